"""Write docs/speed.md, and the README's table on speed, from the figures in benchmarks/results.

python benchmarks/readme.py            # rewrite both
python benchmarks/readme.py --check    # exit 1 if one does not match the figures
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.markdown import command as _command
from benchmarks.markdown import machine as _machine
from benchmarks.markdown import named as _named
from benchmarks.markdown import plain as _plain
from benchmarks.markdown import spread as _range
from benchmarks.markdown import table as _table
from benchmarks.peers_readme import measured_peers, peers_section

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- made by python benchmarks/readme.py: do not edit -->\n"
END = "<!-- end of what is made -->\n"
MODEL = "SmolLM2-135M-Instruct"
# Units of the rows in the table of slopes.
UNITS = {
    "k": ("response", 1),
    "vocab_size": ("1,000 vocabulary entries", 1000),
    "prompt": ("prompt token", 1),
    "response": ("token in each response", 1),
}


def speed_section(results: Path = RESULTS) -> str:
    """The section in Markdown, from the JSON files of several cases."""

    def read(name: str) -> dict:
        return json.loads((results / f"{name}-cpu.json").read_text(), object_hook=_sound)

    def on_gpu(name: str) -> dict:
        return json.loads((results / "gpu" / f"{name}.json").read_text())["parts"]

    pandalm, vicuna = (
        read(f"step-{MODEL}-{rows}") for rows in ("pandalm_human", "vicuna_bench_gpt4")
    )
    name = f"step-{MODEL}-pandalm_human-bfloat16"
    in_bfloat16 = [read(name)] if (results / f"{name}-cpu.json").exists() else []
    parts = [
        _gpu_steps(on_gpu("step")),
        _gpu_head(on_gpu("kernels")),
        _step(pandalm),
        *map(_step_again, in_bfloat16),
        *(peers_section(read(name)) for name in measured_peers(results, MODEL)),
        _workloads([pandalm, vicuna, read("step-paper")]),
        _memory(read("memory-paper")),
        _active(read("active-paper")),
        _pairs(read("pairs-paper")),
        _scaling(read("scaling-paper")),
        _kernel(read("kernel-paper")),
        _rows(read("rows-paper")),
    ]
    return "\n".join(parts)


def _sound(result: dict) -> dict:
    if "problem" in result and not result["problem"].startswith("not installed"):
        raise ValueError(f"figures with a problem are not published: {result['problem']}")
    return result


def _step(figures: dict) -> str:
    (case,) = figures["cases"]
    worst = max(way["gradient_error"] for way in case["contenders"].values())
    weights = f" The model's weights: {figures['weights']}." if "weights" in figures else ""
    return f"""\
Loss and gradient of {case["queries"]} queries, spread by size over the human-judged rows of PandaLM
(`{case["workload"]}`), {case["model"]}, {_plain(case["dtype"])}, {_rounds(figures)}
({_machine(figures)}). The released method pads k
rows per query, repeats the prompt in each, and takes a log-softmax over the whole vocabulary. The
rows after rrhf_fast change one thing each. On the two shortest queries every gradient is within
{worst:.0e} of float64. The model is HuggingFaceTB/{case["model"]}; the rows are the test set of
WeOpenML/PandaLM, and below lm-sys/FastChat's GPT-4 reviews, brought into
[our format](data.md).{weights}

{_contenders(case)}

{_limit(case)}{_command(figures)}
"""


def _step_again(figures: dict) -> str:
    """The same rows in another dtype."""
    (case,) = figures["cases"]
    worst = max(way["gradient_error"] for way in case["contenders"].values())
    return f"""\
The same in {_plain(case["dtype"])}, {_rounds(figures)} ({_machine(figures)}); gradients within
{worst:.2f} of float64:

{_contenders(case)}

