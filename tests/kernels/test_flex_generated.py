"""FlexAttention's GPU code, generated without a GPU, in Triton's interpreter, against float64.

The interpreter computes bfloat16 dot products wrongly, so float16, for which Inductor selects the
same tiles, stands in for it. Float32, which is refused on a GPU, reveals errors that rounding would
hide, with tiles as large as those of training.
"""

import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch.nn.attention.flex_attention import flex_attention

from rrhf_fast import reference
from rrhf_fast.data.forest import build_forest
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.kernels import generated
from rrhf_fast.model import forest_flex
from rrhf_fast.model.backend import AttentionSpec

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/gpu runs the same on the GPU itself"
)

PLAIN = AttentionSpec(num_heads=2, num_kv_heads=1, head_size=16, value_size=16)
SPECS = {
    "plain": PLAIN,
    "window": replace(PLAIN, window=50),
    "window and softcap": replace(PLAIN, window=50, softcap=2.0, scale=0.3),
    "sinks": replace(PLAIN, has_sinks=True),
    "sinks and window": replace(PLAIN, has_sinks=True, window=130),
    "as many keys as queries": replace(PLAIN, num_kv_heads=2),
    "groups of 4": replace(PLAIN, num_heads=4),
    "groups of 8": replace(PLAIN, num_heads=8),
    "groups of 3": replace(PLAIN, num_heads=3),
    "heads of 64": replace(PLAIN, head_size=64, value_size=64),
    "heads of 80": replace(PLAIN, head_size=80, value_size=80),
    "heads of 128": replace(PLAIN, head_size=128, value_size=128),
    "heads of 256": replace(PLAIN, head_size=256, value_size=256),
    "keys of 192, values of 128": replace(PLAIN, head_size=192, value_size=128),
    "keys of 16, values of 64": replace(PLAIN, value_size=64),
}
# Those of an H100 at heads of 64 and 128; Inductor's for float32 are a quarter of the size, and the
# interpreter's time is proportional to their number.
TILES = {
    "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 128,
    "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 64,
}  # fmt: skip
# Largest relative error in the norm.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


def interpret(kernel, *arguments):
    """Launch a generated kernel in the interpreter."""
    if kernel.is_template:
        *arguments, x, y, z = arguments
        kernel.function[x, y, z](*arguments)
        return
    # Operations around attention have one axis of results, and possibly a sum over another.
    names = list(inspect.signature(kernel.function.fn).parameters)
    blocks = {name: 16 for name in ("XBLOCK", "R0_BLOCK") if name in names}
    grid = triton.cdiv(arguments[names.index("xnumel")], blocks["XBLOCK"])
    kernel.function[grid, 1, 1](*arguments, **blocks)


@pytest.fixture
def on_gpu(monkeypatch):
    """Run forest_flex as on a GPU of a compute capability; yields the generated kernels."""
    torch._dynamo.reset()
    monkeypatch.setattr(triton_helpers, "libdevice", SimpleNamespace(tanh=_tanh))
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=generated.lower)
    monkeypatch.setattr(forest_flex, "compiled", compiled)

    options = forest_flex.kernel_options

    def use(capability=90, tiles=TILES):
        monkeypatch.setattr(forest_flex, "capability", lambda device: capability)
        monkeypatch.setattr(forest_flex, "kernel_options", lambda *a: options(*a) | tiles)
        return generated.pretend(capability, interpret)

    yield use
    torch._dynamo.reset()


def forest(*shapes, multiple=128):
    """One query per shape (prompt, lengths of responses, how many first tokens they share)."""
    rng = np.random.default_rng(0)

    def query(prompt, lengths, shared):
        begin = rng.integers(0, 90, shared, dtype=np.int32)
        ids = [np.append(begin, rng.integers(0, 90, n - shared, dtype=np.int32)) for n in lengths]
        rewards = np.arange(len(ids), dtype=np.float32)
        return TokenisedQuery(rng.integers(0, 90, prompt, dtype=np.int32), ids, rewards)

    return build_forest([query(*shape) for shape in shapes], pad_to_multiple_of=multiple)


