"""The report of all rounds: how reward, perplexity and length change from round to round."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rrhf_fast.evaluate.caution import cautions
from rrhf_fast.evaluate.measures import Estimate
from rrhf_fast.evaluate.plot import MEASURES, SHARES, spread
from rrhf_fast.evaluate.report import (
    TITLES,
    extremes,
    facts_of,
    notes_of,
    side_by_side,
    str_of,
)
from rrhf_fast.evaluate.run import BASELINE, MODEL, Side, read_side
from rrhf_fast.stages import page
from rrhf_fast.stages.cards import counted
from rrhf_fast.stages.figure import finish, new_figure
from rrhf_fast.stages.files import read_json, write_rows
from rrhf_fast.stages.terminal import Table


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


def write_rounds(folder: Path, records: list[dict], about: Mapping) -> tuple[Table, list[str]]:
    """Write rounds.jsonl, rounds.png and report.html; returns the table and the notes for the
    terminal. `about`: what the page says of the run."""
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
    table, last = rounds_table(records), records[-1]["round"]
    sides = _sides(folder, last)
    notes = cautions(records[0], records[-1], "in round 0", len(sides[MODEL].prompts))
    prompts = counted(len(sides[MODEL].prompts), "held-out prompt")
    lead = f"Rounds 0 ({about['model']} before training) to {last}, on {prompts} of "
    parts = [
        page.paragraph(f"{lead}{about['eval_data']}, {about['date']}.", "lead"),
        *notes_of(notes),
        page.picture(folder / "rounds.png", _ALT),
        page.heading("Measures by round, with 95 % intervals over prompts"),
        page.figures(table, "measures by round"),
        *extremes(f"Best and worst samples of round {last}", sides[MODEL]),
        page.heading(f"Samples of the same prompts: round 0 (baseline) and {last} (model)"),
        page.texts(side_by_side(sides), "samples"),
        *facts_of(about),
    ]
    title = f"RRHF, {counted(len(records) - 1, 'round')}, from {about['model']}"
    page.write_page(folder / "report.html", title, parts)
    return table, notes


def _sides(folder: Path, last: int) -> dict[str, Side]:
    """The samples of round 0 and the last one, where both have some."""
    rounds = {BASELINE: 0, MODEL: last}
    sides = {
        name: read_side(folder / f"round-{number}" / "evaluation" / "scored.jsonl", MODEL)
        for name, number in rounds.items()
    }
    total = len(sides[MODEL].prompts)
    keep = [i for i in range(total) if all(len(side.rewards[i]) for side in sides.values())]
    return {name: side.pick(keep) for name, side in sides.items()}


def rounds_table(records: list[dict]) -> Table:
    """A table with one column per round."""
    names = [name for name in TITLES if any(name in record for record in records)]
    head = ["", *(f"round {record['round']}" for record in records)]
    rows = [
        [TITLES[name], *(str_of(record[name]) if name in record else "" for record in records)]
        for name in names
    ]
    return head, rows


_ALT = (
    "Plots by round, with intervals: reward, perplexity under the reference, share of distinct "
    "samples, length, share cut off, and ranking accuracy if measured. The table below has the "
    "figures."
)


def plot_rounds(records: list[dict], path: Path) -> None:
    """Plot the measures of `MEASURES`; one point per round."""
    figure = new_figure(15, 8)
    axes = list(figure.subplots(2, 3).flat)
    names = [name for name in MEASURES if any(name in record for record in records)]
    for axis, name in zip(axes, names, strict=False):
        measured = [record for record in records if name in record]
        numbers, values = [r["round"] for r in measured], [r[name] for r in measured]
        style = {"fmt": "o-", "markersize": 7, "capsize": 5, "color": "C0"}
        label = "value and 95 % interval over prompts"
        middle = [value.value for value in values]
        axis.errorbar(numbers, middle, spread(values), label=label, **style)
        title, unit = MEASURES[name]
        axis.set(title=title, xlabel="round", ylabel=unit)
        axis.locator_params(axis="x", integer=True)
        if name in SHARES:
            axis.set_ylim(-0.02, 1.02)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    finish(figure, axes[: len(names)], path)
