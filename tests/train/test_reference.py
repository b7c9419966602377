"""Log-probs under the initial model: right, carried by every pack, kept with the checkpoints."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_fast import RRHFTrainer, TrainConfig, demo, reference, train
from rrhf_fast.data.packs import batches
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.stages.run_folder import complete_checkpoints
from rrhf_fast.train import reference as train_reference
from rrhf_fast.train.__main__ import main
from rrhf_fast.train.distributed import World
from rrhf_fast.train.prepare import prepare
from rrhf_fast.train.reference import attach_reference

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "model_name_or_path": str(demo.MODEL_DIR), "train_batch_size": 5, "learning_rate": 1e-3,
    "max_steps": 7, "save_steps": 2, "eval_steps": 3, "reference": "initial",
    "pair_loss": "logistic",
}  # fmt: skip
FILE = "reference_logps.npz"


def rows_of(path, count):
    return [json.loads(line) for line in path.read_text().splitlines()[:count]]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 rows, of 2 to 6 responses, and 4 held-out ones."""
    folder, rows = tmp_path_factory.mktemp("data"), rows_of(demo.TRAIN_FILE, 12)
    for number, row in enumerate(rows):
        for key in ("responses", "scores", "sources"):
            row[key] = row[key][: 2 + number % 5]
    return {
        "train_data": write(folder / "train.jsonl", rows),
        "eval_data": write(folder / "eval.jsonl", rows_of(demo.EVAL_FILE, 4)),
    }


def config(output_dir, data, **options):
    return TrainConfig(output_dir=str(output_dir), **(OPTIONS | data | options))


def attached(output_dir, data, **options):
    """What is trained, with its reference log-probs."""
    run = prepare(config(output_dir, data, **options), World(torch.device("cpu")))
    run.lock.close()
    run.model.release()
    attach_reference(run)
    return run


def plain_logps(queries, model=demo.MODEL_DIR):
    """[query][response] sums, by plain transformers in float64."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)

    def total(prompt_ids, ids):
        return reference.response_logps(lm, as_long(prompt_ids), as_long(ids)).sum().item()

    with torch.no_grad():
        return [[total(query.prompt_ids, ids) for ids in query.response_ids] for query in queries]


def as_long(ids):
    return torch.from_numpy(ids).long()


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    """The sums of the training rows and of the held-out ones."""
    run = attached(tmp_path_factory.mktemp("expected"), data, reference="none")
    assert run.reference == {} and run.train.reference is None
    return [plain_logps(side.queries) for side in (run.train, run.held_out)]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-5),
        ({"max_tokens_per_pack": 200}, 1e-5),
        ({"packing": "none", "max_tokens_per_pack": 900}, 1e-5),
        ({"use_peft": True, "lora_r": 4}, 1e-5),
        ({"activation_checkpointing": "full"}, 1e-5),
        ({"dtype": "bfloat16"}, 0.02),
        ({"dtype": "bfloat16", "use_peft": True, "packing": "none"}, 0.02),
        pytest.param({"compile": True}, 1e-5, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_values_are_those_of_plain_transformers(options, tolerance, data, expected, tmp_path):
    run = attached(tmp_path, data, **options)
    for planner, sums in zip((run.train, run.held_out), expected, strict=True):
        values = planner.reference.values
        assert values.dtype == np.float32
        assert values == pytest.approx(np.concatenate(sums), rel=tolerance)


def test_values_do_not_depend_on_how_many_queries_are_packed_at_once(
    data, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_reference, "_QUERIES_AT_ONCE", 5)
    values = attached(tmp_path, data).train.reference.values
    assert values == pytest.approx(np.concatenate(expected[0]), rel=1e-5)


@pytest.mark.parametrize("packing", ["forest", "none"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_pack_carries_the_values_of_its_responses(
    packing, num_ranks, data, expected, tmp_path
):
    run = attached(tmp_path, data, packing=packing, max_tokens_per_pack=900)
    options = {"train_batch_size": 5, "seed": 3, "num_steps": 7, "num_ranks": num_ranks}
    seen, fillers = [], 0
    for rank in range(num_ranks):
        for batch in batches(run.train, rank=rank, **options):
            for pack in batch.packs:
                pack = pack.to("cpu")
                assert len(pack.reference_logps) == len(pack.rewards)
                ids = pack.query_ids.tolist()
                sums = [value for i in ids for value in expected[0][i]]
                if ids:
                    assert pack.reference_logps.tolist() == pytest.approx(sums, rel=1e-5)
                fillers += not ids
                seen += ids
    assert set(seen) == set(range(12)) and len(seen) == 12 + 12 + 5  # two epochs and a step
    assert (fillers > 0) == (num_ranks > 1)


@pytest.mark.parametrize(
    "options",
    [
        {"pair_loss": "logistic"},
        {"pair_loss": "logistic", "beta": 0.1, "length_penalty": 0.0, "packing": "none"},
        {"pair_loss": "logistic", "active_set": "on", "max_tokens_per_pack": 400},
        {"pair_loss": "logistic", "use_peft": True, "compat": "official"},
        {"pair_loss": "squared", "margin": 0.5, "rank_reduction": "mean"},
        {"pair_loss": "hinge", "margin": 2.0},
    ],
    ids=str,
)
def test_at_the_first_step_no_score_has_risen(options, data, tmp_path):
    """So every pair has d = 0, whatever the responses' log-probs."""
    result = train(config(tmp_path, data, max_steps=1, train_batch_size=12, **options))
    pairs = {}
    for name in ("train_data", "eval_data"):
        scores = [row["scores"] for row in rows_of(Path(data[name]), 12)]
        pairs[name] = np.mean([sum(a < b for a in row for b in row) for row in scores])
    phi = {"logistic": np.log(2), "squared": 0.25, "hinge": 2.0}[options["pair_loss"]]
    for record, prefix, name in zip(
        result.metrics, ("eval/", ""), ("eval_data", "train_data"), strict=False
    ):
        count = 1 if options.get("rank_reduction") == "mean" else pairs[name]
        assert record[f"{prefix}rank_loss"] == pytest.approx(phi * count, rel=1e-4)
        assert record[f"{prefix}rewards/margins"] == pytest.approx(0, abs=1e-4)
    # Afterwards they have.
    assert result.after["rewards/margins"] != pytest.approx(0, abs=1e-4)


