"""The first run on a GPU: what is correct, what is fast, and why not, part by part.

python benchmarks/gpu_first_run.py correctness --out DIR   # head, attention, compiled layers, tests
python benchmarks/gpu_first_run.py kernels --out DIR       # head and attention against their peers
python benchmarks/gpu_first_run.py step --out DIR          # whole steps by size of packs; profile
python benchmarks/gpu_first_run.py report DIR              # the figures as Markdown

Each command takes at most ten minutes and rewrites DIR/<command>.json after every part; --only
selects parts, so that several checks can share one GPU, each command with its own DIR. A part that
fails, hangs or crashes is recorded, and the next one runs. If the head is wrong, the run ends; if
FlexAttention or the compiler fails, later parts continue without it. --device cpu runs the same
parts at toy sizes.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.isolated import (
    FAILED,
    INTERRUPTED,
    KILLED,
    NOT_RUN,
    OK,
    TIMED_OUT,
    Part,
    run_part,
)  # fmt: skip

# Limit for all parts of a command; the rest of ten minutes is for work between parts.
SECONDS = 570
# Modules that everything needs, and the wheels of those that only some parts need.
NEEDED = ["torch", "triton", "transformers", "numpy", "safetensors", "matplotlib", "tqdm"]
WHEELS = {
    "datasets": "datasets", "dill": "dill", "multiprocess": "multiprocess",
    "yaml": "pyyaml", "docstring_parser": "docstring-parser",
    "annotated_types": "annotated-types", "torchao": "torchao",
    "vaderSentiment": "vaderSentiment", "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy", "pytest": "pytest", "xdist": "pytest-xdist",
    "hypothesis": "hypothesis",
}  # fmt: skip

PARTS = "benchmarks.gpu_parts:"
MODEL, PACK = "Llama-3.2-1B", 16_384
# The machine comes first in every command: figures are compared with its ceilings.
BEST = Part("machine", PARTS + "best", 40)
OURS = ["rrhf_fast triton, two steps", "rrhf_fast triton, one sweep"]
ON_CPU = ["rrhf_fast torch, two steps", "rrhf_fast torch, one sweep"]
WORKSPACES = [512, 2048]
PEERS = ["plain torch", "Liger", "cut-cross-entropy, exact"]
SWEEPS = [f"rrhf_fast triton, one sweep, {size} MiB" for size in WORKSPACES]
TINY_HEAD = {"shapes": [[512, 64, 1024]]}


def _head(name: str, shape: Sequence[int], seconds: float) -> Part:
    options = {"preset": "paper", "rounds": 5, "shapes": [shape], "fractions": [1.0, 0.5]}
    options |= {"workspaces_mb": WORKSPACES, "only": [*PEERS, *OURS[:1], *SWEEPS]}
    toy = TINY_HEAD | {"rounds": 1, "workspaces_mb": [1], "only": None}
    return Part(f"head {name}", "benchmarks.kernel:run", seconds, options, toy)


def _attention(shape: Sequence[int]) -> Part:
    options = {"preset": "paper", "rounds": 5, "shapes": [shape], "tokens": PACK, "decoder": False}
    options["only"] = ["forest_flex", "forest_flex, lengths masked", "forest_flash", "unpacked"]
    toy = {"rounds": 1, "shapes": [[16, 8, 3]], "tokens": 128, "only": None}
    name = "attention {}/{} k={}".format(*shape)
    return Part(name, "benchmarks.attention:run", 95, options, toy)


def _backend(name: str, seconds: float, **more) -> Part:
    options = {"shapes": [[512, 64, 6]], "tokens": 4096, "only": [name]}
    toy = {"shapes": [[16, 8, 3]], "tokens": 128, "only": ["forest_sdpa"]}
    return Part(f"attention {name}", PARTS + "attend", seconds, options, toy, **more)


def _tests(name: str, seconds: float, *more: str) -> Part:
    options = {"paths": [f"tests/gpu/test_{name}.py", *more], "workers": 8}
    return Part(f"tests {name}", PARTS + "tests", seconds, options, {"workers": 0})


COMMANDS = {
    "correctness": [
        BEST,
        Part(
            "head", PARTS + "head", 70,
            {"shapes": [[4096, 1024, 128_256], [4096, 1024, 50_257]], "fractions": [1.0, 0.5],
             "softcaps": [None, 30.0], "only": OURS},
            TINY_HEAD | {"only": ON_CPU}, stops=True,
        ),
        _backend("forest_flex", 60, instead={"attn_implementation": "forest_flash"}),
        _backend("forest_flash", 40),
        _backend("forest_sdpa", 30),
        Part(
            "compiled layers", PARTS + "engine", 70,
            {"shapes": ["two layers of Llama-3-8B"], "num_queries": 8, "engine_options": {}},
            {"shapes": ["tiny"], "num_queries": 2}, instead={"compile": False},
        ),
        _tests("kernels", 60),
        _tests("attention", 130),
        _tests("ranks", 70, "tests/gpu/test_optimizer.py", "tests/train/test_profile.py"),
    ],
    "kernels": [
        BEST,
        _head("Llama 3 8B", [8192, 4096, 128_256], 90),
        _head("Llama 3.2 1B", [16_384, 2048, 128_256], 90),
        _head("Gemma 2 2B", [8192, 2304, 256_000], 80),
        Part(
            "tiles", PARTS + "tiles", 80,
            {"edges": 8192, "hidden_size": 4096, "vocab_size": 128_256,
             "sizes": [[128, 256, 64, 8, 4], [128, 256, 64, 8, 3], [256, 128, 64, 8, 4],
                       [128, 128, 64, 8, 4], [128, 128, 64, 4, 4], [128, 128, 128, 8, 3]]},
            {"edges": 9, "hidden_size": 16, "vocab_size": 70, "sizes": [[64, 64, 16, 8, 2]]},
        ),
        _attention([128, 64, 6]),
        _attention([1024, 128, 8]),
    ],
    "step": [
        BEST,
        Part(
            "packs", PARTS + "by_size", 110,
            {"shape": MODEL, "sizes": [2048, 8192, 16_384, 32_768], "rounds": 3,
             "engine_options": {}},
            {"shape": "tiny", "sizes": [256, 512], "rounds": 1},
        ),
        Part(
            "contenders", PARTS + "contenders", 160,
            {"preset": "paper", "rounds": 3, "workloads": ["paper"], "max_tokens": PACK,
             "only": ["released method", "padded batches", "packed, prompts repeated",
                      "rrhf_fast"],
             "engine_options": {}},
            {"preset": "smoke", "rounds": 1, "max_tokens": 512, "num_queries": 2},
        ),
        Part(
            "long prompts", PARTS + "contenders", 80,
            {"preset": "paper", "rounds": 3, "workloads": ["long prompts"], "max_tokens": PACK,
             "only": ["packed, prompts repeated", "rrhf_fast"], "engine_options": {}},
            {"preset": "smoke", "rounds": 1, "max_tokens": 2048, "num_queries": 1},
        ),
        Part(
            "memory", PARTS + "peaks", 100,
            {"preset": "paper", "rounds": 1, "max_tokens_per_pack": PACK,
             "ways": ["released method", "rrhf_fast", "checkpointed layers"]},
            {"preset": "smoke", "max_tokens_per_pack": 512, "num_queries": 1,
             "ways": ["released method", "rrhf_fast"]},
        ),
        Part(
            "profile", PARTS + "profile", 80,
            {"preset": "paper", "max_tokens": PACK, "num_steps": 3, "folder": "profile",
             "engine_options": {}},
            {"preset": "smoke", "max_tokens": 512, "num_steps": 1, "num_queries": 2},
        ),
    ],
}  # fmt: skip


def run_parts(parts: Iterable[Part], results: dict, out: Path) -> None:
    """Run parts in turn, and after each write `results`, with all "parts" so far, to
    `out`/<command>.json."""
    from benchmarks.results import write_json

    device, env = results["device"], dict(os.environ, PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")
    if device == "cpu":
        env["TRITON_INTERPRET"] = "1"  # kernels run without a GPU
    records, stopped = results.setdefault("parts", {}), ""
    for part in parts:
        if stopped:
            records[part.name] = {"status": NOT_RUN, "detail": stopped}
        else:
            options = dict(part.options) | (part.toy if device == "cpu" else {})
            options |= {"device": device} if "tests" not in part.function else {}
            if "engine_options" in options:
                options["engine_options"] = dict(results["engine_options"])
            if "folder" in options:
                options["folder"] = str(out / options["folder"])
            record = records[part.name] = run_part(part, options, out, env)
            # A hanging part saves nothing; a slow one does.
            hung = record["status"] == TIMED_OUT and not record.get("figures")
            if hung or record["status"] in (FAILED, KILLED):
                results["engine_options"] |= part.instead
                stopped = f"{part.name}: {record['status']}" if part.stops else ""
            if record["status"] == INTERRUPTED:
                stopped = INTERRUPTED
        write_json(out / f"{results['command']}.json", results)
        record = records[part.name]
        print(f"{part.name}: {record['status']} {record['detail']}".rstrip(), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if every part is ok, 1 if not, 2 if nothing can run."""
    options = _parser().parse_args(arguments)
    if options.command == "report":
        print(report(options.folder))
        return 0
    missing = [wheel for module, wheel in WHEELS.items() if find_spec(module) is None]
    lacking = [module for module in NEEDED if find_spec(module) is None]
    if not lacking and options.device == "cuda":
        import torch

        lacking = [] if torch.cuda.is_available() else ["a CUDA GPU"]
    if missing:
        print(f"missing wheels: {', '.join(missing)}", flush=True)
    if lacking:
        print(f"error: nothing runs without {', '.join(lacking)}", file=sys.stderr)
        return 2
    return _run(options, missing)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
        command.add_argument("--attention", help="the engine's; default: from correctness.json")
        command.add_argument("--eager", action="store_true", help="do not compile layers")
        command.add_argument("--only", nargs="+", metavar="PART", help="names or prefixes")
        command.add_argument("--patience", type=float, default=1.0, help="factor on parts' limits")
    commands.add_parser("report").add_argument("folder", type=Path)
    return parser


