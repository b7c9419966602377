"""Loss and gradient of whole queries: the engine, each of its levers off in turn, and the methods
that others use, interleaved. Optimizer steps are left out of all."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

from benchmarks.baselines import HEADS, released_loss, repeat_prompts
from benchmarks.workloads import (
    LONG_PROMPTS,
    LONG_RESPONSES,
    PAPER,
    SHAPES,
    build_model,
    draw,
    draw_tries,
    real,
    unpacked_tokens,
)
from rrhf_fast import reference
from rrhf_fast.config import LossConfig
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.data.padded import padded_tokens
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model.decoder import load_model
from rrhf_fast.model.rrhf import RRHFModel

RELEASED, REPEATED, ENGINE = "released method", "packed, prompts repeated", "rrhf_fast"
# Largest relative error of the whole gradient, in the norm, against float64.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
LENGTHS = {"paper": PAPER, "long prompts": LONG_PROMPTS, "long responses": LONG_RESPONSES}
# Model shapes and workloads of each preset, without and with a GPU.
PRESETS = {
    "smoke": (["tiny"], ["paper", "long prompts"]),
    "paper": (["SmolLM2-135M"], ["paper"]),
    "full": (["SmolLM2-135M"], [*LENGTHS, "beam search"]),
}
GPU_SHAPES = {"paper": ["Llama-3.2-1B"], "full": list(SHAPES)[1:]}


@dataclass
class Contender:
    """A way to compute loss and gradient of the same queries."""

    lm: PreTrainedModel  # whose gradients add up
    tokens: int  # that the decoder encodes
    parts: list[tuple]  # (what `loss` takes, its number of queries), one forward and backward each
    loss: Callable[..., torch.Tensor]

    def run(self) -> float:
        """The mean loss; gradients are added up in the model."""
        num_queries = sum(count for _, count in self.parts)
        total = 0.0
        for part, count in self.parts:
            loss = self.loss(part) * (count / num_queries)
            loss.backward()
            total += loss.detach()
        return float(total)


def run(
    *,
    preset: str,
    model: str | None,
    data: str | None,
    num_queries: int,
    rounds: int,
    max_tokens_per_pack: int,
) -> dict:
    """Time all contenders on the preset's shapes, or on a real model and real rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if data is not None:
        if model is None:
            raise ValueError("data: real rows need --model, for its tokenizer")
        queries = real(data, model, num_queries)
        lm = load_model(model).to(device)
        cases = [_case(lm, queries, rounds, max_tokens_per_pack)]
        cases[0] |= {"model": Path(model).name, "workload": Path(data).stem}
        return {"cases": cases}
    shapes, workloads = PRESETS[preset]
    if device == "cuda":
        shapes = GPU_SHAPES.get(preset, shapes)
    cases = []
    for shape in shapes:
        for workload in workloads:
            lm = build_model(shape, device=device)
            if workload == "beam search":
                queries = draw_tries(PAPER, num_queries, lm.config.vocab_size)
            else:
                queries = draw(LENGTHS[workload], num_queries, lm.config.vocab_size)
            case = _case(lm, queries, rounds, max_tokens_per_pack)
            cases.append({"model": shape, "workload": workload} | case)
            print(cases[-1], flush=True)
            del lm
    return {"cases": cases}