{_limit(case)}{_command(figures)}
"""


def _contenders(case: dict) -> str:
    """A row per contender, with those columns that the figures hold."""
    columns = {
        "tokens encoded": lambda way: f"{way['tokens']:,}",
        "queries/s": lambda way: f"{way['queries_per_second']:.2f}",
        "times the released method": lambda way: _range(way["times_released"]),
    }
    if "limit" in case:
        columns["of the limit"] = lambda way: f"{way['of_limit']:.2f}"
        columns["whole steps with AdamW"] = lambda way: _range(way["steps_times_released"])
    ways = case["contenders"].items()
    rows = [[name, *(show(way) for show in columns.values())] for name, way in ways]
    return _table(["", *columns], rows)


def _rounds(figures: dict) -> str:
    """How the rounds of a case of steps were made."""
    (case,) = figures["cases"]
    if "rounds" not in case:
        return f"medians of {figures['options']['rounds']} interleaved rounds"
    count = case["rounds"]["counted"]
    return f"medians and ranges of {count} interleaved rounds after one to warm up"


def _limit(case: dict) -> str:
    """What is the least that a step takes, and where the rest goes."""
    if "limit" not in case:
        return ""
    limit, took = case["limit"], case["breakdown"]
    seconds, tokens, edges = limit["seconds"], limit["tokens"], limit["edges"]
    engine = case["contenders"]["rrhf_fast"]
    rows = [
        [
            name,
            f"{spent:.2f}",
            f"{spent / took['seconds']:.0%}",
            f"{took['at_peak'][name]:.2f}" if name in took["at_peak"] else "",
        ]
        for name, spent in sorted(took["groups"].items(), key=lambda item: -item[1])
    ]
    table = _table(["where a whole step goes", "s", "share", "s at the peak"], rows)
    return f"""\
The limit is the time of the matrix products that must be computed, at the best speed that any
product that occurs, or a large square one, reaches there,
{limit["peak_tflops"] * 1e3:,.0f} GFLOP/s: the forward of all
{tokens["forward"]:,} tokens and {edges["forward"]:,} predictions, and the backward of the
{tokens["backward"]:,} and {edges["backward"]:,} that lead to a gradient, in all
{limit["total_seconds"]:.2f} s (decoder {seconds["decoder"]:.2f}, head {seconds["head"]:.2f},
attention {seconds["attention"]:.2f}). With each product at the best speed of its own shape it is
{limit["own_speed_seconds"]:.2f} s. rrhf_fast takes {median(engine["seconds"]):.2f} s, and
{median(engine["update_seconds"]):.2f} more for AdamW. Under the profiler:

{table}

"""


def _gpu_steps(parts: dict) -> str:
    machine, sizes = parts["machine"]["figures"], parts["packs"]["figures"]
    (tried,) = parts["contenders"]["figures"].values()
    (case,) = tried["cases"]
    rows = [
        [
            name,
            f"{way['tokens']:,}",
            f"{way['queries_per_second']:.0f}",
            f"{way['tokens_per_second']:,.0f}",
            f"{way['mfu']:.0%}",
            _range(_sound(way)["times_released"]),
        ]
        for name, way in case["contenders"].items()
    ]
    worst = max(way["gradient_error"] for way in case["contenders"].values())
    header = ["", "tokens encoded", "queries/s", "tokens/s", "MFU", "times the released method"]
    by_size = [
        [
            f"{one['max_tokens_per_pack']:,}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['mfu']:.0%}",
            f"{one['ms_per_pack']:.0f}",
            f"{one['peak_gib']:.0f}",
        ]
        for one in sizes["cases"]
    ]
    size_header = ["tokens per pack", "tokens/s", "MFU", "ms per pack", "GiB at the peak"]
    return f"""\
On one {machine["device"]} (torch {machine["torch"]}, triton {machine["triton"]},
{machine["date"]}): loss and gradient of {case["queries"]} queries of the paper's lengths (a prompt
of 128 tokens, 6 responses of 64), {case["model"]} shape, {_plain(case["dtype"])}, packs of
{tried["max_tokens_per_pack"]:,} tokens, medians of 3 interleaved rounds. MFU is the share of the
{machine["tflops"]:.0f} TFLOP/s that a large matrix product reaches there. On two queries
the gradients of all are within {worst:.2f} of float64, as far as bfloat16 goes.

{_table(header, rows)}

By the size of packs, after {sizes["cases"][-1]["graphs"]} graphs in all; at 2,048 the GPU waits for
the host:

{_table(size_header, by_size)}

```bash
python benchmarks/gpu_first_run.py step --only machine packs contenders --out benchmarks/results/gpu
```
"""


def _gpu_head(parts: dict) -> str:
    (cases,) = [part["figures"]["cases"] for part in parts.values()]
    edges, hidden, vocab = cases[0]["shape"]
    rows = [
        [
            name,
            *(_head_cell(_sound(case["contenders"][name])) for case in cases),
            f"{way['peak_extra_mb'] / 1024:.1f}",
        ]
        for name, way in cases[0]["contenders"].items()
    ]
    shares = [f"ms, {case['fraction']:.0%} with a gradient" for case in cases]
    return f"""\
