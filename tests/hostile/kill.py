"""Kill a command at every change it makes to files, repeat it, and compare all files with those of
an undisturbed run: python tests/hostile/kill.py WORK [COMMAND ...] [--every K] [--points N]

Children are forked from this process, which has imported everything. Two ways to kill:

* at the n-th change of a file below the run's folder, as Python's audit events and os.fsync see it,
  from any thread: SIGKILL just before the change;
* in the middle of a write ("torn"): the system ends a write at a limit on the size of files and
  kills the process at its next (SIGXFSZ). This holds for writes of C++ and Rust too.

Writes, ftruncate, and the files that safetensors creates cause no audit event; `--how trace` kills
at system calls of the main thread, with a new process per kill, and needs strace.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before the imports below

import torch

from rrhf_fast import demo

ROOT = Path(__file__).parents[2]
URL = ""  # of the judge, once it runs
MODEL = str(demo.MODEL_DIR)
REWARD = "rrhf_fast.demo.reward:score"
# Audit events, and how many of their first arguments are paths of changed files.
CHANGES = {
    "open": 1, "os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1,
    "os.chmod": 1, "os.link": 2, "os.symlink": 2,
}  # fmt: skip
CALLS = (
    "write,pwrite64,fsync,ftruncate,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat"
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass
class Command:
    """One command line; `{run}` is the run's folder, `{inputs}` that of its inputs."""

    stage: str
    arguments: dict
    needs: tuple[str, ...] = ()

    def line(self, work: Path, run: Path) -> list[str]:
        values = {"run": run, "inputs": work / "inputs", "url": URL}
        words = [word for name, value in self.arguments.items() for word in (f"--{name}", value)]
        place = re.compile(r"\{(run|inputs|url)\}")
        return [place.sub(lambda found: str(values[found[1]]), str(word)) for word in words]


SMALL = {"max_new_tokens": 8, "num_samples": 2, "num_bootstrap": 20}
TRAIN = {
    "model_name_or_path": MODEL, "train_data": "{inputs}/train.jsonl", "train_batch_size": 4,
    "max_steps": 3, "save_steps": 1, "resume_from_checkpoint": "latest", "output_dir": "{run}/out",
    "learning_rate": 1e-3,
}  # fmt: skip
EVAL = {
    "eval_data": "{inputs}/eval.jsonl", "eval_steps": 1, "eval_reward_fn": REWARD,
    "eval_max_new_tokens": 4, "eval_samples": 1,
}  # fmt: skip
LORA = {"use_peft": "true", "lora_r": 2, "save_total_limit": 1}
POLICIES = "[{method: provided}, {method: sample, num_responses: 2, max_new_tokens: 8}]"
COMMANDS = {
    "sample": Command("sample", {
        "data": "{inputs}/train.jsonl", "output": "{run}/rows.jsonl", "batch_size": 4,
        "model_name_or_path": MODEL, "policies": POLICIES}),
    "score": Command("score", {
        "data": "{inputs}/train.jsonl", "output": "{run}/rows.jsonl", "batch_size": 8,
        "reward_fn": REWARD}),
    "judge": Command("score", {
        "data": "{inputs}/eval.jsonl", "output": "{run}/rows.jsonl", "judge_model": "judge",
        "base_url": "{url}", "max_concurrency": 2}),
    "evaluate": Command("evaluate", {
        "data": "{inputs}/eval.jsonl", "output_dir": "{run}/out", "model_name_or_path": MODEL,
        "reference_model_name_or_path": MODEL, "reward_fn": REWARD, **SMALL}),
    "iterate": Command("iterate", {
        "data": "{inputs}/train.jsonl", "output_dir": "{run}/out", "model_name_or_path": MODEL,
        "eval_data": "{inputs}/eval.jsonl", "reward_fn": REWARD, "policies": POLICIES, **SMALL,
        "rounds": 1, "train.train_batch_size": 4, "train.max_steps": 2, "train.save_steps": 1}),
    "train": Command("train", TRAIN | EVAL),
    "train LoRA": Command("train", TRAIN | LORA),
    "export": Command("export", {
        "checkpoint": "{inputs}/trained/checkpoint-1", "output_dir": "{run}/model"}, ("trained",)),
    "export --merge": Command("export", {
        "checkpoint": "{inputs}/adapters", "output_dir": "{run}/model", "merge": "true"},
        ("adapters",)),
}  # fmt: skip
INPUTS = {
    "trained": Command("train", TRAIN | {"output_dir": "{inputs}/trained", "max_steps": 1}),
    "adapters": Command(
        "train", TRAIN | LORA | {"output_dir": "{inputs}/adapters", "max_steps": 1}
    ),
}


