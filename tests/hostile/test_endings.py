"""Every ending is one line and an exit code, whatever the user's function, the system, a signal or
the terminal does; and no text from elsewhere reaches the terminal as more than text."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast import demo
from rrhf_fast.data.checks import listed, one_line, show, visible, visible_lines
from rrhf_fast.sample.__main__ import main as sample
from rrhf_fast.score import ScoreConfig
from rrhf_fast.score import score as score_rows
from rrhf_fast.score.__main__ import main as score
from rrhf_fast.stages import ending as endings
from rrhf_fast.stages.command import fail, run_command
from rrhf_fast.stages.identity import identity
from rrhf_fast.stages.launcher import launched
from rrhf_fast.stages.outlet import Outlet
from rrhf_fast.stages.reward_fn import call_reward_fn
from rrhf_fast.train import TrainConfig, train
from rrhf_fast.train.__main__ import main as train_command

MODEL = str(demo.MODEL_DIR)
ROW = {"prompt": "Why?", "responses": ["a", "bb", "ccc"]}
ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\u202eevil\u2066\u200b\r\x00\ud800\u2028"


def python(*arguments, env=None, **options):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | (env or {})
    done = subprocess.run(
        [sys.executable, *arguments], env=env, stderr=subprocess.PIPE, timeout=120, **options
    )
    return done.returncode, done.stderr.decode()


# --- Reward functions

FUNCTIONS = """
import decimal, os, signal, sys
import numpy as np

class Other(BaseException): pass
class Exits:
    def __float__(self): sys.exit(0)
class Raises:
    def __float__(self): raise ValueError("no\\nfloat")
    def __repr__(self): raise KeyError("no repr")

def exit_0(p, r): sys.exit(0)
def exit_text(p, r): raise SystemExit("bye\\x1b[2J")
def generator_exit(p, r): raise GeneratorExit
def other(p, r): raise Other("a\\nb")
def recursion(p, r): return recursion(p, r)
def memory(p, r): raise MemoryError
def late(p, r): sys.exit(0) if "ccc" in r else None; return [1.0] * len(r)
def ctrl_c(p, r): raise KeyboardInterrupt
def sigint(p, r): os.kill(os.getpid(), signal.SIGINT); return [1.0] * len(r)
def sigterm(p, r): os.kill(os.getpid(), signal.SIGTERM); return [1.0] * len(r)
def sighup(p, r): os.kill(os.getpid(), signal.SIGHUP); return [1.0] * len(r)
def text(p, r): return "1" * len(r)
def texts(p, r): return ["1"] * len(r)
def none(p, r): return None
def few(p, r): return [1.0]
def many(p, r): return [1.0] * 99
def nested(p, r): return [[1.0]] * len(r)
def ragged(p, r): return [[1.0], [1.0, 2.0]]
def imaginary(p, r): return [1j] * len(r)
def huge(p, r): return [10**400] * len(r)
def digits(p, r): return [10**5000] * len(r)
def exits(p, r): return [Exits()] * len(r)
def raises(p, r): return [Raises()] * len(r)
def mapping(p, r): return dict.fromkeys(range(len(r)), 1.0)
def endless(p, r):
    while True: yield 1.0
def lengths(p, r): return [float(len(x)) for x in r]
def array(p, r): return np.array(lengths(p, r), dtype=np.float16)
def generator(p, r): return (float(len(x)) for x in r)
def decimals(p, r): return [decimal.Decimal(len(x)) for x in r]
def closes(p, r): sys.stdout.close(); return lengths(p, r)
def takes_away(p, r): sys.stdout = sys.stderr = None; return lengths(p, r)
def empties(p, r): scores = lengths(p, r); p.clear(); r.clear(); return scores
def tensor(p, r):
    import torch
    return torch.tensor(lengths(p, r), dtype=torch.bfloat16, requires_grad=True)
