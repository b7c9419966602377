"""Measure the engine on this machine.

python benchmarks/run.py step                                # engine, levers off, other methods
python benchmarks/run.py step --model M --data rows.jsonl    # the same on real rows
python benchmarks/run.py all --preset paper --out figures    # every case, with JSON and plots
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Case -> what it measures; benchmarks/<case>.py has run, table and plot.
CASES = {
    "kernel": "log-probs off the head: this project's kernels and their peers",
    "loss": "the ranking loss alone",
    "attention": "attention over packed forests, and a decoder",
    "step": "loss and gradient of whole queries: the engine, levers off, other methods",
    "active": "the backward of the active set, by the share of tokens with a gradient",
    "memory": "peak memory of the same queries",
    "scaling": "time and memory by k, vocabulary, prompt, response and order of the scores",
    "data": "rows to tokens to packs",
}
# Options that name files: published figures show only the name, not the path.
FILES = ("model", "data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one case or all; return the exit code: 0, 1 if a case failed, 2 for invalid options."""
    options = vars(_parser().parse_args(arguments))
    case, out = options.pop("case"), options.pop("out")
    options["rounds"] = options["rounds"] or (1 if options["preset"] == "smoke" else 3)
    options = {name: value for name, value in options.items() if value is not None}
    codes = []
    try:
        options["device"] = _device(options["device"])
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        return _complain(error)
    for name in CASES if case == "all" else [case]:
        print(f"== {name}: {CASES[name]}", flush=True)
        try:
            codes.append(_run(name, dict(options), out))
        except (ValueError, OSError) as error:
            codes.append(_complain(error))
    return max(codes)


def _complain(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


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
        "--rounds", type=_positive, help="each times every contender once; default 3, for smoke 1"
    )
    shared.add_argument("--out", type=Path, help="folder for JSON and plots")
    cases = parser.add_subparsers(dest="case", required=True, metavar="|".join([*CASES, "all"]))
    for name, text in CASES.items():
        case = cases.add_parser(name, parents=[shared], help=text, description=text)
        if name in ("step", "data"):
            case.add_argument("--model", help="causal language model, for --data")
            case.add_argument("--data", help="real rows, JSONL, instead of the preset's lengths")
        if name in ("step", "active"):
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


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA GPU for cuda, torch finds none")
    return name


def _run(case: str, options: dict, out: Path | None) -> int:
    from benchmarks.machine import environment
    from benchmarks.results import describe, write_json

    if case in ("step", "data") and ("model" in options) != ("data" in options):
        raise ValueError("model, data: real rows need --model, for its tokenizer; expected both")
    if options.pop("profile", False):
        _profile(options, out)
        return 0
    module = import_module(f"benchmarks.{case}")
    shown = {k: Path(v).name if k in FILES else v for k, v in options.items()}
    about = {"environment": environment(options["device"]), "case": case, "options": shown}
    names = [shown[key].removesuffix(".jsonl") for key in FILES if key in shown]
    device = about["environment"]["device"].lower().replace(" ", "-")
    stem = "-".join([case, *(names or [shown["preset"]]), device])
    figures: dict = {}

    def save(new: dict) -> None:
        figures.update(new)
        if out is not None:
            write_json(out / f"{stem}.json", figures | about)

    try:
        save(module.run(**options, save=save))
        print(module.table(figures), flush=True)
        if out is not None:
            module.plot(figures, out / f"{stem}.png")
    except Exception as error:
        if not figures and isinstance(error, ValueError | OSError):
            raise  # invalid options
        print(f"error: {case}: {describe(error)}", file=sys.stderr)
        return 1
    return 0


def _profile(options: dict, out: Path | None) -> None:
    from benchmarks.profile_step import profile

    if out is None:
        raise ValueError("profile: needs --out, a folder for the trace and its page")
    num_steps = options.pop("rounds")
    print(profile(**options, num_steps=num_steps, out=out).page())


if __name__ == "__main__":
    sys.exit(main())
