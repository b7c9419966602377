"""The directly built block mask against PyTorch's, which evaluates all pairs."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from rrhf_fast.data.forest import build_forest
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model import forest_flex


def forest_of(num_tokens, seed, multiple=1):
    """Queries of many shapes, `num_tokens` rows in total; the last query fills up the rest."""
    rng = np.random.default_rng(seed)
    queries, left = [], num_tokens
    while left > 0:
        prompt = rng.integers(0, 3, min(left, rng.integers(1, 400)), dtype=np.int32)
        answers = [
            rng.integers(0, 3, rng.integers(1, 300), dtype=np.int32)
            for _ in range(rng.integers(1, 9))
        ]
        query = TokenisedQuery(prompt, answers, np.zeros(len(answers), np.float32))
        size = build_forest([query]).num_tokens
        if size > left:  # a single response adds its length minus one
            query = TokenisedQuery(prompt[:1], [np.zeros(left, np.int32)], np.zeros(1, np.float32))
            size = left
        queries.append(query)
        left -= size
    pack = build_forest(queries, pad_to_multiple_of=multiple)
    assert pack.num_tokens == -(-num_tokens // multiple) * multiple
    return pack


def columns(counts, indices):
    rows = zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)
    return [sorted(row[:count]) for count, row in rows]


@pytest.mark.parametrize("num_tokens", [1, 2, 127, 128, 129, 1000, 2048, 4099, 16_000, 16_384])
def test_equals_create_block_mask_block_by_block(num_tokens):
    pack = forest_of(num_tokens, seed=num_tokens)
    end = pack.subtree_end
    ours = forest_flex.plan(pack).mask(None)
    n = pack.num_tokens
    theirs = create_block_mask(
        lambda b, h, i, j: (j <= i) & (i < end[j]), None, None, n, n, device="cpu"
    )
    assert ours.shape == theirs.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        actual, expected = (
            columns(getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices"))
            for mask in (ours, theirs)
        )
        assert actual == expected, name
        for part in ("num_blocks", "indices"):
            a, b = (getattr(mask, f"{name}_{part}") for mask in (ours, theirs))
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.is_contiguous()  # the kernels read it with unit stride


def test_the_cases_hold_every_kind_of_block():
    """Otherwise the test above could not fail."""
    mask = forest_flex.plan(forest_of(16_384, seed=16_384)).mask(None)
    partial, full = mask.kv_num_blocks.sum().item(), mask.full_kv_num_blocks.sum().item()
    assert full > 50 and partial > 128 and partial + full < 128 * 129 // 2


@pytest.mark.parametrize("num_tokens", [1, 129, 1000, 4099])
@pytest.mark.parametrize("window", [1, 20, 128, 300, 5000])
@pytest.mark.parametrize("multiple", [1, 128])
def test_with_a_window_full_blocks_are_visible_and_skipped_ones_are_not(
    num_tokens, window, multiple
):
    pack = forest_of(num_tokens, seed=num_tokens, multiple=multiple)
    block = 64
    mask = forest_flex.block_mask(pack.subtree_end, pack.position_ids, window, block_size=block)
    n = pack.num_tokens
    row, depth = torch.arange(n), pack.position_ids
    visible = (row <= row[:, None]) & (row[:, None] < pack.subtree_end)
    visible &= depth[:, None] - depth < window
    allowed = mask.mask_mod(0, 0, row[:, None], row)
    assert torch.equal(allowed, visible)
    partial, full = (columns(*x) for x in (
        (mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)
    ))  # fmt: skip
    for a in range(len(partial)):
        assert not set(partial[a]) & set(full[a])
        queries = slice(a * block, (a + 1) * block)
        for c in range(len(partial)):
            part = visible[queries, c * block : (c + 1) * block]
            if c in full[a]:
                assert part.numel() == block * block and part.all()
            elif c not in partial[a]:
                assert not part.any()


def test_a_window_skips_blocks_behind_it():
    response = np.zeros(4096, np.int32)
    query = TokenisedQuery(response[:1], [response], np.zeros(1, np.float32))
    plan = forest_flex.plan(build_forest([query]))
    # Blocks of 128: a block is skipped unless the query block's first row sees its last row, and
    # full if the query block's last row sees its first.
    for window, partial, full in [
        (1, 1, 0), (2, 2, 0), (129, 2, 0), (130, 3, 0), (255, 3, 0), (256, 2, 1), (258, 3, 1),
    ]:  # fmt: skip
        mask = plan.mask(window)
        last = (mask.kv_num_blocks[0, 0, -1].item(), mask.full_kv_num_blocks[0, 0, -1].item())
        assert last == (partial, full), window


@pytest.mark.usefixtures("flex_on_cpu")
def test_changing_lengths_share_compilations():
    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def attend(num_tokens):
        pack = forest_of(num_tokens, seed=1, multiple=128)
        n = pack.num_tokens
        q, k, v = torch.randn(1, 4, n, 8), torch.randn(1, 2, n, 8), torch.randn(1, 2, n, 8)
        plan = forest_flex.plan(pack)
        for window in (None, 40):
            forest_flex.attend(q, k, v, plan, window=window)

    torch._dynamo.reset()
    before = graphs()
    attend(7 * 128)  # like the trial at start-up
    # One kind of layer with a window, one without.
    assert graphs() - before == 2
    for num_tokens in (200, 300, 1000, 777, 4000):
        attend(num_tokens)
    assert graphs() - before == 2