number = 3
"""
MISTAKES = {
    "exit_0": "raised SystemExit: 0", "exit_text": "raised SystemExit: bye\\x1b[2J",
    "generator_exit": "raised GeneratorExit", "other": "raised Other: a b",
    "recursion": "raised RecursionError: maximum recursion", "memory": "raised MemoryError",
    "text": "found str '111'", "texts": "found <U1 in list ['1'", "none": "found NoneType None",
    "few": "expected 3 numbers, one per response, found shape (1,)", "many": "shape (99,)",
    "nested": "shape (3, 1)", "ragged": "found list [[1.0]", "imaginary": "found complex128",
    "huge": "found a number too large", "digits": "found a number too large",
    "exits": "raised SystemExit: 0", "raises": "raised KeyError", "mapping": "found dict {0: 1.0",
    "endless": "found shape (4,)", "number": "not a function", "number.real": "no attribute",
    "missing": "expected package.module:function (AttributeError",
}  # fmt: skip
WORKS = ["array", "generator", "decimals", "closes", "takes_away", "empties", "tensor"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Arguments of score; the module of FUNCTIONS beside the rows."""
    (tmp_path / "odd_rewards.py").write_text(FUNCTIONS)
    (tmp_path / "exits_at_import.py").write_text("import sys; sys.exit(0)")
    (tmp_path / "broken_module.py").write_text("def f(:")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield ["--data", "rows.jsonl", "--output", "scored.jsonl"]
    for name in ("odd_rewards", "exits_at_import"):
        sys.modules.pop(name, None)


def error_of(capsys, name="score"):
    lines = [line for line in capsys.readouterr().err.splitlines() if "torchao" not in line]
    assert len(lines) == 1 and lines[0].isprintable(), lines
    return lines[0].removeprefix(f"rrhf_fast.{name}: error: ")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_reward_function_that_fails_is_one_line(name, files, capsys):
    assert score([*files, "--reward_fn", f"odd_rewards:{name}"]) == 2
    error = error_of(capsys)
    assert error.startswith(f"reward_fn: odd_rewards:{name}") and MISTAKES[name] in error
    assert not Path("scored.jsonl").exists()


@pytest.mark.parametrize("name", WORKS)
def test_a_reward_function_may_return_any_numbers(name, files):
    assert score([*files, "--reward_fn", f"odd_rewards:{name}"]) == 0
    assert json.loads(Path("scored.jsonl").read_text())["scores"] == [1, 2, 3]


@pytest.mark.parametrize(
    "name",
    ["exits_at_import:f", "broken_module:f", "os:system", "no_colon", ":", "a:b:c", "..a:b", "os:",
     "\x1b]0;x\x07:f", "x" * 5000 + ":f", "sys:exit", "a b:c"],
)  # fmt: skip
def test_names_of_functions_that_there_are_not(name, files, capsys):
    assert score([*files, "--reward_fn", name]) == 2
    assert error_of(capsys).startswith("reward_fn: ")


@pytest.mark.parametrize(
    "name, code, problem",
    [("ctrl_c", 130, "interrupted"), ("sigint", 130, "interrupted"),
     ("sigterm", 143, "stopped by SIGTERM"), ("sighup", 129, "stopped by SIGHUP")],
)  # fmt: skip
def test_signals_are_one_line_each_and_lose_no_batch(name, code, problem, files, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    options = [*files, "--batch_size", "1", "--reward_fn"]
    assert score([*options, f"odd_rewards:{name}"]) == code
    assert error_of(capsys) == problem
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_what_was_scored_before_stays(files, capsys):
    options = [*files, "--batch_size", "1", "--reward_fn", "odd_rewards:late"]
    assert score(options) == 2
    assert error_of(capsys) == "reward_fn: odd_rewards:late raised SystemExit: 0"
    journal = Path("scored.jsonl.journal").read_text()
    assert journal.count("reward function/") == 2


def test_the_trainers_evaluation_checks_the_same(files):
    rows = [ROW | {"scores": [1, 2, 3]}] * 2
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        model_name_or_path=MODEL, train_data="train.jsonl", eval_data="train.jsonl",
        output_dir="out", max_steps=1, eval_max_new_tokens=2, eval_reward_fn="odd_rewards:exit_0",
    )  # fmt: skip
    with pytest.raises(ValueError, match="^eval_reward_fn: odd_rewards:exit_0 raised SystemExit"):
        train(config)
    with pytest.raises(ValueError, match="^eval_reward_fn: exits_at_import:f: expected package"):
        train(replace(config, eval_reward_fn="exits_at_import:f", output_dir="out2"))


@given(st.lists(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()))
def test_any_list_is_numbers_or_refused(values):
    try:
        numbers = call_reward_fn(lambda *_: values, [], ["x"] * len(values), "a:b", "reward_fn")
    except ValueError as error:
        assert str(error).startswith("reward_fn: a:b") and "\n" not in str(error)
    else:
        assert numbers.dtype == np.float64 and numbers.shape == (len(values),)


def test_a_parent_package_that_exits_is_no_end(tmp_path, monkeypatch):
    package = tmp_path / "package_that_exits"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(str(tmp_path))
    identity(ScoreConfig(reward_fn="package_that_exits.module:fn"))
    with pytest.raises(ValueError, match="^reward_fn: package_that_exits.module:fn: expected"):
        (tmp_path / "r.jsonl").write_text(json.dumps(ROW))
        options = {"data": str(tmp_path / "r.jsonl"), "output": str(tmp_path / "o.jsonl")}
        score_rows(ScoreConfig(reward_fn="package_that_exits.module:fn", **options))


