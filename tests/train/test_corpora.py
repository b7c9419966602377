"""The rows of a run: one rank of each host tokenises them, and all open the same file."""

import socket
from typing import ClassVar

import numpy as np
import pytest
import torch

from rrhf_fast import TrainConfig, demo
from rrhf_fast.model.decoder import load_tokenizer
from rrhf_fast.stages.token_cache import tokenised
from rrhf_fast.train import corpora
from rrhf_fast.train.corpora import read_corpora
from rrhf_fast.train.distributed import World
from rrhf_fast.train.given import Given

TOKENIZER = load_tokenizer(str(demo.MODEL_DIR))


class Ranks(World):
    """Ranks 0 and 1 on this host and 2 and 3 on another; says for the others what they would."""

    entries: ClassVar[list] = []  # of the first rank of a host, for the second

    def gather(self, value):
        here = corpora._host()
        if isinstance(value, str):
            assert value == here and socket.gethostname() in here
            hosts = [here, here, "other", "other"]
            return hosts if self.rank < 2 else hosts[::-1]
        if value is None:  # another rank of this host has the entry
            value = self.entries.pop(0)
        else:
            self.entries.append(value)
        return [value if rank // 2 == self.rank // 2 else None for rank in range(4)]

    def together(self):
        return torch.no_grad()  # any context: no rank fails here


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        train_data=str(demo.TRAIN_FILE),
        eval_data=str(demo.EVAL_FILE),
        data_cache_dir=str(tmp_path / "cache"),
    )


def test_one_rank_of_each_host_tokenises(config, monkeypatch):
    who = []

    def noted(*arguments, **options):
        who.append(rank)
        return tokenised(*arguments, **options)

    monkeypatch.setattr(corpora, "tokenised", noted)
    digests = set()
    for rank in range(4):
        world = Ranks(torch.device("cpu"), rank=rank, size=4)
        data = read_corpora(config, Given(), TOKENIZER, 256, world)
        digests.add((data.train.digest(), data.held_out.digest()))
        assert (data.seconds is None) == (rank >= 2)  # both hosts see the same folder here
    assert who == [0, 0, 2, 2]  # training rows and held-out ones
    assert len(digests) == 1


def test_held_out_rows_are_a_part_of_the_same_file(config):
    config.eval_data, config.eval_fraction = None, 0.25
    world = World(torch.device("cpu"))
    data = read_corpora(config, Given(), TOKENIZER, 256, world)
    again = read_corpora(config, Given(), TOKENIZER, 256, world)
    assert data.seconds is not None and again.seconds is None
    assert (len(data.train), len(data.held_out)) == (336, 112)
    assert not np.isin(data.held_out.index["prompt_key"], data.train.index["prompt_key"]).any()
    assert again.train.digest() == data.train.digest()
    assert again.held_out.digest() == data.held_out.digest()


def test_rows_in_memory_leave_nothing_behind(config, tmp_path):
    rows = [{"prompt": f"{i}?", "responses": ["a", "b"], "scores": [1, 0]} for i in range(9)]
    given = Given(train_dataset=rows)
    config.eval_data = None
    data = read_corpora(given.complete(config), given, TOKENIZER, 256, World(torch.device("cpu")))
    assert len(data.train) == 9 and data.train.prompt(3) == "3?"
    assert not list((tmp_path / "cache" / "tokenised").iterdir())


def test_end_tokens_are_those_of_training_rows(config):
    """Messages may end with another token than texts; only what is trained on is learned."""
    messages = [{"role": "user", "content": "Why?"}]
    rows = [{"prompt": f"{i}?", "responses": ["a", "b"], "scores": [1, 0]} for i in range(9)]
    held_out = [{**row, "prompt": messages} for row in rows]
    tokenizer = load_tokenizer(str(demo.MODEL_DIR))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    given = Given(train_dataset=rows, eval_dataset=held_out)
    options = given.complete(config), given, tokenizer, 256, World(torch.device("cpu"))
    data = read_corpora(*options)
    assert data.train.end_ids == [tokenizer.eos_token_id]
    assert data.held_out.end_ids == [tokenizer.convert_tokens_to_ids("<|end|>")]