The head alone on the same machine, forward and backward of {edges:,} predictions, hidden size
{hidden:,}, vocabulary {vocab:,}; in brackets as a multiple of what the three matrix products take:

{_table(["", *shares, "GiB beyond inputs"], rows)}

```bash
python benchmarks/gpu_first_run.py kernels --only "head Llama 3 8B" --out benchmarks/results/gpu
```
"""


def _head_cell(way: dict) -> str:
    return f"{way['ms']:.1f} ({way['over_products']['median']:.2f})"


def _workloads(every: Sequence[dict]) -> str:
    rows = [
        [
            f"{case['model']}, {_named(case['workload'])}",
            str(case["queries"]),
            _range(case["contenders"]["rrhf_fast"]["times_released"]),
            _range(case["over_repeated"]),
        ]
        for figures in every
        for case in figures["cases"]
    ]
    header = ["", "queries", "times the released method", "times packed with repeated prompts"]
    return f"""\
The speed-up depends on the lengths, since it comes from padding and repeated prompts:

{_table(header, rows)}

{_command(every[-1])}
"""


def _rows(figures: dict) -> str:
    rows = []
    for case in map(_sound, figures["cases"]):
        cold, cached, alone = case["cold"], case["cached"], case["tokenizer_alone_seconds"]
        rows.append(
            [
                f"{case['rows']:,}",
                f"{cold['first_step_seconds']:.1f}",
                f"{cached['first_step_seconds']:.1f}",
                f"{cold['tokenise_seconds']:.1f}",
                f"{cold['tokenise_seconds'] / alone:.2f}",
                *(
                    f"{number / 2**30:.2f}"
                    for number in (
                        cold["peak_bytes"],
                        cold["worker_peak_bytes"],
                        cached["peak_bytes"],
                        case["cache_bytes"],
                    )
                ),
            ]
        )
    header = ["rows", "s to the first step", "again", "s to tokenise", "times the tokenizer alone"]
    header += ["GiB", "GiB of a worker", "GiB again", "GiB on the disk"]
    return f"""\
From the command to the first optimizer step, rows of a prompt of about 60 tokens with 6 responses
of 66, the demo's model, {figures["processes"]} processes that tokenise; again with the rows in the
cache. Memory is the peak per process, shared pages included ({_machine(figures)}). The tokenizer
alone reads the same texts in as many processes (those of 20,000 rows, scaled up where there are
more).

{_table(header, rows)}

![time and memory by the number of rows](../benchmarks/results/rows-paper-cpu.png)

{_command(figures)}
"""


def _memory(figures: dict) -> str:
    (case,) = figures["cases"]
    rows = [
        [
            name,
            f"{way['extra_bytes'] / 2**20:,.0f}",
            f"{way['extra_of_released']:.0%}",
            f"{way['total_bytes'] / 2**20:,.0f}",
            f"{way['of_released']:.0%}",
        ]
        for name, way in case["ways"].items()
    ]
    header = ["", "MiB beyond weights and gradients", "of released", "MiB with them", "of released"]
    return f"""\
Peak memory of one loss and gradient, {case["queries"]} queries of {case["workload"]},
{case["model"]} shape, each way in a process of its own. The released method takes one query at a
time; rrhf_fast takes as many as `--max_tokens_per_pack` allows, here both:

{_table(header, rows)}

{_command(figures)}
"""


def _active(figures: dict) -> str:
    ways = [way for way in figures["cases"][0]["speedups"] if way != "whole"]
    rows = [
        [
            f"{case['active_fraction']:.0%}",
            case["activation_checkpointing"],
            *(_range(case["speedups"][way]) for way in ways),
            case["auto"],
        ]
        for case in figures["cases"]
    ]
    header = ["tokens with a gradient", "`--activation_checkpointing`", *ways, "auto takes"]
    return f"""\
`--active_set auto` spends no backward on tokens without a gradient: within linear layers, or by a
second pass on the others alone. Both ways, times as fast as the whole backward
({figures["model"]} shape, {figures["workload"]}; {_machine(figures)}):

{_table(header, rows)}

