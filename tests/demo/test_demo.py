"""The embedded demo: its reward, rows and model, and that it can be recreated."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import demo_corpus as corpus
from experiments.make_demo import make
from rrhf_fast.demo import EVAL_FILE, MODEL_DIR, TRAIN_FILE, reward
from tests.jsonl import read

PROMPT = "Human: How do I fix my old chair?\nAssistant:"
GOOD = (
    " Sure! Take a hammer and fix the chair slowly. Start at the top and go down."
    " I hope that helps!"
)
SOURCES = ["beam", "diverse_beam", "top_p", "top_p", "provided_good", "provided_bad"]


def score(response, prompt=PROMPT):
    return reward.score([prompt], [response])[0]


@pytest.mark.parametrize(
    "worse",
    [
        GOOD.replace("chair", "lamp"),  # wrong thing
        GOOD.replace("hammer", "sponge"),  # wrong tool
        GOOD.replace("Sure!", "Ugh."),  # rude
        GOOD.replace("Sure!", "Well.").replace(
            "I hope that helps!", "That is all there is."
        ),  # cool
        GOOD.removesuffix(" I hope that helps!") + " Start at the top and go down." * 2,  # repeats
        GOOD.removesuffix(" helps!"),  # cut off
        " Sure, hammer chair.",  # short
        GOOD + " My uncle has a goat and a jug near a vase.",  # wanders off
        "",
    ],
)
def test_each_flaw_lowers_the_reward(worse):
    assert worse != GOOD
    assert score(worse) < score(GOOD)


def test_saying_more_gains_nothing():
    details = " ".join(corpus.DETAILS)
    assert score(f"{GOOD} {details}") < score(GOOD)
    assert score(GOOD * 3) < score(GOOD)
    assert score(GOOD + " sure glad happy welcome luck") < score(GOOD)  # kind words count once
    naming = " Sure! " + ", ".join(reward.THINGS + tuple(reward.TOOLS.values())) + "."
    assert score(naming) < 0


def test_reward_depends_on_the_prompt_and_accepts_any_text():
    assert score(GOOD, PROMPT.replace("chair", "lamp")) < score(GOOD)
    assert score(GOOD, "Bonjour") < score(GOOD)
    assert score("?!", "") == -6.0
    assert reward.score([], []) == []
    with pytest.raises(ValueError, match="do not match"):
        reward.score([PROMPT], [])


def test_words_of_the_world_have_one_meaning():
    tasks = [task for tasks, _ in reward.KINDS for task in tasks]
    assert sorted(tasks) == sorted(reward.TOOLS)
    names = [*tasks, *reward.THINGS, *reward.TOOLS.values()]
    assert len(names) == len(set(names))
    assert not set(names) & (reward.KIND_WORDS | reward.RUDE_WORDS)


@pytest.mark.parametrize("path, count", [(TRAIN_FILE, 448), (EVAL_FILE, 96)])
def test_rows_are_valid_and_their_scores_reproduce(path, count):
    rows = read(path)
    assert len(rows) == count
    for row in rows:
        assert set(row) == {"prompt", "responses", "scores", "sources"}
        assert row["sources"] == SOURCES
        assert all(isinstance(text, str) for text in row["responses"])
        assert row["scores"] == reward.score([row["prompt"]] * 6, row["responses"])


def test_rewards_rarely_tie_and_hardly_depend_on_length():
    rows = read(TRAIN_FILE)
    pairs = [(a, b) for row in rows for i, a in enumerate(row["scores"]) for b in row["scores"][:i]]
    assert sum(a == b for a, b in pairs) < 0.02 * len(pairs)
    words = [len(text.split()) for row in rows for text in row["responses"]]
    scores = [value for row in rows for value in row["scores"]]
    correlation = torch.corrcoef(torch.tensor([words, scores], dtype=torch.float64))[0, 1]
    assert abs(correlation) < 0.3


def test_splits_share_no_task():
    def tasks(path):
        out = set()
        for row in read(path):
            words = set(row["prompt"].lower().replace("?", " ").replace(".", " ").split())
            (verb,), (thing,) = words & set(reward.TOOLS), words & set(reward.THINGS)
            out.add((verb, thing))
        return out

    assert tasks(TRAIN_FILE) and tasks(EVAL_FILE) and not tasks(TRAIN_FILE) & tasks(EVAL_FILE)
    for path in (TRAIN_FILE, EVAL_FILE):
        prompts = [row["prompt"] for row in read(path)]
        assert len(set(prompts)) == len(prompts)


def test_shipped_files_are_small():
    files = [TRAIN_FILE, EVAL_FILE, *MODEL_DIR.iterdir()]
    assert sum(file.stat().st_size for file in files) < 2.5e6


def test_model_loads_and_ends_its_answers():
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert model.dtype == torch.float32
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(set(ids)) == 3
    for config in (model.config, model.generation_config):
        assert ids == (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    inputs = tokenizer(
        [row["prompt"] for row in read(EVAL_FILE)[:8]], padding=True, return_tensors="pt"
    )
    torch.manual_seed(0)
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        max_new_tokens=96,
    )
    new = out[:, inputs["input_ids"].shape[1] :]
    assert (new == tokenizer.eos_token_id).any(dim=1).float().mean() > 0.8


def test_prompt_and_response_tokenise_the_same_apart_and_together():
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    for row in read(EVAL_FILE)[:32]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        assert prompt.count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id
        for response in row["responses"]:
            apart = tokenizer(response, add_special_tokens=False)["input_ids"]
            assert prompt + apart == tokenizer(row["prompt"] + response)["input_ids"]
            assert tokenizer.decode(apart) == response
            assert len(prompt) + len(apart) < 256
    text = "Ünïcode, emoji \U0001f600 and\ttabs  stay."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_equal_seeds_make_equal_files(tmp_path):
    tiny = dict(
        documents=256, batch_size=32, train_prompts=3, eval_prompts=2, hidden_size=32, layers=1
    )
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(tmp_path / name, seed=seed, **tiny)
    files = sorted(
        f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*") if f.is_file()
    )
    assert {str(f) for f in files} >= {"train.jsonl", "eval.jsonl", "model/model.safetensors"}
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    for file in ("train.jsonl", "model/model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()
