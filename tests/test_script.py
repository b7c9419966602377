"""`rrhf-fast COMMAND` is `python -m rrhf_fast.COMMAND`, by name, words, messages and exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rrhf_fast
from rrhf_fast.__main__ import COMMANDS, main

PACKAGE = Path(rrhf_fast.__file__).parent


def run(*command, **options):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr


def test_the_page_lists_every_command(capsys):
    folders = {path.parent.name for path in PACKAGE.glob("*/__main__.py")}
    assert folders == {name for name in COMMANDS if "." not in name}
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    for name, text in COMMANDS.items():
        (line,) = [line for line in page.splitlines() if line.split()[:1] == [name]]
        assert line.endswith(text) and len(line) <= 100


@pytest.mark.parametrize("word", ["--help", "--version", "trian", "env --help"])
def test_nothing_heavy_is_loaded(word):
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'matplotlib'}\n"
        "atexit.register(lambda: print('loaded', heavy & set(sys.modules)))\n"
        "from rrhf_fast.__main__ import script\n"
        f"sys.argv[1:] = {word.split()}\n"
        "script()\n"
    )
    assert run("-c", code)[1].splitlines()[-1] == "loaded set()"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_the_module(name, tmp_path):
    is_tool = name.startswith("kernels")
    words = ["--help"] if is_tool else ["--no_such_option", "1"]
    code, out, error = run("-m", "rrhf_fast", name, *words, cwd=tmp_path)
    by_module = run("-m", f"rrhf_fast.{name}", *words, cwd=tmp_path)
    assert (code, out) == by_module[:2] and code == (0 if is_tool else 2)
    assert is_tool or error == by_module[2]  # a tool loads libraries, which write warnings


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rrhf-fast {rrhf_fast.__version__}\n"


@pytest.mark.parametrize(
    "words, problem",
    [
        (["trian"], "trian: no such command (did you mean train?)"),
        (["evalaute", "--seed", "1"], "evalaute: no such command (did you mean evaluate?)"),
        (["x"], "x: no such command (rrhf-fast --help lists them)"),
        (["--seed", "1"], "--seed: expected a command first (rrhf-fast --help lists them)"),
        ([], "expected a command, found none (rrhf-fast --help lists them)"),
        ([""], "expected a command, found none (rrhf-fast --help lists them)"),
    ],
)
def test_what_is_no_command(words, problem, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err == f"rrhf-fast: error: {problem}\n"


@given(st.text().filter(lambda word: word not in {*COMMANDS, "-h", "--help", "--version"}))
def test_any_other_word_is_refused_in_one_line(word):
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as error:
        assert main([word]) == 2
    line = error.getvalue()
    assert line.startswith("rrhf-fast: error: ") and len(line.splitlines()) == 1
    assert len(line) < 250 and "\x1b" not in line


def test_it_finds_modules_where_it_is_started_after_installed_ones(tmp_path):
    (tmp_path / "brief.py").write_text("def score(prompts, responses):\n    return [1.0, 2.0]\n")
    (tmp_path / "numpy.py").write_text("raise RuntimeError('not the installed one')\n")
    row = {"prompt": "p", "responses": ["a", "b"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = ["score", "--data", "rows.jsonl", "--output", "out.jsonl", "--reward_fn", "brief:score"]
    # As an installed script starts: its own folder comes first, not that of the caller.
    code = f"import sys; sys.path[0] = '/nowhere'; sys.path.insert(1, {str(PACKAGE.parent)!r}); "
    code += f"sys.argv[1:] = {words}; from rrhf_fast.__main__ import script; script()"
    assert run("-c", code, cwd=tmp_path)[0] == 0
    (scored,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(scored)["scores"] == [1.0, 2.0]
