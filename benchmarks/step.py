"""Loss and gradient of whole queries: the engine, each of its levers off in turn, and the methods
that others use, interleaved. Optimizer steps are left out of all."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

from benchmarks.baselines import HEADS, released_loss, repeat_prompts
from benchmarks.plots import ranked_bars
from benchmarks.points import ENGINE, PADDED, RELEASED, REPEATED
from benchmarks.tables import text_table
from benchmarks.timing import interleaved, ratio
from benchmarks.workloads import (
    EQUAL,
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
from rrhf_fast import TrainConfig, reference
from rrhf_fast.config import LossConfig
from rrhf_fast.data.forest import PackedForest
from rrhf_fast.data.packs import Batch, PackPlanner
from rrhf_fast.data.padded import padded_tokens
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.engine.backward import backward_active, is_worthwhile
from rrhf_fast.engine.distributed import World
from rrhf_fast.engine.evaluate import Totals
from rrhf_fast.model.decoder import load_model
from rrhf_fast.model.rrhf import RRHFModel

# Largest relative error of the whole gradient, in the norm, against float64.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
LENGTHS = {
    "paper": PAPER,
    "prompt as long as responses": EQUAL,
    "long prompts": LONG_PROMPTS,
    "long responses": LONG_RESPONSES,
}
# Model shapes, workloads and queries of each preset, without and with a GPU.
PRESETS = {
    "smoke": (["tiny"], ["paper", "long prompts"], 4),
    "paper": (["SmolLM2-135M"], ["paper", "prompt as long as responses"], 4),
    "full": (["SmolLM2-135M"], [*LENGTHS, "beam search"], 4),
}
GPU_PRESETS = {
    "smoke": (["tiny"], ["paper", "long prompts"], 16),
    "paper": (["Llama-3.2-1B"], ["paper", "long prompts"], 64),
    "full": (list(SHAPES)[1:], [*LENGTHS, "beam search"], 64),
}


@dataclass
class Contender:
    """A way to compute loss and gradient of the same queries."""

    lm: PreTrainedModel  # whose gradients add up
    tokens: int  # that the decoder encodes
    run: Callable[[], float]  # the mean loss; gradients are added up in `lm`


def run(
    *,
    preset: str,
    device: str,
    rounds: int,
    max_tokens_per_pack: int = 2048,
    num_queries: int | None = None,
    model: str | None = None,
    data: str | None = None,
) -> dict:
    """Time all contenders on the preset's shapes, or on a real model and real rows.

    Raises:
        ValueError: rows without a model, or rows or model that cannot be read.
    """
    shapes, workloads, count = (GPU_PRESETS if device == "cuda" else PRESETS)[preset]
    count = num_queries or count
    if data is not None:
        queries = real(data, model, count)
        case = _case(load_model(model).to(device), queries, rounds, max_tokens_per_pack)
        return {"cases": [{"model": Path(model).name, "workload": Path(data).stem} | case]}
    cases = []
    for shape in shapes:
        for workload in workloads:
            lm = build_model(shape, device=device)
            if workload == "beam search":
                queries = draw_tries(PAPER, count, lm.config.vocab_size)
            else:
                queries = draw(LENGTHS[workload], count, lm.config.vocab_size)
            case = _case(lm, queries, rounds, max_tokens_per_pack)
            cases.append({"model": shape, "workload": workload} | case)
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

    planner = PackPlanner(
        queries, packing="forest", max_tokens_per_pack=max_tokens, **_pack_options(engine)
    )
    trees = planner.packs(range(len(queries)))
    takes_active = is_worthwhile(TrainConfig(), _active_fraction(engine, trees))
    few = sorted(queries, key=lambda query: query.padded_width)[:2]
    exact_loss, exact = _exact(plain, few)
    checks = {}
    for name, contender in contenders(engine, padded, few, max_tokens, takes_active).items():
        loss = contender.run()
        gradient = _gradient(contender.lm)
        checks[name] = {
            "loss_error": abs(loss - exact_loss) / abs(exact_loss),
            "gradient_error": ((gradient - exact).norm() / exact.norm()).item(),
        }
        assert max(checks[name].values()) < TOLERANCES[dtype], (name, checks[name])
    del exact

    def forget() -> None:
        plain.zero_grad()
        lm.zero_grad()

    ways = contenders(engine, padded, queries, max_tokens, takes_active)
    seconds = interleaved({name: way.run for name, way in ways.items()}, rounds, before=forget)
    return {
        "queries": len(queries),
        "dtype": str(dtype),
        "responses": sum(len(query.response_ids) for query in queries),
        "unpacked_tokens": unpacked_tokens(queries),
        "contenders": {
            name: {
                "tokens": way.tokens,
                "queries_per_second": len(queries) / median(seconds[name]),
                "times_released": ratio(seconds[RELEASED], seconds[name]),
                "seconds": seconds[name],
                **checks[name],
            }
            for name, way in ways.items()
        },
        "over_repeated": ratio(seconds[REPEATED], seconds[ENGINE]),
    }


def contenders(
    engine: RRHFModel,
    padded: RRHFModel,
    queries: Sequence[TokenisedQuery],
    max_tokens: int,
    takes_active: bool,
) -> dict[str, Contender]:
    """Every way, by name. `padded` is the same model on the padded layout; `takes_active` is what
    the trainer would choose by default."""
    device = engine.device

    def packs(model: RRHFModel, packing: str, max_tokens: int) -> list[tuple]:
        options = {} if packing == "none" else _pack_options(model)
        planner = PackPlanner(queries, packing=packing, max_tokens_per_pack=max_tokens, **options)
        found = planner.packs(range(len(queries)))
        return [(pack.to(device), pack.num_queries) for pack in found]

    def released(query: TokenisedQuery) -> torch.Tensor:
        with padded.autocast():
            return released_loss(padded.lm, query)

    def rows(pack) -> torch.Tensor:
        return padded(pack).loss

    def forest(pack) -> torch.Tensor:
        return engine(pack).loss

    def way(model: RRHFModel, loss: Callable, parts: list[tuple], tokens: int) -> Contender:
        return Contender(model.lm, tokens, partial(_add_up, loss, parts))

    trees = packs(engine, "forest", max_tokens)
    repeated = _repeated(engine, queries, max_tokens)
    padded_count = sum(padded_tokens(query) for query in queries)
    tokens, repeated_count = (
        sum(pack.num_tokens for pack, _ in parts) for parts in (trees, repeated)
    )
    active = partial(_active, engine, trees, len(queries), max_tokens)
    whole = way(engine, forest, trees, tokens)
    by_active = Contender(engine.lm, tokens, active)
    found = {
        RELEASED: way(padded, released, [(query, 1) for query in queries], padded_count),
        PADDED: way(padded, rows, packs(padded, "none", max_tokens), padded_count),
        REPEATED: way(engine, forest, repeated, repeated_count),
    }
    if takes_active:
        found |= {ENGINE: by_active, "without the active set": whole}
    else:
        found |= {ENGINE: whole, "active set all the same": by_active}
    found["one query a pack"] = way(engine, forest, packs(engine, "forest", 1), tokens)
    for name, head in HEADS.items():
        found[name] = way(engine, partial(head, engine), trees, tokens)
    return found


def _add_up(loss: Callable, parts: list[tuple]) -> float:
    """Forward and backward of each of `parts`: what `loss` takes, and its number of queries."""
    num_queries, total = sum(count for _, count in parts), 0.0
    for part, count in parts:
        mean = loss(part) * (count / num_queries)
        mean.backward()
        total += mean.detach()
    return float(total)


def _active(engine: RRHFModel, trees: list[tuple], num_queries: int, max_tokens: int) -> float:
    totals = Totals(engine.device)
    config = replace(TrainConfig(), max_tokens_per_pack=max_tokens)
    batch = Batch([pack for pack, _ in trees], num_queries)
    backward_active(engine, batch, config, World(engine.device), totals)
    return totals.means()["loss"]


def _active_fraction(engine: RRHFModel, trees: Sequence[PackedForest]) -> float:
    totals = Totals(engine.device)
    for pack in trees:
        pack = pack.to(engine.device)
        _, weights = engine(pack, wants_weights=True)
        totals.add_active(pack, weights != 0)
    return totals.active_fraction


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
            packs.append((pack.to(engine.device), len(members)))
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


def table(figures: dict) -> str:
    """Tokens, queries/s and the ratio to the released method of every contender."""
    parts = []
    for case in figures["cases"]:
        header = [_title(case), "tokens", "queries/s", "times released"]
        rows = [
            [
                name,
                f"{c['tokens']:,}",
                f"{c['queries_per_second']:.2f}",
                "{median:.2f} ({min:.2f} to {max:.2f})".format(**c["times_released"]),
            ]
            for name, c in case["contenders"].items()
        ]
        over = "rrhf_fast over packed with repeated prompts: {median:.2f} ({min:.2f} to {max:.2f})"
        parts.append(text_table(header, rows) + "\n" + over.format(**case["over_repeated"]))
    return "\n\n".join(parts)


def plot(figures: dict, path: Path) -> None:
    """Speed as a multiple of the released method's."""
    panels = [
        (_title(c), {name: w["times_released"]["median"] for name, w in c["contenders"].items()})
        for c in figures["cases"]
    ]
    ranked_bars(panels, path, xlabel="queries/s, times the released method's")


def _title(case: dict) -> str:
    return f"{case['model']}, {case['workload']}, {case['queries']} queries"