{_command(figures)}
"""


def _pairs(figures: dict) -> str:
    (case,) = figures["cases"]
    rows = [[name, _range(times)] for name, times in case["times_hinge"].items()]
    return f"""\
Other losses of a pair, and log-probs of a reference model that packs carry, cost what the paper's
hinge does. Time of a step's loss and gradient without the active set, relative to the hinge
({figures["model"]} shape, {figures["workload"]}, {case["queries"]} queries; {_machine(figures)}):

{_table(["loss of a pair", "time"], rows)}

{_command(figures)}
"""


def _scaling(figures: dict) -> str:
    """The marginal costs, from the slopes of the sweeps."""
    rows = []
    for sweep in figures["sweeps"]:
        if sweep["axis"] not in UNITS:
            continue
        unit, of = UNITS[sweep["axis"]]
        fixed = ", ".join(f"{name} {n}" for name, n in sweep["lengths"].items() if n is not None)
        slopes = [series["slopes"] for series in sweep["series"].values()]
        times, memory = (
            [f"{slope[name] * of * scale:,.2f}" for slope in slopes]
            for name, scale in (("seconds", 1e3), ("extra_bytes", 1 / 1024**2))
        )
        cells = [f"{ms} ms, {mib} MiB" for ms, mib in zip(times, memory, strict=True)]
        rows.append([f"{unit} ({fixed})", *cells])
    ways = list(figures["sweeps"][0]["series"])
    return f"""\
Marginal costs, from the slopes of
[sweeps](../benchmarks/results/scaling-paper-cpu.png): time and memory, beyond weights and
gradients, of one query's loss and gradient ({figures["model"]} shape, hidden size
{figures["hidden_size"]}; {_machine(figures)}):

{_table(["one more", *ways], rows)}

{_command(figures)}
"""


def _kernel(figures: dict) -> str:
    edges, hidden, vocab = figures["cases"][0]["shape"]
    names = [n for n, way in figures["cases"][0]["contenders"].items() if "ms" in way]
    rows = [
        [f"{case['fraction']:.0%}", *(f"{case['contenders'][n]['ms']:,.0f}" for n in names)]
        for case in figures["cases"]
    ]
    return f"""\
The head alone, {edges:,} predictions, hidden size {hidden:,}, vocabulary {vocab:,}, milliseconds
forward and backward, by the share of predictions that have a gradient. One sweep makes the logits
once; two steps make them again in the backward, and so keep nothing between the two
({_machine(figures)}).

{_table(["with a gradient", *names], rows)}

{_command(figures)}
"""


def headline(results: Path = RESULTS) -> str:
    """The README's sentence and picture: the engine and what others do, on a GPU."""
    parts, case = _gpu_case(results)
    machine = parts["machine"]["figures"]
    ways = case["contenders"]
    times, mfu = _sound(ways["rrhf_fast"])["times_released"], ways["rrhf_fast"]["mfu"]
    return f"""\
Loss and gradient on one {machine["device"]}, {case["model"]} shape, bfloat16, prompts of 128 tokens
with 6 responses of 64: {times["median"]:.1f} times the queries per second of the released method
and {case["over_repeated"]["median"]:.1f} times those of packs that repeat the prompt, at
{mfu:.0%} MFU ([all figures and their commands](docs/speed.md)).

![queries per second](benchmarks/results/gpu/step.png)
"""


def _gpu_case(results: Path) -> tuple[dict, dict]:
    """All parts of the step's figures on a GPU, and its one case."""
    parts = json.loads((results / "gpu" / "step.json").read_text())["parts"]
    (tried,) = parts["contenders"]["figures"].values()
    (case,) = tried["cases"]
    return parts, case


def main() -> int:
    """Rewrite or check; returns the exit code."""
    made = {ROOT / "README.md": headline(), ROOT / "docs" / "speed.md": speed_section()}
    wrong = False
    for page, section in made.items():
        text = page.read_text()
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        new = f"{before}{BEGIN}\n{section}\n{END}{after}"
        wrong |= new != text
        if "--check" not in sys.argv[1:]:
            page.write_text(new)
    if "--check" in sys.argv[1:]:
        return int(wrong)
    from benchmarks import step  # late: it loads PyTorch

    _, case = _gpu_case(RESULTS)
    step.plot({"cases": [case]}, RESULTS / "gpu" / "step.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
