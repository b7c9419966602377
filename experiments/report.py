"""Turn finished stages into results/: figures, a page and a plot per experiment, and an index."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.recipe import CONFIGS, Arm, Experiment, Stage, arms_of, as_list, at, title_of
from experiments.runner import all_stages, read_result
from experiments.statistics import Table, best_column, estimate, holm, seeds_gaps, seeds_test
from rrhf_fast.evaluate.measures import Estimate
from rrhf_fast.stages.figure import save_figure
from rrhf_fast.stages.files import write_text


def collect(experiment: Experiment, work: Path) -> dict:
    """The figures of a finished experiment: by prompt, with intervals and tests."""
    names = experiment.text["measures"]
    prompts: list[list[str]] = []  # distinct lists
    arms = []
    for arm in experiment.arms:
        record = {"name": arm.name, "series": arm.series, "x": arm.x, "skipped": arm.skipped}
        record |= {"by_prompt": _by_prompt(arm, names, work, prompts), "measures": {}}
        if "reward@best" in names:
            _add_best(record, _temperatures(arm, experiment), prompts)
        if "cost" in experiment.text:
            record["seconds"] = _seconds(arm, work)
        arms.append(record)
    figures = {
        "name": experiment.name,
        "title": experiment.text["title"],
        "question": experiment.text["question"],
        "seeds": experiment.seeds,
        "baseline": as_list(experiment.text["baseline"])[0],
        "environment": _environment(experiment.results(), work),
        "measures": names,
        "cost": experiment.text.get("cost"),
        "x": experiment.text.get("x"),
        "prompts": prompts,
        "arms": arms,
    }
    _measure(figures, {arm.name: experiment.baselines_of(arm) for arm in experiment.arms})
    return figures


def update(figures: dict, experiment: Experiment) -> None:
    """Compare the arms of earlier figures anew if the recipe now compares others."""
    arms = {arm["name"]: arm for arm in figures["arms"] if arm["measures"]}
    wanted = {
        arm.name: [name for name in experiment.baselines_of(arm) if name in arms]
        for arm in experiment.arms
        if arm.name in arms
    }
    if any(sorted(_baselines(arms[name])) != sorted(names) for name, names in wanted.items()):
        _measure(figures, {name: wanted.get(name, []) for name in arms})


def _by_prompt(arm: Arm, names: list[str], work: Path, prompts: list[list[str]]) -> dict:
    """{measure: {"prompts": [an index into `prompts` per seed], "numerators": [[...] per seed],
    "denominators": likewise, or None for ones}}. Adds missing lists to `prompts`."""
    tables: dict[str, dict] = {}
    for results in arm.results.values():
        measures = {}
        for stage, temperature in results:
            found = read_result(stage, work)["measures"]
            measures |= {at(name, temperature): value for name, value in found.items()}
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


def _temperatures(arm: Arm, experiment: Experiment) -> list[float]:
    """The temperatures among which an arm has to choose: those of the recipe, without greedy if its
    answer is the best of several samples."""
    stages = [stage for results in arm.results.values() for stage, _ in results]
    of_samples = any(stage.kind == "best_of" for stage in stages)
    return [t for t in experiment.text["temperatures"] if t > 0 or not of_samples]


def _add_best(arm: dict, temperatures: list[float], prompts: list[list[str]]) -> None:
    """Add the measure reward@best, composed of the others, and how often each was chosen. An arm
    that lacks any of the temperatures gets none: the others have a wider choice."""
    if any(at("reward", t) not in arm["by_prompt"] for t in temperatures):
        return
    lists = [arm["by_prompt"][at("reward", t)] for t in temperatures]
    if any(other["prompts"] != lists[0]["prompts"] for other in lists):
        raise ValueError(f"{arm['name']}: reward: measured on other prompts at some temperature")
    rows = [prompts[number] for number in lists[0]["prompts"]]
    width = max(map(len, rows))
    halves = np.array(
        [[int(p[-1], 16) % 2 == 1 for p in row + ["0"] * (width - len(row))] for row in rows]
    )
    values = [_padded(table["numerators"], width) for table in lists]
    chosen = best_column(values, halves)
    best = np.choose(chosen, values)
    arm["by_prompt"]["reward@best"] = {
        "prompts": lists[0]["prompts"],
        "numerators": [row[: len(kept)].tolist() for row, kept in zip(best, rows, strict=True)],
        "denominators": None,
    }
    used = np.isfinite(best)
    shares = {f"{t:g}": float((chosen[used] == i).mean()) for i, t in enumerate(temperatures)}
    arm["best_temperature"] = {t: round(share, 3) for t, share in shares.items() if share > 0}


def _padded(rows: list[list[float]], width: int) -> np.ndarray:
    return np.array([row + [np.nan] * (width - len(row)) for row in rows])


def _seconds(arm: Arm, work: Path) -> dict[str, float]:
    """CPU seconds per seed of the stages behind an arm, by kind, without its evaluation."""
    totals: dict[str, float] = {}
    for results in arm.results.values():
        for stage in all_stages(needed for result, _ in results for needed in result.inputs):
            if stage.kind not in ("select", "make", "export", "evaluate", "round"):
                seconds = read_result(stage, work).get("seconds", float("nan"))
                totals[stage.kind] = totals.get(stage.kind, 0.0) + seconds / len(arm.results)
    return {kind: round(seconds, 2) for kind, seconds in totals.items()}


def _measure(figures: dict, baselines: dict[str, list[str]]) -> None:
    tables = {
        arm["name"]: {name: _table(figures, arm, name) for name in arm["by_prompt"]}
        for arm in figures["arms"]
    }
    arms = {arm["name"]: arm for arm in figures["arms"]}
    for name in figures["measures"]:
        compared, p_values, pairs = [], [], []
        for arm in figures["arms"]:
            table = tables[arm["name"]].get(name)
            if table is None or not table.denominators.any():
                continue
            record = arm["measures"][name] = _record(estimate(table)) | {"against": []}
            for against in baselines[arm["name"]]:
                baseline = tables[against].get(name)
                if baseline is None:
                    continue
                sides = [arms[key]["by_prompt"][name]["prompts"] for key in (arm["name"], against)]
                if sides[0] != sides[1]:
                    problem = f"{name}: measured on other prompts than {against}"
                    raise ValueError(f"{figures['name']}: {arm['name']}: {problem}")
                compared.append({"arm": against, **_record(estimate(table, baseline))})
                record["against"].append(compared[-1])
                p_values.append(seeds_test(table, baseline))
                pairs.append(frozenset((table.numerators.tobytes(), baseline.numerators.tobytes())))
        # Arms that are the same at each seed test nothing. A test counts once: two names may stand
        # for the same models, and two rows for both directions of one comparison.
        tested = {pair: p for pair, p in zip(pairs, p_values, strict=True) if p < 1}
        adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
        for pair, record in zip(pairs, compared, strict=True):
            p = adjusted.get(pair, 1.0)
            record["p"] = round(p, 5)
            # Both must agree: the test over seeds, the interval over seeds and prompts.
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
    transform = {"transform": _perplexity} if name.startswith("perplexity") else {}
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
        "paired by seed and prompt; **bold** ones differ from 0 by their interval and by a paired "
        "t-test whose units are seeds (p < 0.05 after Holm's correction, over the distinct rows of "
        "a column; the intervals are not corrected). Seeds share the initial model "
        "and, where a set of rows is nearly used up, most rows: other ones may differ more.",
        *_on_temperatures(figures),
        *([f"Left out: {'; '.join(skipped)}."] if skipped else []),
        *_not_run(figures, text),
        f"Made by `python -m experiments {given}{roots}` ({versions}, {device}) from "
        f"{recipe}; [every prompt's figures]({name}.json).",
    ]
    return "\n\n".join(parts) + "\n"


def _not_run(figures: dict, text: dict) -> list[str]:
    """What the recipe asks for and older figures lack."""
    have = {arm["name"] for arm in figures["arms"]}
    arms = [name for name, *_ in arms_of(text) if name not in have]
    lacking = []
    if "reward@best" in text["measures"] and "reward@best" not in figures["measures"]:
        lacking.append("were taken at T = 1 only, where a gain may be one in certainty alone")
    if len(figures["seeds"]) < len(text["seeds"]):
        lacking.append(f"have {len(figures['seeds'])} of {len(text['seeds'])} seeds")
    if arms:
        lacking.append(f"lack the arms {'; '.join(arms)}")
    if not lacking:
        return []
    return [f"**The recipe asks for more than these figures: they {', and '.join(lacking)}.**"]


def _on_temperatures(figures: dict) -> list[str]:
    shares = {arm["name"]: arm.get("best_temperature") for arm in figures["arms"]}
    chosen = {name: max(found, key=found.get) for name, found in shares.items() if found}
    if not chosen:
        return []
    usual = max(chosen.values(), key=list(chosen.values()).count)
    others = [f"{name} (T = {t})" for name, t in chosen.items() if t != usual]
    return [
        "The same trained model answers at each temperature T: four samples per prompt, or the one "
        "greedy answer (T = 0). At T = 1 a method also gains by only making its samples more "
        "certain, which a lower temperature does for free: compare at equal T, or each at its "
        "best. The best T is chosen per seed and half of the prompts, on the other seeds and the "
        f"other half; most often it is T = {usual}"
        + (f", except for {'; '.join(others)}." if others else " for all.")
    ]


def _tables(figures: dict) -> list[str]:
    """The values, the differences if there are any, and the cost."""
    names = figures["measures"]
    titles = [title_of(name, names) for name in names]
    arms = [arm for arm in figures["arms"] if arm["measures"]]
    values = [[arm["name"], *(_cell(arm["measures"].get(name)) for name in names)] for arm in arms]
    tables = [_markdown(["", *titles], values)]
    differences = [
        [f"{arm['name']} − {against}", *(_cell(_against(arm, name, against)) for name in names)]
        for arm in arms
        for against in _baselines(arm)
    ]
    if differences:
        tables.append(_markdown(["difference", *titles], differences))
    if (cost := figures.get("cost")) and any(
        arm["name"] == cost["over"] and cost["measure"] in arm["by_prompt"] for arm in arms
    ):
        tables.append(_cost_table(figures, arms))
    return tables


def _baselines(arm: dict) -> list[str]:
    """The arms that this one is compared with."""
    found = [against["arm"] for record in arm["measures"].values() for against in record["against"]]
    return list(dict.fromkeys(found))


def _against(arm: dict, measure: str, baseline: str) -> dict | None:
    compared = arm["measures"].get(measure, {}).get("against", [])
    return next((record for record in compared if record["arm"] == baseline), None)


def _cost_table(figures: dict, arms: list[dict]) -> str:
    """CPU seconds per seed, and per reward gained over the arm that cost nothing."""
    measure, by_name = figures["cost"]["measure"], {arm["name"]: arm for arm in arms}
    free = by_name[figures["cost"]["over"]]
    last = {arm["series"]: arm["name"] for arm in arms if arm["series"] is not None}
    shown = [
        arm
        for arm in arms
        if measure in arm["by_prompt"]
        if arm is not free and last.get(arm["series"], arm["name"]) == arm["name"]
    ]
    kinds = list(dict.fromkeys(kind for arm in shown for kind in arm["seconds"]))
    rows = []
    for arm in shown:
        gain = estimate(*(_table(figures, side, measure) for side in (arm, free)))
        total = sum(arm["seconds"].values())
        per_gain = f"{total / gain.value:.1f}" if gain.low > 0 else "no gain shown"
        parts = [f"{arm['seconds'].get(kind, 0):.1f}" for kind in kinds]
        rows.append([arm["name"], *parts, f"{total:.1f}", str(gain), per_gain])
    title = title_of(measure, figures["measures"])
    head = ["CPU seconds per seed", *kinds, "in all", f"gain: {title}", "seconds per reward gained"]
    return _markdown(head, rows)


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
    figure = Figure(figsize=(4.3 * columns + 1, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    shown = list(axes.flat)[: len(names)]
    for axis, name in zip(shown, names, strict=True):
        if curves:
            _curves(axis, arms, name)
            axis.set_xlabel(figures["x"] or "")
        else:
            _dots(axis, arms, name, figures["baseline"])
        axis.set_title(title_of(name, figures["measures"]), fontsize="medium")
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
    dashes = iter((":", "--", "-.", (0, (1, 4))))
    for number, label in enumerate(series):
        here = [arm for arm in arms if arm["series"] == label and name in arm["measures"]]
        if not here:
            continue
        records = [arm["measures"][name] for arm in here]
        values = [record["value"] for record in records]
        if len(here) == 1:
            axis.axhline(values[0], color="gray", linestyle=next(dashes, "-"), label=label)
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
    """One line per failed `check`: {better, than, measure} expects a difference whose interval is
    above 0, as is each seed's own difference; from three seeds on, the test over seeds (p < 0.05)
    replaces the latter. Two seeds leave that test one degree of freedom, so that only a difference
    of 12.7 standard errors would pass, and their interval alone is somewhat too narrow."""
    arms = {arm["name"]: arm for arm in figures["arms"]}
    problems = []
    for check in checks:
        name, sides = check["measure"], [arms.get(check[k]) for k in ("better", "than")]
        expected = f"expected {check['better']} above {check['than']} in {name}"
        if not all(side and name in side["by_prompt"] for side in sides):
            problems.append(f"{figures['name']}: {expected}, found no figures of both")
            continue
        tables = [_table(figures, side, name) for side in sides]
        gain, gaps, p = estimate(*tables), seeds_gaps(*tables), seeds_test(*tables)
        if not gain.low > 0 or not (p < 0.05 if len(gaps) > 2 else (gaps > 0).all()):
            by_seed = " ".join(f"{gap:.3f}" for gap in gaps)
            problems.append(f"{figures['name']}: {expected}, found {gain} (by seed {by_seed})")
    return problems