def losses_of_the_readme():
    """The rows of its table of losses: name and options."""
    table = (ROOT / "README.md").read_text().split("| loss | options |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        name, given = (cell.strip(" `") for cell in line.strip("|").split("|"))
        words = given.replace("--", "").split()
        values = map(yaml.safe_load, words[1::2])
        yield pytest.param(dict(zip(words[::2], values, strict=True)), id=name)


@pytest.mark.parametrize("options", list(losses_of_the_readme()))
def test_a_loss_of_the_readme_is_what_its_options_say(options, data, tmp_path):
    """After the weights moved, against the plain loss on plain transformers' log-probs."""
    options = {"reference": "none", "pair_loss": "hinge", "sft_weight": 0.0} | options
    run = attached(tmp_path / "out", data, **options)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.model.lm.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=g)
    before = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float64)
    now = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float64)
    now.load_state_dict(run.model.lm.state_dict())
    ours = ("length_penalty", "pair_loss", "margin", "beta", "rank_reduction", "sft_weight")
    settings = {name: getattr(run.config, name) for name in ours}
    losses = []
    for query in (run.train.queries[i] for i in range(4)):
        prompt = as_long(query.prompt_ids)
        old, new = (
            [reference.response_logps(lm, prompt, as_long(ids)) for ids in query.response_ids]
            for lm in (before, now)
        )
        settings["reference_logps"] = old if options["reference"] == "initial" else None
        losses.append(reference.rrhf_loss(new, torch.from_numpy(query.rewards), **settings)[0])
    with run.model.engaged(), torch.no_grad():
        found = run.model(run.train.build(range(4))).loss
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_a_loss_that_needs_them_refuses_packs_without(data, tmp_path):
    run = attached(tmp_path, data)
    run.train.reference = None
    with run.model.engaged(), pytest.raises(ValueError, match="reference: expected a pack with"):
        run.model(run.train.build([0]))


def records(folder):
    """The metrics, without those that depend on the machine's speed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_second"} for x in lines]


def assert_same_run(one, other):
    assert records(one) == records(other)
    for name in (path.name for path in one.glob("*.safetensors")):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run from its first step to its last."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    train(config(folder, data))
    return folder


def stopped(whole, target):
    """The run as if killed after its second checkpoint."""
    shutil.copytree(whole, target)
    (target / "model.safetensors").unlink(missing_ok=True)
    shutil.rmtree(target / "checkpoint-6")
    return target


@pytest.fixture
def computed(monkeypatch):
    """The number of rows of each side whose values are computed."""
    calls, compute = [], train_reference._compute

    def counted(run, planner, starts):
        calls.append(len(planner.queries))
        return compute(run, planner, starts)

    monkeypatch.setattr(train_reference, "_compute", counted)
    return calls


def test_a_resumed_run_has_the_values_of_its_checkpoint(whole, data, computed, tmp_path, capsys):
    out = stopped(whole, tmp_path / "out")
    train(config(out, data, resume_from_checkpoint="latest"))
    assert computed == []
    assert f"log-probs of 69 responses from {out}/checkpoint-4" in capsys.readouterr().out
    assert_same_run(whole, out)
    saved = [(folder / FILE).read_bytes() for folder in complete_checkpoints(out)]
    assert len(saved) == 3 and len(set(saved)) == 1
    sums = json.loads((out / "checkpoint-2/checksums.json").read_text())
    assert FILE in sums


@pytest.mark.parametrize(
    "options", [{"packing": "none"}, {"max_tokens_per_pack": 300}, {"active_set": "on"}], ids=str
)
def test_values_outlive_options_that_compute_the_same(whole, data, computed, tmp_path, options):
    out = stopped(whole, tmp_path / "out")
    train(config(out, data, resume_from_checkpoint="latest", **options))
    assert computed == []
    for one, other in zip(records(whole), records(out), strict=True):
        for key in {"loss", "eval/loss", "rewards/margins"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-4)


def test_adapters_resume_too(data, computed, tmp_path):
    options = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2, "data_seed": 0}
    train(config(tmp_path / "whole", data, **options))
    assert computed == [12, 4]
    out = stopped(tmp_path / "whole", tmp_path / "out")
    (out / "adapter_model.safetensors").unlink()
    # Another seed, other adapters at first; they add nothing then.
    train(config(out, data, resume_from_checkpoint="latest", seed=7, **options))
    assert computed == [12, 4]
    assert_same_run(tmp_path / "whole", out)


def test_another_model_gets_values_of_its_own(whole, data, computed, tmp_path, capsys):
    """They are those of the model as it was named, not as the checkpoint has it."""
    lm = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    with torch.no_grad():
        lm.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5
    lm.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(tmp_path / "model")
    out, model = stopped(whole, tmp_path / "out"), str(tmp_path / "model")
    trainer = RRHFTrainer(
        args=config(out, data, resume_from_checkpoint="latest", model_name_or_path=model)
    )
    trainer.train()
    assert computed == [12, 4]
    line = f"({out}/checkpoint-4 has those of another model or of other rows)"
    assert line in capsys.readouterr().out
    sums = plain_logps(trainer.run.train.queries, model)
    found = trainer.run.train.reference.values
    assert found == pytest.approx(np.concatenate(sums), rel=1e-5)
    with np.load(out / "checkpoint-6" / FILE) as file:  # and they are kept from here on
        assert any(np.array_equal(found, file[key]) for key in file)


def test_a_model_of_other_settings_is_another_one(whole, data, computed, tmp_path):
    shutil.copytree(demo.MODEL_DIR, tmp_path / "model")
    file = tmp_path / "model/config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    out = stopped(whole, tmp_path / "out")
    model = str(tmp_path / "model")
    train(config(out, data, resume_from_checkpoint="latest", model_name_or_path=model))
    assert computed == [12, 4]


def test_the_same_model_elsewhere_is_the_same(whole, data, computed, tmp_path):
    shutil.copytree(demo.MODEL_DIR, tmp_path / "model")
    out = stopped(whole, tmp_path / "out")
    model = str(tmp_path / "model")
    train(config(out, data, resume_from_checkpoint="latest", model_name_or_path=model))
    assert computed == []
    assert_same_run(whole, out)


def test_other_held_out_rows_get_values_of_their_own(whole, data, computed, tmp_path):
    rows = rows_of(Path(data["eval_data"]), 4)
    rows[2]["responses"][0] += "!"
    changed = data | {"eval_data": write(tmp_path / "eval.jsonl", rows)}
    out = stopped(whole, tmp_path / "out")
    train(config(out, changed, resume_from_checkpoint="latest"))
    assert computed == [4]


@pytest.mark.parametrize("change", ["response", "max_length"])
def test_other_training_rows_are_refused_before_a_forward(whole, data, computed, tmp_path, change):
    rows, options = rows_of(Path(data["train_data"]), 12), {}
    if change == "response":
        rows[7]["responses"][1] += "!"
    else:
        options["max_length"] = 40
    changed = data | {"train_data": write(tmp_path / "train.jsonl", rows)}
    out = stopped(whole, tmp_path / "out")
    with pytest.raises(ValueError, match="is from a run on other rows"):
        train(config(out, changed, resume_from_checkpoint="latest", **options))
    assert computed == []


def test_a_checkpoint_without_values(data, computed, tmp_path, capsys):
    train(config(tmp_path / "whole", data, reference="none"))
    assert not list(tmp_path.rglob(FILE)) and computed == []
    out = stopped(tmp_path / "whole", tmp_path / "out")
    capsys.readouterr()
    train(config(out, data, resume_from_checkpoint="latest"))
    assert computed == [12, 4]
    assert f"({out}/checkpoint-4 has none)" in capsys.readouterr().out
    assert (out / "checkpoint-6" / FILE).is_file()
    assert not (out / "checkpoint-4" / FILE).exists()


def test_values_that_cannot_be_read_are_computed_again(whole, data, computed, tmp_path):
    """In a checkpoint whose save was cut off before its checksums; others are refused."""
    out = stopped(whole, tmp_path / "out")
    file = out / "checkpoint-4" / FILE
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"is damaged .{FILE} has changed"):
        train(config(out, data, resume_from_checkpoint=str(out / "checkpoint-4")))
    (out / "checkpoint-4/checksums.json").unlink()
    train(config(out, data, resume_from_checkpoint="latest"))
    assert computed == [12, 4]
    assert_same_run(whole, out)


def test_a_model_in_memory_and_an_evaluation_before_training(data, whole, computed, tmp_path):
    trainer = RRHFTrainer(
        AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR),
        config(tmp_path / "out", data),
        processing_class=AutoTokenizer.from_pretrained(demo.MODEL_DIR),
    )
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert computed == [4, 12]
    assert first == records(tmp_path / "out")[0]["eval/loss"]
    assert_same_run(whole, tmp_path / "out")


def test_a_model_in_memory_that_was_trained_is_no_reference(data, tmp_path):
    """As when a notebook's cell is run again: the checkpoint's run trained this very model."""
    lm, tokenizer = (
        AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR),
        AutoTokenizer.from_pretrained(demo.MODEL_DIR),
    )
    RRHFTrainer(lm, config(tmp_path, data, max_steps=2), processing_class=tokenizer).train()
    again = config(tmp_path, data, max_steps=4, resume_from_checkpoint="latest")
    trainer = RRHFTrainer(lm, again, processing_class=tokenizer)
    with pytest.raises(ValueError, match="reference: the model in memory is not the one that"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair_loss": "squared"}, "margin, pair_loss: squared draws responses together"),
        ({"pair_loss": "hinge"}, "margin, reference: all responses score alike at first"),
    ],
)
def test_losses_that_rounding_would_decide_are_refused(options, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, data, **options))


def test_a_signal_while_they_are_computed(data, whole, tmp_path, monkeypatch, capsys):
    logps, options = RRHFModel.response_logps, OPTIONS | data | {"output_dir": tmp_path / "out"}
    arguments = [text for k, value in options.items() for text in (f"--{k}", str(value))]

    def signalled(model, pack):
        signal.raise_signal(signal.SIGTERM)
        return logps(model, pack)

    monkeypatch.setattr(RRHFModel, "response_logps", signalled)
    assert main(arguments) == 75
    assert "stopped by SIGTERM" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(arguments) == 0
    assert_same_run(whole, tmp_path / "out")


def test_a_log_prob_that_is_not_finite_names_its_row(data, tmp_path, monkeypatch):
    logps = RRHFModel.response_logps

    def broken(model, pack):
        sums, where = logps(model, pack), pack.query_ids.tolist().index(2)
        sums[pack.group_offsets[where] + 1] = -torch.inf
        return sums

    monkeypatch.setattr(RRHFModel, "response_logps", broken)
    problem = r"reference: .*train.jsonl:3: a response has the log-prob -inf under the initial"
    with pytest.raises(ValueError, match=problem):
        train(config(tmp_path, data))


def test_the_initial_model_ties_in_every_pair(data, tmp_path):
    """What its scores differ by is rounding, of which an accuracy says nothing."""
    result = train(config(tmp_path, data, max_steps=1, packing="none", max_tokens_per_pack=900))
    assert result.before["rewards/accuracies"] == 0.5 and result.before["rewards/margins"] == 0
    assert result.after["rewards/margins"] > 0
