"""From rows to the first optimizer step, by the number of rows: cold, and with a filled cache.

Each run is a command of its own, whose processes are watched from outside. The tokenizer alone, on
the same texts and in as many processes, is what tokenising is compared with.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.results import Save, no_save, recorded
from rrhf_fast import demo
from rrhf_fast.model.decoder import load_tokenizer

ROWS = {
    "smoke": [200, 1_000],
    "paper": [1_000, 10_000, 100_000, 500_000, 1_000_000],
    "full": [1_000, 10_000, 100_000, 500_000, 1_000_000],
}
NUM_RESPONSES, TOKENS = 6, 66  # of a response
COLD, CACHED = "cold", "cached"
# Rows at most that the tokenizer alone reads, and the most for which it is timed again each round.
_ALONE = 20_000


def run(*, preset: str, device: str, rounds: int, save: Save = no_save) -> dict:
    """Train one step of the demo's model on drawn rows, without and with their tokens in the
    cache."""
    cores = len(os.sched_getaffinity(0))
    figures = {"model": "the demo's", "processes": cores, "cases": []}
    with tempfile.TemporaryDirectory(prefix="rows-") as name:
        folder = Path(name)
        for count in ROWS[preset]:
            case = {"rows": count}
            figures["cases"].append(case)
            with recorded(case):
                case |= _case(folder, count, cores)
            save(figures)
    return figures


def _case(folder: Path, count: int, cores: int) -> dict:
    file, cache = folder / f"{count}.jsonl", folder / "cache"
    tokens = _write(file, count)
    alone = _alone(file, min(count, _ALONE), cores) * max(1, count / _ALONE)
    case = {"bytes": file.stat().st_size, "tokens": tokens, "tokenizer_alone_seconds": alone}
    case |= {kind: _first_step(file, cache, folder / "out") for kind in (COLD, CACHED)}
    case["cache_bytes"] = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    shutil.rmtree(cache)
    file.unlink()
    return case


def _write(file: Path, count: int) -> int:
    """Draw rows of words of the demo's responses; returns their tokens, prompts included."""
    tokenizer, draw = load_tokenizer(str(demo.MODEL_DIR)), random.Random(count)
    rows = [json.loads(line) for line in demo.TRAIN_FILE.open()]
    words = " ".join(text for row in rows for text in row["responses"]).split()

    def text(num_words: int) -> str:
        start = draw.randrange(len(words) - num_words)
        return " ".join(words[start : start + num_words])

    sample = [" " + text(1000) for _ in range(20)]
    per_word = (
        sum(map(len, tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]))
        / 20_000
    )
    response_words, prompt_words = round((TOKENS - 1) / per_word), round(60 / per_word)
    with file.open("w") as out:
        for number in range(count):
            responses = [" " + text(response_words) for _ in range(NUM_RESPONSES)]
            prompt = f"{number}: {text(prompt_words)}"
            scores = [draw.random() for _ in responses]
            row = {"prompt": prompt, "responses": responses, "scores": scores}
            out.write(json.dumps(row) + "\n")
    return round(count * (NUM_RESPONSES * TOKENS + 60))


