"""Run a graph of stages in several processes; finished stages survive any kill.

work/<key>/   a stage's files; log.txt; finally result.json, which marks it as done
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import wait
from pathlib import Path

from experiments.recipe import Stage
from rrhf_fast.stages.files import write_text


class StageFailed(RuntimeError):
    """A stage raised; the message names its folder and the error."""


def run_stages(results: Iterable[Stage], work: Path, jobs: int) -> None:
    """Run all stages that these need and that are not done yet.

    Raises:
        StageFailed: a stage failed; those under way are finished first.
    """
    todo = all_stages(results, work)
    # These take longest and need no input.
    todo.sort(key=lambda stage: stage.kind != "make")
    waiting, total, started = list(todo), len(todo), time.monotonic()
    if not todo:
        return
    work.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")  # imports once, forks in an instant
    context.set_forkserver_preload(["experiments.report"])
    running: dict[multiprocessing.Process, Stage] = {}
    failed: list[tuple[Stage, int]] = []
    while running or (waiting and not failed):
        pending = {stage.key for stage in [*waiting, *running.values()]}
        ready = [s for s in waiting if not pending.intersection(i.key for i in s.inputs)]
        while ready and len(running) < jobs and not failed:
            stage = ready.pop(0)
            waiting.remove(stage)
            process = context.Process(target=_work, args=(stage, work))
            process.start()
            running[process] = stage
        done = wait([process.sentinel for process in running])
        for process in [process for process in running if process.sentinel in done]:
            process.join()
            stage = running.pop(process)
            if process.exitcode != 0:
                failed.append((stage, process.exitcode))
            count = total - len(waiting) - len(running)
            minutes = (time.monotonic() - started) / 60
            print(
                f"{count}/{total} {stage.kind} {stage.key}: "
                f"{'failed' if process.exitcode else 'done'} ({minutes:.1f} min)",
                flush=True,
            )
    if failed:
        (stage, code), log = failed[0], work / failed[0][0].key / "log.txt"
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        problem = f"killed by signal {-code}" if code < 0 else (lines or [f"exit code {code}"])[-1]
        raise StageFailed(f"{stage.kind} {stage.key}: {problem} (see {log})")


def read_result(stage: Stage, work: Path) -> dict:
    """The measures and the environment of a finished stage."""
    return json.loads((work / stage.key / "result.json").read_text())


def all_stages(results: Iterable[Stage], work: Path | None = None) -> list[Stage]:
    """These stages and their inputs, each once, inputs first. Given the folder `work`, only those
    that are not done."""
    stages: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.key in stages or (work and (work / stage.key / "result.json").exists()):
            return
        for needed in stage.inputs:
            visit(needed)
        stages[stage.key] = stage

    for stage in results:
        visit(stage)
    return list(stages.values())


def _work(stage: Stage, work: Path) -> None:
    """Run one stage, in a process of its own."""
    import torch

    from experiments.stages import KINDS, build_config

    folder = work / stage.key
    folder.mkdir(parents=True, exist_ok=True)
    # A process that outlived its killed parent may still run this stage: wait for it.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "result.json").exists():
            return
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            torch.set_num_threads(1)
            (folder / "stage.json").write_text(
                json.dumps({"kind": stage.kind, "options": stage.options}, indent=1)
            )
            measures = KINDS[stage.kind].run(build_config(stage.kind, stage.options), folder)
            # Of the CPU, not of the clock: other processes change it little.
            seconds = round(sum(os.times()[:4]), 2)
            result = {"environment": _environment(), "measures": measures, "seconds": seconds}
            write_text(folder / "result.json", json.dumps(result))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


def _environment() -> dict[str, str]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    environment = {"device": device}
    for name in ("torch", "transformers", "trl", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            environment[name] = version(name)
    return environment