# --- Whatever a stage raises


def ending(monkeypatch, capsys, error):
    def run(config):
        raise error

    code = run_command("score", None, ScoreConfig, run, [])
    return code, error_of(capsys)


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


ENDINGS = [
    (OSError(errno.ENOSPC, "No space left on device", "o/x"), 1, "o/x could not be written (No"),
    (OSError(errno.EIO, "Input/output error"), 1, "(Input/output error)"),
    (OSError("odd\ntext"), 1, "odd text"),
    (PermissionError(errno.EACCES, "Permission denied", "o"), 2, "o: Permission denied"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 999), 2, "File name too long"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "a\x1b[2J"), 2, "a\\x1b[2J: Is a directory"),
    (MemoryError(), 1, "out of memory: lower --batch_size"),
    (OutOfMemoryError("CUDA out of memory. Tried"), 1, "CUDA out of memory: lower --batch_size"),
    (SystemExit(0), 1, "something that was called ended the process (SystemExit 0)"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (ValueError("two\nlines " + ESCAPES), 2, "two lines \\x1b]0;title\\x07\\x1b[2J"),
    (ValueError("w " * 9000), 2, "w w w"),
]  # fmt: skip


@pytest.mark.parametrize("error, code, problem", ENDINGS)
def test_what_a_stage_raises_is_one_line(error, code, problem, monkeypatch, capsys):
    ended, line = ending(monkeypatch, capsys, error)
    assert ended == code and problem in line and len(line) <= 2000


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, capsys):
    with pytest.raises(ZeroDivisionError):
        ending(monkeypatch, capsys, ZeroDivisionError())


@pytest.mark.parametrize(
    "place", ["file", "file/o.jsonl", "no/such/folder/o.jsonl", "folder", "x" * 300, "/proc/o"]
)
def test_outputs_that_cannot_be_written(place, tmp_path, monkeypatch, capsys, files):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    arguments = ["--data", "rows.jsonl", "--reward_fn", "odd_rewards:lengths"]
    code = score([*arguments, "--output", place])
    captured = capsys.readouterr()
    assert code in (0, 1, 2) and "Traceback" not in captured.err
    assert code == 0 or (captured.err.count("\n") == 1 and place[:100] in captured.err)
    assert (tmp_path / "file").read_text() == "precious"


# --- The launcher's variables

