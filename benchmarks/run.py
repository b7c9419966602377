"""Measure the engine on this machine.

python benchmarks/run.py step --model M --data rows.jsonl   # engine against the released method
"""

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    """Run one benchmark, print its figures, and write them as JSON when --out is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("case", choices=["step"])
    parser.add_argument("--model", required=True, help="folder or name of a causal language model")
    parser.add_argument("--data", required=True, help="rows, JSONL")
    parser.add_argument("--num_queries", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_tokens_per_pack", type=int, default=2048)
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = vars(parser.parse_args())
    out, case = options.pop("out"), options.pop("case")

    from benchmarks import step

    figures = step.run(**options)
    figures |= {"environment": environment(), "options": options}
    figures["options"]["model"] = Path(options["model"]).name
    figures["options"]["data"] = Path(options["data"]).name
    text = json.dumps(figures, indent=1)
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = f"{case}-{figures['options']['model']}-{Path(options['data']).stem}.json"
        (out / name).write_text(text + "\n")


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
        **{name: version(name) for name in ("torch", "transformers")},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
