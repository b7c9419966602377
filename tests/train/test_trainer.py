"""RRHFTrainer as users of transformers and TRL know one: objects in, callbacks, evaluate, save."""

import json
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    TrainerCallback,
)

from rrhf_fast import ExportConfig, RRHFTrainer, TrainConfig, demo, export, train


def rows_of(path, count):
    return [json.loads(line) for line in Path(path).read_text().splitlines()[:count]]


ROWS, HELD_OUT = rows_of(demo.TRAIN_FILE, 16), rows_of(demo.EVAL_FILE, 6)
OPTIONS = {"train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "eval_steps": 2}
TIMES = {"tokens_per_second", "mfu"}


def options(folder, **more):
    return TrainConfig(output_dir=str(folder), **OPTIONS | more)


def records(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def by_name(tmp_path_factory):
    """A run by options alone: rows in files, the model by its name."""
    folder = tmp_path_factory.mktemp("by_name")
    for name, rows in (("train", ROWS), ("eval", HELD_OUT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train_data": str(folder / "train.jsonl"), "eval_data": str(folder / "eval.jsonl")}
    train(options(folder / "out", model_name_or_path=str(demo.MODEL_DIR), **data))
    return folder


def lists():
    return {"train_dataset": ROWS, "eval_dataset": HELD_OUT}


def arrow():
    return {name: datasets.Dataset.from_list(rows) for name, rows in lists().items()}


@pytest.mark.parametrize("rows", [lists, arrow, None], ids=["lists", "datasets", "paths"])
def test_objects_give_the_same_run_as_names(by_name, rows, tmp_path):
    given = rows() if rows else {}
    for name in () if rows else ("train", "eval"):
        given[f"{name}_dataset"] = str(by_name / f"{name}.jsonl")
    trainer = RRHFTrainer(
        model=AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR),
        args=options(tmp_path),
        processing_class=AutoTokenizer.from_pretrained(demo.MODEL_DIR),
        **given,
    )
    result = trainer.train()
    assert records(tmp_path) == records(by_name / "out")
    assert result.after["loss"] == trainer.evaluate()["eval_loss"]
    expected, found = weights(by_name / "out"), weights(tmp_path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_save_model_and_generation(tmp_path):
    trainer = RRHFTrainer(str(demo.MODEL_DIR), options(tmp_path / "out"), ROWS)
    trainer.train()
    trainer.save_model(str(tmp_path / "copy"))
    first, second = weights(tmp_path / "out"), weights(tmp_path / "copy")
    assert all(torch.equal(first[name], second[name]) for name in first)
    prompt = torch.tensor([[5, 6, 7]])
    found = trainer.model.generate(prompt, max_new_tokens=5, do_sample=False)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert torch.equal(found, saved.generate(prompt, max_new_tokens=5, do_sample=False))


def test_a_reward_function_scores_fresh_samples(tmp_path):
    def reward_fn(prompts, responses):
        return [float(len(response)) for response in responses]

    args = options(tmp_path, eval_max_new_tokens=8, max_steps=2)
    trainer = RRHFTrainer(demo.MODEL_DIR.as_posix(), args, ROWS, HELD_OUT, reward_fn=reward_fn)
    trainer.train()
    samples = rows_of(tmp_path / "samples.jsonl", None)
    last = [sample for sample in samples if sample["step"] == 2]
    mean = sum(len(sample["response"]) for sample in last) / len(last)
    assert trainer.evaluate()["eval_reward"] == pytest.approx(mean)


class Events(TrainerCallback):
    """Writes down what it is told."""

    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda args, state, control, **more: self.calls.append((name, state, more))


def test_every_event_comes_in_its_place(tmp_path):
    class Numbered(Events):
        def __getattribute__(self, name):
            if not name.startswith("on_"):
                return super().__getattribute__(name)
            return lambda args, state, control, **more: self.calls.append(
                (name.removeprefix("on_"), state.global_step)
            )

    events = Numbered()
    args = options(tmp_path, max_steps=3, train_batch_size=8, save_steps=2)
    RRHFTrainer(str(demo.MODEL_DIR), args, ROWS, HELD_OUT, callbacks=[events]).train()
    assert events.calls == [
        ("init_end", 0), ("train_begin", 0), ("log", 0), ("evaluate", 0),
        ("epoch_begin", 0), ("step_begin", 0), ("step_end", 1), ("log", 1),
        ("step_begin", 1), ("step_end", 2), ("epoch_end", 2), ("log", 2),
        ("log", 2), ("evaluate", 2), ("save", 2),
        ("epoch_begin", 2), ("step_begin", 2), ("step_end", 3), ("epoch_end", 3), ("log", 3),
        ("log", 3), ("evaluate", 3), ("train_end", 3),
    ]  # fmt: skip


def test_what_callbacks_are_told(tmp_path):
    events = Events()
    args = options(tmp_path, max_steps=2)
    trainer = RRHFTrainer(str(demo.MODEL_DIR), args, ROWS, HELD_OUT, callbacks=[events])
    trainer.train()
    told = {name: more for name, _, more in events.calls}
    logs = [more["logs"] for name, _, more in events.calls if name == "on_log"]
    assert logs[-2]["loss"] == records(tmp_path)[-2]["loss"]
    assert logs[-1]["eval_loss"] == records(tmp_path)[-1]["eval/loss"]
    assert events.calls[-1][1].log_history == logs
    assert told["on_evaluate"]["metrics"]["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert told["on_step_end"]["model"] is trainer.model
    assert isinstance(told["on_step_end"]["optimizer"], torch.optim.Optimizer)
    assert told["on_step_end"]["lr_scheduler"].get_last_lr() == [0.0, 0.0]  # at the end


class Wishes(TrainerCallback):
    """Asks for something after one step."""

    def __init__(self, wish, step):
        self.wish, self.step = wish, step

    def on_step_end(self, args, state, control, **more):
        if state.global_step == self.step:
            setattr(control, f"should_{self.wish}", True)
        return control


def test_a_callback_ends_training_with_a_saved_model(tmp_path):
    args = options(tmp_path, max_steps=20)
    result = RRHFTrainer(
        str(demo.MODEL_DIR), args, ROWS, HELD_OUT, callbacks=[Wishes("training_stop", 3)]
    ).train()
    assert result.steps == 3 and not result.interrupted and not result.preempted
    found = records(tmp_path)
    assert [r["step"] for r in found if "loss" in r] == [1, 2, 3]
    assert found[-1]["step"] == 3 and result.after["loss"] == found[-1]["eval/loss"]
    assert (tmp_path / "model.safetensors").exists()


def test_a_callback_has_a_checkpoint_and_an_evaluation_made(tmp_path):
    wishes = [Wishes("save", 1), Wishes("evaluate", 3)]
    args = options(tmp_path, eval_steps=100)
    RRHFTrainer(str(demo.MODEL_DIR), args, ROWS, HELD_OUT, callbacks=wishes).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert [r["step"] for r in records(tmp_path) if "eval/loss" in r] == [0, 3, 4]


def test_early_stopping_of_transformers(tmp_path):
    """At a rate of nearly zero nothing improves by the threshold."""
    args = options(tmp_path, max_steps=20, eval_steps=1, learning_rate=1e-9)
    stopper = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=0.1)
    result = RRHFTrainer(str(demo.MODEL_DIR), args, ROWS, HELD_OUT, callbacks=[stopper]).train()
    assert result.steps == 2  # after the evaluations of steps 1 and 2


def test_an_evaluation_before_training_costs_no_patience(tmp_path):
    args = options(tmp_path, max_steps=3, eval_steps=1)
    stopper = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = RRHFTrainer(str(demo.MODEL_DIR), args, ROWS, HELD_OUT, callbacks=[stopper])
    trainer.evaluate()
    assert trainer.train().steps == 3


@pytest.mark.parametrize(
    ("wish", "expected"),
    [("save", ["checkpoint-2", "checkpoint-4"]), ("training_stop", []), ("evaluate", [])],
)
def test_wishes_at_the_end_of_an_epoch_are_granted_there(wish, expected, tmp_path):
    class AtEpochEnd(TrainerCallback):
        def on_epoch_end(self, args, state, control, **more):
            setattr(control, f"should_{wish}", True)

    args = options(tmp_path, train_batch_size=8, eval_steps=100)
    result = RRHFTrainer(str(demo.MODEL_DIR), args, ROWS, HELD_OUT, callbacks=[AtEpochEnd]).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == expected
    assert result.steps == (2 if wish == "training_stop" else 4)
    evaluated = [r["step"] for r in records(tmp_path) if "eval/loss" in r]
    assert evaluated == {"evaluate": [0, 2, 4], "save": [0, 4], "training_stop": [0, 2]}[wish]


def test_the_model_is_a_plain_one_outside_and_in_callbacks(tmp_path):
    """Its attention is that of forests only while packs run."""
    lm = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    prompt = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]])

    def logits(model):
        with torch.no_grad():
            return model(prompt).logits

    before, seen = logits(lm), []

    class Looks(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **more):
            seen.append(logits(model))

        def on_evaluate(self, args, state, control, model=None, **more):
            seen.append(logits(model))

    trainer = RRHFTrainer(lm, options(tmp_path, max_steps=2), ROWS, HELD_OUT, callbacks=[Looks])
    torch.testing.assert_close(logits(lm), before)
    trainer.train()
    torch.testing.assert_close(seen[0], before)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(seen[-1], logits(saved))
    torch.testing.assert_close(logits(lm), logits(saved))
    trainer.evaluate()
    torch.testing.assert_close(logits(lm), logits(saved))


@pytest.mark.parametrize("part", ["embedding", "a layer"])
def test_frozen_weights_are_saved_too(part, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    frozen = lm.get_input_embeddings() if part == "embedding" else lm.model.layers[0]
    frozen.requires_grad_(False)
    before = {name: p.clone() for name, p in lm.named_parameters() if not p.requires_grad}
    args = options(tmp_path / "out", max_steps=2, save_steps=2)
    RRHFTrainer(lm, args, ROWS).train()
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, dict(lm.named_parameters())[name])
        assert name not in before or torch.equal(parameter, before[name])
    export(ExportConfig(str(tmp_path / "out" / "checkpoint-2"), str(tmp_path / "exported")))
    exported = weights(tmp_path / "exported")
    assert all(torch.equal(exported[name], value) for name, value in saved.state_dict().items())


@pytest.mark.parametrize("more", [{}, {"dtype": "bfloat16"}, {"activation_checkpointing": "full"}])
def test_a_second_trainer_goes_on_where_the_first_one_ended(more, tmp_path):
    """As if the model had been saved and loaded in between."""
    lm = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    RRHFTrainer(lm, options(tmp_path / "first", **more), ROWS, HELD_OUT).train()
    again = RRHFTrainer(lm, options(tmp_path / "again", **more), ROWS, HELD_OUT)
    again.train()
    loaded = options(tmp_path / "loaded", **more)
    RRHFTrainer(str(tmp_path / "first"), loaded, ROWS, HELD_OUT).train()
    assert records(tmp_path / "again") == records(tmp_path / "loaded")
    for layer in lm.model.layers:  # wrapped once
        wrapped = getattr(vars(layer).get("forward"), "args", [None])[0]
        assert not isinstance(wrapped, partial)
    assert len(again.run.model.copied) == (14 if "dtype" in more else 0) * len(lm.model.layers) / 2


def test_what_is_no_training_is_refused(tmp_path):
    for more in ({"dry_run": True}, {"show_tokens": 2}):
        with pytest.raises(ValueError, match="dry_run, show_tokens: nothing is trained"):
            RRHFTrainer(str(demo.MODEL_DIR), options(tmp_path, **more), ROWS)


def test_the_traceback_of_an_error_in_the_rows_is_kept(tmp_path):
    class Rows:
        def __iter__(self):
            raise KeyError("here")

    with pytest.raises(ValueError, match=r"train_dataset\[0\]: cannot be read") as error:
        RRHFTrainer(str(demo.MODEL_DIR), options(tmp_path), Rows())
    assert "_dataset_records" in [entry.name for entry in error.traceback]


def test_an_early_stop_ends_the_profiler_and_logs_the_last_step(tmp_path):
    class Stops(TrainerCallback):
        def on_evaluate(self, args, state, control, **more):
            control.should_training_stop = state.global_step == 4

    args = options(tmp_path, max_steps=20, logging_steps=10, profile_steps=4)
    trainer = RRHFTrainer(str(demo.MODEL_DIR), args, ROWS, HELD_OUT, callbacks=[Stops])
    assert trainer.train().steps == 4
    assert not torch.autograd._profiler_enabled()
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [4]


def test_a_run_that_fails_leaves_a_plain_model(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, *args, **more):
            raise RuntimeError("no")

    lm = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    with pytest.raises(RuntimeError, match="no"):
        RRHFTrainer(lm, options(tmp_path), ROWS, callbacks=[Fails]).train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(lm(prompt).logits, saved(prompt).logits)


def test_the_tensorboard_callback_of_transformers(tmp_path):
    pytest.importorskip("tensorboard")
    from transformers.integrations import TensorBoardCallback

    args = options(tmp_path, max_steps=2)
    RRHFTrainer(str(demo.MODEL_DIR), args, ROWS, HELD_OUT, callbacks=[TensorBoardCallback]).train()
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_paths_frames_and_names(tmp_path, by_name):
    pandas = pytest.importorskip("pandas")
    trainer = RRHFTrainer(
        demo.MODEL_DIR,
        options(tmp_path),
        pandas.DataFrame(ROWS),
        by_name / "eval.jsonl",
        processing_class=str(demo.MODEL_DIR),
    )
    trainer.train()
    assert records(tmp_path) == records(by_name / "out")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"model": 3}, "model: expected a name or a PreTrainedModel, found a int"),
        ({"train_dataset": {"train": ROWS}}, "train_dataset: expected rows, found the keys train"),
        ({"train_dataset": 7}, "train_dataset: expected rows or the name of a file, found a int"),
        ({"train_dataset": [{"prompt": "a"}]}, r"train_dataset\[0\]"),
        ({"train_dataset": []}, "train_dataset: no rows"),
        ({"train_dataset": None}, "train_data: missing"),
        ({"callbacks": [print]}, "callbacks: expected transformers' TrainerCallback"),
        ({"callbacks": TrainerCallback()}, "callbacks: expected a list of callbacks"),
        ({"reward_fn": "package:fn"}, "reward_fn: expected a function, found 'package:fn'"),
        ({"args": {"max_steps": 3}}, "args: expected a TrainConfig, found a dict"),
    ],
)
def test_mistakes_name_the_argument(given, problem, tmp_path):
    arguments = {"model": str(demo.MODEL_DIR), "train_dataset": ROWS} | given
    arguments = {"args": options(tmp_path)} | arguments
    with pytest.raises(ValueError, match=problem):
        RRHFTrainer(**arguments)