VARIABLES = [
    ({"RANK": "abc"}, "RANK: expected a number"),
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: expected a number"),
    ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE: expected a number, 1 or more, found '0'"),
    ({"WORLD_SIZE": "", "RANK": "0"}, "WORLD_SIZE: expected a number, 1 or more, found ''"),
    ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK: expected a number, 0 or more, found '-1'"),
    ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: expected less than WORLD_SIZE, 2, found 2"),
    ({"WORLD_SIZE": "2"}, "RANK: missing, but WORLD_SIZE is 2"),
    ({"RANK": "0", "LOCAL_RANK": "1e9"}, "LOCAL_RANK: expected a number"),
    ({"RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT: expected a number"),
    ({"RANK": "0", "MASTER_PORT": "99999"}, "MASTER_PORT: expected a port, found 99999"),
    ({"RANK": "\u0663" * 3}, "RANK: expected a number"),
    ({"RANK": "9" * 5000}, "RANK: expected a number"),
]  # fmt: skip


@pytest.mark.parametrize("variables, problem", VARIABLES)
def test_variables_of_a_launcher_that_make_no_sense(variables, problem, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(endings.time, "sleep", lambda seconds: None)
    assert train_command(["--dry_run", "true"]) == 2
    assert error_of(capsys, "train").startswith(problem)


def test_variables_that_make_sense(monkeypatch):
    assert launched() == (0, 1, 0, False)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launched() == (3, 4, 1, True)


def test_as_a_process_too():
    code, errors = python("-m", "rrhf_fast.train", "--seed", "1", env={"WORLD_SIZE": "abc"})
    assert code == 2 and errors.count("\n") == 1 and "WORLD_SIZE: expected a number" in errors


# --- Terminals


def test_what_a_terminal_obeys_is_written_out():
    assert visible("\x1b[31m\x07\x9b\u202e\u2066\u200b\ufeff\ud800\n\u2028") == (
        r"\x1b[31m\x07\x9b\u202e\u2066\u200b\ufeff\ud800\n\u2028"
    )
    for text in (
        "Grüße",
        "日本語 한국어",
        "👍🏽 ❤️",
        "👩\u200d👩\u200d👧 🏳️\u200d🌈",
        "שלום مرحبا",
        "می\u200cخواهم",
        "क्\u200dष श्री\u200cमान",
        "ന\u0d4d\u200d, ക\u0d4d\u200d",  # a virama and a joiner end the word
    ):
        assert visible(text) == text == one_line(text) == visible_lines(text)
    assert visible("ab\u200dcd \u200d") == r"ab\u200dcd \u200d"
    assert visible("pay\u200cpal.com م\u200c") == r"pay\u200cpal.com م\u200c"
    assert visible_lines("a\nb\x1b") == "a\nb\\x1b"
    assert visible_lines("\ta\tb\n\n\t\r\n") == "\ta\tb\n\n\t\\r\n"
    assert one_line("a\r\nb\t\x1b[2J\x85c") == r"a b \x1b[2J c"


@given(st.text(st.characters() | st.sampled_from(ESCAPES), max_size=40))
def test_no_text_of_a_message_is_more_than_text(text):
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    for shown in (visible(text), one_line(text), show(text), listed([text]), one_line(text, 5)):
        assert not {unicodedata.category(c) for c in re.sub("[\u200c\u200d]", "", shown)} & hidden


@given(st.text(st.characters() | st.sampled_from(ESCAPES), max_size=40))
def test_an_error_is_one_line_of_what_can_be_printed(text):
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        fail("score", ValueError(f"option: {text}: expected"), 2)
    line = stream.getvalue()
    assert line.endswith("\n") and len(line.splitlines()) == 1


def test_names_of_rows_models_and_files_reach_the_terminal_as_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "\x1b]0;x\x07\u202eü"
    row = ROW | {"scores": [1, 2, 3], name: 1, "prompt": f"Why{name}?"}
    Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ["--model_name_or_path", MODEL, "--train_data", f"{name}.jsonl"]
    assert train_command([*arguments, "--max_steps", "1", "--output_dir", f"out{name}"]) == 0
    assert train_command([*arguments, "--show_tokens", "1"]) == 0
    drawn = f"{{method: greedy, max_new_tokens: 2, source: {json.dumps(name)}}}"
    policies = f"[{{method: provided}}, {drawn}]"
    files = ["--data", f"{name}.jsonl", "--output", f"sampled{name}"]
    assert sample([*files, "--model_name_or_path", MODEL, "--policies", policies]) == 0
    assert sample(["--data", f"{name}.jsonl", "--output", f"{name}/x", "--policies", name]) == 2
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "\\x1b]0;x\\x07\\u202eü" in captured.out


class Broken:
    """A stream that fails as told."""

    encoding = "ascii"

    def __init__(self, error):
        self.error, self.written = error, ""

    def write(self, text):
        if self.error is not None:
            raise self.error
        self.written += text.encode("ascii").decode()

    flush = lambda self: self.write("")  # noqa: E731


def test_output_that_nobody_can_read_ends_nothing():
    for error in (BrokenPipeError(errno.EPIPE, "Broken pipe"), ValueError("closed file")):
        outlet = Outlet(Broken(error))
        print("a", file=outlet, flush=True)
        assert outlet.problem is None
    outlet = Outlet(Broken(OSError(errno.ENOSPC, "No space left on device")))
    print("a", file=outlet, flush=True)
    assert outlet.problem == "No space left on device"
    outlet = Outlet(Broken(None))
    print("Grüße", file=outlet, flush=True)
    assert outlet._stream.written == "Gr\\xfc\\xdfe\n"
    print("nowhere", file=Outlet(None), flush=True)


PRINT = ("-m", "rrhf_fast.sample", "--print_config", "--data", "Grüße")


def test_streams_of_a_process():
    read, write = os.pipe()
    os.close(read)
    assert python(*PRINT, stdout=write) == (0, "")
    os.close(write)
    ascii_only = {"PYTHONIOENCODING": "ascii", "LANG": "C", "PYTHONUTF8": "0", "COLUMNS": "0"}
    assert python(*PRINT, env=ascii_only, stdout=subprocess.DEVNULL) == (0, "")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            code, errors = python(*PRINT, stdout=full)
        problem = "rrhf_fast.sample: error: standard output: No space left on device\n"
        assert (code, errors) == (1, problem)
    closed = f"exec {sys.executable} -m rrhf_fast.sample --data x >&- 2>&-"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run(["bash", "-c", closed], env=env, timeout=120).returncode == 2