def _run(options: argparse.Namespace, missing: list[str]) -> int:
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "command": options.command,
        "device": options.device,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "missing_wheels": missing,
        "engine_options": _engine_options(options, out),
    }
    # Like Ctrl-C: end the part and write its figures so far.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_parts(_parts(options), results, out)
    finally:
        signal.signal(signal.SIGTERM, before)
    return int(any(record["status"] != OK for record in results["parts"].values()))


def _parts(options: argparse.Namespace) -> list[Part]:
    wanted = [""] if options.only is None else options.only
    parts = [p for p in COMMANDS[options.command] if p.name.startswith(tuple(wanted))]
    return [replace(part, seconds=part.seconds * options.patience) for part in parts]


def _engine_options(options: argparse.Namespace, out: Path) -> dict:
    """The requested options, else those that worked in `correctness`."""
    asked = {} if options.attention is None else {"attn_implementation": options.attention}
    asked |= {"compile": False} if options.eager else {}
    earlier = out / "correctness.json"
    if options.command == "correctness" or not earlier.exists():
        return asked
    return json.loads(earlier.read_text())["engine_options"] | asked


# Figures of a result that the report shows.
SHOWN = (
    "device", "driver", "torch", "triton", "tflops", "copy_gb_per_second", "ms", "over_products",
    "speedup", "tokens_per_second", "mfu", "times_released", "graphs", "peak_gib", "peak_extra_mb",
    "extra_bytes", "passed", "skipped", "gradient_error", "problem",
)  # fmt: skip


