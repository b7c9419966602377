"""Others' trainers against this engine: DPO of TRL and LLaMA-Factory on the best and the worst
response of each row, and the released trainer of RRHF on whole rows.

Every contender runs in a process of its own, with an interpreter that has it, gets the same tokens
and weights, and takes the same step again and again at a learning rate of 0. First each takes one
step, whose loss and gradient are compared with this engine's. Then, in each round, one after the
other in a shuffled order takes a step, while the others wait.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks import kernel
from benchmarks.exact import without_near_ties
from benchmarks.machine import compute_dtype as dtype_of
from benchmarks.peer_processes import Peer, find, missing
from benchmarks.plots import ranked_bars
from benchmarks.results import Save, no_save, recorded
from benchmarks.tables import text_table
from benchmarks.timing import in_rounds, ratio
from benchmarks.workloads import PACK_TOKENS, PAPER, build_model, draw, real
from rrhf_fast import demo, reference
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model.decoder import load_model, load_tokenizer

SCRIPTS = "benchmarks.peer_scripts"
BETA = 0.1  # DPO's default
DPO = {"pair_loss": "logistic", "reference": "initial", "beta": BETA}
DPO |= {"length_penalty": 0.0, "rank_reduction": "mean", "sft_weight": 0.0}
# Largest relative difference of the loss, and (norm) of the gradient, from this engine's.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
# Nats per token between scores that rounding could swap; such responses form no pair.
NEAR_TIES = {"float32": 1e-4, "bfloat16": 0.005}
QUERIES = {"smoke": 4, "paper": 8, "full": 24}
REAL = 8  # rows of a file


@dataclass(frozen=True)
class Contender:
    """A trainer, and what it computes."""

    module: str  # in `SCRIPTS`
    computes: str
    package: str | None = None  # that its interpreter must have besides transformers
    loss: Mapping | None = None  # of this engine
    is_compared: bool = True  # otherwise no peer computes the same loss


ENGINE_DPO, ENGINE_OFFICIAL = "rrhf_fast, DPO", "rrhf_fast, --compat official"
TRL, FACTORY, RELEASED = "TRL's DPOTrainer", "LLaMA-Factory's DPO", "the released trainer"
PAIRS = {
    ENGINE_DPO: Contender(
        "engine", "DPO; the prompt of a pair once; the reference's log-probs before", loss=DPO
    ),
    "rrhf_fast, RRHF": Contender(
        "engine", "hinge and SFT, the defaults; without a reference", loss={}, is_compared=False
    ),
    TRL: Contender(
        "trl_dpo",
        "DPO; both rows padded with the prompt in each; the reference's log-probs before",
        "trl",
    ),
    FACTORY: Contender(
        "llamafactory_dpo",
        "DPO; both rows padded with the prompt in each; the reference's forward in each step",
        "llamafactory",
    ),
}
ROWS = {
    ENGINE_OFFICIAL: Contender(
        "engine", "the same loss, all responses of a row at once", loss={"compat": "official"}
    ),
    RELEASED: Contender(
        "released",
        "rows padded with the prompt in each, logits of all tokens, in transformers.Trainer",
        "accelerate",
    ),
}
# Workload -> what all its contenders are measured against, and those.
WORKLOADS = {"pairs": (ENGINE_DPO, PAIRS), "all responses": (ENGINE_OFFICIAL, ROWS)}


def run(
    *,
    preset: str,
    device: str,
    rounds: int,
    model: str | None = None,
    data: str | None = None,
    num_queries: int | None = None,
    max_tokens_per_pack: int | None = None,
    compute_dtype: str | None = None,
    peers_python: Sequence[str] = (),
    workloads: Sequence[str] = tuple(WORKLOADS),
    save: Save = no_save,
) -> dict:
    """Compare, then time, all contenders that can be found.

    Args:
        rounds: of timing; 0 only compares.
        model, data: real rows, instead of the preset's.
        peers_python: interpreters to look for peers in that this one lacks.
        workloads: names, instead of all.

    Raises:
        ValueError: rows or model cannot be read.
    """
    dtype = compute_dtype or str(dtype_of(device)).removeprefix("torch.")
    count = num_queries or (QUERIES[preset] if data is None else REAL)
    figures: dict = {"dtype": dtype, "cases": []}
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        named, path, queries = _inputs(preset, model, data, count, Path(folder))
        job = {"model": path, "device": device, "dtype": dtype, "beta": BETA}
        job["max_tokens"] = max_tokens_per_pack or PACK_TOKENS[device]
        for workload in workloads:
            case = named | {"workload": workload, "contenders": {}}
            figures["cases"].append(case)
            with recorded(case):
                if workload == "pairs":
                    kept = _pairs(queries)
                else:
                    near = (path, device, _by_length(queries), NEAR_TIES[dtype])
                    kept, case["near_ties"] = _without_near_ties(*near)
                case["rows"] = len(kept)
                case["responses"] = sum(len(query.response_ids) for query in kept)
                told = partial(save, figures)
                _measure(case, job, kept, rounds, peers_python, Path(folder), told)
            save(figures)
        config = AutoConfig.from_pretrained(path)
    if device == "cuda":
        shape = (job["max_tokens"], config.hidden_size, config.vocab_size)
        options = {"preset": preset, "device": device, "rounds": rounds, "shapes": [shape]}
        figures["head"] = kernel.run(**options, compute_dtype=dtype)
    return figures


def _inputs(
    preset: str, model: str | None, data: str | None, count: int, folder: Path
) -> tuple[dict, str, list[TokenisedQuery]]:
    """Names for the figures, the folder of model and tokenizer, and the rows in tokens."""
    if data is not None:
        named = {"model": Path(model).name, "data": Path(data).stem}
        # Peers start in another folder.
        path = str(Path(model).absolute()) if Path(model).exists() else model
        return named, path, real(data, model, count)
    if preset == "smoke":
        rows = real(str(demo.TRAIN_FILE), str(demo.MODEL_DIR), count)
        return {"model": "demo", "data": "demo"}, str(demo.MODEL_DIR), rows
    shape = "SmolLM2-135M"
    lm = build_model(shape, device="cpu")
    lm.save_pretrained(folder / "model")
    # Of the tokenizer, trainers only read the tokens for padding and for the end.
    load_tokenizer(str(demo.MODEL_DIR)).save_pretrained(folder / "model")
    rows = draw(PAPER, count, lm.config.vocab_size)
    return {"model": f"{shape} shape", "data": str(PAPER)}, str(folder / "model"), rows


def _pairs(queries: Sequence[TokenisedQuery]) -> list[TokenisedQuery]:
    """The best and the worst response of each row that has responses of unequal rewards."""
    made = []
    for query in queries:
        best, worst = int(query.rewards.argmax()), int(query.rewards.argmin())
        if query.rewards[best] > query.rewards[worst]:
            ids = [query.response_ids[best], query.response_ids[worst]]
            made.append(replace(query, response_ids=ids, rewards=query.rewards[[best, worst]]))
    if not made:
        raise ValueError("no row has responses of unequal scores")
    return _by_length(made)


def _by_length(queries: Sequence[TokenisedQuery]) -> list[TokenisedQuery]:
    """Rows of similar length next to each other: with as little padding as batches can have."""
    return sorted(queries, key=lambda query: query.padded_width)


def _without_near_ties(
    path: str, device: str, queries: Sequence[TokenisedQuery], near: float
) -> tuple[list[TokenisedQuery], int]:
    """The queries with equal rewards where rounding could swap two scores, so that the hinge has
    the same gradient whoever computes it; and how many rewards that changes."""
    lm, kept, changed = load_model(path).to(device), [], 0
    for number, query in enumerate(queries, 1):
        _say(f"scoring row {number} of {len(queries)}")
        prompt, *responses = (
            torch.from_numpy(ids).long().to(lm.device)
            for ids in (query.prompt_ids, *query.response_ids)
        )
        with torch.no_grad():
            sums = [reference.response_logps(lm, prompt, ids).sum().item() for ids in responses]
        width, shortest = query.padded_width, min(map(len, responses))
        scores = np.array(sums) / width
        rewards = without_near_ties(query.rewards, scores, near * shortest / width)
        changed += int((rewards != query.rewards).sum())
        kept.append(replace(query, rewards=rewards))
    return kept, changed


def _measure(
    case: dict,
    job: dict,
    queries: Sequence[TokenisedQuery],
    rounds: int,
    pythons: Sequence[str],
    folder: Path,
    save: Callable[[], None],
) -> None:
    """Start and compare every contender, then time those that work; results are added to `case`."""
    engine, contenders = WORKLOADS[case["workload"]]
    results, running = case["contenders"], {}
    job = job | {"rows": [_as_lists(query) for query in queries]}
    # As after some steps: otherwise the loss of every pair would be log 2.
    job["shifts"] = [[(i % 3) - 1.0, (i % 5) / 2 - 1.0] for i in range(len(queries))]
    exact: dict = {}
    with ExitStack() as stack:
        for name, contender in contenders.items():
            result = results[name] = {"computes": contender.computes}
            with recorded(result):
                python = find(contender.package, pythons)
                if python is None:
                    result["problem"] = missing(contender.package)
                    continue
                _say(f"{case['workload']}: starting {name}")
                own = job | {"loss": contender.loss, "gradient": str(folder / "gradient.pt")}
                module = f"{SCRIPTS}.{contender.module}"
                slug = f"{case['workload']}-{len(results)}".replace(" ", "-")
                peer = stack.enter_context(Peer(python, module, own, folder, slug))
                result |= peer.answer()
                if result["threads"] != torch.get_num_threads():
                    raise RuntimeError(f"has {result['threads']} threads, as others do not")
                first = peer.step()
                result |= {"loss": first["loss"], "tokens": first["tokens"]}
                gradient = torch.load(own["gradient"])
                if name == engine:
                    exact |= {"loss": first["loss"], "gradient": gradient}
                elif contender.is_compared:
                    _compare(result, gradient, exact, TOLERANCES[job["dtype"]])
                running[name] = peer
            save()
        del exact
        if rounds == 0:
            return
        calls = {name: partial(_step, name, peer) for name, peer in running.items()}
        # The step that was compared warmed it up.
        options = {"device": job["device"], "results": results, "record": case}
        seconds = in_rounds(calls, rounds, **options, is_warm=True)
    for name, steps in seconds.items():
        results[name] |= _figures(steps, len(queries))
        if engine in seconds:
            results[name] |= _over_engine(steps, seconds[engine])


def _as_lists(query: TokenisedQuery) -> dict:
    return {
        "prompt": query.prompt_ids.tolist(),
        "responses": [ids.tolist() for ids in query.response_ids],
        "rewards": query.rewards.tolist(),
    }


def _compare(result: dict, gradient: dict, exact: dict, tolerance: float) -> None:
    """Add the relative differences from this engine's loss and gradient; mark large ones."""
    if not exact:
        raise RuntimeError("nothing to compare with: rrhf_fast failed")
    ours = exact["gradient"]
    if ours.keys() != gradient.keys():
        raise RuntimeError(f"other weights: {sorted(ours.keys() ^ gradient.keys())[:3]}")
    squares = sum((gradient[name] - ours[name]).double().square().sum() for name in ours)
    total = sum(tensor.double().square().sum() for tensor in ours.values())
    result["loss_difference"] = abs(result["loss"] - exact["loss"]) / abs(exact["loss"])
    result["gradient_difference"] = (squares / total).sqrt().item()
    if not max(result["loss_difference"], result["gradient_difference"]) < tolerance:
        result["problem"] = "differs from rrhf_fast"


