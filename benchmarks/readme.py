"""Write the README's section on speed from the figures in benchmarks/results.

python benchmarks/readme.py            # rewrite the section
python benchmarks/readme.py --check    # exit 1 if it is not what the figures say
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- made by python benchmarks/readme.py: do not edit -->\n"
END = "<!-- end of what is made -->\n"
STEP, HEAD = "step-smollm2-pandalm_human-cpu", "head-cpu"


def speed_section(results: Path = RESULTS) -> str:
    """The section in Markdown, from the JSON files of two benchmarks."""
    step, head = (json.loads((results / f"{name}.json").read_text()) for name in (STEP, HEAD))
    return "\n".join([_step(step), _head(head)])


def _step(figures: dict) -> str:
    (case,) = figures["cases"]
    contenders = case["contenders"]
    released = contenders["released method"]
    rows = [
        f"| {name} | {c['tokens']:,} | {c['queries_per_second']:.2f} | "
        f"{c['queries_per_second'] / released['queries_per_second']:.2f} |"
        for name, c in contenders.items()
    ]
    worst = max(c["gradient_error"] for c in contenders.values())
    low, high = case["speedup"]["min"], case["speedup"]["max"]
    return f"""\
Loss and gradient of {case["queries"]} queries spread over `{case["workload"]}`, {case["model"]},
{_plain(case["dtype"])}, medians of {len(released["seconds"])} interleaved rounds
({_machine(figures)}).
The released method pads k rows a query, repeats the prompt in each, and
takes a log-softmax over the whole vocabulary; from "one query a pack" on, one thing at a time is
taken from rrhf_fast. Every gradient is within {worst:.0e} of float64.

| | tokens encoded | queries/s | times the released method |
|---|---|---|---|
{chr(10).join(rows)}

rrhf_fast over the released method by round: {low:.2f} to {high:.2f}.

```bash
{_command("step", figures)}
```
"""


def _head(figures: dict) -> str:
    rows = []
    for case in figures["cases"]:
        cells = [f"{c['ms']:,.0f}" for c in case["contenders"].values()]
        rows.append(f"| {case['fraction']:.0%} | {' | '.join(cells)} |")
    edges, hidden, vocab = figures["cases"][0]["shape"]
    names = list(figures["cases"][0]["contenders"])
    return f"""\
The head alone, {edges:,} predictions, hidden size {hidden:,}, vocabulary {vocab:,}, milliseconds
forward and backward, by the share of predictions that has a gradient. One sweep makes the logits
once; two steps make them again in the backward, and so keep nothing between the two.

| with a gradient | {" | ".join(names)} |
|---|{"---|" * len(names)}
{chr(10).join(rows)}

```bash
{_command("head", figures)}
```
"""


def _machine(figures: dict) -> str:
    env = figures["environment"]
    device = env["processor"] if env["device"] == "cpu" else env["device"]
    threads = f", {env['threads']} threads" if env["device"] == "cpu" else ""
    return f"{device}{threads}, torch {env['torch']}, {env['date']}"


def _command(case: str, figures: dict) -> str:
    options = {name: value for name, value in figures["options"].items() if value is not None}
    if "data" in options:
        options.pop("preset", None)  # real rows need none
    words = [f"--{name} {value}" for name, value in options.items()]
    return " ".join([f"python benchmarks/run.py {case}", *words])


def _plain(dtype: str) -> str:
    return dtype.removeprefix("torch.")


def main() -> int:
    """Rewrite or check; returns the exit code."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = before + BEGIN + "\n" + speed_section() + "\n" + END + after
    if "--check" in sys.argv[1:]:
        return int(made != text)
    readme.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