def report(folder: Path) -> str:
    """One Markdown table per command's file."""
    texts = []
    for file in sorted(folder.glob("*.json")):
        results = json.loads(file.read_text())
        if "parts" not in results:
            continue
        lines = [f"## {results['command']}, {results['date']}", ""]
        lines += ["| part | result | seconds | figures |", "|---|---|--:|---|"]
        for name, record in results["parts"].items():
            shown = "<br>".join(_lines(record.get("figures"), ""))
            status = f"{record['status']} {record['detail']}".strip()
            lines.append(f"| {name} | {status} | {record.get('seconds', 0):.0f} | {shown} |")
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def _lines(figures: object, place: str) -> list[str]:
    """The figures in `SHOWN`, each with its path."""
    if isinstance(figures, list):
        return [line for one in figures for line in _lines(one, place + _label(one))]
    if not isinstance(figures, dict):
        return []
    shown = {name: figures[name] for name in SHOWN if figures.get(name) is not None}
    own = ", ".join(f"{name} {_short(value)}" for name, value in shown.items())
    inner = [_lines(one, f"{place}{name} ") for name, one in figures.items() if name not in SHOWN]
    return ([f"{place}{own}"] if own else []) + [line for lines in inner for line in lines]


def _label(case: object) -> str:
    """A label that distinguishes a case from the others in its list."""
    names = ("shape", "softcap", "fraction", "prompt/response/k", "workload", "max_tokens_per_pack")
    known = case if isinstance(case, dict) else {}
    return " ".join(f"{name} {known[name]}" for name in names if name in known) + " "


def _short(value: object) -> str:
    value = value["median"] if isinstance(value, dict) else value
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
