"""Parts of the first run on a GPU that are not benchmarks by themselves: checks, and benchmarks
that retry with smaller packs if memory runs out. Each saves its figures as it goes, and raises on
any problem."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import attention, kernel, machine, memory, packs, profile_step, step
from benchmarks.points import ENGINE
from benchmarks.results import Save, problems, ran_out, recorded


def best(*, device: str, save: Save) -> None:
    """The machine's name, versions and ceilings."""
    save(machine.measured_best(device))


def head(*, save: Save, **options) -> None:
    """This project's heads against float64; options as for `kernel.run`."""
    _require(kernel.run(**options, preset="smoke", rounds=0, save=save))


def attend(*, save: Save, **options) -> None:
    """Attention backends against float64, on every row of a pack; options as for
    `attention.run`."""
    options |= {"preset": "smoke", "rounds": 0, "whole": True, "decoder": False}
    _require(attention.run(**options, save=save))


def engine(*, save: Save, **options) -> None:
    """Loss and gradient of the engine against float64, and whether it fell back from its preferred
    options; options as for `step.run`."""
    figures = step.run(**options, preset="smoke", rounds=0, only=[ENGINE], save=save)
    _require(figures)
    warnings = [line for case in figures["cases"] for line in case["warnings"]]
    if warnings:
        raise RuntimeError("; ".join(warnings))


def _require(figures: dict) -> None:
    """Raise on any problem, or if nothing was checked."""
    if lines := problems(figures):
        raise RuntimeError("\n".join(lines))
    if not all(case["contenders"] for case in figures["cases"]):
        raise RuntimeError("nothing was checked: no contender has one of these names")


def tests(*, paths: Sequence[str], workers: int, save: Save) -> None:
    """Run pytest on `paths`, in `workers` processes if pytest-xdist is installed."""
    import pytest

    recorder = _Recorder(save)
    options = ["-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    try:
        import xdist  # noqa: F401
    except ImportError:
        pass
    else:
        options += ["-n", str(workers)]
    code = pytest.main([*options, *paths], plugins=[recorder])
    recorder.figures["exit_code"] = int(code)
    save(recorder.figures)
    if code != 0:
        raise RuntimeError(f"pytest ended with exit code {int(code)}")


class _Recorder:
    """A pytest plugin that saves the results so far after every test."""

    def __init__(self, save: Save):
        self.figures = {"passed": 0, "failed": {}, "skipped": 0, "seconds": {}}
        self.save = save

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.figures["failed"][report.nodeid] = report.longreprtext.splitlines()[-8:]
        elif report.skipped:
            self.figures["skipped"] += 1
        elif report.when == "call":
            self.figures["passed"] += 1
        if report.when == "call" and report.duration > 5:
            self.figures["seconds"][report.nodeid] = report.duration
        if report.when == "teardown":
            self.save(self.figures)


def tiles(
    *, device: str, edges: int, hidden_size: int, vocab_size: int, sizes: Sequence, save: Save
) -> None:
    """Times of the head's kernels by tile, (block_m, block_n, block_k, num_warps, num_stages)."""
    from rrhf_fast.kernels import linear_logprob, tune
    from rrhf_fast.kernels.configs import Tile

    dtype = machine.compute_dtype(device)
    g = torch.Generator(device).manual_seed(0)
    states, weight = (
        torch.randn(rows, hidden_size, generator=g, device=device).to(dtype)
        for rows in (edges, vocab_size)
    )
    targets = torch.randint(vocab_size, (edges,), generator=g, device=device)
    tma = linear_logprob.capability(states) >= 90
    figures: dict = {"shape": [edges, hidden_size, vocab_size], "tiles": []}

    def report(line: str) -> None:
        figures["tiles"].append(line)
        save(figures)

    chosen = [Tile(*size, tma=tma) for size in sizes]
    figures["fastest"] = tune.tune(states, weight, targets, chosen, report)
    save(figures)


def profile(*, folder: str, save: Save, **options) -> None:
    """Where an optimizer step's time goes; options as for `profile_step.profile`."""

    def measure(max_tokens: int, engine_options: dict, save: Save) -> dict:
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        page = profile_step.profile(
            **options, out=out, max_tokens_per_pack=max_tokens, engine_options=engine_options
        )
        return {
            "seconds": page.total,
            "parts": page.seconds,
            "mfu": page.utilisation,
            "tokens_per_second": page.num_tokens / page.total,
        }

    fitting(measure, options.pop("max_tokens"), options.pop("engine_options"), save)


def contenders(*, save: Save, **options) -> None:
    """The engine and other methods; options as for `step.run`."""

    def measure(max_tokens: int, engine_options: dict, save: Save) -> dict:
        more = {"max_tokens_per_pack": max_tokens, "engine_options": engine_options}
        return step.run(**options, **more, save=save)

    fitting(measure, options.pop("max_tokens"), options.pop("engine_options"), save)


def fitting(
    measure: Callable[[int, dict, Save], dict], max_tokens: int, engine_options: dict, save: Save
) -> None:
    """Call `measure` (tokens per pack, engine options, save) until memory suffices: with packs of
    half the size, then also with checkpointed layers.

    Raises:
        RuntimeError: the last attempt failed as a whole.
    """
    tries: dict[str, dict] = {}
    for size, mode in ((max_tokens, "none"), (max_tokens // 2, "none"), (max_tokens // 2, "full")):
        name = f"packs of {size}, checkpointing {mode}"
        tries[name] = result = {}
        options = engine_options | {"activation_checkpointing": mode}
        with recorded(result):
            result |= measure(size, options, lambda so_far, name=name: save(tries | {name: so_far}))
        save(tries)
        if not ran_out(result):
            break
    if "problem" in result:
        raise RuntimeError(result["problem"])


def by_size(*, save: Save, **options) -> None:
    """The engine by pack size; options as for `packs.run`."""
    packs.run(**options, save=save)


def peaks(*, save: Save, **options) -> None:
    """Peak memory; options as for `memory.run`."""
    memory.run(**options, save=save)
