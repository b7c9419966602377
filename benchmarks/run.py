"""Measure the engine on this machine.

python benchmarks/run.py step                                # engine, levers off, other methods
python benchmarks/run.py step --model M --data rows.jsonl    # the same on real rows
python benchmarks/run.py step --compute_dtype bfloat16       # in bfloat16, on a CPU
python benchmarks/run.py all --preset paper --out figures    # every case, with JSON and plots

On a CPU figures need a machine that does nothing else. Where other programs use over 5 % of the
cores, a run does not start, and a round is repeated; with --busy_ok runs start all the same, and
the figures say so. Threads are bound to cores.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import cores

# Case -> what it measures; benchmarks/<case>.py has run, table and plot.
CASES = {
    "kernel": "log-probs off the head: this project's kernels and their peers",
    "loss": "the ranking loss alone",
    "attention": "attention over packed forests, and a decoder",
    "step": "loss and gradient of whole queries: the engine, levers off, other methods",
    "peers": "trainers of others, each in its own process: DPO, and the released trainer",
    "active": "the backward of the active set, by the share of tokens with a gradient",
    "pairs": "other losses of a pair, and a reference, against the paper's hinge",
    "memory": "peak memory of the same queries",
    "scaling": "time and memory by k, vocabulary, prompt, response and order of the scores",
    "loop": "steps of whole runs: the wait for packs, and the first step",
    "data": "rows to tokens to packs",
    "rows": "from rows to the first step: time and memory by the number of rows",
    "sample": "responses per second, with vLLM where it is installed",
}
# Cases that run in one process, whose threads are bound to cores: other processes would inherit the
# first thread's one core. `memory` and `scaling` bind those of the processes they measure.
BOUND = ("kernel", "loss", "attention", "step", "active", "pairs")
# Rounds unless --rounds says how many. In one process they are short, and are interleaved.
ROUNDS, BOUND_ROUNDS = 3, 5
ON_ROWS = ("step", "peers", "loop", "data")  # cases that take a real model and rows
# Options that name files: published figures show only the name, not the path.
FILES = ("model", "data")
# Options that figures do not depend on.
UNSHOWN = ("peers_python",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one case or all; return the exit code: 0, 1 if a case failed, 2 for invalid options, a
    machine that other programs use, or a package that is not installed."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = vars(_parser().parse_args(arguments))
    case, out = options.pop("case"), options.pop("out")
    if case == "all":
        return _run_all(arguments)
    is_real = options.get("data") is not None
    options["rounds"] = options["rounds"] or _rounds(case, options["preset"], is_real)
    options = {name: value for name, value in options.items() if value is not None}
    print(f"== {case}: {CASES[case]}", flush=True)
    try:
        options["device"] = _device(options["device"], case)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        return _run(case, options, out)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"error: {error.name}: not installed here (make test installs it)", file=sys.stderr)
    return 2


def _run_all(arguments: Sequence[str]) -> int:
    """Run every case in a process of its own, since only some bind their threads; return 1 if one
    failed or was killed, else the largest exit code."""
    at = arguments.index("all")
    before, after = arguments[:at], arguments[at + 1 :]
    command = [sys.executable, __file__]
    codes = {name: subprocess.call([*command, *before, name, *after]) for name in CASES}
    for name, code in codes.items():
        if code:
            print(f"error: {name}: {_ending(code)}", file=sys.stderr)
    return max(codes.values()) if set(codes.values()) <= {0, 2} else 1


def _ending(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    named = {one.value: one.name for one in signal.Signals}
    return f"killed by {named.get(-code, f'signal {-code}')}"


def _rounds(case: str, preset: str, is_real: bool) -> int | None:
    if preset == "smoke" and not is_real:  # figures of real rows may be published
        return 1
    # A round of steps may take minutes: it chooses.
    return None if case == "step" else BOUND_ROUNDS if case in BOUND else ROUNDS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    shared.add_argument(
        "--preset",
        choices=["smoke", "paper", "full"],
        default="smoke",
        help="smoke: minutes for all cases on two cores; paper: as published; full: more",
    )
    shared.add_argument(
        "--rounds",
        type=_positive,
        help="each times every contender once, after one to warm up; default 5, where a round "
        "lasts long 3, for smoke without --data 1",
    )
    shared.add_argument(
        "--busy_ok", action="store_true", help="measure beside other programs, and mark the figures"
    )
    shared.add_argument("--out", type=Path, help="folder for JSON and plots")
    cases = parser.add_subparsers(dest="case", required=True, metavar="|".join([*CASES, "all"]))
    for name, text in CASES.items():
        case = cases.add_parser(name, parents=[shared], help=text, description=text)
        if name in ON_ROWS:
            case.add_argument("--model", help="causal language model, for --data")
            case.add_argument("--data", help="real rows, JSONL, instead of the preset's lengths")
            case.add_argument(
                "--model_note",
                help="what figures say of its weights; default: what the weights themselves tell",
            )
        if name in ("kernel", "step", "peers"):
            case.add_argument(
                "--compute_dtype",
                choices=["float32", "bfloat16"],
                help="default: bfloat16 on a GPU that supports it, else float32",
            )
        if name == "step":
            case.add_argument("--only", nargs="+", metavar="CONTENDER", help="default: all")
        if name == "peers":
            case.add_argument(
                "--workloads", nargs="+", choices=["pairs", "all responses"], help="default: both"
            )
            case.add_argument(
                "--peers_python",
                nargs="+",
                metavar="PYTHON",
                help="interpreters that have peers which this one lacks; those of make peers are "
                "found by themselves",
            )
        if name in ("step", "active", "peers"):
            case.add_argument("--num_queries", type=_positive, help="default: the preset's")
            case.add_argument(
                "--max_tokens_per_pack", type=_positive, help="default: 16384 on a GPU, else 2048"
            )
        if name == "step":
            case.add_argument(
                "--profile",
                action="store_true",
                help="instead: trace the engine's steps, and break down their time on one page",
            )
    cases.add_parser("all", parents=[shared], help="every case in turn")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def _device(name: str, case: str) -> str:
    """The device; loads torch, with threads bound to cores for a case on the CPU in `BOUND`."""
    if case in BOUND and name != "cuda":
        cores.bind()
    import torch

    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError("device: expected a CUDA GPU for cuda, torch finds none")
    device = "cuda" if name == "cuda" or (name == "auto" and found) else "cpu"
    if device == "cuda" or case not in BOUND:
        cores.free()
    return device


def _run(case: str, options: dict, out: Path | None) -> int:
    from benchmarks.machine import environment
    from benchmarks.results import describe, write_json
    from benchmarks.workloads import weights_note

    note = options.pop("model_note", None)
    if case in ON_ROWS and ("model" in options) != ("data" in options):
        raise ValueError("model, data: real rows need --model, for its tokenizer; expected both")
    profile = options.pop("profile", False)
    if profile and out is None:
        raise ValueError("profile: needs --out, a folder for the trace and its page")
    about = {"environment": environment(options["device"]), "case": case}
    about["environment"] |= _load(options)
    if profile:
        _profile(options, out)
        return 0
    module = import_module(f"benchmarks.{case}")
    shown = {k: Path(v).name if k in FILES else v for k, v in options.items() if k not in UNSHOWN}
    about["options"] = shown
    if "model" in options:
        about["weights"] = note or weights_note(options["model"])
    names = [shown[key].removesuffix(".jsonl") for key in FILES if key in shown]
    names = (names or [shown["preset"]]) + [shown[k] for k in ("compute_dtype",) if k in shown]
    device = about["environment"]["device"].lower().replace(" ", "-")
    stem = "-".join([case, *names, device])
    figures: dict = {}

    def save(new: dict) -> None:
        figures.update(new)
        if out is not None:
            write_json(out / f"{stem}.json", figures | about)

    try:
        save(module.run(**options, save=save))
        print(module.table(figures), flush=True)
        for text in cores.remarks(figures | about):
            print(f"note: {text}", flush=True)
        if "weights" in about:
            print(f"weights of {shown['model']}: {about['weights']}", flush=True)
        if out is not None:
            module.plot(figures, out / f"{stem}.png")
    except Exception as error:
        if not figures and isinstance(error, ValueError | OSError):
            raise  # invalid options
        print(f"error: {case}: {describe(error)}", file=sys.stderr)
        return 1
    return 0


def _load(options: dict) -> dict:
    """What other programs use of the CPU, for the record. A smoke test goes on all the same."""
    busy_ok = options.pop("busy_ok")
    if options["device"] == "cuda":
        return {}
    only_tries = options["preset"] == "smoke" and "data" not in options
    load = cores.check_load(refuse=not (busy_ok or only_tries))
    return {"load": load | ({"busy_ok": True} if busy_ok else {})}


def _profile(options: dict, out: Path) -> None:
    from benchmarks.profile_step import profile

    num_steps = options.pop("rounds", 3)
    print(profile(**options, num_steps=num_steps, out=out).page())


if __name__ == "__main__":
    sys.exit(main())
