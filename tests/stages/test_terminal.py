"""Tables: drawn on a terminal, plain lines elsewhere."""

import io
import os
import pty
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import rrhf_fast
from rrhf_fast.stages.outlet import Outlet
from rrhf_fast.stages.terminal import draws, say_pairs, say_tables
from rrhf_fast.train.result import TrainResult, say_result

PAIRS = {"model": "M (llama)", "": "2 rows", "leak": "warning: 1 of 2", "warning": "no scores"}
TABLE = (["2 prompts", "model"], [["mean reward", "0.1 [0.0, 0.2]"], ["tokens", "7"]])
PLAIN = """\
model      M (llama)
           2 rows
leak       warning: 1 of 2
warning    no scores
2 prompts    model
mean reward  0.1 [0.0, 0.2]
tokens       7

warning: it collapses
"""


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Call a function with a terminal of 40 columns as stdout; returns what it printed."""
    for name in ("NO_COLOR", "FORCE_COLOR", "RANK", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "40"}.items():
        monkeypatch.setenv(name, value)

    def run(function, *arguments):
        stream = Terminal()
        with redirect_stdout(Outlet(stream)):
            function(*arguments)
        return stream.getvalue()

    return run


def say_all():
    say_pairs(PAIRS)
    say_tables([TABLE], ["warning: it collapses"])


def test_pipes_get_plain_lines(capsys):
    say_all()
    assert capsys.readouterr().out == PLAIN


def test_a_terminal_gets_colours_and_no_line_that_is_too_long(terminal):
    text = terminal(say_pairs, PAIRS | {"rows": "many words " * 9})
    text += terminal(say_tables, [TABLE], ["warning: it collapses"])
    assert "\x1b[33mwarning: 1 of 2" in text and "\x1b[33mno scores" in text
    assert "\x1b[33mwarning: it collapses\x1b[0m" in text and "\u2500" in text
    assert "mean reward" in text and "0.1 [0.0, 0.2]" in text
    bare = text
    for code in ("\x1b[0m", "\x1b[1m", "\x1b[33m", "\x1b[1;33m"):
        bare = bare.replace(code, "")
    assert "\x1b" not in bare and max(map(len, bare.splitlines())) <= 40


def test_no_color_is_respected(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = terminal(say_all)
    assert "warning: it collapses" in text and "\x1b[33m" not in text


def test_names_are_no_markup_and_command_no_terminal(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = terminal(say_pairs, {"model": "[bold]x[/bold] \x1b]0;x\x07:smile:"})
    text += terminal(say_tables, [(["[red]"], [["\x1b[2J[/nothing]"]])])
    assert "[bold]x[/bold] \\x1b]0;x\\x07:smile:" in text
    assert "[red]" in text and "\\x1b[2J[/nothing]" in text


def test_other_ranks_print_nothing(terminal, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert terminal(say_all) == ""


def test_streams_that_know_of_no_terminal(monkeypatch):
    closed = Terminal()
    closed.isatty = lambda: (_ for _ in ()).throw(ValueError("I/O operation on closed file"))
    for stream in (None, object(), closed):
        monkeypatch.setattr(sys, "stdout", stream)
        assert not draws()


RESULT = TrainResult(
    Path("out"), [], steps=3, before={"loss": 2.0, "reward": -1.0}, after={"loss": 1.5, "reward": 0}
)


def test_what_training_changed_is_plain_in_a_pipe(capsys):
    say_result(RESULT)
    assert capsys.readouterr().out == (
        "held-out reward at temperature 1     -1.000 ->    0.000\n"
        "held-out loss                         2.000 ->    1.500\n"
        "done after 3 steps; model and metrics are in out\n"
    )


def test_what_training_changed_is_a_table_on_a_terminal(terminal):
    text = terminal(say_result, RESULT)
    assert "before" in text and "after" in text and "->" not in text
    assert text.endswith("done after 3 steps; model and metrics are in out\n")


SCRIPT = """
import sys
from rrhf_fast.stages.terminal import say_pairs, say_tables
say_pairs({"model": "M"})
say_tables([(["a"], [["b"]])])
print("rich" in sys.modules, file=sys.stderr)
"""


def test_rich_is_loaded_on_terminals_alone():
    env = os.environ | {"PYTHONPATH": str(Path(rrhf_fast.__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("model      M\na\nb\n", "False\n")
    ours, its = pty.openpty()
    done = subprocess.run(command, env=env, stdout=its, stderr=subprocess.PIPE, text=True)
    os.close(its)
    text = os.read(ours, 10_000).decode()
    os.close(ours)
    assert done.stderr == "True\n" and "M" in text
