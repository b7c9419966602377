"""Options are data: whatever a file or a command line holds, nothing in it runs, repeats or hangs,
and what makes no sense is one line with the option's name."""

import contextlib
import math
import os
import sys
from dataclasses import asdict, fields
from types import NoneType

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rrhf_fast.evaluate.__main__ import main as evaluate
from rrhf_fast.evaluate.config import EvaluateConfig
from rrhf_fast.export.__main__ import main as export
from rrhf_fast.export.config import ExportConfig
from rrhf_fast.iterate.__main__ import main as iterate
from rrhf_fast.iterate.config import IterateConfig
from rrhf_fast.sample.__main__ import main as sample
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.score.__main__ import main as score
from rrhf_fast.score.config import ScoreConfig
from rrhf_fast.stages.options import check
from rrhf_fast.stages.parse import parse_config
from rrhf_fast.stages.plain_yaml import MOST, NotPlain, load
from rrhf_fast.train.__main__ import main as train
from rrhf_fast.train.config import TrainConfig

COMMANDS = {
    "train": (train, TrainConfig),
    "sample": (sample, SampleConfig),
    "score": (score, ScoreConfig),
    "evaluate": (evaluate, EvaluateConfig),
    "iterate": (iterate, IterateConfig),
    "export": (export, ExportConfig),
}
NESTED = "[" * 100_000
BOMB = "a: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12)
)
QUADRATIC = f"a: &a {'x' * 50_000}\nb: [{', '.join(['*a'] * 5_000)}]\n"
# A chain of aliases: each holds the one before, and 40 lists around it.
DEEP = "a0: &a0 x\n" + "".join(
    f"a{i + 1}: &a{i + 1} {'[' * 40}*a{i}{']' * 40}\n" for i in range(60)
)


def one_line(capsys, command):
    """The only error line, without its beginning."""
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and len(lines[0]) <= 2200, lines
    assert all(c.isprintable() for c in lines[0])
    start = f"rrhf_fast.{command}: error: "
    assert lines[0].startswith(start)
    return lines[0].removeprefix(start)


# --- Nothing is imported or called


