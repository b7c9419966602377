"""Turn finished stages into results/: figures, a page and a plot per experiment, and an index."""

import json
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after choosing the backend

from experiments.recipe import CONFIGS, MEASURES, Arm, Experiment, Stage
from experiments.runner import read_result
from experiments.statistics import Table, estimate, holm, swap_test
from rrhf_fast.evaluate.measures import Estimate
from rrhf_fast.evaluate.report import save_figure
from rrhf_fast.stages.files import write_text


def collect(experiment: Experiment, work: Path) -> dict:
    """The figures of a finished experiment: by prompt, with intervals and tests."""
    names = experiment.text["measures"]
    prompts: list[list[str]] = []  # distinct lists
    arms = []
    for arm in experiment.arms:
        record = {"name": arm.name, "series": arm.series, "x": arm.x, "skipped": arm.skipped}
        arms.append(record | {"by_prompt": _by_prompt(arm, names, work, prompts), "measures": {}})
    figures = {
        "name": experiment.name,
        "title": experiment.text["title"],
        "question": experiment.text["question"],
        "seeds": experiment.text["seeds"],
        "baseline": experiment.text["baseline"],
        "environment": _environment(experiment.results(), work),
        "measures": names,
        "x": experiment.text.get("x"),
        "prompts": prompts,
        "arms": arms,
    }
    _measure(figures, {arm.name: experiment.baseline_of(arm) for arm in experiment.arms})
    return figures


def _by_prompt(arm: Arm, names: list[str], work: Path, prompts: list[list[str]]) -> dict:
    """{measure: {"prompts": [an index into `prompts` per seed], "numerators": [[...] per seed],
    "denominators": likewise, or None for ones}}. Adds missing lists to `prompts`."""
    tables: dict[str, dict] = {}
    for stages in arm.results.values():
        measures = {}
        for stage in stages:
            measures |= read_result(stage, work)["measures"]
        for name in names:
            if name not in measures:
                continue
            measure = measures[name]
            if measure["prompts"] not in prompts:
                prompts.append(measure["prompts"])
            lists = tables.setdefault(name, {"prompts": [], "numerators": [], "denominators": []})
            lists["prompts"].append(prompts.index(measure["prompts"]))
            for side in ("numerators", "denominators"):
                lists[side].append([float(f"{value:.6g}") for value in measure[side]])
    for lists in tables.values():
        if all(value == 1 for row in lists["denominators"] for value in row):
            lists["denominators"] = None
    return tables


def _measure(figures: dict, baselines: dict[str, str | None]) -> None:
    tables = {
        arm["name"]: {name: _table(figures, arm, name) for name in arm["by_prompt"]}
        for arm in figures["arms"]
    }
    arms = {arm["name"]: arm for arm in figures["arms"]}
    for name in figures["measures"]:
        compared, p_values = [], []
        for arm in figures["arms"]:
            table = tables[arm["name"]].get(name)
            if table is None or not table.denominators.any():
                continue
            record = arm["measures"][name] = _record(estimate(table))
            against = baselines[arm["name"]]
            baseline = tables[against].get(name) if against else None
            if baseline is not None:
                sides = [arms[key]["by_prompt"][name]["prompts"] for key in (arm["name"], against)]
                if sides[0] != sides[1]:
                    problem = f"{name}: measured on other prompts than {against}"
                    raise ValueError(f"{figures['name']}: {arm['name']}: {problem}")
                record["against"] = {"arm": against, **_record(estimate(table, baseline))}
                compared.append(record["against"])
                p_values.append(swap_test(table, baseline))
        for record, p in zip(compared, holm(p_values), strict=True):
            record["p"] = round(p, 5)
            # Both must agree: the test over prompts, the interval over seeds.
            record["differs"] = p < 0.05 and not record["low"] <= 0 <= record["high"]


def _table(figures: dict, arm: dict, name: str) -> Table:
    """One measure of one arm as a table; prompts that a seed lacks stay 0 / 0."""
    values = arm["by_prompt"][name]
    prompts = [figures["prompts"][number] for number in values["prompts"]]
    columns = {prompt: i for i, prompt in enumerate(sorted({p for row in prompts for p in row}))}
    numerators, denominators = np.zeros((2, len(prompts), len(columns)))
    for seed, row in enumerate(prompts):
        at = [columns[prompt] for prompt in row]
        np.add.at(numerators[seed], at, values["numerators"][seed])
        ones = values["denominators"] is None
        np.add.at(denominators[seed], at, 1.0 if ones else values["denominators"][seed])
    transform = {"transform": _perplexity} if name == "perplexity" else {}
    return Table(numerators, denominators, **transform)


