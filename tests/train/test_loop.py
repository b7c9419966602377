"""Whole runs on the embedded model: what they write, what must not change them, how they end."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rrhf_fast import TrainConfig, demo, reference, train
from rrhf_fast.data.load import load_rows
from rrhf_fast.data.rows import BadRow
from rrhf_fast.data.tokenise import tokenise_rows
from rrhf_fast.model import layers
from rrhf_fast.model.decoder import UnsupportedModel
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.model.save import SaveFailed
from rrhf_fast.stages.run_folder import complete_checkpoints, read_state
from rrhf_fast.train import evaluate
from rrhf_fast.train.backward import OutOfMemory
from rrhf_fast.train.metrics import MetricsLog
from rrhf_fast.train.plot import plot_training
from rrhf_fast.train.step import NotFinite

ROOT = Path(__file__).parents[2]


def head(path, count, target):
    target.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    return str(target)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {
        "train_data": head(demo.TRAIN_FILE, 24, folder / "train.jsonl"),
        "eval_data": head(demo.EVAL_FILE, 6, folder / "eval.jsonl"),
    }


def run(output_dir, data, **options):
    defaults = {
        "model_name_or_path": str(demo.MODEL_DIR),
        "learning_rate": 1e-3,
        "train_batch_size": 8,
        "num_train_epochs": 1,
    }
    return train(TrainConfig(output_dir=str(output_dir), **(defaults | data | options)))


def curves(result):
    """The metrics, without what machine and compiler decide, or only forests have."""
    apart = {"tokens_per_second", "compiled_graphs", "active_fraction"}
    return [
        {key: value for key, value in record.items() if key not in apart}
        for record in result.metrics
    ]


def assert_same_curves(a, b, rel):
    for one, other in zip(curves(a), curves(b), strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"num_tokens"}:
            assert one[key] == pytest.approx(other[key], rel=rel, abs=1e-5), (one["step"], key)


def test_the_saved_model_gives_the_log_probs_that_training_reported(tmp_path, data):
    result = run(tmp_path, data, eval_reward_fn="rrhf_fast.demo.reward:score")
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "samples.jsonl"}
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert not [name for name in names if name.startswith(".") or name.endswith(".bin")]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.metrics
    assert result.steps == 3 and [r["step"] for r in result.metrics] == [0, 1, 2, 3, 3]
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2 * 6

    lm = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert lm.config._attn_implementation == "sdpa"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows, report = load_rows(data["eval_data"])
    queries, _ = tokenise_rows(rows, tokenizer, report, max_length=256)
    losses, correct, pairs = [], 0, 0
    for query in queries:
        prompt = torch.from_numpy(query.prompt_ids).long()
        with torch.no_grad():
            logps = [
                reference.response_logps(lm, prompt, torch.from_numpy(ids).long())
                for ids in query.response_ids
            ]
        rewards = torch.from_numpy(query.rewards)
        losses.append(reference.rrhf_loss(logps, rewards)[0])
        p = torch.stack([reference.score(logp) for logp in logps])
        better = rewards[:, None] > rewards[None]
        correct += int((better & (p[:, None] > p[None])).sum())
        pairs += int(better.sum())
    assert result.after["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert result.after["rewards/accuracies"] == correct / pairs


@pytest.fixture
def determinism():
    """What a run sets for its whole process, set back."""
    with mock.patch.dict(os.environ):
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens_per_pack": 200},
        {"packing": "none", "max_tokens_per_pack": 1500},
        {"active_set": "on", "max_tokens_per_pack": 400},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"attn_implementation": "forest_sdpa", "full_determinism": True},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=[
        "accumulation",
        "padding",
        "active",
        "checkpointing",
        "selective",
        "determinism",
        "compilation",
    ],
)
def test_how_a_step_is_computed_does_not_change_the_run(tmp_path, data, change, determinism):
    # A large epsilon, because Adam blows rounding up where a gradient is nearly 0.
    plain = run(tmp_path / "plain", data, adam_epsilon=1e-3)
    changed = run(tmp_path / "changed", data, adam_epsilon=1e-3, **change)
    assert torch.are_deterministic_algorithms_enabled() == change.get("full_determinism", False)
    assert ("compiled_graphs" in changed.metrics[1]) == change.get("compile", False)
    assert_same_curves(plain, changed, rel=1e-3)


def test_a_single_step_trains(tmp_path, data):
    result = run(tmp_path, data, max_steps=1)
    rates = [record["learning_rate"] for record in result.metrics if "loss" in record]
    assert rates == [1e-3]
    assert result.after["loss"] < result.before["loss"]


def test_a_mistake_leaves_the_metrics_of_the_earlier_run(tmp_path, data):
    run(tmp_path, data, max_steps=1)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for mistake in ({"lr_scheduler_type": "greedy"}, {"eval_reward_fn": "os:getcwd"}):
        with pytest.raises(ValueError, match=next(iter(mistake))):
            run(tmp_path, data, overwrite_output_dir=True, max_steps=1, **mistake)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_model_cut_into_other_files_is_replaced_whole(tmp_path, data):
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    run(tmp_path, data, max_steps=1)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    others = (tmp_path / "config.json").stat().st_mode
    assert (tmp_path / "model.safetensors").stat().st_mode == others


def test_samples_stay_within_the_models_window(tmp_path, data):
    # Learned positions: one token too many is an IndexError.
    lm = GPT2LMHeadModel(
        GPT2Config(vocab_size=576, n_embd=16, n_layer=1, n_head=2, n_positions=150)
    )
    lm.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(tmp_path / "model")
    result = run(
        tmp_path / "out", data, max_steps=1, model_name_or_path=str(tmp_path / "model"),
        eval_reward_fn="rrhf_fast.demo.reward:score", eval_max_new_tokens=10_000,
    )  # fmt: skip
    assert 0 < result.after["response_length"] < 150


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path, data):
    lm = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    weights = lm.state_dict()
    del weights["model.layers.0.mlp.up_proj.weight"], weights["lm_head.weight"]
    lm.save_pretrained(tmp_path / "model", state_dict=weights)
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"1 weights are missing .*layers.0.mlp.up_proj"):
        run(tmp_path / "out", data, model_name_or_path=str(tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="model_name_or_path: "):
        run(tmp_path / "out", data, model_name_or_path=str(tmp_path / "model"))


def test_seeds(tmp_path, data):
    def curve(name, **options):
        return curves(run(tmp_path / name, data, max_steps=2, **options))

    first = curve("first", seed=1)
    assert first == curve("again", seed=1)
    assert first != curve("other", seed=2)
    assert first == curve("data", seed=2, data_seed=1)  # without sampling, only the order matters


def test_bfloat16(tmp_path, data):
    result = run(tmp_path / "half", data, dtype="bfloat16")
    exact = run(tmp_path / "full", data)
    assert_same_curves(result, exact, rel=0.1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_samples_are_computed_in_the_runs_dtype(tmp_path, data, dtype, monkeypatch):
    seen, right = set(), evaluate.sample_responses

    def sample_responses(lm, *args, **options):
        hook = lm.model.layers[0].mlp.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
        try:
            return right(lm, *args, **options)
        finally:
            hook.remove()

    monkeypatch.setattr(evaluate, "sample_responses", sample_responses)
    options = {"eval_reward_fn": "rrhf_fast.demo.reward:score", "max_steps": 1}
    run(tmp_path, data, dtype=dtype, **options)
    assert seen == {getattr(torch, dtype)}


def test_optimizer_state_in_bfloat16_trains_as_well(tmp_path, data, capsys):
    exact = run(tmp_path / "full", data)
    ours = run(tmp_path / "half", data, optimizer_state_dtype="bfloat16")
    assert_same_curves(ours, exact, rel=0.05)
    assert "attention  forest_sdpa (forest_flex has no backward on cpu" in capsys.readouterr().out


def test_compat_official_divides_by_the_padded_width(tmp_path, data):
    ours, official = (
        run(tmp_path / compat, data, compat=compat, max_steps=1).before["rank_loss"]
        for compat in ("none", "official")
    )
    assert official < ours / 2


def test_eval_fraction_holds_rows_out(tmp_path, data):
    only_train = {"train_data": data["train_data"]}
    result = run(tmp_path, only_train, eval_fraction=0.25, train_batch_size=18)
    assert result.steps == 1 and result.before and result.after
    without = run(tmp_path / "without", only_train, train_batch_size=24)
    assert without.steps == 1 and without.before == without.after == {}


def test_skipped_rows_are_in_the_summary(tmp_path, data, capsys):
    rows = Path(data["train_data"]).read_text().splitlines()[:2]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*rows, "{}", "[]", "{}"]))
    run(tmp_path / "out", {"train_data": str(path)}, on_bad_rows="skip")
    out = capsys.readouterr().out
    assert "5 read, 2 to train on, 0 held out" in out
    assert "2 skipped: missing field, 1 skipped: not an object" in out


def test_what_was_left_out_or_not_used_is_in_the_summary(tmp_path, data, capsys):
    rows = [json.loads(line) for line in Path(data["train_data"]).read_text().splitlines()[:4]]
    rows[0]["responses"][1] = ""
    rows[1]["id"] = rows[2]["id"] = 7
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadRow, match="--on_bad_rows skip"):
        run(tmp_path / "out", {"train_data": str(path)})
    run(tmp_path / "out", {"train_data": str(path)}, on_bad_rows="skip")
    out = capsys.readouterr().out
    assert ", 1 left out: empty response" in out and "id (2 rows)" in out


def test_no_prompt_is_trained_on_and_held_out(tmp_path, data, capsys):
    rows = [json.loads(line) for line in Path(data["train_data"]).read_text().splitlines()[:8]]
    pairs = [
        {
            "prompt": row["prompt"],
            "chosen": row["responses"][i],
            "rejected": row["responses"][i + 1],
        }
        for row in rows
        for i in range(3)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    run(tmp_path / "out", {"train_data": str(path)}, eval_fraction=0.25, max_steps=1)
    out = capsys.readouterr().out
    assert "24 read, 18 to train on, 6 held out" in out and "share a prompt" not in out
    run(tmp_path / "leak", {"train_data": str(path), "eval_data": data["train_data"]}, max_steps=1)
    assert "warning: 8 of 24 held-out rows share a prompt with" in capsys.readouterr().out


def test_overwriting_is_possible_when_asked(tmp_path, data):
    run(tmp_path, data, max_steps=1)
    with pytest.raises(ValueError, match="already holds"):
        run(tmp_path, data, max_steps=1)
    (tmp_path / "samples.jsonl").write_text("{}\n")  # of a run with a reward function
    assert run(tmp_path, data, max_steps=2, overwrite_output_dir=True).steps == 2
    assert not (tmp_path / "samples.jsonl").exists()


def test_a_run_that_blows_up_keeps_the_last_good_weights(tmp_path, data):
    options = {"learning_rate": 1e30, "max_grad_norm": 0, "warmup_steps": 0, "max_steps": 9}
    with pytest.raises(NotFinite, match=r"step 4: loss .*train.jsonl:\d+.*; 3 steps in a row"):
        run(tmp_path, data, **options)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [(r["step"], r.get("skipped")) for r in records if "loss" in r] == [
        (1, None), (2, 1), (3, 2),
    ]  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (tmp_path / "training.png").exists()


def test_a_pack_that_does_not_fit_is_named(tmp_path, data, monkeypatch):
    plain = RRHFModel.forward

    def no_room(model, pack, **options):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, pack, **options)

    monkeypatch.setattr(RRHFModel, "forward", no_room)
    problem = r"a pack of [\d,]+ tokens \(\d queries\) does not fit; lower --max_tokens_per_pack"
    with pytest.raises(OutOfMemory, match=problem):
        run(tmp_path, data)
    with pytest.raises(OutOfMemory, match="--max_length .a single query"):
        run(tmp_path, data, max_tokens_per_pack=10, overwrite_output_dir=True)


def test_auto_on_a_cpu_is_8192_tokens_a_pack(tmp_path, data, capsys):
    result = run(tmp_path / "auto", data, max_tokens_per_pack="auto", save_steps=1)
    assert "packs of 8192 tokens" in capsys.readouterr().out
    assert_same_curves(result, run(tmp_path / "8192", data, max_tokens_per_pack=8192), rel=0)
    (saved, *_) = complete_checkpoints(tmp_path / "auto")
    assert read_state(saved)["config"]["max_tokens_per_pack"] == 8192


def test_adapters_in_bfloat16(tmp_path, data):
    result = run(tmp_path / "half", data, dtype="bfloat16", use_peft=True)
    assert_same_curves(result, run(tmp_path / "full", data, use_peft=True), rel=0.1)
    # Samples go other ways in another arithmetic, so they only have to be there.
    options = {"use_peft": True, "eval_reward_fn": "rrhf_fast.demo.reward:score", "max_steps": 1}
    result = run(tmp_path / "samples", data, dtype="bfloat16", **options)
    assert result.after["response_length"] > 1


def test_a_reward_function_that_misbehaves(tmp_path, data, monkeypatch):
    (tmp_path / "rewards_for_test.py").write_text(
        "def nan(prompts, responses): return [float('nan')] * len(prompts)\n"
        "def broken(prompts, responses): return responses[10**6]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="eval_reward_fn: rewards_for_test:nan: expected 6 fin"):
        run(tmp_path / "out", data, eval_reward_fn="rewards_for_test:nan")
    with pytest.raises(ValueError, match="rewards_for_test:broken raised IndexError: list index"):
        run(
            tmp_path / "out",
            data,
            eval_reward_fn="rewards_for_test:broken",
            max_steps=1,
            overwrite_output_dir=True,
        )


def test_ctrl_c_saves_what_was_learned(tmp_path, data):
    command = [sys.executable, "-m", "rrhf_fast.train", "--output_dir", str(tmp_path / "out")]
    options = {"model_name_or_path": demo.MODEL_DIR, "train_batch_size": 8, "max_steps": 100_000}
    for name, value in (options | data).items():
        command += [f"--{name}", str(value)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        # A suite in a shell's background would hand down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    metrics = tmp_path / "out" / "metrics.jsonl"
    give_up = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert time.monotonic() < give_up and process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # a second one costs nothing
    out, errors = process.communicate(timeout=60)
    # One that comes while Python tidies up is reported and ignored.
    assert errors.count(b"Traceback") == errors.count(b"Exception ignored")
    assert (tmp_path / "out" / "training.png").exists()
    assert process.returncode == 130
    assert b"stopped early after" in out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [json.loads(line) for line in metrics.read_text().splitlines()]


def test_errors_can_be_sent_to_other_ranks():
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=2, n_embd=2, n_layer=1, n_head=1))
    for error in (BadRow("kind", "f:1", "bad"), UnsupportedModel(lm, "reason"), SaveFailed("full")):
        error.on_all_ranks = True
        sent = pickle.dumps(error)
        found = pickle.loads(sent)
        assert type(found) is type(error) and str(found) == str(error) and len(sent) < 1000
        assert vars(found) == vars(error)


def test_a_dry_run_trains_nothing(tmp_path, data, capsys):
    result = run(tmp_path / "out", data, dry_run=True)
    assert result.output_dir is None and result.steps == 0
    assert "GiB" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_tensorboard_gets_the_same_numbers(tmp_path, data):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(tmp_path, data, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    logged = [(e.step, e.value) for e in events.Scalars("rank_loss")]
    expected = [(r["step"], pytest.approx(r["rank_loss"])) for r in result.metrics if "loss" in r]
    assert logged == expected


def test_a_tracker_that_is_missing(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="report_to: wandb is not installed"):
        run(tmp_path, data, report_to=["wandb"])


def test_numbers_that_are_not_finite_are_null_in_the_metrics(tmp_path):
    log = MetricsLog(tmp_path, TrainConfig())
    log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "epoch": 0.5})
    log.close()
    expected = {"step": 1, "loss": None, "grad_norm": None, "epoch": 0.5}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == expected
    plot_training(log.records, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()


def test_layers_that_are_compiled_too_often_are_reported(tmp_path, monkeypatch, capfd):
    torch._dynamo.reset()
    monkeypatch.setattr(layers, "COMPILER", "aot_eager")
    monkeypatch.setattr(layers, "RECOMPILE_LIMIT", 1)
    train(TrainConfig(output_dir=str(tmp_path), max_steps=2, compile=True))
    torch._dynamo.reset()
    lines = [line for line in capfd.readouterr().out.splitlines() if "warning: step" in line]
    assert len(lines) == 1 and "recompile_limit" in lines[0]
