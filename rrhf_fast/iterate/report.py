"""The report of all rounds: how reward, perplexity and length change from round to round."""

from pathlib import Path

import numpy as np

from rrhf_fast.evaluate.measures import Estimate
from rrhf_fast.evaluate.report import (
    TITLES,
    Table,
    as_text,
    save_figure,
    side_by_side,
    str_of,
    write_page,
)
from rrhf_fast.evaluate.run import BASELINE, MODEL, read_side
from rrhf_fast.stages.figure import new_figure
from rrhf_fast.stages.files import read_json, write_rows

HACKING = (
    "warning: reward and perplexity both rose beyond their intervals, a sign of reward hacking. "
    "Read the samples; kl_coef keeps the model closer to its reference."
)
COLLAPSE = (
    "warning: fewer of a prompt's samples are distinct than before training, beyond the intervals: "
    "the model's answers collapse. Read the samples; fewer steps, a lower learning rate or kl_coef "
    "keep more of them."
)


def read_round(evaluation: Path, number: int) -> dict:
    """Read {"round": number, measure: Estimate} from a round's evaluation.json. Raises ValueError
    if it is damaged."""
    file = evaluation / "evaluation.json"
    record = read_json(file)
    try:
        measures = record["model"] | record["comparison"]
        return {"round": number} | {
            name: Estimate(*(float("nan") if value is None else value for value in parts.values()))
            for name, parts in measures.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged (expected the measures of an evaluation)") from error


def write_rounds(folder: Path, records: list[dict]) -> str:
    """Write rounds.jsonl, rounds.png and report.html; returns the table for the terminal."""
    write_rows(
        folder / "rounds.jsonl",
        [
            {
                name: value
                if name == "round"
                else [float(x) if np.isfinite(x) else None for x in vars(value).values()]
                for name, value in record.items()
            }
            for record in records
        ],
    )
    plot_rounds(records, folder / "rounds.png")
    table = rounds_table(records)
    warnings = [HACKING] * is_hacking(records) + [COLLAPSE] * is_collapsing(records)
    sides = {
        BASELINE: read_side(folder / "round-0" / "evaluation" / "scored.jsonl", MODEL),
        MODEL: read_side(
            folder / f"round-{records[-1]['round']}" / "evaluation" / "scored.jsonl", MODEL
        ),
    }
    write_page(
        folder / "report.html",
        f"RRHF, {len(records) - 1} rounds",
        folder / "rounds.png",
        [table],
        side_by_side(sides),
        warnings,
    )
    return "\n\n".join([as_text(table), *warnings])


def rounds_table(records: list[dict]) -> Table:
    """A table with one column per round."""
    names = [name for name in TITLES if any(name in record for record in records)]
    head = ["", *(f"round {record['round']}" for record in records)]
    rows = [
        [TITLES[name], *(str_of(record[name]) if name in record else "" for record in records)]
        for name in names
    ]
    return head, rows


def is_hacking(records: list[dict]) -> bool:
    """Whether reward and perplexity of the last round both exceed round 0's beyond the
    intervals."""
    first, last = records[0], records[-1]
    return all(last[name].low > first[name].high for name in ("reward", "perplexity"))


def is_collapsing(records: list[dict]) -> bool:
    """Whether the share of distinct samples of the last round is below round 0's beyond the
    intervals."""
    return records[-1]["distinct"].high < records[0]["distinct"].low


# What is plotted, in which color.
PANELS = {
    "reward": "C3",
    "perplexity": "C0",
    "distinct": "C4",
    "ranking_accuracy": "C2",
    "tokens": "C1",
    "cut_off": "C5",
}


def plot_rounds(records: list[dict], path: Path) -> None:
    """Plot these measures; one point per round."""
    figure = new_figure(15, 7)
    axes = figure.subplots(2, 3)
    for axis, (name, color) in zip(axes.flat, PANELS.items(), strict=True):
        measured = [record for record in records if name in record]
        numbers, values = [r["round"] for r in measured], [r[name] for r in measured]
        middle = np.array([value.value for value in values])
        error = [middle - [value.low for value in values], [v.high for v in values] - middle]
        axis.errorbar(numbers, middle, yerr=np.maximum(error, 0), fmt="o-", color=color, capsize=4)
        axis.set(title=f"{TITLES[name].capitalize()}, 95 % interval", xlabel="round")
        axis.locator_params(axis="x", integer=True)
    save_figure(figure, axes.flat, path)
