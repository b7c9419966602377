"""Write docs/speed.md, and the README's table on speed, from the figures in benchmarks/results.

python benchmarks/readme.py            # rewrite both
python benchmarks/readme.py --check    # exit 1 if one does not match the figures
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
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
    parts = [
        _gpu_steps(on_gpu("step")),
        _gpu_head(on_gpu("kernels")),
        _step(pandalm),
        _workloads([pandalm, vicuna, read("step-paper")]),
        _memory(read("memory-paper")),
        _active(read("active-paper")),
        _scaling(read("scaling-paper")),
        _kernel(read("kernel-paper")),
    ]
    return "\n".join(parts)


def _sound(result: dict) -> dict:
    if "problem" in result:
        raise ValueError(f"figures with a problem are not published: {result['problem']}")
    return result


def _step(figures: dict) -> str:
    (case,) = figures["cases"]
    ways = case["contenders"]
    rows = [
        [
            name,
            f"{way['tokens']:,}",
            f"{way['queries_per_second']:.2f}",
            f"{way['times_released']['median']:.2f}",
        ]
        for name, way in ways.items()
    ]
    worst = max(way["gradient_error"] for way in ways.values())
    table = _table(["", "tokens encoded", "queries/s", "times the released method"], rows)
    return f"""\
Loss and gradient of {case["queries"]} queries, spread by size over the human-judged rows of PandaLM
(`{case["workload"]}`), {case["model"]}, {_plain(case["dtype"])}, medians of
{figures["options"]["rounds"]} interleaved rounds ({_machine(figures)}). The released method pads k
rows per query, repeats the prompt in each, and takes a log-softmax over the whole vocabulary. The
rows after rrhf_fast change one thing each. On the two shortest queries every gradient is within
{worst:.0e} of float64. The model is HuggingFaceTB/{case["model"]}; the rows are the test set of
WeOpenML/PandaLM, and below lm-sys/FastChat's GPT-4 reviews, brought into the format above.

{table}

{_command(figures)}
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
    modes = dict.fromkeys(case["activation_checkpointing"] for case in figures["cases"])
    shares = list(dict.fromkeys(case["active_fraction"] for case in figures["cases"]))
    rows = []
    for mode in modes:
        cells = {
            case["active_fraction"]: case
            for case in figures["cases"]
            if case["activation_checkpointing"] == mode
        }
        cells = [
            f"{_range(cells[share]['speedup'])}, auto takes {cells[share]['auto']}"
            for share in shares
        ]
        rows.append([mode, *cells])
    return f"""\
`--active_set auto` scores a step's responses first and runs the backward on the part of the tokens
that has a gradient, where that is less work. Times as fast as the whole backward, by that part
({figures["model"]} shape, {figures["workload"]}; {_machine(figures)}):

{_table(["`--activation_checkpointing`", *(f"{share:.0%}" for share in shares)], rows)}

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
    names = list(figures["cases"][0]["contenders"])
    rows = [
        [f"{case['fraction']:.0%}", *(f"{c['ms']:,.0f}" for c in case["contenders"].values())]
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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def _range(ratio: dict) -> str:
    return "{median:.2f} ({min:.2f} to {max:.2f})".format(**ratio)


def _named(workload: str) -> str:
    names = {"pandalm_human": "PandaLM rows", "vicuna_bench_gpt4": "Vicuna rows"}
    return names.get(workload, f"drawn: {workload}")


def _machine(figures: dict) -> str:
    env = figures["environment"]
    device = env["processor"] if env["device"] == "cpu" else env["device"]
    threads = f", {env['threads']} threads" if env["device"] == "cpu" else ""
    return f"{device}{threads}, torch {env['torch']}, {env['date']}"


def _command(figures: dict) -> str:
    options = dict(figures["options"])
    if "data" in options:
        options.pop("preset")  # unused for real rows
    words = [f"--{name} {value}" for name, value in options.items()]
    return "\n".join(
        ["```bash", " ".join(["python benchmarks/run.py", figures["case"], *words]), "```"]
    )


def _plain(dtype: str) -> str:
    return dtype.removeprefix("torch.")


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