# 512 rows: blocks that are invisible, fully visible, and crossed by the trees' borders; the last
# one contains padding.
PACK = forest((200, [90, 200, 20], 5), (3, [5], 0))


def errors(pack, spec, dtype):
    """Relative errors of the output and of the gradients of query, key, value and sinks."""
    g = torch.Generator().manual_seed(0)
    n = pack.num_tokens

    def draw(heads, size):  # laid out as by a decoder's projections
        states = torch.randn(1, n, heads, size, generator=g).to(dtype)
        return states.transpose(1, 2).requires_grad_()

    tensors = [
        draw(spec.num_heads, spec.head_size),
        draw(spec.num_kv_heads, spec.head_size),
        draw(spec.num_kv_heads, spec.value_size),
    ]
    if spec.has_sinks:
        tensors.append(torch.randn(spec.num_heads, generator=g).requires_grad_())
    upstream = torch.randn(1, n, spec.num_heads, spec.value_size, generator=g).to(dtype)
    options = {"scale": spec.scale, "window": spec.window, "softcap": spec.softcap}
    out = forest_flex.attend(
        *tensors[:3], forest_flex.plan(pack), sinks=(*tensors, None)[3], **options
    )
    actual = [out, *torch.autograd.grad(out, tensors, upstream)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    q, k, v = (t[0] for t in exact[:3])
    out = reference.forest_attention(
        q, k, v, pack.subtree_end, pack.position_ids, sinks=(*exact, None)[3], **options
    )
    expected = [out[None], *torch.autograd.grad(out, exact, upstream[0].double())]
    return [
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip(actual, expected, strict=True)
    ]


def test_a_wrong_stride_would_show():
    """The pack has full blocks, and each of its lists differs by columns and by rows."""
    mask = forest_flex.plan(PACK).mask(None)
    assert mask.full_kv_num_blocks.sum() > 0
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (
            getattr(mask, f"{kind}_{part}")[0, 0] for part in ("num_blocks", "indices")
        )
        by_rows, by_columns = (
            [set(row[:count].tolist()) for row, count in zip(matrix, counts, strict=True)]
            for matrix in (indices, indices.T)
        )
        assert by_rows != by_columns


@pytest.mark.parametrize("kind", SPECS)
def test_equals_float64(kind, on_gpu):
    with on_gpu() as kernels:
        deviations = errors(PACK, SPECS[kind], torch.float32)
    assert max(deviations) <= TOLERANCES[torch.float32], deviations
    # Attention and its backward were generated, not replaced by fallback operators.
    assert [kernel.is_template for kernel in kernels].count(True) == 2


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("kind", ["heads of 128", "heads of 256"])
def test_the_tiles_of_training_on_every_gpu(kind, capability, on_gpu):
    with on_gpu(capability, tiles={}):
        deviations = errors(PACK, SPECS[kind], torch.float16)
    assert max(deviations) <= TOLERANCES[torch.float16], deviations


@pytest.mark.parametrize(
    "pack",
    [
        forest((5, [30, 20], 3)),  # one block: sizes of 1 become constants
        forest((5, [30, 20], 3), multiple=1),  # short enough for a decoding kernel
        forest((150, [60, 40], 20), multiple=1),
    ],
    ids=lambda pack: str(pack.num_tokens),
)
@pytest.mark.parametrize("kind", ["plain", "groups of 3"])
def test_packs_of_every_length(pack, kind, on_gpu):
    with on_gpu() as kernels:
        deviations = errors(pack, SPECS[kind], torch.float32)
    assert max(deviations) <= TOLERANCES[torch.float32], deviations
    assert not [kernel for kernel in kernels if "BLOCK_M = 16" in kernel.source]


def test_lengths_share_kernels(on_gpu):
    packs = [
        forest((150, [60, 40, 33], 20), (20, [30, 40, 25], 0)),
        forest((40, [90, 70, 20], 5)),
        PACK,
    ]
    with on_gpu() as kernels:
        for pack in packs:
            assert max(errors(pack, PLAIN, torch.float32)) <= TOLERANCES[torch.float32]
    assert [kernel.is_template for kernel in kernels].count(True) == 2
