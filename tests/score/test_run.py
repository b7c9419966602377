"""The stage `score`: reward models, functions, the policy itself, kills."""

import importlib
import math
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rrhf_fast import demo, reference
from rrhf_fast.data.load import load_drafts, load_rows
from rrhf_fast.score import score
from rrhf_fast.score.__main__ import main
from rrhf_fast.score.config import ScoreConfig, ScorerConfig
from rrhf_fast.score.logprobs import LogProbs
from rrhf_fast.score.reward_model import RewardModel
from rrhf_fast.stages.identity import identity
from tests.jsonl import read, write

MODEL = str(demo.MODEL_DIR)
ROWS = [
    {"prompt": "Why?", "responses": ["Because.", "No idea at all.", ""], "id": 1},
    {"prompt": "Who?", "responses": ["You.", "A man who came by."], "sources": ["a", "b"]},
    {"prompt": "When?", "responses": []},
    {"prompt": [{"role": "user", "content": "Where?"}], "responses": ["Here."]},
]


@pytest.fixture
def config(tmp_path):
    return ScoreConfig(
        data=write(tmp_path / "rows.jsonl", ROWS),
        output=str(tmp_path / "scored.jsonl"),
        batch_size=2,
    )


# --- Functions


def count_letters(prompts, responses):
    return [len(response) for response in responses]


def slowly(prompts, responses):
    time.sleep(0.02)
    return count_letters(prompts, responses)


def some_bad(prompts, responses):
    return [math.nan if "idea" in response else 1.0 for response in responses]


def too_few(prompts, responses):
    return [1.0]


def raises(prompts, responses):
    raise KeyError("oops")


def test_a_function_scores_every_response(config):
    config.reward_fn = f"{__name__}:count_letters"
    counts = score(config)
    assert (counts["rows"], counts["scored"], counts["unrankable"]) == (4, 6, 2)
    rows = read(config.output)
    assert [row["scores"] for row in rows] == [[8, 15, 0], [4, 18], [], [5]]
    assert [row["responses"] for row in rows] == [row["responses"] for row in ROWS]
    assert rows[0]["id"] == 1 and rows[1]["sources"] == ["a", "b"]


def test_responses_without_a_score_are_set_apart_with_the_reason(config):
    config.reward_fn = f"{__name__}:some_bad"
    assert score(config)["unscored"] == 1
    row = read(config.output)[0]
    assert row["responses"] == ["Because.", ""] and row["scores"] == [1.0, 1.0]
    assert row["unscored"] == [
        {"response": "No idea at all.", "source": None, "error": "a score of nan"}
    ]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_fixed_function_is_called_again(tmp_path, config, monkeypatch, overwrite):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"fixed{overwrite}"
    (tmp_path / f"{name}.py").write_text("def fn(prompts, responses): return [float('nan')] * 2")
    config = replace(config, reward_fn=f"{name}:fn", data=write(tmp_path / "two.jsonl", ROWS[1:2]))
    with pytest.raises(ValueError, match="no response could be scored: a score of nan"):
        score(config)
    (tmp_path / f"{name}.py").write_text("def fn(prompts, responses): return [2, 1]")
    sys.modules.pop(name)
    importlib.invalidate_caches()
    assert score(replace(config, overwrite=overwrite))["scored"] == 2
    assert read(config.output)[0]["scores"] == [2, 1]


