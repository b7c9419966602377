"""Compile every kernel configuration, without a GPU, and print what the machine code needs.

    python -m rrhf_fast.kernels.report
    python -m rrhf_fast.kernels.report --out kernels.json

Registers and stack are those of a thread; shared memory is that of a program. A spill is a load or
store of registers to local memory. Must run without TRITON_INTERPRET.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rrhf_fast.kernels import adamw_bf16, generated, linear_logprob, ranking, scale
from rrhf_fast.kernels.configs import TILES, Tile
from rrhf_fast.model import forest_flex
from rrhf_fast.model.backend import AttentionSpec

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that one program may have.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
VARIANTS = ("plain", "bias", "softcap", "bias softcap")
INTEGERS = (
    "num_edges", "num_active", "hidden_size", "vocab_size", "first_token", "width",
    "num_values", "num_blocks",
)  # fmt: skip
FLOATS = ("logit_scale", "softcap", "margin")
INDICES = ("targets", "active", "path_edges", "path_offsets", "group_offsets", "best", "num_pairs")


@dataclass(frozen=True)
class Usage:
    """One compiled kernel."""

    kernel: str
    variant: str
    arch: int  # compute capability, 90 for 9.0
    registers: int
    stack: int  # bytes
    spills: int  # instructions
    shared: int  # bytes
    matrix: str  # the matrix instruction, or ""
    doubles: int  # lines of PTX that compute in float64
    accesses: dict[int, int]  # loads and stores of global memory in PTX, by a thread's bytes


# Layers as models have them, for the code that is generated for attention.
FLEX_LAYERS = {
    "Llama 3.2 1B": AttentionSpec(num_heads=32, num_kv_heads=8, head_size=64, value_size=64),
    "Llama 3 8B": AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, value_size=128),
    "Phi 2": AttentionSpec(num_heads=32, num_kv_heads=32, head_size=80, value_size=80),
    "Gemma 2 2B": AttentionSpec(
        num_heads=8, num_kv_heads=4, head_size=256, value_size=256, window=4096, softcap=50.0
    ),
    "gpt-oss": AttentionSpec(
        num_heads=64, num_kv_heads=8, head_size=64, value_size=64, window=128, has_sinks=True
    ),
    "DeepSeek V2 Lite": AttentionSpec(num_heads=16, num_kv_heads=16, head_size=192, value_size=128),
}


def compile_flex(capabilities: Sequence[int] = tuple(generated.SHARED_LIMITS)) -> Iterator[Usage]:
    """Forward and backward of forest_flex for each of `FLEX_LAYERS` and compute capability, in
    bfloat16, as Inductor generates them for it."""
    for arch, (name, spec) in itertools.product(capabilities, FLEX_LAYERS.items()):
        for kernel in _flex_kernels(spec, arch):
            meta = kernel.info["triton_meta"]
            # Keys were plain numbers in earlier versions.
            attributes = {
                key if isinstance(key, tuple) else (key,): value
                for key, value in meta["configs"][0].items()
            }
            source = ASTSource(kernel.function, meta["signature"], meta["constants"], attributes)
            options = {key: kernel.info[key] for key in ("num_warps", "num_stages")}
            direction = "backward" if "backward" in kernel.name else "forward"
            yield _usage(source, arch, f"flex {direction}", name, options)


def _flex_kernels(spec: AttentionSpec, arch: int) -> list[generated.Kernel]:
    torch._dynamo.reset()
    n = 2 * forest_flex.BLOCK_SIZE

    def draw(heads: int, size: int) -> torch.Tensor:
        states = torch.randn(1, n, heads, size, dtype=torch.bfloat16)
        return states.transpose(1, 2).requires_grad_()

    tensors = [
        draw(spec.num_heads, spec.head_size),
        draw(spec.num_kv_heads, spec.head_size),
        draw(spec.num_kv_heads, spec.value_size),
    ]
    plan = forest_flex.Plan(torch.full((n,), n, dtype=torch.int32), torch.arange(n).int())
    compiled = torch.compile(
        forest_flex.flex_attention, dynamic=True, fullgraph=True, backend=generated.lower
    )
    with (
        generated.pretend(arch) as kernels,
        patch.object(forest_flex, "compiled", compiled),
        patch.object(forest_flex, "capability", lambda device: arch),
    ):
        out = forest_flex.attend(
            *tensors, plan, scale=spec.scale, window=spec.window, softcap=spec.softcap,
            sinks=torch.zeros(spec.num_heads, requires_grad=True) if spec.has_sinks else None,
        )  # fmt: skip
        torch.autograd.grad(out, tensors, torch.ones_like(out))
    return [kernel for kernel in kernels if kernel.is_template]


def compile_all() -> Iterator[Usage]:
    """Every row of the table, plain and with each of the head's options; the forward also as it
    keeps exponentials; and what has no table, on every architecture."""
    for (name, arch, itemsize), tile in TILES.items():
        uses = {"forward": [("forward", False)], "dlogits": [("dlogits", None), ("forward", True)]}
        for kernel_name, keeps in uses[name]:
            yield from _compile_head(kernel_name, arch, itemsize, tile, keeps)
    for arch in SHARED_LIMITS:
        for variant in VARIANTS:
            tile = {"TILE_N": 128, "BLOCK_M": linear_logprob.EXPS_BLOCK_M}
            constants = tile | {
                "BLOCK_N": linear_logprob.EXPS_BLOCK_N, "HAS_SOFTCAP": "softcap" in variant,
                "WANTS_BIAS": "bias" in variant,
            }  # fmt: skip
            if "bias" not in variant:
                constants["bias_sums"] = None
            kernel = linear_logprob.dlogits_of_exps_kernel
            yield _compile(kernel, constants, {"exps": "*bf16"}, arch, f"keep bf16 {variant}", {})
        for kernel in (ranking.forward_kernel, ranking.backward_kernel):
            constants = {"BLOCK_T": ranking.BLOCK_T, "BLOCK_K": ranking.BLOCK_K}
            constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
            yield _compile(kernel, constants, {}, arch, "ranking", {})
        for element in ("fp32", "bf16"):
            types = {"parameter": f"*{element}", "gradient": f"*{element}"}
            types |= {"exp_avg": "*bf16", "exp_avg_sq": "*bf16"}
            kernel, constants = adamw_bf16.update_kernel, {"BLOCK": adamw_bf16.BLOCK}
            options = {"num_warps": adamw_bf16.NUM_WARPS}
            yield _compile(kernel, constants, types, arch, f"adamw {element}", options)
        for element in ("bf16", "fp32"):
            constants, blocks = {"BLOCK": scale.BLOCK}, {"values": f"*{element}"}
            yield _compile(scale.scale_kernel, constants, blocks, arch, element, {})


def _compile_head(
    name: str, arch: int, itemsize: int, tile: Tile, keeps: bool | None
) -> Iterator[Usage]:
    kernel = getattr(linear_logprob, f"{name}_kernel")
    element = {2: "bf16", 4: "fp32"}[itemsize]
    half = f"tensordesc<{element}[{tile.block_m}, {tile.block_n // 2}]>"
    blocks = {
        "states": f"tensordesc<{element}[{tile.block_m}, {tile.block_k}]>",
        "weight": f"tensordesc<{element}[{tile.block_n}, {tile.block_k}]>",
        "dlogits": half,
        "exps": half,
    }
    if not tile.tma:
        blocks |= {"states": f"*{element}", "weight": f"*{element}"}
    for variant in VARIANTS:
        has_bias = "bias" in variant
        constants = {
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
            "GROUP_M": tile.group_m, "HAS_BIAS": has_bias, "HAS_SOFTCAP": "softcap" in variant,
            "PRECISION": "ieee" if itemsize == 4 else "tf32", "TMA": tile.tma, "KEEPS": keeps,
            "WANTS_BIAS": has_bias,
        }  # fmt: skip
        constants |= {} if has_bias else {"bias": None, "bias_sums": None}
        constants |= {} if keeps else {"exps": None}
        constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        label = f"{element} {variant}"
        yield _compile(
            kernel, constants, blocks, arch, f"keep {label}" if keeps else label, options
        )


def _compile(kernel, constants: dict, types: dict, arch: int, variant: str, options: dict) -> Usage:
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        known = types.get(name) or kernel.params[i].annotation_type
        signature[name] = "constexpr" if name in constants else known or _type(name)
        # Pointers as torch allocates, unless they may be slices, and sizes as models have.
        is_aligned = not kernel.params[i].do_not_specialize_on_alignment
        if (signature[name].startswith("*") and is_aligned) or name in ("hidden_size", "width"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    name = kernel.fn.__name__.removesuffix("_kernel")
    return _usage(source, arch, name, variant, options)


def _usage(source: ASTSource, arch: int, name: str, variant: str, options: dict) -> Usage:
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("cuobjdump", "-sass", file.name)
    numbers = dict(
        part.split(":") for part in usage.split() if part.count(":") == 1 and part[-1] != ":"
    )
    ptx = compiled.asm["ptx"]
    return Usage(
        kernel=name,
        variant=variant,
        arch=arch,
        registers=int(numbers["REG"]),
        stack=int(numbers["STACK"]),
        spills=code.count(" LDL") + code.count(" STL"),
        shared=compiled.metadata.shared,
        matrix=next((name for name in MATRIX_INSTRUCTIONS if name in ptx), ""),
        doubles=sum(".f64" in line for line in ptx.splitlines()),
        accesses=_accesses(ptx),
    )


def _accesses(ptx: str) -> dict[int, int]:
    found = re.findall(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    return dict(Counter(int(count or 1) * int(bits) // 8 for count, bits in found))


def _type(name: str) -> str:
    if name in INTEGERS:
        return "i32"
    if name in FLOATS:
        return "fp32"
    if name in (*INDICES, "num_correct"):
        return "*i64"
    return "*i32" if name == "counts" else "*fp32"


def _tool(*command: str) -> str:
    path = TOOLS / command[0]
    return subprocess.run([path, *command[1:]], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print the table, and write it to a file if one is named."""
    parser = argparse.ArgumentParser(description="Compile every kernel; see the module.")
    parser.add_argument("--out", type=Path, help="JSON")
    out = parser.parse_args().out
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    print(" ".join(f"{name} {version}" for name, version in versions.items()))
    print("kernel           variant               sm  regs  stack spills   shared  matrix")
    rows = []
    for u in itertools.chain(compile_all(), compile_flex()):
        numbers = f"{u.arch:>4}{u.registers:>6}{u.stack:>7}{u.spills:>7}{u.shared:>9}"
        print(f"{u.kernel:<17}{u.variant:<20}{numbers}  {u.matrix}", flush=True)
        rows.append(asdict(u))
    if out is not None:
        out.write_text(json.dumps({"versions": versions, "kernels": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
