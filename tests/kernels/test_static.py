"""Static checks of every kernel's machine code, for three architectures, without a GPU."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiles with triton")

from rrhf_fast.kernels.configs import TILES, choose

ROOT = Path(__file__).parents[2]
TRITON = ".".join(version("triton").split(".")[:2])
SPECIALISATIONS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from rrhf_fast.kernels.adamw_bf16 import update_kernel as kernel
backend = make_backend(GPUTarget("cuda", 90, 32))
bind = create_function_from_signature(kernel.signature, kernel.params, backend)
tensors = [torch.zeros(64), torch.zeros(64), *torch.zeros(2, 64).bfloat16(), torch.ones(())]
kinds = set()
for size, seed, count, rate in [(1, 1, 1, 1), (16, 0, 16, 1.0), (2**33, 2**64 - 1, 999, 1e-3)]:
    kinds.add(str(bind(*tensors, size, seed, count, count - 1, *[rate] * 8, BLOCK=512)[1]))
print(len(kinds))
"""
# Counts and alignments that differ from pack to pack, for each kernel that takes a pack's tensors.
PACKS = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from rrhf_fast.kernels import linear_logprob, ranking, scale
backend = make_backend(GPUTarget("cuda", 90, 32))
sizes = {"hidden_size": 64, "vocab_size": 50257, "width": 50272, "first_token": 0}
sizes |= {"num_values": 64}
variants = {}
for module in (linear_logprob, ranking, scale):
    for label, kernel in vars(module).items():
        if not label.endswith("_kernel"):
            continue
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        kinds = set()
        for count, start in [(1, 0), (16, 1), (37, 1), (4096, 2)]:
            arguments = {}
            for parameter in kernel.params:
                name = parameter.name
                if parameter.is_constexpr:
                    arguments[name] = 16
                elif name in ("num_edges", "num_active", "num_blocks"):
                    arguments[name] = count
                elif name in sizes or name in ("logit_scale", "softcap", "beta", "margin"):
                    arguments[name] = sizes.get(name, 1.0)
                else:
                    slices = getattr(module, "SLICES", ())
                    arguments[name] = torch.zeros(64)[start if name in slices else 0 :]
            kinds.add(str(bind(**arguments)[1]))
        variants[f"{module.__name__} {label}"] = len(kinds)
print(json.dumps(variants))
"""
SCRIPT = """
import json
from dataclasses import asdict
from rrhf_fast.kernels.report import SHARED_LIMITS, compile_all
print(json.dumps({"limits": SHARED_LIMITS, "kernels": [asdict(u) for u in compile_all()]}))
"""


FLEX = """
import json, sys
from dataclasses import asdict
from rrhf_fast.kernels import generated, report
kernels = [asdict(u) for u in report.compile_flex(json.loads(sys.argv[1]))]
print(json.dumps({"limits": generated.SHARED_LIMITS, "kernels": kernels}))
"""
# Spilled instructions of the worst of report.FLEX_LAYERS, forward and backward, rounded up, with
# triton 3.6.0 and 3.7.1. FlexAttention's default warps and tiles spill up to 17,443 (sm_80),
# 1,522 (sm_90), 4,387 (sm_100) and 4,800 (sm_120).
FLEX_SPILLS = {80: (20, 310), 90: (120, 560), 100: (60, 170), 120: (5, 120)}


def compiled(script, *arguments):
    """The output of a script in a process that compiles kernels instead of interpreting them."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_no_spills_shared_memory_fits_and_the_right_matrix_instructions():
    report = compiled(SCRIPT)
    # Four variants of each row of the table; those of the backward also for the forward that keeps
    # exponentials; and the kernels without a product, on each architecture.
    rows = [2 if kernel == "dlogits" else 1 for kernel, _, _ in TILES]
    assert len(report["kernels"]) == 4 * sum(rows) + (4 + 4 + 2 + 2) * len(report["limits"])
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for usage in report["kernels"]:
        assert usage["doubles"] == 0, usage
        # Exceptions: no known model caps the logits of a head with a bias; and triton 3.6 spills
        # two registers in the forward that keeps exponentials on Hopper.
        if (usage["variant"], usage["arch"], TRITON) == ("keep bf16 plain", 90, "3.6"):
            assert usage["spills"] <= 4, usage
        elif "bias softcap" not in usage["variant"]:
            assert usage["spills"] == usage["stack"] == 0, usage
        # Consumer cards (8.6, 8.9, 12.0) run the rows of 8.0 in 99 KB.
        limit = 99 * 1024 if usage["arch"] == 80 else report["limits"][str(usage["arch"])]
        assert usage["shared"] <= limit, usage
        is_product = usage["kernel"] in ("forward", "dlogits") and "bf16" in usage["variant"]
        assert usage["matrix"] == (instruction[usage["arch"]] if is_product else ""), usage
        if usage["kernel"] == "dlogits_of_exps":
            # 16 bytes at a time, for any vocabulary (the report assumes no divisibility).
            assert usage["accesses"].get("16", 0) >= 2, usage
            assert usage["registers"] < 128, usage
        if "adamw" in usage["variant"]:
            # Reads and writes of parameter, gradient and moments in each of four blocks: single
            # elements only in the tensor's last program.
            is_float32 = "fp32" in usage["variant"]
            expected = {"16": 4 * 3, "8": 4 * 4} if is_float32 else {"8": 4 * 7}
            wide = {size: n for size, n in usage["accesses"].items() if int(size) > 4}
            assert wide == expected, usage


def test_every_device_finds_a_tile_that_it_can_run():
    assert choose("forward", 86, 2) is TILES["forward", 80, 2]
    assert choose("forward", 90, 2) is TILES["forward", 90, 2]
    assert choose("dlogits", 103, 2) is TILES["dlogits", 100, 2]
    assert choose("dlogits", 100, 4) is TILES["dlogits", 80, 4]
    assert choose("forward", 120, 2) is TILES["forward", 80, 2]


def test_neither_size_nor_step_nor_rate_recompiles_the_optimizer():
    """Triton compiles variants of a kernel for each type, for 1, and for multiples of 16."""
    assert compiled(SPECIALISATIONS) == 1


def test_no_pack_recompiles_a_kernel():
    variants = compiled(PACKS)
    assert len(variants) == 6
    assert set(variants.values()) == {1}, variants


@pytest.mark.slow
@pytest.mark.parametrize("capability", FLEX_SPILLS)
def test_generated_attention_fits_and_spills_little(capability):
    report = compiled(FLEX, json.dumps([capability]))
    assert len(report["kernels"]) == 2 * 6
    for usage in report["kernels"]:
        assert usage["shared"] <= report["limits"][str(capability)], usage
        assert usage["spills"] <= FLEX_SPILLS[capability]["backward" in usage["kernel"]], usage
        assert usage["matrix"], usage