@dataclass
class Ended:
    """A child that ended. events: (kind, path in the run's folder, size of the file)."""

    code: int
    output: str
    events: list[tuple[str, str, int]]


def run(
    line: list[str],
    stage: str,
    folder: Path,
    *,
    kill_at: int = 0,
    limit: int = 0,
    survives: bool = False,
    files: int = 0,
) -> Ended:
    """Run a command in a forked child.

    Args:
        kill_at: kill it at its event of this number (from 1).
        limit: kill it at the first file that outgrows so many bytes; if it `survives`, writing
            such a file is an error instead.
        files: how many files it may have open.
    """
    output, events = os.pipe(), os.pipe()
    fcntl.fcntl(events[1], fcntl.F_SETPIPE_SZ, 2**20)  # read once the child is dead
    pid = os.fork()
    if pid == 0:
        os.dup2(output[1], 1)
        os.dup2(output[1], 2)
        code = 1
        try:
            _kill_at(folder, kill_at, events[1])
            if limit:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN if survives else signal.SIG_DFL)
            if files:
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
            code = import_module(f"rrhf_fast.{stage}.__main__").main(line)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(output[1])
    os.close(events[1])
    with os.fdopen(output[0]) as file:
        text = file.read()
    with os.fdopen(events[0]) as file:
        seen = [tuple(json.loads(row)) for row in file]
    _, status = os.waitpid(pid, 0)
    return Ended(os.waitstatus_to_exitcode(status), text, seen)


def _kill_at(folder: Path, number: int, report: int) -> None:
    """In the child: count and report changes below the folder; die before the n-th."""
    counter, root, fsync = itertools.count(1), f"{folder}/", os.fsync

    def changed(kind: str, path: str) -> None:
        if not path.startswith(root):
            return
        size = os.stat(path).st_size if os.path.isfile(path) else 0
        os.write(report, (json.dumps([kind, path.removeprefix(root), size]) + "\n").encode())
        if next(counter) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        if event not in CHANGES or (event == "open" and not arguments[2] & WRITES):
            return
        # The last argument may be the folder's descriptor, as rmtree passes it.
        at = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
        paths = [_path(path, at) for path in arguments[: CHANGES[event]]]
        changed(event.removeprefix("os."), next((p for p in paths if p.startswith(root)), ""))

    def synced(file) -> None:
        changed("fsync", _path(file))
        fsync(file)

    sys.addaudithook(hook)
    os.fsync = synced


def _path(path: object, at: int = -1) -> str:
    if hasattr(path, "fileno"):
        path = path.fileno()
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    folder = os.getcwd() if at < 0 else os.readlink(f"/proc/self/fd/{at}")
    return os.path.join(folder, os.fsdecode(path))


def snapshot(folder: Path) -> dict[str, object]:
    """All files and folders by name; what differs from run to run by nature is left out."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mode,
            None if path.is_dir() else _content(path),
        )
        for path in sorted(folder.rglob("*"))
    }


def _content(path: Path) -> object:
    if path.name == "metrics.jsonl":
        records = map(json.loads, path.read_text().splitlines())
        return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]
    if path.name == "training.png":  # draws tokens per second
        return path.read_bytes()[:8]
    if path.name == "options.json":  # holds times of the model's files
        options = json.loads(path.read_text())
        models = [name for name in options if name.startswith("content of ") and "model" in name]
        return options | {name: None for name in models}
    if path.name == "trainer_state.json":  # the lengths of metrics.jsonl depend on its times
        state = json.loads(path.read_text())
        asked = ("resume_from_checkpoint", "overwrite_output_dir")  # as iterate resumes a round
        config = {k: v for k, v in state["config"].items() if k not in asked}
        return {k: v for k, v in state.items() if k != "files"} | {"config": config}
    if path.name == ".metadata":  # holds a random number
        reader = torch.distributed.checkpoint.FileSystemReader(path.parent)
        return repr(reader.read_metadata().state_dict_metadata)
    if path.name == "checksums.json":  # of the two files above too
        return sorted(str(json.loads(path.read_text()).keys()))
    return path.read_bytes()


@dataclass
class Row:
    """The table's row of one command and one kind of event."""

    points: int = 0
    resumed: int = 0
    failures: list[str] = field(default_factory=list)


