"""Records of several steps are means over them, also across a checkpoint."""

import json
import statistics

import pytest
from transformers import TrainerCallback

from rrhf_fast import RRHFTrainer, TrainConfig, demo
from rrhf_fast.train import trainer
from tests.train.test_trainer import ROWS, Wishes, records

# Each step has four rows of equally many pairs: means over rows and pairs are those over steps.
OPTIONS = {"train_batch_size": 4, "max_steps": 8, "learning_rate": 1e-3}
MEANS = ("loss", "rank_loss", "sft_loss", "rewards/accuracies", "rewards/margins", "grad_norm")


def train(folder, callbacks=(), **more):
    args = TrainConfig(output_dir=str(folder), **OPTIONS | more)
    return RRHFTrainer(str(demo.MODEL_DIR), args, ROWS, callbacks=list(callbacks)).train()


@pytest.fixture(scope="module")
def each(tmp_path_factory):
    """The records of every step."""
    folder = tmp_path_factory.mktemp("each")
    train(folder)
    return records(folder)


def assert_means(found, each, windows):
    assert [record["step"] for record in found] == [steps[-1] for steps in windows]
    for record, steps in zip(found, windows, strict=True):
        over = [each[step - 1] for step in steps]
        for name in MEANS:
            expected = statistics.fmean(one[name] for one in over)
            assert record[name] == pytest.approx(expected, rel=1e-12), name
        assert record["learning_rate"] == over[-1]["learning_rate"]
        assert record["num_tokens"] == over[-1]["num_tokens"]
        tokens = [one["num_tokens"] - (each[i - 2]["num_tokens"] if i > 1 else 0)
                  for i, one in zip(steps, over, strict=True)]  # fmt: skip
        active = sum(n * one["active_fraction"] for n, one in zip(tokens, over, strict=True))
        assert record["active_fraction"] == pytest.approx(active / sum(tokens), rel=1e-3)


def test_a_record_is_the_mean_of_its_steps(each, tmp_path):
    train(tmp_path, logging_steps=3)
    assert_means(records(tmp_path), each, [[1, 2, 3], [4, 5, 6], [7, 8]])


def test_a_record_that_a_callback_asks_for_ends_a_window(each, tmp_path):
    train(tmp_path, [Wishes("log", 2)], logging_steps=4)
    assert_means(records(tmp_path), each, [[1, 2], [3, 4], [5, 6, 7, 8]])


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **more):
        if state.global_step == 5:
            raise KeyError("cut off")


def test_a_window_goes_on_after_a_checkpoint(each, tmp_path):
    options = {"logging_steps": 3, "save_steps": 2}
    train(tmp_path / "whole", **options)
    with pytest.raises(KeyError):
        train(tmp_path / "cut", [Stop()], **options)
    train(tmp_path / "cut", resume_from_checkpoint="latest", **options)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert_means(records(tmp_path / "cut"), each, [[1, 2, 3], [4, 5, 6], [7, 8]])


def test_sums_of_another_length_are_no_window(tmp_path):
    train(tmp_path, save_steps=4)
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    record = json.loads(state.read_text())
    state.write_text(json.dumps(record | {"window": record["window"] | {"sums": [0.0]}}))
    (tmp_path / "checkpoint-4" / "checksums.json").unlink()
    with pytest.raises(ValueError, match="^resume_from_checkpoint: .*window: expected 14 sums"):
        train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_step_that_is_skipped_hides_no_other(each, tmp_path, monkeypatch):
    """Its update is left out, and its record is that of the steps before it."""

    def poison(self, batch, *arguments, **more):
        totals, norm, problem = taken(self, batch, *arguments, **more)
        if self.world.is_first and arguments[1] == 3:
            totals.sums[0], problem = float("nan"), "step 3: not finite"
        return totals, norm, problem

    taken = trainer.take_step
    monkeypatch.setattr(trainer, "take_step", poison)
    train(tmp_path, logging_steps=6)
    first, *_ = records(tmp_path)
    assert (first["step"], first["skipped"]) == (3, 1)
    assert first["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2, rel=1e-12)