@pytest.fixture
def payload(tmp_path, monkeypatch):
    """A module whose import writes a file, as the calls of its parts do; and that file."""
    ran = tmp_path / "ran"
    text = f"open({str(ran)!r}, 'a').write('imported')\n"
    text += f"def call(*a, **k):\n    open({str(ran)!r}, 'a').write('called')\n"
    text += "class Made:\n    __init__ = call\n"
    (tmp_path / "payload_of_options.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield ran
    sys.modules.pop("payload_of_options", None)


CALLS = [
    "{class_path: payload_of_options.Made, init_args: {a: 1}}",
    "!!python/object/apply:payload_of_options.call [1]",
    "payload_of_options.Made",
    "[{class_path: payload_of_options.Made}]",
    "{class_path: payload_of_options.Made}",
    "{class_path: payload_of_options.call, init_args: {}}",
    "!!python/name:payload_of_options.call ''",
    "!!python/module:payload_of_options ''",
]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_imports_or_calls_what_it_names(name, payload, tmp_path):
    config_class, file = COMMANDS[name][1], tmp_path / "o.yaml"
    for i, option in enumerate(config_class.__dataclass_fields__):
        for text in CALLS[i % 4 :: 4]:
            file.write_text(f"{option}: {text}\n")
            words = [f"--{option}", f"--{option}+", f"--{option}.a"]
            words = [["--config", str(file)], *([word, text] for word in words)]
            for arguments in [*words, [f"--{option}.class_path", "payload_of_options.Made"]]:
                with contextlib.suppress(ValueError):
                    parse_config(config_class, arguments)
                assert not payload.exists(), arguments
    assert "payload_of_options" not in sys.modules


def test_files_within_options_import_nothing_either(payload, tmp_path):
    file = tmp_path / "t.yaml"
    for text in [*CALLS, *(f"seed: {text}" for text in CALLS)]:
        file.write_text(text)
        for arguments in (["--train", str(file)], ["--train", text], ["--config", str(file)]):
            with pytest.raises(ValueError):
                parse_config(IterateConfig, arguments)
        policy = f"[{{method: sample, extra_body: {text}}}]"
        with contextlib.suppress(ValueError):
            parse_config(SampleConfig, ["--policies", policy])
    assert not payload.exists()


def test_class_path_is_a_name_like_others_where_names_are_free():
    text = "{class_path: os.system, init_args: {command: id}}"
    config = parse_config(TrainConfig, ["--chat_template_kwargs", text])
    expected = {"class_path": "os.system", "init_args": {"command": "id"}}
    assert config.chat_template_kwargs == expected


def test_the_environment_sets_no_option(monkeypatch):
    for name in ("JSONARGPARSE_DEFAULT_ENV", "TRAIN_SEED", "SEED", "RRHF_FAST_SEED"):
        monkeypatch.setenv(name, "true" if "DEFAULT" in name else "7")
    assert parse_config(TrainConfig, []) == TrainConfig()


# --- Files that are no files of options

FILES = {
    "the same name twice": (b"seed: 1\ndata: [a]\nseed: 2\n", "o.yaml:3: seed: given twice"),
    "twice within": (b"chat_template_kwargs: {a: 1, a: 2}", "o.yaml:1: a: given twice"),
    "an alias bomb": (BOMB.encode(), "characters, with its aliases filled in"),
    "a quadratic one": (QUADRATIC.encode(), "characters, with its aliases filled in"),
    "deep by aliases": (DEEP.encode(), "nested more than 50 times, with its aliases filled in"),
    "an alias of itself": (b"seed: 1\ndata: &a [*a]", "o.yaml:2: *a: an alias within what it name"),
    "an alias of nothing": (b"data: *a", "o.yaml:1: *a: an alias of nothing"),
    "nested": (b"data: " + NESTED.encode(), "o.yaml:1: nested more than 50 times"),
    "nested by dashes": (b"- " * 100_000, "o.yaml:1: nested more than 50 times"),
    "nested mappings": (b"{a: " * 100_000, "o.yaml:1: nested more than 50 times"),
    "a name that is a list": (b"? [a]\n: 1", "o.yaml:1: expected a name, found a list"),
    "a long number": (b"seed: " + b"9" * 10_000, "o.yaml:1: a number of 10000 digits"),
    "a tag": (b"seed: 1\ndata: !x 1", "o.yaml:2: !x: tags are not read"),
    "bytes": (b"data: !!binary aGk=", "o.yaml:1: tag:yaml.org,2002:binary: tags are not read"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "o.yaml:2: expected one document, found another"),
    "a tab": (b"train:\n\tseed: 1\n", "o.yaml:2: not YAML ("),
    "a NUL": (b"seed: 1\ndata: a\0b\n", "o.yaml:2: not YAML ("),
    "an escape": (b"seed: 1\n\ndata: \x1b]0;x\x07\n", "o.yaml:3: not YAML ("),
    "half a pair": (b'data: "\\ud800"', "o.yaml:1: "),
    "UTF-16": ("seed: 1".encode("utf-16"), "o.yaml: not YAML (not UTF-8 at byte 0)"),
    "other bytes": (b"data: caf\xe9", "o.yaml: not YAML (not UTF-8 at byte 9)"),
    "too large": (b"# " + b"x" * MOST, f"o.yaml: more than {MOST} characters"),
    "a name with an escape": (b'"\\e[31mred": 1', "o.yaml: \\x1b[31mred: no such option"),
    "a long name": (b"? " + b"n" * 5000 + b"\n: 1", "o.yaml: nnn"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_hostile_file_is_one_line_with_its_name(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data, problem = FILES[case]
    (tmp_path / "o.yaml").write_bytes(data)
    assert sample(["--config", "o.yaml"]) == 2
    assert problem in one_line(capsys, "sample")
    assert iterate(["--train", "o.yaml"]) == 2
    assert one_line(capsys, "iterate").startswith("train: o.yaml")


def test_what_is_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    (tmp_path / "loop").symlink_to("loop")
    names = ["fifo", ".", "", "/dev/zero", "/dev/stdin", "-", "https://example.org/o.yaml", "loop"]
    for name in [*names, "a\0b", "\ud800", "x" * 5000, "o.yaml/x", "\x1b]0;x\x07", "no\nfile"]:
        assert sample([f"--config={name}"]) == 2
        error = one_line(capsys, "sample")
        assert error.startswith("config: ") and "cannot be read (" in error


YAML_11 = "{a: 1:30, b: 010, c: 2026-01-01, d: 1e-5, e: 0x10, f: 1_000, g: yes, h: Off, i: 0b11}"


def test_words_that_yaml_1_1_reads_as_something_else():
    values = parse_config(TrainConfig, ["--chat_template_kwargs", YAML_11]).chat_template_kwargs
    expected = {"a": "1:30", "b": "010", "c": "2026-01-01", "d": 1e-5, "e": 16, "f": 1000}
    assert values == expected | {"g": True, "h": False, "i": "0b11"}
    for text in ("1:30", "010", "0b11"):
        with pytest.raises(ValueError, match=f"^seed: expected int, .*found '{text}'$"):
            parse_config(TrainConfig, ["--seed", text])
    values = parse_config(TrainConfig, ["--chat_template_kwargs", "{1: a, on: b, null: c}"])
    assert values.chat_template_kwargs == {"1": "a", "on": "b", "null": "c"}


def test_a_byte_order_mark_and_aliases_within_reason(tmp_path):
    text = "\ufeffstop_strings: &a [x]\nlr_scheduler_kwargs: &b {k: *a}\n"
    text += "chat_template_kwargs: {<<: *b, z: é}\n"
    (tmp_path / "o.yaml").write_text(text, encoding="utf-8")
    config = parse_config(TrainConfig, ["--config", str(tmp_path / "o.yaml")])
    assert config.chat_template_kwargs == {"k": ["x"], "z": "é"}
    config.chat_template_kwargs["k"].append("y")  # no part of another option
    assert config.stop_strings == ["x"] and config.lr_scheduler_kwargs == {"k": ["x"]}


TEXT = st.text(st.characters(exclude_characters="\x85\u2028\u2029", codec="utf-8"), max_size=5)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | TEXT
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@given(PLAIN)
def test_data_that_yaml_wrote_is_read_back(value):
    assert load(yaml.safe_dump(value)) == value
    assert load(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)) == value


@settings(max_examples=300)
@given(st.text(st.sampled_from("ab:{}[]&*!|>-?,#'\"\n\t \\0%@<~"), max_size=30))
def test_any_text_is_data_or_refused(text):
    with contextlib.suppress(NotPlain):
        value = load(text)
        assert isinstance(value, NoneType | str | int | float | bool | list | dict)


# --- Values that make no sense

NEST: list = []
for _ in range(5000):
    NEST = [NEST]
CIRCLE: list = []
CIRCLE.append(CIRCLE)
ABSURD = [
    -1, 0, 1e308, 1e-320, math.inf, math.nan, 10**400, -(10**400), 10**5000, 10**18, 2**32, 2**64,
    "", " ", "(", "\x1b]0;x\x07", "\ud800", "x" * 5000, "../../..", "/dev/null", "/dev/full",
    "/proc/self/mem", "a\0b", ["a"] * 100_000, [], [[[]]], True, None, {}, {"a": {"b": 1}},
    {"a": math.nan}, {1: 2}, {"class_path": "os.system"}, NEST, CIRCLE, {"a": NEST}, {"a": CIRCLE},
    b"x", 1j, object(), ("a",), {"a": 10**400}, {"\ud800": 1}, [None], ["\0"], ["\ud800"],
]  # fmt: skip
BASE = {
    TrainConfig: {}, Policy: {},
    SampleConfig: {"data": "d", "output": "o", "model_name_or_path": "m"},
    ScoreConfig: {"data": "d", "output": "o", "reward_fn": "a:b"},
    EvaluateConfig: {
        "data": "d", "output_dir": "o", "model_name_or_path": "m", "reward_fn": "a:b",
    },
    IterateConfig: {
        "data": "d", "eval_data": "e", "model_name_or_path": "m", "reward_fn": "a:b",
    },
    ExportConfig: {"checkpoint": "a", "output_dir": "b"},
}  # fmt: skip


@pytest.mark.parametrize("config_class", BASE)
def test_absurd_values_by_python_are_taken_or_refused_by_name(config_class):
    refused, step = 0, 3 if len(fields(config_class)) > 30 else 1
    for i, option in enumerate(fields(config_class)):
        for value in ABSURD[i % step :: step]:
            try:
                config = config_class(**BASE[config_class] | {option.name: value})
                check(config) if config_class is ExportConfig else config.validate()
            except ValueError as error:
                refused += 1
                named = str(error).partition(": ")[0]
                # The seeds of later rounds depend on their number.
                assert option.name in named or "missing" in str(error) or named == "train.seed"
                assert "\n" not in str(error) and len(str(error)) < 600, error
    assert refused > 20 * len(fields(config_class)) / step


TEXTS = [
    "-1", "1e308", ".inf", "nan", "1" + "0" * 400, "9" * 5000, "", " ", "(", "\x1b]0;x\x07",
    "x" * 5000, "[", "{a: ", "&a [*a]", "*a", "null", "[1, 2]", "{a: 1}", "- x", "a: b",
    "\ud800", "[null]", "--", "-",
]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_absurd_words_of_a_command_line(name):
    config_class = COMMANDS[name][1]
    needed = ["--checkpoint", "a", "--output_dir", "b"] if name == "export" else []
    for i, option in enumerate(config_class.__dataclass_fields__):
        for j, text in enumerate(TEXTS):
            words = [f"--{option}={text}", f"--{option}+={text}", f"--{option}.k={text}"]
            for word in words if i < 3 else words[(i + j) % 3 :][:1]:
                try:
                    parse_config(config_class, [*needed, word])
                except ValueError as error:
                    assert option in str(error), (word[:80], error)


MISTAKES = {
    "endless epochs": (["--num_train_epochs", "1e308"], "num_train_epochs: expected more than "),
    "endless steps": (["--max_steps", "1" + "0" * 18], "max_steps: expected at least 1, at most 1"),
    "a seed that numpy refuses": (["--seed", "4294967296"], "seed: expected 0 or more, below 4"),
    "a NUL": (["--run_name", "a\0b"], "run_name: expected a text without NUL, found 'a\\x00b'"),
    "half a pair": (["--run_name", "\ud800"], "run_name: expected valid Unicode, found '\\ud800'"),
    "not a number": (["--chat_template_kwargs", "{a: .nan}"], "chat_template_kwargs: expected fin"),
    "no value": (["--seed"], "seed: expected a value, found none"),
    "an option as a value": (["--seed", "--margin", "1"], "seed: expected a value, found --margin"),
    "no option": (["seed"], "seed: expected --OPTION VALUE"),
    "within a number": (["--seed.a", "1"], "seed.a: no such option"),
    "an escape": (["--\x1b]0;x\x07", "1"], "\\x1b]0;x\\x07: no such option"),
    "a long one": (["--" + "n" * 5000, "1"], "n" * 100 + "..." + "n"),
    "two lines": (["--a\nb", "1"], "a b: no such option"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, problem = MISTAKES[case]
    assert train(arguments) == 2
    assert one_line(capsys, "train").startswith(problem)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", ["(", "a{99999999999}", "", [], ["q_proj", ""]])
def test_names_of_layers_that_adapt_none(names):
    with pytest.raises(ValueError, match="^lora_target_modules: .*(no regular expr|found nothing)"):
        TrainConfig(use_peft=True, lora_target_modules=names).validate()


MAGNITUDES = [
    (TrainConfig(learning_rate=1e308), "learning_rate: expected at most 1e30"),
    (TrainConfig(margin=1e38), "margin: expected at most 1e30"),
    (TrainConfig(rank_weight=1e300), "rank_weight: expected at most 1e30"),
    (TrainConfig(stop_strings=["a", ""]), "stop_strings: an empty text"),
    (Policy(temperature=1e-320), "temperature: expected at least 1e-6"),
    (Policy(num_responses=10**12), "num_responses: expected at least 1, at most 10000"),
    (SampleConfig(**BASE[SampleConfig], stop_strings=[""]), "stop_strings: an"),
    (ScoreConfig(**BASE[ScoreConfig], kl_coef=1e308), "kl_coef: expected at most 1e30"),
    (EvaluateConfig(**BASE[EvaluateConfig], temperature=1e-300), "temperature: expected at least"),
    (EvaluateConfig(**BASE[EvaluateConfig], num_bootstrap=10**12), "num_bootstrap: expected at l"),
    (IterateConfig(**BASE[IterateConfig], train={"margin": 1e99}), "train.margin: expected at mo"),
    (IterateConfig(**BASE[IterateConfig], stop_strings=[""]), "stop_strings: an empty text"),
]


@pytest.mark.parametrize("config, problem", MAGNITUDES)
def test_numbers_that_would_end_in_nonsense(config, problem):
    with pytest.raises(ValueError, match=f"^{problem}"):
        config.validate()


def test_options_within_options_keep_what_was_given_before(tmp_path):
    (tmp_path / "o.yaml").write_text("train.seed: 5\ntrain: {lora_r: 3}\n")
    arguments = ["--config", str(tmp_path / "o.yaml"), "--train.margin", "2"]
    config = parse_config(IterateConfig, arguments)
    assert config == IterateConfig(train=TrainConfig(seed=5, lora_r=3, margin=2))
    arguments = ["--chat_template_kwargs.a", "{b: 1}", "--chat_template_kwargs.a.c", "2"]
    assert parse_config(TrainConfig, arguments).chat_template_kwargs == {"a": {"b": 1, "c": 2}}
    arguments = ["--policies+", "{method: greedy}", "--policies.max_new_tokens", "3"]
    policies = parse_config(SampleConfig, arguments).policies
    assert policies == [Policy(), Policy(method="greedy", max_new_tokens=3)]


def test_what_print_config_prints_is_the_config_again(tmp_path, capsys):
    words = ["--policies+", "{source: 'no', model: '007'}", "--stop_strings", '["\\e[1m", "1:30"]']
    words += ["--chat_template_kwargs", '{"a": "\\u202e", b: [1, {c: null}], "1": é}']
    with pytest.raises(SystemExit):
        sample([*words, "--print_config"])
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.split("\n"))
    (tmp_path / "o.yaml").write_text(text, encoding="utf-8")
    again = parse_config(SampleConfig, ["--config", str(tmp_path / "o.yaml")])
    assert asdict(again) == asdict(parse_config(SampleConfig, words))
