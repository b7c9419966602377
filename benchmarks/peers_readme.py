"""The published section on peers, from the figures of `benchmarks/run.py peers`."""

from pathlib import Path
from statistics import median

from benchmarks.markdown import command, machine, named, spread, table

STEP_PARTS = ("gradient_seconds", "seconds")


def measured_peers(results: Path, model: str) -> list[str]:
    """The names of what was measured against peers on a CPU: of real rows in float32, then what is
    in other dtypes or drawn."""
    names = [path.stem.removesuffix("-cpu") for path in results.glob("peers-*-cpu.json")]
    return sorted(names, key=lambda name: (model not in name, len(name)))


def peers_section(figures: dict) -> str:
    """Others' trainers, from their own processes."""
    parts = [_case(case) for case in figures["cases"]]
    case = figures["cases"][0]
    weights = f" (weights: {figures['weights']})" if "weights" in figures else ""
    return f"""\
Others' trainers on the same tokens and weights, {case["model"]}{weights}, {named(case["data"])},
{figures["dtype"]}, medians and ranges of {figures["options"]["rounds"]} rounds in which each, in a
process of its own, takes one optimizer step in turn ({machine(figures)}). Rows are sorted by
length, so that batches have little padding; gradients are those of all rows, and a step adds their
norm and AdamW. Before, each trainer's loss and gradient were compared with those of the first row.
"Times ours" is time relative to that row's. The reference's forward is that of all rows; where it
is done once before all steps it is in no other column.

{chr(10).join(parts)}
{command(figures)}
"""


def _case(case: dict) -> str:
    """One table, and what its rows compute. A peer that was not there is named with the reason."""
    rows, notes = [], []
    for name, way in case["contenders"].items():
        setting = f"; {way['setting']}" if "setting" in way else ""
        notes.append(f"* {_versioned(name, way)}: {way['computes']}{setting}")
        if "seconds" not in way:
            notes[-1] = f"* {name}: {way.get('problem', 'not timed')}"
            continue
        reference = "none"
        if "reference_seconds" in way:
            where = "in the step" if "reference_in_step" in way else "once before"
            reference = f"{way['reference_seconds']:.2f} s, {where}"
            if "without_reference_over_engine" in way:
                without = way["without_reference_over_engine"]["median"]
                reference += f" (gradients without it: {without:.2f})"
        differs = way.get("gradient_difference")
        each = [f"{median(way[s]) / case['rows'] * 1e3:,.0f}" for s in STEP_PARTS]
        rows.append(
            [
                name,
                f"{way['tokens']:,}",
                *each,
                reference,
                "" if differs is None else f"{differs:.0e}",
                *(
                    spread(way[f"{part}_over_engine"]) if f"{part}_over_engine" in way else ""
                    for part in STEP_PARTS
                ),
            ]
        )
    what = "the best and the worst response" if case["workload"] == "pairs" else "all responses"
    header = [f"{case['rows']} rows, {what} of each", "tokens encoded", "ms per row, gradients"]
    header += ["ms per row, steps", "reference forward", "gradient differs by"]
    header += ["gradients, times ours", "steps, times ours"]
    return "\n".join([table(header, rows), "", *notes, ""])


def _versioned(name: str, way: dict) -> str:
    return f"{name} ({way['version']})" if "version" in way else name
