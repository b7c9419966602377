"""Plots: one legend, a unit on every axis, letters of one size; nothing covers a panel."""

import numpy as np
import pytest

from rrhf_fast.data.rows import Draft
from rrhf_fast.evaluate import plot as evaluation_plot
from rrhf_fast.evaluate.measures import Estimate
from rrhf_fast.evaluate.run import Evaluation, Side
from rrhf_fast.iterate import report as rounds
from rrhf_fast.stages import figure as figures
from rrhf_fast.train import plot as training_plot


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written."""
    found, save = [], figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda f, *rest: (found.append(f), save(f, *rest)))
    return found


def estimate(value):
    return Estimate(value, value - 0.1, value + 0.2)


def panels_of(figure, legend):
    """The titles of the panels; checks what all figures share."""
    axes = [axis for axis in figure.axes if axis.get_visible()]
    assert all(axis.get_legend() is None for axis in axes)
    texts = [text.get_text() for one in figure.legends for text in one.get_texts()]
    assert texts == legend and len(figure.legends) == 1
    for axis in axes:
        assert axis.get_title() and axis.get_ylabel(), axis.get_title()
        assert {text.get_fontsize() for text in (axis.title, axis.xaxis.label)} == {14}
    return [axis.get_title() for axis in axes]


def side(seed):
    rng = np.random.default_rng(seed)
    drafts = [Draft(f"{i}?", ["one two", "three"], None, None, {}, "") for i in range(3)]
    return Side(drafts, [rng.normal(size=2) for _ in range(3)])


@pytest.mark.parametrize("has_baseline", [False, True])
@pytest.mark.parametrize("has_perplexity", [False, True])
def test_an_evaluation(has_baseline, has_perplexity, drawn, tmp_path):
    measures = {name: estimate(0.5) for name in ("reward", "distinct", "tokens", "cut_off")}
    measures |= {"perplexity": estimate(9.0)} if has_perplexity else {}
    names = ["baseline", "model"] if has_baseline else ["model"]
    evaluation = Evaluation(
        by_prompt={},
        model=measures,
        baseline=measures if has_baseline else {},
        comparison={},
        best_of_n={name: [estimate(0.1), estimate(0.3)] for name in names},
        sides={name: side(number) for number, name in enumerate(names)},
        prompts=3,
        dropped=0,
        about={},
        warnings=[],
    )
    evaluation_plot.plot_evaluation(evaluation, tmp_path / "evaluation.png")
    titles = panels_of(drawn[0], names)
    assert len(titles) == 8 and "Share of distinct samples" in titles
    assert {"Mean reward of a sample", "Length of a sample"} < set(titles)
    assert ("Perplexity under the reference" in titles) == has_perplexity
    bars = [bar for axis in drawn[0].axes[:4] for bar in axis.containers]
    assert len(bars) == 4 * len(names)


def test_rounds(drawn, tmp_path):
    names = ("reward", "perplexity", "distinct", "tokens", "cut_off")
    records = [{"round": i} | {name: estimate(0.4 + i) for name in names} for i in range(3)]
    rounds.plot_rounds(records, tmp_path / "rounds.png")
    assert len(panels_of(drawn[0], ["value and 95 % interval over prompts"])) == 5
    records[2]["ranking_accuracy"] = estimate(0.8)
    rounds.plot_rounds(records, tmp_path / "rounds.png")
    assert "Ranking accuracy of p" in panels_of(drawn[1], ["value and 95 % interval over prompts"])


@pytest.mark.parametrize("has_reward", [False, True])
def test_training(has_reward, drawn, tmp_path):
    keys = ("loss", "rank_loss", "sft_loss", "rewards/accuracies", "rewards/margins", "grad_norm")
    records = [
        {"step": step, "tokens_per_second": 9.0} | {key: 10.0**-step for key in keys}
        for step in range(1, 4)
    ]
    records[0]["tokens_per_second"] = 900.0  # on a machine that was busy then
    measured = {f"eval/{key}": 0.5 for key in keys[:5]}
    if has_reward:
        measured |= {"eval/reward": 1.0, "eval/reward_ci95": 0.1, "eval/response_length": 7}
    records += [{"step": step} | measured for step in (0, 3)]
    training_plot.plot_training(records, tmp_path / "training.png")
    titles = panels_of(drawn[0], ["training", "held out", "chance"])
    assert ("Length of fresh samples" in titles) == has_reward != ("Margin" in titles)
    assert drawn[0].axes[0].get_yscale() == "log" and drawn[0].axes[5].get_yscale() == "linear"
    # No steps, or numbers that are none, draw nothing.
    training_plot.plot_training([{"step": 1, "loss": float("nan")}], tmp_path / "empty.png")