def _step(name: str, peer: Peer) -> dict:
    figures = peer.step()
    _say(f"{name}: {figures['seconds']:.2f} s")
    return figures


def _figures(steps: Sequence[dict], num_rows: int) -> dict:
    """Of a contender: the steps of all rounds, and rows per second."""
    figures: dict = {name: [step[name] for step in steps] for name in steps[0]}
    figures |= {"loss": steps[-1]["loss"], "tokens": steps[-1]["tokens"]}
    figures["peak_mib"] = max(figures["peak_mib"])
    figures["rows_per_second"] = num_rows / median(figures["seconds"])
    if "reference_seconds" in steps[0]:
        figures["reference_in_step"] = True
        figures["reference_seconds"] = median(figures["reference_seconds"])
    return figures


def _over_engine(steps: Sequence[dict], ours: Sequence[dict]) -> dict:
    """Times this engine's seconds, of gradients and of steps; and of gradients without the
    reference's forward, where a step has it."""
    ratios = {}
    for what in ("gradient_seconds", "seconds"):
        theirs = [step[what] for step in steps]
        ratios[f"{what}_over_engine"] = ratio(theirs, [step[what] for step in ours])
    if "reference_seconds" in steps[0]:
        theirs = [step["gradient_seconds"] - step["reference_seconds"] for step in steps]
        engine = [step["gradient_seconds"] for step in ours]
        ratios["without_reference_over_engine"] = ratio(theirs, engine)
    return ratios


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(figures: dict) -> str:
    """Medians in seconds of all rows, and times this engine's."""
    parts = []
    header = ["tokens", "gradients, s", "steps, s", "reference, s", "ms per row", "times ours"]
    header += ["of steps", "differs by", ""]
    for case in figures["cases"]:
        ways = case["contenders"]
        rows = [[name, *_cells(result, case["rows"])] for name, result in ways.items()]
        parts.append(text_table([_title(case, figures["dtype"]), *header], rows))
        if "problem" in case:
            parts.append(case["problem"])
        for name, result in ways.items():
            setting = f"; {result['setting']}" if "setting" in result else ""
            parts[-1] += f"\n{name}: {result['computes']}{setting}"
    if "head" in figures:
        parts.append(kernel.table(figures["head"]))
    return "\n\n".join(parts)


