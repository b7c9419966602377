"""Responses per second of sampling: transformers' generate, the same with each prompt encoded once,
and vLLM where it is installed (`make test-vllm` makes an environment for CPUs, .venv-vllm).

All draw the same number of tokens per response from the same weights, in turns; no response ends
early. Starting vLLM, and its compilation, are not timed.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.plots import ranked_bars
from benchmarks.results import Save, no_save, recorded
from benchmarks.tables import text_table
from benchmarks.timing import interleaved, ratio
from benchmarks.workloads import build_model
from rrhf_fast.model import generate
from rrhf_fast.model.decoder import inference_dtype

PLAIN, ENGINE, VLLM = "transformers", "rrhf_fast transformers", "rrhf_fast vLLM"


@dataclass(frozen=True)
class Workload:
    """Prompts of equal length, and responses of equal length to each."""

    prompts: int
    prompt: int  # tokens
    k: int  # responses per prompt
    response: int  # tokens

    def __str__(self) -> str:
        return f"{self.prompts} prompts of {self.prompt} tokens, k={self.k}, {self.response} new"


SHAPES = {"smoke": "tiny", "paper": "SmolLM2-135M", "full": "SmolLM2-135M"}
GPU_SHAPE = "Llama-3.2-1B"
WORKLOADS = {
    "smoke": [Workload(2, 64, 4, 4)],
    "paper": [Workload(2, 512, 8, 32)],
    "full": [Workload(8, 512, 8, 32), Workload(32, 64, 8, 128)],
}


def run(*, preset: str, device: str, rounds: int, save: Save = no_save) -> dict:
    """Time all ways of drawing responses, on a model of random weights."""
    shape = GPU_SHAPE if device == "cuda" else SHAPES[preset]
    dtype = inference_dtype("auto")
    lm = build_model(shape, device=device).to(dtype)
    figures = {"model": shape, "dtype": str(dtype).removeprefix("torch."), "cases": []}
    with ExitStack() as stack:
        vllm: dict = {}
        with recorded(vllm):
            vllm["draw"] = _vllm(lm, stack)
        for workload in WORKLOADS[preset]:
            case = {"workload": str(workload), **asdict(workload)}
            figures["cases"].append(case)
            with recorded(case):
                case["ways"] = _case(lm, workload, rounds, vllm, case)
            save(figures)
    return figures


# Draws all responses to these prompts, each of the given number of tokens.
Draw = Callable[[Sequence[np.ndarray], Workload], object]


def _case(
    lm: PreTrainedModel, workload: Workload, rounds: int, vllm: dict, record: dict
) -> dict[str, dict]:
    rng = np.random.default_rng(0)
    size = (workload.prompts, workload.prompt)
    prompts = list(rng.integers(0, lm.config.vocab_size, size, dtype=np.int32))
    draws: dict[str, Draw] = {
        PLAIN: lambda *what: _local(lm, *what, encode_once=False),
        ENGINE: lambda *what: _local(lm, *what, encode_once=True),
    }
    results: dict[str, dict] = {name: {} for name in (*draws, VLLM)}
    if "draw" in vllm:
        draws[VLLM] = vllm["draw"]
    else:
        results[VLLM] = dict(vllm)
    ways = {name: lambda draw=draw: draw(prompts, workload) for name, draw in draws.items()}
    for name, way in ways.items():  # to warm up
        with recorded(results[name]):
            way()
    ways = {name: way for name, way in ways.items() if "problem" not in results[name]}
    device = lm.device.type
    times = interleaved(ways, rounds, device=device, results=results, record=record)
    responses = workload.prompts * workload.k
    for name, seconds in times.items():
        results[name] = {
            "seconds": seconds,
            "responses_per_second": median(responses / s for s in seconds),
            "of_transformers": ratio(times[PLAIN], seconds),
        }
    return results


def _local(
    lm: PreTrainedModel, prompts: Sequence[np.ndarray], workload: Workload, *, encode_once: bool
) -> None:
    options = {
        "max_length": lm.config.max_position_embeddings,
        "end_token_ids": [lm.config.vocab_size],  # no token: nothing ends a response early
        "pad_token_id": 0,
    }
    decoding = generate.Decoding(workload.response, count=workload.k)
    with ExitStack() as stack:
        if not encode_once:  # as `generate` alone
            replaced = mock.patch.object(generate, "_encode_once", lambda *_, **__: None)
            stack.enter_context(replaced)
        drawn = generate.generate_batch(lm, prompts, decoding, **options)
    assert all(len(ids) == workload.response for one in drawn for ids in one)


def _vllm(lm: PreTrainedModel, stack: ExitStack) -> Draw:
    """Start vLLM with the same weights."""
    if find_spec("vllm") is None:
        raise ModuleNotFoundError("vLLM is not installed")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    from vllm import LLM, SamplingParams

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    lm.save_pretrained(folder)
    engine = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype=lm.dtype,
        enable_prefix_caching=True,
        max_model_len=1024,
        gpu_memory_utilization=0.5,  # the other weights are there too
    )
    stack.callback(engine.llm_engine.engine_core.shutdown)

    def draw(prompts: Sequence[np.ndarray], workload: Workload) -> None:
        engine.reset_prefix_cache()  # of the round before
        params = SamplingParams(
            n=workload.k, max_tokens=workload.response, ignore_eos=True, detokenize=False
        )
        tokens = [{"prompt_token_ids": ids.tolist()} for ids in prompts]
        drawn = engine.generate(tokens, params, use_tqdm=False)
        assert all(len(one.token_ids) == workload.response for out in drawn for one in out.outputs)

    return draw


def table(figures: dict) -> str:
    """Responses per second of each way, and its speed relative to transformers' generate."""
    lines = [f"{figures['model']}, {figures['dtype']}, {torch.get_num_threads()} threads"]
    for case in figures["cases"]:
        lines += ["", case["workload"]]
        if "problem" in case:
            lines.append(case["problem"])
            continue
        rows = []
        for name, way in case["ways"].items():
            if "problem" in way:
                rows.append([name, way["problem"][:60], ""])
                continue
            speedup = way["of_transformers"]
            spread = f"{speedup['median']:.2f} ({speedup['min']:.2f} - {speedup['max']:.2f})"
            rows.append([name, f"{way['responses_per_second']:.2f}", spread])
        lines.append(text_table(["", "responses/s", "x transformers (range)"], rows))
    return "\n".join(lines)


def plot(figures: dict, path: Path) -> None:
    """Responses per second of each way, one panel per workload."""
    panels = []
    for case in figures["cases"]:
        ways = {n: way for n, way in case.get("ways", {}).items() if "problem" not in way}
        if ways:
            rates = {name: way["responses_per_second"] for name, way in ways.items()}
            panels.append((f"{case['workload']}; {figures['model']}", rates))
    ranked_bars(panels, path, xlabel="responses per second")
