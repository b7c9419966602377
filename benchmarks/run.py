"""Measure the engine on this machine.

python benchmarks/run.py step --preset smoke                # engine, levers off, other methods
python benchmarks/run.py step --model M --data rows.jsonl   # the same on real rows
python benchmarks/run.py head                               # the head's kernels against peers'
python benchmarks/run.py active                             # backward of the active set alone
python benchmarks/run.py attention                          # packed forests against unpacked rows
"""

import argparse
import json
import platform
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    """Run one benchmark, print its figures, and write them as JSON when --out is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--rounds", type=int, default=3, help="each times every contender once")
    shared.add_argument("--out", type=Path, help="folder for JSON and plot")
    cases = parser.add_subparsers(dest="case", required=True)
    step = cases.add_parser("step", parents=[shared], help="loss and gradient of whole queries")
    step.add_argument("--preset", choices=["smoke", "paper", "full"], default="smoke")
    step.add_argument("--model", help="folder or name of a causal language model, for --data")
    step.add_argument("--data", help="real rows, JSONL, instead of the preset's shapes")
    step.add_argument("--num_queries", type=int, default=8)
    step.add_argument("--max_tokens_per_pack", type=int, default=2048)
    active = cases.add_parser("active", parents=[shared], help="backward of what has a gradient")
    active.add_argument("--preset", choices=["smoke", "paper"], default="smoke")
    active.add_argument("--num_queries", type=int, default=20)
    active.add_argument("--max_tokens_per_pack", type=int, default=4096)
    cases.add_parser("head", parents=[shared], help="log-probs off the head, on its own")
    attention = cases.add_parser("attention", parents=[shared], help="attention, and a decoder")
    attention.add_argument("--tokens", type=int, default=16_384, help="of a pack, about")
    options = vars(parser.parse_args())
    out, case = options.pop("out"), options.pop("case")

    module = import_module(f"benchmarks.{case}")
    figures = module.run(**options)
    # Names, not paths: figures are published.
    named = ("model", "data")
    options = {k: Path(v).name if k in named and v else v for k, v in options.items()}
    figures |= {"environment": environment(), "options": options}
    text = json.dumps(figures, indent=1)
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        names = [Path(options[key]).stem for key in named if options.get(key)]
        names = names or [options[key] for key in ("preset",) if key in options]
        device = figures["environment"]["device"].lower().replace(" ", "-")
        name = "-".join([case, *names, device])
        (out / f"{name}.json").write_text(text + "\n")
        if hasattr(module, "plot"):
            module.plot(figures, out / f"{name}.png")


def environment() -> dict:
    """What the figures depend on."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
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
    main()
