"""Format figures as Markdown."""

from collections.abc import Sequence

from benchmarks.cores import remarks


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, of cells as they are."""
    lines = [f"| {' | '.join(cells)} |" for cells in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def spread(ratio: dict) -> str:
    """Median and range of a ratio."""
    return "{median:.2f} ({min:.2f} to {max:.2f})".format(**ratio)


def named(workload: str) -> str:
    """What readers know a workload by."""
    names = {"pandalm_human": "PandaLM rows", "vicuna_bench_gpt4": "Vicuna rows"}
    return names.get(workload, f"drawn: {workload}")


def machine(figures: dict) -> str:
    """Where and when figures were measured, and with what."""
    env = figures["environment"]
    device = env["processor"] if env["device"] == "cpu" else env["device"]
    threads = f", {env['threads']} threads" if env["device"] == "cpu" else ""
    return f"{device}{threads}, torch {env['torch']}, {env['date']}"


def command(figures: dict) -> str:
    """The command that makes these figures, as a block of code, and what disturbed them."""
    options = dict(figures["options"])
    if "data" in options:
        options.pop("preset")  # unused for real rows
    words = [f"--{name} {value}" for name, value in options.items()]
    line = " ".join(["python benchmarks/run.py", figures["case"], *words])
    said = remarks(figures)
    return "\n".join(["```bash", line, "```", *([f"\nNote: {'; '.join(said)}."] if said else [])])


def plain(dtype: str) -> str:
    """A dtype without its module."""
    return dtype.removeprefix("torch.")