def test_a_function_of_a_broken_package_has_an_identity(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("1 +")
    assert "content of reward_fn" not in identity(ScoreConfig(reward_fn="broken.module:fn"))


def test_scores_of_two_functions_are_not_mixed(tmp_path, config, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "def fn(prompts, responses): {}return [1.0] * len(prompts)"
    (tmp_path / "halfway.py").write_text(code.format("assert '' not in responses; "))
    config.reward_fn = "halfway:fn"
    config.data = write(Path(config.data), [*ROWS[1:2], *ROWS[:1]])
    with pytest.raises(ValueError, match="raised AssertionError"):
        score(config)
    (tmp_path / "halfway.py").write_text(code.format(""))
    with pytest.raises(ValueError, match="unfinished work .* reward function"):
        score(config)


def test_a_bad_model_name_locks_nothing(config, capsys):
    arguments = ["--data", config.data, "--output", config.output]
    kl = ["--reward_fn", f"{__name__}:count_letters", "--kl_coef", "1"]
    kl += ["--model_name_or_path", MODEL]
    for wrong in (
        ["--reward_fn", f"{__name__}:nothing"],
        ["--reward_model_name_or_path", "/no/such/model"],
        ["--policy_as_reward", "true", "--model_name_or_path", "/no/such/model"],
        [*kl, "--reference_model_name_or_path", "/no/such/model"],
    ):
        assert main([*arguments, *wrong]) == 2
        option = next(name for name in wrong[::-1] if name.startswith("--")).removeprefix("--")
        error = capsys.readouterr().err
        assert f"error: {option}: " in error
        if "/no/such/model" in wrong:
            problem = "no such folder, and no such model on the hub could be loaded"
            assert error.endswith(f"{option}: /no/such/model: {problem}\n")
    assert main([*arguments, "--reward_fn", f"{__name__}:count_letters"]) == 0


def test_scoring_again_replaces_everything_of_the_first_scores(tmp_path, config):
    row = {"prompt": "Who?", "responses": ["a", "bc"], "scores": [1, 2], "rewards": [3, 4]}
    row |= {"log_ratios": [5, 6], "criteria": [{}, {}], "unscored": [{"error": "x"}], "id": 7}
    config = replace(config, data=write(tmp_path / "again.jsonl", [row]))
    config.reward_fn = f"{__name__}:count_letters"
    score(config)
    assert read(config.output) == [
        {"id": 7, "prompt": "Who?", "responses": ["a", "bc"], "scores": [1, 2]}
    ]


@pytest.mark.parametrize(
    "name, problem",
    [
        ("too_few", "expected 2 numbers, one per response, found shape (1,)"),
        ("raises", "raised KeyError: 'oops'"),
        ("nothing", "expected package.module:function"),
    ],
)
def test_a_failing_function_is_one_line(config, name, problem, capsys):
    arguments = ["--data", config.data, "--output", config.output, "--batch_size", "2"]
    assert main([*arguments, "--reward_fn", f"{__name__}:{name}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"reward_fn: {__name__}:{name}" in error
    assert problem in error and not os.path.exists(config.output)


@pytest.mark.slow
def test_killed_runs_end_with_the_same_file(tmp_path, config, killed_at_random):
    rows = [{"prompt": str(i), "responses": ["x" * i, "y" * (2 * i)]} for i in range(30)]
    config = replace(config, data=write(tmp_path / "many.jsonl", rows))
    config.reward_fn = "rrhf_fast.demo.reward:score"
    config.kl_coef, config.batch_size = 0.1, 1
    config.model_name_or_path = config.reference_model_name_or_path = MODEL
    score(config)
    other = replace(config, output=config.output + "-killed")
    assert killed_at_random(score, other, kills=4, seed=int.from_bytes(os.urandom(4))) == 4
    assert Path(other.output).read_bytes() == Path(config.output).read_bytes()


# --- Reward models


def tiny(kind, vocab, pad):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=vocab,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=pad,
        num_labels=1,
        initializer_range=0.5,
    )
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=vocab,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            pad_token_id=pad,
            num_labels=1,
            initializer_range=0.5,
        )
        return GPT2ForSequenceClassification(config)
    config, model = {
        "llama": (LlamaConfig, LlamaForSequenceClassification),
        "bert": (BertConfig, BertForSequenceClassification),
        "roberta": (RobertaConfig, RobertaForSequenceClassification),
    }[kind]
    return model(config(**sizes)).eval()


# No pad, pad == eos, a separate pad; RoBERTa starts its positions after the padding id.
KINDS = [("llama", None), ("llama", 1), ("llama", 2), ("gpt2", 1), ("bert", 2), ("roberta", 2)]


@pytest.mark.parametrize("kind, pad", KINDS)
def test_the_reward_model_scores_a_batch_like_single_rows(tmp_path, kind, pad):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
    if kind in ("bert", "roberta"):
        tokenizer.sep_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    model = tiny(kind, len(tokenizer), pad).eval()
    model.save_pretrained(tmp_path)
    rewards = RewardModel(ScorerConfig(reward_model_name_or_path=str(tmp_path)))
    prompts = ["Why is it?", "Who?", "What do I need to fix the chair?"]
    responses = ["Because it is so.", "You.", "A hammer." * 20]
    rows = rewards.encode(prompts, responses)
    together = rewards.score(rows)
    model.config.pad_token_id = None
    for row, got in zip(rows, together, strict=True):
        assert len(row["input_ids"]) <= 64
        alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, 0].item()
        assert got == pytest.approx(alone, abs=1e-5)
    if kind in ("llama", "gpt2"):  # the reward is read at the end token
        assert all(row["input_ids"][-1] == tokenizer.eos_token_id for row in rows)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_many_responses_are_encoded_as_each_alone(tmp_path, kind):
    """Also pairs that are cut: at the prompt, and at both where the response is long."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if kind == "bert":
        tokenizer.sep_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    tiny(kind, len(tokenizer), 2).save_pretrained(tmp_path)
    rewards = RewardModel(ScorerConfig(reward_model_name_or_path=str(tmp_path)))
    texts = ["Why is it?", "What do I need to fix the chair? " * 20, ""]
    prompts = [*texts, [{"role": "user", "content": "Hi"}]]
    pairs = [(prompt, response) for prompt in prompts for response in texts]
    rows = rewards.encode(*zip(*pairs, strict=True))
    for (prompt, response), row in zip(pairs, rows, strict=True):
        assert rewards.encode([prompt], [response]) == [row]
        assert len(row["input_ids"]) <= 64
        if kind == "bert" and isinstance(prompt, str):
            count = len(tokenizer(response, add_special_tokens=False)["input_ids"])
            how = "only_first" if count < 64 - 2 else "longest_first"
            cut = {"truncation": how, "max_length": 64}
            assert row["input_ids"] == tokenizer(prompt, response, **cut)["input_ids"]


def test_a_resumed_run_encodes_only_what_is_left(tmp_path, config, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.save_pretrained(tmp_path / "rm")
    tiny("llama", len(tokenizer), 2).save_pretrained(tmp_path / "rm")
    config.reward_model_name_or_path = str(tmp_path / "rm")
    whole = replace(config, output=str(tmp_path / "whole.jsonl"))
    score(whole)
    encode, ask, encoded = RewardModel.encode, RewardModel.score, []

    def stopped(model, rows):
        if len(rows) > 1 and len(encoded) > 6 + 4:  # 6 to count tokens
            raise KeyboardInterrupt
        return ask(model, rows)

    def counted(model, prompts, responses):
        encoded.extend(responses)
        return encode(model, prompts, responses)

    monkeypatch.setattr(RewardModel, "encode", counted)
    monkeypatch.setattr(RewardModel, "score", stopped)
    with pytest.raises(KeyboardInterrupt):
        score(config)
    monkeypatch.setattr(RewardModel, "score", ask)
    encoded.clear()
    score(config)
    assert len(encoded) == 2
    assert read(config.output) == read(whole.output)


def test_the_reward_model_reads_messages_through_its_template(tmp_path, config):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "rm")
    tiny("llama", len(tokenizer), 2).save_pretrained(tmp_path / "rm")
    rewards = RewardModel(ScorerConfig(reward_model_name_or_path=str(tmp_path / "rm")))
    messages = [{"role": "user", "content": "Hi"}]
    chat, text = rewards.encode([messages, "Hi"], ["Yo", "Yo"])
    assert tokenizer.decode(chat["input_ids"]) == "user: Hi\nassistant: Yo\n"
    assert tokenizer.decode(text["input_ids"]) == "<s>HiYo</s>"
    config.reward_model_name_or_path = str(tmp_path / "rm")
    score(config)
    rows = read(config.output)
    assert [len(row["scores"]) for row in rows] == [3, 2, 0, 1]
    assert all(math.isfinite(value) for row in rows for value in row["scores"])
    assert main(["--data", config.data, "--output", config.output, "--policy_as_reward", "x"]) == 2


def test_a_rejection_by_the_chat_template_is_one_line(tmp_path, config, capsys):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = "{{ raise_exception('users only') }}"
    tokenizer.save_pretrained(tmp_path / "rm")
    tiny("llama", len(tokenizer), 2).save_pretrained(tmp_path / "rm")
    arguments = ["--data", config.data, "--output", config.output]
    assert main([*arguments, "--reward_model_name_or_path", str(tmp_path / "rm")]) == 2
    assert re.search("reward_input: .* template rejects .*users only", capsys.readouterr().err)


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a reward model: .*score.weight"):
        RewardModel(ScorerConfig(reward_model_name_or_path=MODEL))
    with pytest.raises(ValueError, match="no tokenizer|not a sequence classifier"):
        RewardModel(ScorerConfig(reward_model_name_or_path=str(tmp_path)))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.save_pretrained(tmp_path)
    model = tiny("llama", len(tokenizer), 2)
    LlamaForSequenceClassification(
        LlamaConfig(**model.config.to_dict() | {"num_labels": 2})
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a head of 1 label, found 2"):
        RewardModel(ScorerConfig(reward_model_name_or_path=str(tmp_path)))


# --- The policy's log-probs


def oracle(prompt, response):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    prompt_ids = torch.tensor(tokenizer(prompt)["input_ids"])
    return reference.response_logps(model, prompt_ids, torch.tensor(ids)).detach()


@pytest.mark.parametrize("packing", ["forest", "none"])
def test_the_policy_scores_by_its_length_normalised_log_prob(config, packing):
    config = replace(config, data=write(Path(config.data), [ROWS[2], *ROWS[:2]]))
    config.policy_as_reward, config.model_name_or_path = True, MODEL
    config.packing, config.max_tokens_per_pack = packing, 16
    assert score(config)["scored"] == 5
    for row in read(config.output):
        for response, p in zip(row["responses"], row["scores"], strict=True):
            assert p == pytest.approx(
                reference.score(oracle(row["prompt"], response)).item(), abs=1e-5
            )


def test_a_prompt_of_most_of_the_window_is_read_whole(config, capsys):
    """And a response beyond the window is cut, which is said."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompt = " ".join(["Why is the sky blue today?"] * 40)
    while len(tokenizer(prompt).input_ids) > 200:  # of 256
        prompt = prompt[8:]
    rows = [{"prompt": prompt, "responses": ["Because.", "A man who came by."]}]
    config = replace(config, data=write(Path(config.data), rows), policy_as_reward=True)
    config.model_name_or_path = MODEL
    score(config)
    (row,) = read(config.output)
    for response, p in zip(row["responses"], row["scores"], strict=True):
        assert p == pytest.approx(reference.score(oracle(prompt, response)).item(), abs=1e-5)
    assert "cut" not in capsys.readouterr().out
    rows[0]["responses"][1] *= 40
    score(replace(config, data=write(Path(config.data), rows), overwrite=True))
    said = "note: model_name_or_path: responses are cut to its window of 256 tokens"
    assert said in capsys.readouterr().out.splitlines()


def test_the_penalty_is_the_log_ratio_of_the_sampled_tokens(tmp_path, config):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    row = {"prompt": "Why?", "responses": ["Because.", "No"], "finish_reasons": ["stop", "length"]}
    config = replace(config, data=write(tmp_path / "kl.jsonl", [row]))
    config.reward_fn, config.kl_coef = f"{__name__}:count_letters", 0.5
    config.model_name_or_path = str(tmp_path / "policy")
    config.reference_model_name_or_path = MODEL
    score(config)
    (row,) = read(config.output)
    drafts, _ = load_drafts(config.data)
    policy = LogProbs(str(tmp_path / "policy"), config)(drafts)[0]
    expected = [
        (policy[0].sum() - oracle("Why?", "Because.").sum()).item(),
        (policy[1][:-1].sum() - oracle("Why?", "No")[:-1].sum()).item(),  # cut off: no end token
    ]
    assert row["log_ratios"] == pytest.approx(expected, abs=1e-3)
    assert min(map(abs, expected)) > 0.1
    assert row["rewards"] == [8, 2]
    scores = [8 - 0.5 * expected[0], 2 - 0.5 * expected[1]]
    assert row["scores"] == pytest.approx(scores, abs=1e-3)


def test_equal_models_give_no_penalty(config):
    config.reward_fn, config.kl_coef = f"{__name__}:count_letters", 0.5
    config.data = write(Path(config.data), ROWS[:2])
    config.model_name_or_path = config.reference_model_name_or_path = MODEL
    score(config)
    assert all(row["scores"] == row["rewards"] for row in read(config.output))
    report = load_rows(config.output, on_bad_rows="skip")[1]
    assert report.kept == 2 and report.bad_responses == {"empty response": 1}


# --- The command line


MISTAKES = {
    "no scorer": ([], "expected exactly one, found none"),
    "two scorers": (
        ["--reward_fn", "a:b", "--judge_model", "m"],
        "found reward_fn and judge_model",
    ),
    "no policy": (["--policy_as_reward", "true"], "model_name_or_path: missing"),
    "no reference": (
        ["--reward_fn", "a:b", "--kl_coef", "1", "--model_name_or_path", MODEL],
        "reference_model_name_or_path: missing",
    ),
    "out of range": (["--reward_fn", "a:b", "--kl_coef", "-1"], "kl_coef: expected 0 or more"),
    "no key": (["--judge_model", "m", "--api_key_env", "NO_KEY"], "NO_KEY is not set"),
    "no responses": (["--reward_fn", "a:b", "--data", "bare.jsonl"], "bare.jsonl:1: responses"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", ROWS)
    write(tmp_path / "bare.jsonl", [{"prompt": "a"}])
    arguments, problem = MISTAKES[name]
    assert main(["--data", "rows.jsonl", "--output", "o.jsonl", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("rrhf_fast.score: error: ")
    assert problem in lines[0]


def test_both_sums_of_a_penalty_are_over_the_same_tokens(tmp_path, config):
    """Where the window of one of the models is too small for the response."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(MODEL),
        AutoModelForCausalLM.from_pretrained(MODEL),
    )
    model.config.max_position_embeddings = 32
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    config.reward_fn, config.kl_coef = f"{__name__}:count_letters", 0.5
    row = {"prompt": "Why?", "responses": ["Because it is so. " * 10, "No."]}
    config.data = write(tmp_path / "kl.jsonl", [row])
    for policy, other in (("small", MODEL), (MODEL, "small")):
        config.model_name_or_path = str(tmp_path / policy) if policy == "small" else policy
        config.reference_model_name_or_path = str(tmp_path / other)
        score(replace(config, overwrite=True))
        assert read(config.output)[0]["log_ratios"] == pytest.approx([0, 0], abs=1e-4)