def test_models_that_cannot_be_trained(tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    nameless = AutoModelForCausalLM.from_config(lm.config)
    nameless.config._name_or_path = ""
    frozen = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR).requires_grad_(False)
    other = AutoModelForSequenceClassification.from_config(lm.config)
    for model, problem in (
        (nameless, "processing_class: missing"),
        (frozen, "model: all of its weights are frozen"),
        (other, "model: expected a causal language model, found a LlamaForSequence"),
    ):
        with pytest.raises(ValueError, match=problem):
            RRHFTrainer(model, options(tmp_path), ROWS)


def test_a_callback_that_returns_something_else_is_named(tmp_path):
    class Returns(TrainerCallback):
        def on_step_end(self, *args, **more):
            return True

    with pytest.raises(ValueError, match="callbacks: expected the control or None from Returns.on"):
        RRHFTrainer(str(demo.MODEL_DIR), options(tmp_path), ROWS, callbacks=[Returns]).train()


def test_a_model_with_adapters_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    lm = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    lm.add_adapter(peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="model: it has adapters already"):
        RRHFTrainer(lm, options(tmp_path), ROWS)


def test_a_trainer_trains_once(tmp_path):
    trainer = RRHFTrainer(str(demo.MODEL_DIR), options(tmp_path, max_steps=1), ROWS)
    trainer.train()
    with pytest.raises(ValueError, match="train: this trainer has trained"):
        trainer.train()


def test_evaluate_wants_held_out_rows(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset: missing"):
        RRHFTrainer(str(demo.MODEL_DIR), options(tmp_path), ROWS).evaluate()


def test_the_peak_of_memory_is_told(tmp_path, capsys):
    """At least what this process uses now; the system's own figure is the oracle."""
    result = RRHFTrainer(str(demo.MODEL_DIR), options(tmp_path, max_steps=1), ROWS).train()
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    (peak,) = [line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line]
    assert result.peak_memory_gib == pytest.approx(int(peak) / 2**20, rel=0.01)
    assert f"peak memory {result.peak_memory_gib:31.2f} GiB\n" in capsys.readouterr().out