def _case(
    lm: PreTrainedModel, queries: Sequence[TokenisedQuery], rounds: int, max_tokens: int
) -> dict:
    device, dtype = lm.device, torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        dtype = torch.bfloat16
    # The released code divides by the padded width, so all do here.
    options = {"max_length": 4096, "compute_dtype": dtype}
    plain = copy.deepcopy(lm)
    padded = RRHFModel(plain, LossConfig(compat="official"), packing="none", **options)
    engine = RRHFModel(
        lm, LossConfig(compat="official"), max_tokens=max_tokens, compile=None, **options
    )

    def build(queries: Sequence[TokenisedQuery]) -> dict[str, Contender]:
        return _contenders(engine, padded, queries, max_tokens)

    few = sorted(queries, key=lambda query: query.padded_width)[:2]
    exact_loss, exact = _exact(plain, few)
    checks = {}
    for name, contender in build(few).items():
        loss = contender.run()
        gradient = _gradient(contender.lm)
        checks[name] = {
            "loss_error": abs(loss - exact_loss) / abs(exact_loss),
            "gradient_error": ((gradient - exact).norm() / exact.norm()).item(),
        }
        assert checks[name]["gradient_error"] < TOLERANCES[dtype], (name, checks[name])
    del exact

    contenders = build(queries)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            plain.zero_grad()
            lm.zero_grad()
            seconds[name].append(_seconds(contender.run))
    ratios = [a / b for a, b in zip(seconds[RELEASED], seconds[ENGINE], strict=True)]
    return {
        "queries": len(queries),
        "dtype": str(dtype),
        "responses": sum(len(query.response_ids) for query in queries),
        "unpacked_tokens": unpacked_tokens(queries),
        "contenders": {
            name: {
                "tokens": contender.tokens,
                "queries_per_second": len(queries) / median(seconds[name]),
                "seconds": seconds[name],
                **checks[name],
            }
            for name, contender in contenders.items()
        },
        "speedup": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def _contenders(
    engine: RRHFModel, padded: RRHFModel, queries: Sequence[TokenisedQuery], max_tokens: int
) -> dict[str, Contender]:
    device = engine.lm.device

    def packs(model: RRHFModel, packing: str, max_tokens: int) -> list[tuple]:
        planner = PackPlanner(
            queries,
            packing=packing,
            max_tokens_per_pack=max_tokens,
            **({} if packing == "none" else _pack_options(model)),
        )
        found = planner.packs(range(len(queries)))
        return [(pack.to(device), pack.num_queries) for pack in found]

    def released(query: TokenisedQuery) -> torch.Tensor:
        with padded.autocast():
            return released_loss(padded.lm, query)

    def rows(pack) -> torch.Tensor:
        return padded(pack).loss

    def forest(pack) -> torch.Tensor:
        return engine(pack).loss

    trees = packs(engine, "forest", max_tokens)
    repeated = _repeated(engine, queries, max_tokens)
    padded_count = sum(padded_tokens(query) for query in queries)
    tokens = sum(pack.num_tokens for pack, _ in trees)
    repeated_count = sum(pack.num_tokens for pack, _ in repeated)
    found = {
        RELEASED: Contender(padded.lm, padded_count, [(q, 1) for q in queries], released),
        "padded batches": Contender(
            padded.lm, padded_count, packs(padded, "none", max_tokens), rows
        ),
        REPEATED: Contender(engine.lm, repeated_count, repeated, forest),
        ENGINE: Contender(engine.lm, tokens, trees, forest),
        "one query a pack": Contender(engine.lm, tokens, packs(engine, "forest", 1), forest),
    }
    for name, head in HEADS.items():
        loss = partial(head, engine)
        found[name] = Contender(engine.lm, tokens, trees, loss)
    return found


def _pack_options(model: RRHFModel) -> dict:
    return {"pad_to_multiple_of": model.pad_to_multiple_of, "plan": model.plan}


def _repeated(engine: RRHFModel, queries: Sequence[TokenisedQuery], max_tokens: int) -> list[tuple]:
    """Queries in order into packs of at most max_tokens, their prompts repeated."""
    packs, members, size = [], [], 0
    for i, query in enumerate([*queries, None]):
        own = 0 if query is None else unpacked_tokens([query])
        if members and (query is None or size + own > max_tokens):
            chosen = [queries[j] for j in members]
            pack = repeat_prompts(chosen, members, **_pack_options(engine))
            packs.append((pack.to(engine.lm.device), len(members)))
            members, size = [], 0
        members, size = [*members, i], size + own
    return packs


def _exact(plain: PreTrainedModel, queries: Sequence[TokenisedQuery]) -> tuple[float, torch.Tensor]:
    """Loss and whole gradient by the reference, one response at a time, in float64."""
    model = copy.deepcopy(plain).double()
    total = 0.0
    for query in queries:
        prompt, *responses = (
            torch.from_numpy(ids).long().to(model.device)
            for ids in (query.prompt_ids, *query.response_ids)
        )
        logps = [reference.response_logps(model, prompt, ids) for ids in responses]
        loss, _, _ = reference.rrhf_loss(
            logps,
            torch.from_numpy(query.rewards),
            sft_reduction="mean",
            padded_width=query.padded_width - 1,
        )
        (loss / len(queries)).backward()
        total += loss.item() / len(queries)
    return total, _gradient(model)


def _gradient(model: PreTrainedModel) -> torch.Tensor:
    gradient = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    model.zero_grad()
    return gradient


def _seconds(function: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
