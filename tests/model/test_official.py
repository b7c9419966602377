"""`--compat official` against the released trainer's loss, computed on its own padded rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from rrhf_fast import TrainConfig, demo
from rrhf_fast.data.load import RowReport
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.data.rows import parse_row
from rrhf_fast.data.tokenise import TokenisedQuery, tokenise_rows
from rrhf_fast.model.decoder import load_tokenizer
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train.backward import backward_active, backward_whole
from rrhf_fast.train.distributed import World
from rrhf_fast.train.evaluate import Totals

VOCAB = 576
IGNORED = -100


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def released_loss(lm, query, length_penalty):
    """One query's loss as the released trainer defines it.

    A row's inputs are prompt and response, end token included. Its labels are shifted one position
    to the left: P - 1 ignored positions, the response, and one more ignored position, so labels are
    as long as inputs. Rows are padded to the longest, P + max R. When gathering log-probs, the
    trainer sets ignored labels to 0 in place, and then counts labels that are not ignored as a
    response's length, which are all: hence the division by P + max R for every response. The SFT
    part is a mean over the same row.
    """
    width = len(query.prompt_ids) + max(len(ids) for ids in query.response_ids)
    sums = []
    for ids in query.response_ids:
        inputs = [*query.prompt_ids.tolist(), *ids.tolist()]
        labels = [IGNORED] * (len(query.prompt_ids) - 1) + ids.tolist() + [IGNORED]
        assert len(labels) == len(inputs)
        labels += [IGNORED] * (width - len(labels))
        logps = torch.log_softmax(lm(input_ids=torch.tensor([inputs])).logits[0], dim=-1)
        kept = [logps[t, label] for t, label in enumerate(labels) if label != IGNORED]
        sums.append(sum(kept))
        assert len(labels) == width
    scores = [total / width**length_penalty for total in sums]
    loss = 0.0
    for better, reward in enumerate(query.rewards):
        for worse, other in enumerate(query.rewards):
            if reward > other and scores[worse] > scores[better]:
                loss = loss + scores[worse] - scores[better]
    return loss - sums[int(np.argmax(query.rewards))] / width


def released_step(lm, queries, length_penalty=1.0):
    """Mean loss over the queries, one per device as in the release, and its gradient."""
    lm.zero_grad()
    loss = sum(released_loss(lm, query, length_penalty) for query in queries) / len(queries)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in lm.parameters()])


def engine_step(lm, queries, packing, backward, length_penalty=1.0):
    config = TrainConfig(
        compat="official", packing=packing, length_penalty=length_penalty, max_tokens_per_pack=96
    )
    model = RRHFModel(lm, config, packing=packing, max_length=64)
    planner = PackPlanner(queries, packing=packing, max_tokens_per_pack=96)
    batch, totals = planner.batch(range(len(queries))), Totals()
    lm.zero_grad()
    backward(model, batch, config, World(torch.device("cpu")), totals)
    gradient = torch.cat([p.grad.flatten() for p in lm.parameters()])
    lm.set_attn_implementation("sdpa")
    return totals.means()["loss"], gradient


WAYS = [("forest", backward_whole), ("forest", backward_active), ("none", backward_whole)]


def check(lm, queries, **options):
    loss, gradient = released_step(lm, queries, **options)
    for packing, backward in WAYS:
        our_loss, our_gradient = engine_step(lm, queries, packing, backward, **options)
        way = (packing, backward.__name__)
        assert our_loss == pytest.approx(loss, rel=1e-6), way
        assert (our_gradient - gradient).norm() <= 1e-6 * gradient.norm(), way


@pytest.mark.parametrize("limits", [{}, {"max_length": 24}, {"max_response_length": 3}], ids=str)
def test_rows_of_the_demo(lm, limits):
    """Whole and truncated: padding follows the truncated lengths."""
    lines = [
        ("The cat sat on the mat and", [" slept.", " ran away from the big dog."], [2, 1]),
        ("A", [" b", " c d e f g h i j k l m n o p q r s t"], [0, 1]),
        ("Why", [" not", " so", " because of it all"], [1, 1, 3]),
    ]
    rows = [
        parse_row({"prompt": prompt, "responses": texts, "scores": scores}, f"f:{i}")
        for i, (prompt, texts, scores) in enumerate(lines)
    ]
    limits = {"max_length": 64, "max_prompt_length": 6} | limits
    queries, cut = tokenise_rows(rows, load_tokenizer(str(demo.MODEL_DIR)), RowReport(), **limits)
    assert cut.cut["responses"] > 0 or "max_response_length" not in limits
    check(lm, queries)


def responses(rng, k):
    return [rng.integers(1, VOCAB, rng.integers(1, 9), dtype=np.int32) for _ in range(k)]


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), length_penalty=st.sampled_from([1.0, 0.0, 0.7]))
def test_any_rows(lm, seed, length_penalty):
    """Includes one-token prompts (a lone BOS, or no BOS), ragged k, ties and a lone end token."""
    rng = np.random.default_rng(seed)
    queries = []
    for prompt_length in (1, int(rng.integers(1, 12)), 5):
        response_ids = responses(rng, int(rng.integers(2, 6)))
        rewards = rng.integers(0, 3, len(response_ids)).astype(np.float32)
        prompt = rng.integers(0, VOCAB, prompt_length, dtype=np.int32)
        queries.append(TokenisedQuery(prompt, response_ids, rewards))
    check(lm, queries, length_penalty=length_penalty)