def _first_step(file: Path, cache: Path, out: Path) -> dict:
    """Run the command for one step; returns the seconds to its end of the step, and the peak memory
    of the largest process and of its workers."""
    shutil.rmtree(out, ignore_errors=True)
    options = {"model_name_or_path": demo.MODEL_DIR, "train_data": file, "output_dir": out}
    options |= {"max_steps": 1, "train_batch_size": 8, "data_cache_dir": cache}
    command = [sys.executable, "-m", "rrhf_fast.train"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    log = file.with_suffix(".log")
    start, peaks, seconds = time.perf_counter(), {}, None
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peaks |= _peaks(process.pid)
            metrics = out / "metrics.jsonl"
            if seconds is None and metrics.exists() and '"step": 1' in metrics.read_text():
                seconds = time.perf_counter() - start
            time.sleep(0.05)
    if process.returncode or seconds is None:
        raise RuntimeError(f"training failed: {log.read_text()[-500:]}")
    own, match = peaks.pop(process.pid), re.search(r"tokenised in ([\d.]+) s", log.read_text())
    return {
        "first_step_seconds": seconds,
        "tokenise_seconds": float(match[1]) if match else None,
        "peak_bytes": own,
        "worker_peak_bytes": max(peaks.values(), default=0),
    }


def _peaks(pid: int) -> dict[int, int]:
    """Peak memory, by /proc, of a process and of its children; shared pages count in each."""
    peaks = {}
    for child in [pid, *_children(pid)]:
        try:
            text = Path(f"/proc/{child}/status").read_text()
        except OSError:  # it has ended
            continue
        if "VmHWM:" in text:
            peaks[child] = int(text.split("VmHWM:")[1].split()[0]) * 1024
    return peaks


def _children(pid: int) -> Iterator[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        yield from (int(child) for t in tasks for child in (t / "children").read_text().split())
    except OSError:
        return


def _alone(file: Path, count: int, cores: int) -> float:
    """Seconds of the tokenizer alone on the texts of `count` rows, in one process per core."""
    with file.open() as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    parts = [rows[start : start + 256] for start in range(0, len(rows), 256)]
    texts = [[t for row in part for t in (row["prompt"], *row["responses"])] for part in parts]
    with ProcessPoolExecutor(cores, get_context("spawn"), initializer=_load) as pool:
        list(pool.map(_encode, texts[:cores]))  # starts them
        start = time.perf_counter()
        list(pool.map(_encode, texts))
        return time.perf_counter() - start


def _load() -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = load_tokenizer(str(demo.MODEL_DIR))


def _encode(texts: list[str]) -> int:
    return len(_tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def table(figures: dict) -> str:
    """Seconds to the first step and peak memory by rows."""
    lines = [
        f"{figures['processes']} processes tokenise; GiB of the process that trains, and of the "
        "largest that tokenises",
        f"{'rows':>9} {'cold, s':>9} {'GiB':>6} {'worker':>6} {'cached, s':>9} {'GiB':>6} "
        f"{'tokenise, s':>11} {'alone, s':>9} {'ratio':>6} {'cache, MiB':>10}",
    ]
    for case in figures["cases"]:
        if "problem" in case:
            lines.append(f"{case['rows']:9,} {case['problem']}")
            continue
        cold, cached = case[COLD], case[CACHED]
        ratio = cold["tokenise_seconds"] / case["tokenizer_alone_seconds"]
        lines.append(
            f"{case['rows']:9,} {cold['first_step_seconds']:9.1f} "
            f"{cold['peak_bytes'] / 2**30:6.2f} {cold['worker_peak_bytes'] / 2**30:6.2f} "
            f"{cached['first_step_seconds']:9.1f} {cached['peak_bytes'] / 2**30:6.2f} "
            f"{cold['tokenise_seconds']:11.1f} "
            f"{case['tokenizer_alone_seconds']:9.1f} {ratio:6.2f} "
            f"{case['cache_bytes'] / 2**20:10.0f}"
        )
    return "\n".join(lines)


def plot(figures: dict, path: Path) -> None:
    """Seconds and memory by rows, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [case for case in figures["cases"] if "problem" not in case]
    rows = [case["rows"] for case in cases]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, color in ((COLD, "C0"), (CACHED, "C2")):
        seconds = [case[kind]["first_step_seconds"] for case in cases]
        left.plot(rows, seconds, "o-", color=color, label=f"to the first step, {kind}")
        memory = [case[kind]["peak_bytes"] / 2**30 for case in cases]
        right.plot(rows, memory, "o-", color=color, label=f"{kind}")
    alone = [case["tokenizer_alone_seconds"] for case in cases]
    left.plot(rows, alone, "s--", color="0.5", label="the tokenizer alone")
    workers = [case[COLD]["worker_peak_bytes"] / 2**30 for case in cases]
    right.plot(rows, workers, "s--", color="0.5", label="a process that tokenises")
    left.set(xscale="log", yscale="log", xlabel="rows", ylabel="s", title="Seconds")
    right.set(xscale="log", xlabel="rows", ylabel="GiB", title="Peak memory per process")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{NUM_RESPONSES} responses of {TOKENS} tokens per row")
    figure.savefig(path, dpi=120)
    plt.close(figure)