def _perplexity(logp: np.ndarray) -> np.ndarray:
    return np.exp(-logp)


def _record(measured: Estimate) -> dict:
    return {k: float(f"{getattr(measured, k):.6g}") for k in ("value", "low", "high")}


def _environment(stages: Iterable[Stage], work: Path) -> dict[str, str]:
    """Device and library versions of the stages, which may differ if some are older."""
    values_of: dict[str, set[str]] = {}
    for stage in stages:
        for name, value in read_result(stage, work)["environment"].items():
            values_of.setdefault(name, set()).add(value)
    return {name: " and ".join(sorted(values)) for name, values in values_of.items()}


def write_results(figures: dict, text: dict, folder: Path) -> str:
    """Write NAME.json, NAME.md and NAME.png; returns the tables for the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{figures['name']}.json", json.dumps(figures) + "\n")
    plot(figures, folder / f"{figures['name']}.png")
    tables = _tables(figures)
    write_text(folder / f"{figures['name']}.md", _page(figures, text, tables))
    return "\n\n".join(tables)


def _page(figures: dict, text: dict, tables: list[str]) -> str:
    name, environment = figures["name"], dict(figures["environment"])
    device = environment.pop("device", "CPU")
    versions = ", ".join(f"{package} {version}" for package, version in environment.items())
    skipped = [f"{arm['name']} ({arm['skipped']})" for arm in figures["arms"] if arm["skipped"]]
    roots = "".join(f" --{root} DIR" for root in ("models", "data") if f"{{{root}}}" in str(text))
    recipe, given = f"{name}.yaml", f"{name}.yaml"
    if (CONFIGS / recipe).exists():
        recipe, given = f"[{recipe}](../configs/{recipe})", name
    parts = [
        f"# {figures['title']}",
        figures["question"].strip(),
        *([text["reading"].strip()] if text.get("reading") else []),
        f"![{figures['title']}]({name}.png)",
        *tables,
        f"Values are means over {len(figures['seeds'])} seeds and the held-out prompts, with 95 % "
        "intervals over both, which are symmetric and so may exceed a bound. Differences are "
        "paired by seed and prompt; **bold** ones differ from 0 by a paired permutation test over "
        "prompts (p < 0.05 after Holm's correction, over all rows of a column) and by their "
        "interval, which is not corrected for the number of rows. Seeds share the initial model "
        "and, where a set of rows is nearly used up, most rows: other ones may differ more.",
        *([f"Left out: {'; '.join(skipped)}."] if skipped else []),
        f"Made by `python -m experiments {given}{roots}` ({versions}, {device}) from "
        f"{recipe}; [every prompt's figures]({name}.json).",
    ]
    return "\n\n".join(parts) + "\n"


def _tables(figures: dict) -> list[str]:
    """The values, and the differences if there are any."""
    names = figures["measures"]
    arms = [arm for arm in figures["arms"] if arm["measures"]]
    values = [[arm["name"], *(_cell(arm["measures"].get(name)) for name in names)] for arm in arms]
    tables = [_markdown(["", *(MEASURES[name] for name in names)], values)]
    differences = [
        [
            f"{arm['name']} − {against}",
            *(_cell(arm["measures"].get(name, {}).get("against")) for name in names),
        ]
        for arm in arms
        if (against := _against(arm))
    ]
    if differences:
        head = ["difference", *(MEASURES[name] for name in names)]
        tables.append(_markdown(head, differences))
    return tables


def _against(arm: dict) -> str | None:
    names = (record.get("against", {}).get("arm") for record in arm["measures"].values())
    return next(filter(None, names), None)


def _cell(record: dict | None) -> str:
    if record is None:
        return ""
    digits = 2 if max(abs(record[k]) for k in ("value", "low", "high")) >= 10 else 3
    sign = "+" if "p" in record else ""
    value = f"{record['value']:{sign}.{digits}f}"
    value = f"**{value}**" if record.get("differs") else value
    text = f"{value} [{record['low']:.{digits}f}, {record['high']:.{digits}f}]"
    return text + (f" p {record['p']:.4f}" if "p" in record else "")


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose source is aligned too."""
    lines = [head, *rows]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))} |"
        for line in lines
    )


