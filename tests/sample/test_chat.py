"""Samples of a chat model are read back from rows as the tokens that the model drew."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PhiConfig

from rrhf_fast.data.load import RowReport, load_drafts
from rrhf_fast.data.tokenise import tokenise_rows
from rrhf_fast.sample import local, sample
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.sample.local import LocalModel
from tests.data.test_chat import CHANNELS, SPECIAL, chatml, make_tokenizer, user
from tests.jsonl import write


@pytest.fixture(params=[CHANNELS, chatml("{{ m.content.split('</think>')[-1] }}", "<think>\n")])
def folder(request, tmp_path):
    """A model with random weights, which draws special tokens as often as letters."""
    tokenizer = make_tokenizer(request.param)
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    lm = AutoModelForCausalLM.from_config(config)
    for token in range(len(tokenizer)):
        if not tokenizer.decode([token]).isascii():  # a byte of no letter
            lm.lm_head.bias.data[token] = -1e4
    lm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def test_training_sees_the_tokens_that_were_drawn(folder, monkeypatch):
    drawn, response = {}, local.as_response

    def record(ids, *options):
        result = response(ids, *options)
        drawn[result["text"]] = ids
        return result

    monkeypatch.setattr(local, "as_response", record)
    rows = [
        {
            "prompt": user(f"Say {i}"),
            "responses": ["cat"],
            "id": i,
            "chat_template_kwargs": {"id": i},
        }
        for i in range(4)
    ]
    policies = [Policy(num_responses=8, max_new_tokens=12), Policy(method="provided")]
    config = SampleConfig(
        data=write(folder / "rows.jsonl", rows),
        output=str(folder / "sampled.jsonl"),
        model_name_or_path=str(folder / "model"),
        policies=policies,
        chat_template_kwargs={"quiet": True},
    )
    sample(config)
    drafts, _ = load_drafts(config.output)
    tokenizer = make_tokenizer()
    with_special, special = 0, set(tokenizer.convert_tokens_to_ids([*SPECIAL]))
    template = LocalModel(config.model_name_or_path, drafts, config, "model").tokenizer
    for draft in drafts:
        assert draft.chat_template_kwargs == {"quiet": True, "id": draft.others["id"]}
        *samples, provided = draft.as_generated
        assert all(samples) and provided is False
        own = draft.pick(range(len(samples)))
        (query,), _ = tokenise_rows([own.as_row()], template, RowReport(), max_length=999)
        for text, ids in zip(own.responses, query.response_ids, strict=True):
            expected = drawn[text]
            if tokenizer.decode(expected[-1:]) in ("<eos>", "<|im_end|>", "<|return|>"):
                expected = expected[:-1]
            if len(tokenizer(text)["input_ids"]) != len(expected):
                continue  # the tokenizer joins letters that were drawn apart
            np.testing.assert_array_equal(ids[:-1], expected)
            with_special += bool(set(expected) & special)
    assert with_special > 8
