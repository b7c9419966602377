"""Measure the engine on this machine.

python benchmarks/run.py step                                # engine, levers off, other methods
python benchmarks/run.py step --model M --data rows.jsonl    # the same on real rows
python benchmarks/run.py all --preset paper --out figures    # every case, with JSON and plots
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Case -> what it measures; benchmarks/<case>.py has run, table and plot.
CASES = {
    "kernel": "log-probs off the head: this project's kernels and their peers",
    "loss": "the ranking loss on its own",
    "attention": "attention over packed forests, and a decoder",
    "step": "loss and gradient of whole queries: the engine, levers off, other methods",
    "active": "the backward of what has a gradient alone, by how much that is",
    "memory": "peak memory of the same queries",
    "scaling": "time and memory by k, vocabulary, prompt, response and order of the scores",
    "data": "rows to tokens to packs",
}
# Options that name files: figures are published, so they show the name alone.
FILES = ("model", "data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one case or all; returns the exit code."""
    options = vars(_parser().parse_args(arguments))
    case, out = options.pop("case"), options.pop("out")
    options["rounds"] = options["rounds"] or (1 if options["preset"] == "smoke" else 3)
    options = {name: value for name, value in options.items() if value is not None}
    try:
        options["device"] = _device(options["device"])
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        for name in CASES if case == "all" else [case]:
            print(f"== {name}: {CASES[name]}", flush=True)
            _run(name, options, out)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


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
        help="smoke: minutes for all cases on two cores; paper: what is published; full: more",
    )
    shared.add_argument(
        "--rounds", type=_positive, help="each times every contender once; default 3, in smoke 1"
    )
    shared.add_argument("--out", type=Path, help="folder for JSON and plots")
    cases = parser.add_subparsers(dest="case", required=True, metavar="|".join([*CASES, "all"]))
    for name, text in CASES.items():
        case = cases.add_parser(name, parents=[shared], help=text, description=text)
        if name in ("step", "data"):
            case.add_argument("--model", help="causal language model, for --data")
            case.add_argument("--data", help="real rows, JSONL, instead of the preset's lengths")
        if name in ("step", "active"):
            case.add_argument("--num_queries", type=_positive, help="default: as the preset has it")
            case.add_argument("--max_tokens_per_pack", type=_positive, default=2048)
        if name == "step":
            case.add_argument(
                "--profile",
                action="store_true",
                help="instead: trace the engine's steps, and say on one page where the time goes",
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
        raise ValueError("device: cuda was asked for, and torch finds no CUDA GPU")
    return name


def _run(case: str, options: dict, out: Path | None) -> None:
    if case in ("step", "data") and ("model" in options) != ("data" in options):
        raise ValueError("model, data: real rows need --model, for its tokenizer; expected both")
    if options.pop("profile", False):
        _profile(options, out)
        return
    module = import_module(f"benchmarks.{case}")
    figures = module.run(**options)
    print(module.table(figures), flush=True)
    options = {k: Path(v).name if k in FILES else v for k, v in options.items()}
    figures |= {"environment": environment(options["device"]), "case": case, "options": options}
    if out is not None:
        names = [options[key].removesuffix(".jsonl") for key in FILES if key in options]
        device = figures["environment"]["device"].lower().replace(" ", "-")
        stem = "-".join([case, *(names or [options["preset"]]), device])
        (out / f"{stem}.json").write_text(json.dumps(figures, indent=1) + "\n")
        module.plot(figures, out / f"{stem}.png")


def _profile(options: dict, out: Path | None) -> None:
    from benchmarks.profile_step import profile

    if out is None:
        raise ValueError("profile: needs --out, a folder for the trace and its page")
    num_steps = options.pop("rounds")
    print(profile(**options, num_steps=num_steps, out=out).page())


def environment(device: str) -> dict:
    """What the figures depend on."""
    import torch

    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
