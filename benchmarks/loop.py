"""The steps of whole runs: how long each waits for its packs, which a thread plans and builds, and
what the first step costs beside the third.

Each run is a process of its own, with threads bound to cores, and trains for a few steps. Those of
real rows differ in size, so there the first over the third says little.
"""

import os
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median

from transformers import TrainerCallback

from benchmarks.points import isolated
from benchmarks.results import Save, no_save, recorded
from benchmarks.tables import text_table
from benchmarks.timing import ratio
from rrhf_fast import RRHFTrainer, TrainConfig, demo

STEPS = {"smoke": 4, "paper": 8, "full": 8}


def run(
    *,
    preset: str,
    device: str,
    rounds: int,
    model: str | None = None,
    data: str | None = None,
    save: Save = no_save,
) -> dict:
    """Train the demo, or `model` on `data`, `rounds` times; return the figures."""
    options = {
        "model_name_or_path": model or str(demo.MODEL_DIR),
        "train_data": data or str(demo.TRAIN_FILE),
        "train_batch_size": 4 if data else 16,
        "max_steps": STEPS[preset],
        "max_tokens_per_pack": 2048,
        "on_bad_rows": "skip",
    }
    case = {"model": Path(model).name if model else "the demo's", "runs": []}
    figures = {"steps": STEPS[preset], "prompts_per_step": options["train_batch_size"]}
    figures["cases"] = [case]
    with recorded(case):
        for _ in range(rounds):
            with isolated() as process:
                case["runs"].append(process.submit(_train, options, device).result())
            case |= _summary(case["runs"])
            save(figures)
    return figures


class _Clock(TrainerCallback):
    """When steps begin and end, and when the one before was logged."""

    def __init__(self):
        self.waits, self.steps = [], []

    def on_train_begin(self, *_, **__):
        self._idle = time.perf_counter()

    def on_step_begin(self, *_, **__):
        self._began = time.perf_counter()
        self.waits.append(self._began - self._idle)

    def on_step_end(self, *_, **__):
        self.steps.append(time.perf_counter() - self._began)

    def on_log(self, *_, **__):  # the last thing between two steps that is no wait
        self._idle = time.perf_counter()


def _train(options: dict, device: str) -> dict:
    """Seconds of each step, and that it waited for its packs before."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    clock = _Clock()
    with tempfile.TemporaryDirectory(prefix="loop-") as name, redirect_stdout(StringIO()):
        options |= {"output_dir": f"{name}/out", "data_cache_dir": f"{name}/cache"}
        with RRHFTrainer(args=TrainConfig(**options), callbacks=[clock]) as trainer:
            trainer.train()
    return {"waits": clock.waits, "steps": clock.steps}


def _summary(runs: list[dict]) -> dict:
    """Medians over runs. The wait for the first packs counts apart: nothing can hide it."""
    waits = [sum(one["waits"][1:]) / sum(one["steps"][1:]) for one in runs]
    first, third = ([one["steps"][number] for one in runs] for number in (0, 2))
    return {
        "step_seconds": median(second for one in runs for second in one["steps"][2:]),
        "first_wait_seconds": median(one["waits"][0] for one in runs),
        "wait_of_later_steps": median(waits),
        "first_over_third": ratio(first, third),
    }


def table(figures: dict) -> str:
    """Seconds of a step, and later waits relative to their steps."""
    steps = f"{figures['steps']} steps of {figures['prompts_per_step']} prompts"
    header = [steps, "ms per step", "first wait, ms", "later waits", "first step over third"]
    rows = []
    for case in figures["cases"]:
        if "problem" in case:
            rows.append([f"{case['model']}: {case['problem'][:60]}", "", "", "", ""])
            continue
        shares = case["first_over_third"]
        rows.append(
            [
                case["model"],
                f"{1e3 * case['step_seconds']:,.0f}",
                f"{1e3 * case['first_wait_seconds']:,.0f}",
                f"{case['wait_of_later_steps']:.2%}",
                f"{shares['median']:.2f} ({shares['min']:.2f} to {shares['max']:.2f})",
            ]
        )
    return text_table(header, rows)


def plot(figures: dict, path: Path) -> None:
    """Each run's steps, one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    (case,) = figures["cases"]
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for number, one in enumerate(case["runs"]):
        axis.plot(range(1, len(one["steps"]) + 1), one["steps"], marker="o", label=f"run {number}")
    axis.set(xlabel="step", ylabel="seconds", ylim=0, title=f"Steps of {case['model']} model")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
