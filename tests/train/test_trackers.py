"""What trackers receive, read back from their own files by their own clients."""

import json
import threading

import pytest

from rrhf_fast import RRHFTrainer, TrainConfig, demo, train
from rrhf_fast.train import trackers
from rrhf_fast.train.samples_table import best_and_worst, samples_table
from tests import jsonl
from tests.train.test_trainer import HELD_OUT, ROWS


def length(prompts, responses):
    return [float(len(response)) for response in responses]


@pytest.fixture
def run(tmp_path):
    """Two steps with samples, reported to a tracker; returns the records and the shown samples."""

    def run(tracker):
        args = TrainConfig(
            output_dir=str(tmp_path / "out"),
            report_to=[tracker],
            log_completions=True,
            run_name="a run",
            max_steps=2,
            train_batch_size=4,
            eval_max_new_tokens=8,
        )
        given = {"eval_dataset": HELD_OUT, "reward_fn": length}
        result = RRHFTrainer(str(demo.MODEL_DIR), args, ROWS, **given).train()
        lines = (tmp_path / "out/samples.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        return result.metrics, best_and_worst([s for s in samples if s["step"] == 2])

    return run


def test_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    records, shown = run("tensorboard")
    events = EventAccumulator(str(tmp_path / "out"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert logged == [(r["step"], pytest.approx(r["loss"])) for r in records if "loss" in r]
    *_, last = events.Tensors("samples/text_summary")
    head, _, *rows = make_ndarray(last.tensor_proto)[0].decode().splitlines()
    assert (last.step, head) == (2, "| reward | prompt | response |")
    assert [row.split(" | ")[0] for row in rows] == [f"| {sample['reward']}" for sample in shown]


@pytest.mark.parametrize("when", ["log", "show", "finish"])
def test_a_tracker_that_fails_does_not_end_the_run(run, when, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    calls, before = [], threading.excepthook

    def gone(*_):
        calls.append(when)
        raise ConnectionError("no route\nto the server")

    monkeypatch.setattr(trackers._TensorBoard, when, gone)
    records, _ = run("tensorboard")
    assert records[-1]["step"] == 2 and (tmp_path / "out/model.safetensors").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "report_to" in line]
    problem = "tensorboard failed (no route to the server) and gets no more of this run"
    assert line == f"warning: report_to: {problem}; {tmp_path}/out/metrics.jsonl has everything"
    assert calls[0] == when and len(calls) == (2 if when == "finish" else 1)
    assert when == "finish" or threading.excepthook is before
    assert len(jsonl.read(tmp_path / "out/metrics.jsonl")) == len(records)


def test_mlflow(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # where it puts tables
    records, shown = run("mlflow")
    (found,) = mlflow.search_runs(experiment_names=["rrhf_fast"], output_format="list")
    assert found.info.run_name == "a run" and found.info.status == "FINISHED"
    assert found.data.params["train_batch_size"] == "4"
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "eval/loss")
    assert [(m.step, m.value) for m in history] == [
        (r["step"], r["eval/loss"]) for r in records if "eval/loss" in r
    ]
    table = mlflow.load_table("samples/step-2.json", run_ids=[found.info.run_id])
    assert list(table["response"]) == [sample["response"] for sample in shown]


def test_wandb(run, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run("wandb")
    assert wandb.run is None  # finished
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples_2_*.table.json")
    assert json.loads(table.read_text())["columns"] == ["reward", "prompt", "response"]


def test_trackio(run, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    run("trackio")
    found = trackio.Api().runs("rrhf_fast")
    assert [one.name for one in found] == ["a run"]


SAMPLES = [{"prompt": "p", "response": f"r{i}", "reward": float(i), "step": 1} for i in range(7)]


def test_the_best_come_first_and_the_worst_last():
    assert [s["reward"] for s in best_and_worst(SAMPLES)] == [6.0, 5.0, 1.0, 0.0]
    assert [s["reward"] for s in best_and_worst(SAMPLES[:3])] == [2.0, 1.0, 0.0]


def test_the_console_shows_messages_and_control_characters_on_one_line_each():
    messages = [{"role": "user", "content": "Why?\nNow"}]
    samples = [{"prompt": messages, "response": "Be\x1b[2Jcause\n" * 90, "reward": 0.5}]
    head, line = samples_table(best_and_worst(samples), 1000).split("\n")
    assert head == "samples after step 1,000: the best and the worst rewards"
    assert line.startswith("     0.500  Why? Now -> Be") and line.endswith("...")
    assert "Because" not in line and len(line) < 120 and "\x1b" not in line


def test_completions_need_a_reward():
    with pytest.raises(ValueError, match="^log_completions: needs eval_reward_fn"):
        train(TrainConfig(model_name_or_path="m", train_data="rows.jsonl", log_completions=True))