def plot(figures: dict, path: Path) -> None:
    """Draw one panel per measure: arms as dots with intervals, or series as curves over points."""
    names = [n for n in figures["measures"] if any(n in a["measures"] for a in figures["arms"])]
    arms = [arm for arm in figures["arms"] if arm["measures"]]
    curves = all(isinstance(arm["x"], int | float) for arm in arms)
    columns = {1: 1, 2: 2, 4: 2}.get(len(names), 3)
    rows = -(-len(names) // columns)
    height = 3.6 if curves else max(2.2, 1.1 + 0.27 * len(arms))
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4.3 * columns + 1, height * rows),
        layout="constrained",
        squeeze=False,
    )
    shown = list(axes.flat)[: len(names)]
    for axis, name in zip(shown, names, strict=True):
        if curves:
            _curves(axis, arms, name)
            axis.set_xlabel(figures["x"] or "")
        else:
            _dots(axis, arms, name, figures["baseline"])
        axis.set_title(MEASURES[name], fontsize="medium")
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    if curves:  # one for all panels, beside them so that it covers no points
        figure.legend(*_legend(shown), loc="outside right upper", fontsize="small")
    else:
        for axis in axes[:, 1:].flat:
            axis.tick_params(labelleft=False)
    figure.suptitle(figures["title"])
    save_figure(figure, shown, path)


def _dots(axis, arms: list[dict], name: str, baseline: str) -> None:
    series = list(dict.fromkeys(arm["series"] for arm in arms))
    for y, arm in enumerate(arms):
        if record := arm["measures"].get(name):
            style = {"color": f"C{series.index(arm['series'])}", "markersize": 4}
            axis.errorbar(record["value"], y, xerr=_spread([record]), fmt="o", **style)
            if arm["name"] == baseline:
                axis.axvline(record["value"], color="gray", linestyle=":")
    axis.set_yticks(range(len(arms)), [arm["name"] for arm in arms], fontsize="small")
    axis.set_ylim(len(arms) - 0.5, -0.5)


def _curves(axis, arms: list[dict], name: str) -> None:
    """Shift series sideways to part their intervals; a series of one point is drawn as a level."""
    series = list(dict.fromkeys(arm["series"] for arm in arms))
    points = sorted({arm["x"] for arm in arms})
    reach = points[-1] - points[0]
    if len(points) <= 8:
        axis.set_xticks(points)
    for number, label in enumerate(series):
        here = [arm for arm in arms if arm["series"] == label and name in arm["measures"]]
        if not here:
            continue
        records = [arm["measures"][name] for arm in here]
        values = [record["value"] for record in records]
        if len(here) == 1:
            axis.axhline(values[0], color="gray", linestyle=":", label=label)
            low, high = records[0]["low"], records[0]["high"]
            axis.axhspan(low, high, color="gray", alpha=0.15, linewidth=0)
            continue
        shift = (number - len(series) / 2) * 0.005 * reach
        x = [arm["x"] + shift for arm in here]
        style = {"color": f"C{number}", "markersize": 4, "elinewidth": 0.8}
        axis.errorbar(x, values, yerr=_spread(records), fmt="o-", label=label, **style)


def _spread(records: list[dict]) -> list[list[float]]:
    """Distances below and above the values, as matplotlib expects."""
    below = [record["value"] - record["low"] for record in records]
    above = [record["high"] - record["value"] for record in records]
    return [below, above]


def _legend(axes: list) -> tuple[list, list[str]]:
    """Collect every label once and take the labels off the panels."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
            handle.set_label("_")
    return list(handles.values()), list(handles)


def write_index(texts: dict[str, dict], folder: Path) -> None:
    """Write index.md: every experiment with results, its question and its reading."""
    texts = {name: text for name, text in texts.items() if (folder / f"{name}.md").exists()}
    if not texts:
        return
    parts = ["# Does it align?", "Made by `python -m experiments`."]
    for name, text in texts.items():
        parts += [
            f"## [{text['title']}]({name}.md)",
            text["question"].strip(),
            *([text["reading"].strip()] if text.get("reading") else []),
            f"![{text['title']}]({name}.png)",
        ]
    write_text(folder / "index.md", "\n\n".join(parts) + "\n")


def failed_checks(figures: dict, checks: list[dict]) -> list[str]:
    """One line per failed `check`: {better, than, measure} expects a difference above 0 with
    p < 0.05."""
    arms = {arm["name"]: arm for arm in figures["arms"]}
    problems = []
    for check in checks:
        tables = [_table(figures, arms[check[k]], check["measure"]) for k in ("better", "than")]
        gain, p = estimate(*tables), swap_test(*tables)
        if not (gain.value > 0 and p < 0.05):
            expected = f"expected {check['better']} above {check['than']} in {check['measure']}"
            problems.append(f"{figures['name']}: {expected}, found {gain} (p {p:.4f})")
    return problems