class Matrix:
    """Kills, repeats and compares in the folder `work`."""

    def __init__(self, work: Path):
        self.work = work.resolve()
        self.rows: dict[tuple[str, str], Row] = {}
        inputs = self.work / "inputs"
        inputs.mkdir(parents=True, exist_ok=True)
        for source, count in ((demo.TRAIN_FILE, 8), (demo.EVAL_FILE, 3)):
            lines = source.read_text().splitlines(keepends=True)[:count]
            (inputs / source.name).write_text("".join(lines))

    def kill(self, name: str, points: Callable[[int], list[int]]) -> None:
        """Kill a command at the events and sizes that `points` picks from so many."""
        command, folder, ended, expected = self._prepare(name)
        line = command.line(self.work, folder)
        for number in points(len(ended.events)):
            self._fresh(folder)
            killed = run(line, command.stage, folder, kill_at=number)
            kind = killed.events[-1][0] if killed.code == -signal.SIGKILL else "not reached"
            self._repeat(name, kind, killed, folder, expected)
        limits = _limits(ended)
        for number in points(len(limits)):
            self._fresh(folder)
            killed = run(line, command.stage, folder, limit=limits[number - 1])
            reached = killed.code == -signal.SIGXFSZ
            self._repeat(name, "torn" if reached else "not reached", killed, folder, expected)

    def trace(self, name: str, points: Callable[[int], list[int]]) -> None:
        """Kill a command at system calls that `points` picks, from the first in the run's folder
        on."""
        command, folder, _, expected = self._prepare(name)
        line = command.line(self.work, folder)
        self._fresh(folder)
        log = self.work / "strace.log"
        assert _traced(command.stage, line, "-o", str(log)).code == 0
        calls = [text.split(maxsplit=1) for text in log.read_text().splitlines()]
        calls = [call for pid, call in calls if pid == calls[0][0] and "resumed>" not in call]
        first = next(i for i, call in enumerate(calls) if str(folder) in call)
        for number in points(len(calls) - first):
            self._fresh(folder)
            call = calls[first + number - 1].partition("(")[0]
            when = sum(other.startswith(f"{call}(") for other in calls[: first + number])
            inject = f"inject={call}:signal=SIGKILL:when={when}"
            killed = _traced(command.stage, line, "-o", os.devnull, "-e", inject)
            kind = "not reached" if killed.code == 0 else f"strace {call}"
            self._repeat(name, kind, killed, folder, expected)

    def fill(self, name: str, points: Callable[[int], list[int]]) -> None:
        """Refuse a command's writes at the sizes of files that `points` picks: it must end with one
        line and exit code 1, and once there is space, the same command with the same files."""
        command, folder, ended, expected = self._prepare(name)
        line, limits = command.line(self.work, folder), _limits(ended)
        for number in points(len(limits)):
            self._fresh(folder)
            full = run(line, command.stage, folder, limit=limits[number - 1], survives=True)
            self._refused(name, "file size", full, "File too large", folder, expected)

    def fill_disk(self, name: str, points: Callable[[int], list[int]]) -> None:
        """The same with a real file system that is full."""
        command, folder, _, expected = self._prepare(name)
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        line, pages = command.line(self.work, folder), -(-used // 4096)
        for number in points(pages):
            self._fresh(folder)
            with small_disk(folder, 4 * number) as enlarge:
                full = run(line, command.stage, folder)
                enlarge()
                self._refused(name, "tmpfs", full, "No space left on device", folder, expected)

    def _prepare(self, name: str) -> tuple[Command, Path, Ended, dict]:
        command, folder = COMMANDS[name], self.work / name.replace(" ", "_") / "run"
        for need in command.needs:
            self._undisturbed(INPUTS[need], self.work / "inputs", keep=True)
        ended = self._undisturbed(command, folder)
        return command, folder, ended, snapshot(folder)

    def _refused(
        self, name: str, kind: str, full: Ended, reason: str, folder: Path, expected: dict
    ) -> None:
        """Check how a command on a full disk ended, then repeat it."""
        stage = COMMANDS[name].stage
        lines = [line for line in full.output.splitlines() if line.startswith("rrhf_fast.")]
        words = f"rrhf_fast.{stage}: error: output.* could not be written .*{reason}.*again"
        is_clear = len(lines) == 1 and re.match(words, lines[0])
        self._repeat(name, "not reached" if full.code == 0 else kind, full, folder, expected)
        if full.code != 0 and (full.code != 1 or "Traceback" in full.output or not is_clear):
            row = self.rows[name, kind]
            row.resumed -= 1
            row.failures.append(f"{name}: {kind}: ended with {full.code}: {full.output[-1500:]}")

    def _repeat(self, name: str, kind: str, killed: Ended, folder: Path, expected: dict) -> None:
        command, row = COMMANDS[name], self.rows.setdefault((name, kind), Row())
        where = f"{name}: after {len(killed.events)} events, {killed.events[-1:]}"
        if kind == "not reached" and killed.code != 0:
            row.failures.append(f"{where}: ended with {killed.code}: {killed.output[-500:]}")
        line = command.line(self.work, folder)
        if kind != "not reached":
            again = run(line, command.stage, folder)
            if again.code != 0:
                row.failures.append(f"{where}: repeated: {again.code}: {again.output[-500:]}")
        found = snapshot(folder)
        names = [n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)]
        if names:
            row.failures.append(f"{where}: differ: {sorted(names)}")
        row.points += 1
        row.resumed += not (row.failures and row.failures[-1].startswith(where))

    def _undisturbed(self, command: Command, folder: Path, *, keep: bool = False) -> Ended:
        if not keep:
            self._fresh(folder)
        ended = run(command.line(self.work, folder), command.stage, folder)
        assert ended.code == 0, ended.output
        return ended

    @staticmethod
    def _fresh(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def table(self) -> str:
        """Points, and how many ended like the undisturbed run, per command and kind of event."""
        lines = ["| command | killed at | points | same files | failed |", "|---|---|--:|--:|--:|"]
        for (name, kind), row in sorted(self.rows.items()):
            failed = row.points - row.resumed
            lines.append(f"| {name} | {kind} | {row.points} | {row.resumed} | {failed} |")
        total = Counter()
        for row in self.rows.values():
            total.update(points=row.points, resumed=row.resumed)
        failed = total["points"] - total["resumed"]
        lines.append(f"| all | | {total['points']} | {total['resumed']} | {failed} |")
        return "\n".join(lines)


@contextlib.contextmanager
def judge(work: Path) -> Iterator[None]:
    """An endpoint that judges, in a process of its own."""
    global URL
    words = [sys.executable, str(ROOT / "tests" / "openai_server.py"), str(work / "judge.log"), "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, text=True, **pipes) as server:
        URL = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        try:
            yield
        finally:
            server.kill()


def _traced(stage: str, line: list[str], *options: str) -> Ended:
    """Run a command under strace, in a process of its own."""
    words = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", f"trace={CALLS}", *options]
    words += [sys.executable, "-m", f"rrhf_fast.{stage}", *line]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return Ended(done.returncode, done.stdout, [])


def _limits(ended: Ended) -> list[int]:
    """In the middle of each file, of each line of a journal, and one byte before their ends."""
    sizes = sorted({size for _, _, size in ended.events if size})
    middles = [(low + high) // 2 for low, high in itertools.pairwise([0, *sizes])]
    return sorted({size for size in [*middles, *(size - 1 for size in sizes)] if size})


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """Mount a file system of `size` KiB on the folder; yields what enlarges it."""
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}k,mode=755"]
    subprocess.run([*options, "tmpfs", str(folder)], check=True, capture_output=True)
    enlarge = ["mount", "-o", "remount,size=64m", str(folder)]
    try:
        yield lambda: subprocess.run(enlarge, check=True, capture_output=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def spread(count: int, points: int) -> list[int]:
    """`points` numbers from 1 to `count`, the first and the last among them if there are two."""
    if points >= count:
        return list(range(1, count + 1))
    if points == 1:
        return [(count + 1) // 2]
    return sorted({1 + i * (count - 1) // (points - 1) for i in range(points)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=", ".join(COMMANDS))
    choices = ["kill", "fill", "fill_disk", "trace"]
    parser.add_argument("--how", choices=choices, default="kill", help="end runs so")
    parser.add_argument("--every", type=int, default=1, help="kill at every k-th event")
    parser.add_argument("--points", type=int, help="kill at so many events of each command")
    parser.add_argument("--skip", type=int, default=0, help="events before the first kill")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    import_module("openai")
    for stage in {command.stage for command in COMMANDS.values()}:
        import_module(f"rrhf_fast.{stage}.run" if stage != "train" else "rrhf_fast.train.trainer")

    def points(count: int) -> list[int]:
        if options.points:
            return spread(count, options.points)
        return list(range(1 + options.skip, count + 1, options.every))

    matrix, started = Matrix(options.work), time.monotonic()
    with judge(options.work), contextlib.suppress(KeyboardInterrupt):  # Ctrl-C: the table so far
        for name in options.commands or COMMANDS:
            begun = time.monotonic()
            getattr(matrix, options.how)(name, points)
            print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    print(matrix.table())
    print(f"\n{time.monotonic() - started:.0f} s")
    failures = [failure for row in matrix.rows.values() for failure in row.failures]
    print("\n".join(failures), file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
