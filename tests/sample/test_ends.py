"""Where a sampled response ends: at the checkpoint's own end tokens, and at stop strings."""

from dataclasses import replace
from itertools import takewhile

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, MambaConfig
from transformers import MambaForCausalLM as Mamba

from rrhf_fast import demo
from rrhf_fast.model.generate import generate_batch, own_end_token_ids
from rrhf_fast.sample import sample
from rrhf_fast.sample.config import Policy, SampleConfig
from tests.jsonl import read, write

MODEL = str(demo.MODEL_DIR)
PROMPTS = [row["prompt"] for row in read(demo.EVAL_FILE)[:10]]


@pytest.fixture
def config(tmp_path):
    return SampleConfig(
        data=write(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in PROMPTS]),
        output=str(tmp_path / "sampled.jsonl"),
        model_name_or_path=MODEL,
        batch_size=4,
    )


@pytest.fixture(scope="module")
def lm():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)


def test_an_end_that_only_repeats_the_models_config_does_not_count():
    """There it may be the default of a class, of another tokenizer's vocabulary."""
    repeated = GenerationConfig(eos_token_id=2, _from_model_config=True)
    assert own_end_token_ids(repeated) == own_end_token_ids(None) == []
    assert own_end_token_ids(GenerationConfig(eos_token_id=-1)) == []
    several = GenerationConfig(eos_token_id=[2, 5], _from_model_config=True)
    assert own_end_token_ids(several) == [2, 5]


@pytest.mark.parametrize("ends", [[1, 3], 3])
def test_a_checkpoints_own_ends_stop_a_response(tmp_path, config, lm, ends):
    """As they stop plain transformers: many models have several, of which a tokenizer names one."""
    model, tokenizer = lm
    folder = tmp_path / "own"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (policy,) = config.policies = [Policy(method="greedy", max_new_tokens=40)]
    config.model_name_or_path = str(folder)
    GenerationConfig(eos_token_id=ends, pad_token_id=2).save_pretrained(folder)
    sample(config)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    num_stopped = 0
    for row in read(config.output):
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        out = plain.generate(ids, max_new_tokens=policy.max_new_tokens)[0, ids.shape[1] :].tolist()
        text = list(takewhile(lambda token: token not in (1, 3), out))
        num_stopped += out[len(text) : len(text) + 1] == [3]
        assert row["responses"] == [tokenizer.decode(text)]
    assert num_stopped


def test_a_stop_string_that_the_prompt_begins_does_not_count(config, lm):
    """The last letters of a prompt and the first of an answer are no stop string of the answer."""
    config.policies = [Policy(method="greedy", max_new_tokens=12)]
    sample(config)
    before = [row["responses"] for row in read(config.output)]
    (first,) = before[0]
    config.stop_strings = [PROMPTS[0][-2:] + first[:1]]
    assert config.stop_strings[0] not in first
    sample(replace(config, overwrite=True))
    assert [row["responses"] for row in read(config.output)] == before
    config.stop_strings = [first[3:6]]
    sample(replace(config, overwrite=True))
    (row, *_) = read(config.output)
    assert row["responses"] == [first[: first.index(first[3:6])]]
    assert row["finish_reasons"] == ["stop"]


def test_diverse_beams_of_a_recurrent_model_are_refused():
    lm = Mamba(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=4)).eval()
    beams = Policy(method="diverse_beam", num_responses=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="diverse_beam: .*mamba cannot .*use sample"):
        generate_batch(lm, [np.array([3, 4])], beams, end_token_ids=[1], pad_token_id=0)