def _cells(result: dict, num_rows: int) -> list[str]:
    problem = result.get("problem", "")[:80]
    if "seconds" not in result:
        return [""] * 8 + [problem or "not timed"]
    reference = ""
    if "reference_seconds" in result:
        where = " (in it)" if "reference_in_step" in result else " (before)"
        reference = f"{result['reference_seconds']:.2f}{where}"
    gradients, steps = (
        "{median:.2f} ({min:.2f} to {max:.2f})".format(**result[f"{what}_over_engine"])
        if f"{what}_over_engine" in result
        else ""
        for what in ("gradient_seconds", "seconds")
    )
    differs = result.get("gradient_difference")
    return [
        f"{result['tokens']:,}",
        f"{median(result['gradient_seconds']):.2f}",
        f"{median(result['seconds']):.2f}",
        reference,
        f"{median(result['seconds']) / num_rows * 1e3:,.0f}",
        gradients,
        steps,
        "" if differs is None else f"{differs:.0e}",
        problem,
    ]


def plot(figures: dict, path: Path) -> None:
    """Time of whole steps as a multiple of this engine's."""
    panels = []
    for case in figures["cases"]:
        ways = case["contenders"].items()
        times = {
            n: w["seconds_over_engine"]["median"] for n, w in ways if "seconds_over_engine" in w
        }
        if times:
            panels.append((_title(case, figures["dtype"]), times))
    ranked_bars(panels, path, xlabel="seconds of a step, times rrhf_fast's")


def _title(case: dict, dtype: str) -> str:
    rows = f"{case.get('rows', 'no')} rows"
    return f"{case['model']}, {case['data']}, {rows}, {case['workload']}, {dtype}"
