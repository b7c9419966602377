"""The report of an evaluation: tables for the terminal, a plot, and a self-contained HTML page."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from rrhf_fast.data.messages import transcript
from rrhf_fast.evaluate.measures import Estimate
from rrhf_fast.evaluate.plot import plot_evaluation
from rrhf_fast.evaluate.run import BASELINE, MODEL, Evaluation, Side
from rrhf_fast.stages import page
from rrhf_fast.stages.cards import counted
from rrhf_fast.stages.terminal import Table

TITLES = {
    "reward": "mean reward of a sample",
    "best_of_n": "reward of the best sample",
    "perplexity": "perplexity under the reference",
    "ranking_accuracy": "ranking accuracy of p",
    "distinct": "share of distinct samples",
    "tokens": "tokens per sample, mean",
    "tokens_median": "tokens per sample, median",
    "tokens_p95": "tokens per sample, 95th percentile",
    "cut_off": "share cut off by the limit",
    "length_reward_correlation": "correlation of length and reward",
    "reward_gain": "gain in reward",
    "win": "samples that win",
    "tie": "samples that tie",
    "lose": "samples that lose",
}
# What a page calls what it says of a run, where that is not its name.
_FACTS = {
    "eval_data": "held-out data",
    "ranking_data": "data for ranking accuracy",
    "num_samples": "samples per prompt",
    "max_new_tokens": "tokens per sample at most",
    "date": "date of the samples",
}
# Prompts shown with a sample of each side, and best and worst samples shown.
SHOWN, EXTREMES = 12, 6


def is_reported(folder: Path) -> bool:
    """Whether `evaluate` and `write_report` have written all their files, the last of which is the
    report: a kill may come between any two."""
    names = ("by_prompt.json", "evaluation.json", "evaluation.png", "report.html")
    return all((folder / name).exists() for name in names)


def write_report(evaluation: Evaluation, folder: Path) -> tuple[list[Table], list[str]]:
    """Write evaluation.png and report.html; returns the tables and the notes for the terminal."""
    plot_evaluation(evaluation, folder / "evaluation.png")
    tables, about = evaluation_tables(evaluation), evaluation.about
    prompts = counted(evaluation.prompts, "held-out prompt")
    compared = f"{about['model']} against {about['baseline']}" if evaluation.baseline else ""
    lead = f"{compared or about['model']}, on {prompts} of {about['data']}, {about['date']}."
    side = evaluation.sides[MODEL]
    parts = [
        page.paragraph(lead, "lead"),
        *notes_of(evaluation.warnings),
        page.picture(folder / "evaluation.png", _alt(evaluation)),
        page.heading("Measures, with 95 % intervals over prompts"),
        *(page.figures(table, "measures") for table in tables),
        *extremes("Best and worst samples", side),
        page.heading("Samples of the same prompts"),
        page.texts(side_by_side(evaluation.sides), "samples"),
        *facts_of(about),
    ]
    page.write_page(folder / "report.html", f"Evaluation of {about['model']}", parts)
    return tables, evaluation.warnings


def evaluation_tables(evaluation: Evaluation) -> list[Table]:
    """The measures of each side, and those of the model against its baseline."""
    sides = [evaluation.model, *([evaluation.baseline] if evaluation.baseline else [])]
    dropped = f" ({evaluation.dropped} unscored)" if evaluation.dropped else ""
    head = [f"{evaluation.prompts} prompts{dropped}", MODEL, BASELINE][: len(sides) + 1]
    names = [name for name in TITLES if any(name in side for side in sides)]
    rows = [
        [TITLES[name], *(str_of(side[name]) if name in side else "" for side in sides)]
        for name in names
    ]
    tables = [(head, rows)]
    if evaluation.comparison:
        rows = [[TITLES[name], str_of(value)] for name, value in evaluation.comparison.items()]
        tables.append(([f"{MODEL} against {BASELINE}", "value [95 % interval]"], rows))
    return tables


def str_of(estimate: Estimate) -> str:
    """The value, with its interval if there is one."""
    return f"{estimate.value:.3f}" if np.isnan(estimate.low) else str(estimate)


def side_by_side(sides: dict[str, Side]) -> Table:
    """The first sample of each side for the same prompts, the baseline's first."""
    names = [name for name in (BASELINE, MODEL) if name in sides]
    rows = [
        [transcript(sides[MODEL].prompts[i])] + [_sample(sides[name], i, 0) for name in names]
        for i in range(min(SHOWN, len(sides[MODEL].prompts)))
    ]
    return ["prompt", *(f"{name} (reward)" for name in names)], rows


def extremes(title: str, side: Side) -> list[str]:
    """The section of a page that shows the best samples beside the worst, one per prompt."""
    by_best = sorted(range(len(side.rewards)), key=lambda i: -side.rewards[i].max())
    by_worst = sorted(range(len(side.rewards)), key=lambda i: side.rewards[i].min())
    rows = [
        [
            transcript(side.prompts[best]),
            _sample(side, best, int(side.rewards[best].argmax())),
            transcript(side.prompts[worst]),
            _sample(side, worst, int(side.rewards[worst].argmin())),
        ]
        for best, worst in zip(by_best[:EXTREMES], by_worst[:EXTREMES], strict=True)
    ]
    head = ["prompt", "best sample (reward)", "prompt", "worst sample (reward)"]
    return [page.heading(title), page.texts((head, rows), title)]


def notes_of(warnings: list[str]) -> list[str]:
    """What a page says before anything else."""
    return [page.paragraph(text, "warning") for text in warnings]


def facts_of(about: Mapping) -> list[str]:
    """The sections of a page on the run behind it."""
    pairs = {
        _FACTS.get(name, name): str(value) for name, value in about.items() if name != "options"
    }
    parts = [page.heading("This run"), page.facts(pairs)]
    if about["options"]:
        options = yaml.safe_dump(about["options"], sort_keys=False, allow_unicode=True)
        title = "Options that differ from the defaults"
        parts += [page.heading(title), page.code(options)]
    return parts


def _sample(side: Side, prompt: int, i: int) -> str:
    return f"{side.responses[prompt][i]}\n({side.rewards[prompt][i]:.3f})"


def _alt(evaluation: Evaluation) -> str:
    whose = "model and baseline" if evaluation.baseline else "the model"
    return (
        f"Plots of {whose}: reward, perplexity if measured, share of distinct samples and length, "
        "with intervals; the spread of rewards and lengths; best of n; reward against length. The "
        "table below has the figures."
    )
