"""Options: their types and ranges hold by Python, by command line and by file."""

import json
import math
from dataclasses import fields
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt, Predicate
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast.evaluate.__main__ import main as evaluate
from rrhf_fast.evaluate.config import EvaluateConfig
from rrhf_fast.evaluate.run import claim
from rrhf_fast.export import export
from rrhf_fast.export.__main__ import main as export_command
from rrhf_fast.export.config import ExportConfig
from rrhf_fast.iterate.__main__ import main as iterate
from rrhf_fast.iterate.config import IterateConfig
from rrhf_fast.sample.__main__ import main as sample
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.score.__main__ import main as score
from rrhf_fast.score.config import ScoreConfig
from rrhf_fast.stages.command import parse_config
from rrhf_fast.stages.identity import identity
from rrhf_fast.stages.options import check
from rrhf_fast.train.__main__ import main as train
from rrhf_fast.train.config import TrainConfig

COMMANDS = {
    "train": (train, TrainConfig),
    "sample": (sample, SampleConfig),
    "score": (score, ScoreConfig),
    "evaluate": (evaluate, EvaluateConfig),
    "iterate": (iterate, IterateConfig),
}


def beside(limit, kind):
    """The values next to a limit: those that are just refused, and those that are just taken."""
    step = (lambda x, to: x + to) if kind is int else (lambda x, to: math.nextafter(x, to * 2e9))
    match limit:
        case Ge(low):
            return [step(low, -1)], [low]
        case Gt(low):
            return [low], [step(low, 1)]
        case Le(high):
            return [step(high, 1)], [high]
        case Lt(high):
            return [high], [step(high, -1)]
        case Predicate():  # warmup_steps
            return [-0.001, 1.5], [0.0, 0.999, 1.0, 7]
    raise TypeError(limit)


def numbers(config_class):
    """Values just outside and just inside the range of each numeric option, by its name."""
    found = {}
    for name, kind in get_type_hints(config_class, include_extras=True).items():
        if get_origin(kind) is dict:  # its values are checked where they are used
            continue
        kinds = [kind] if get_origin(kind) is Annotated else get_args(kind)
        for part in kinds:
            if get_origin(part) is Annotated and get_args(part)[0] in (int, float):
                number, *limits = get_args(part)
                pairs = [beside(limit, number) for limit in limits]
                wrong = [value for outside, _ in pairs for value in outside]
                found[name] = wrong, [value for _, inside in pairs for value in inside]
        assert name in found or not {int, float} & {kind, *kinds}, f"{name} has no range"
    return found


NUMBERS = {name: numbers(config_class) for name, (_, config_class) in COMMANDS.items()}
OPTIONS = [(command, option) for command, options in NUMBERS.items() for option in options]
POLICY, TRAINER = numbers(Policy), NUMBERS["train"]


def test_there_are_numbers():
    counts = {name: len(options) for name, options in NUMBERS.items()}
    assert counts == {"train": 37, "sample": 7, "score": 9, "evaluate": 16, "iterate": 19}
    assert len(POLICY) == 8


def empty(config_class):
    return config_class("a", "b") if config_class is ExportConfig else config_class()


@pytest.mark.parametrize("command, option", OPTIONS)
def test_python_refuses_what_is_out_of_range(command, option):
    config_class = COMMANDS[command][1]
    outside, inside = NUMBERS[command][option]
    for value in [*outside, math.nan, math.inf, -math.inf, True, "1", [1]]:
        config = config_class(**{option: value})
        with pytest.raises(ValueError, match=f"^{option}: expected .*, found ") as error:
            config.validate()
        assert "\n" not in str(error.value)
    for value in inside:
        check(config_class(**{option: value}))


def refused(main, arguments, command, option, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rrhf_fast.{command}: error: {option}: expected ")
    assert ", found " in error and error.count("\n") == 1


@pytest.mark.parametrize("command, option", OPTIONS)
def test_command_line_and_file_refuse_it_too(command, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main, outside = COMMANDS[command][0], NUMBERS[command][option][0]
    refused(main, [f"--{option}={outside[0]!r}"], command, option, capsys)
    (tmp_path / "o.yaml").write_text(yaml.safe_dump({option: outside[-1]}))
    refused(main, ["--config", "o.yaml"], command, option, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["o.yaml"]


@pytest.mark.parametrize("option", POLICY)
def test_the_options_of_a_policy(option, tmp_path, capsys):
    outside, inside = POLICY[option]
    for value in [*outside, math.nan, True, "1"]:
        with pytest.raises(ValueError, match=f"^{option}: expected"):
            Policy(**{option: value}).validate()
        with pytest.raises(ValueError, match=rf"^policies\[1\].{option}: expected"):
            check(SampleConfig(policies=[{}, {option: value}]))
    check(Policy(**{option: inside[0]}))
    check(SampleConfig(policies=({option: inside[0]}, Policy())))
    text = yaml.safe_dump([{option: outside[-1]}], default_flow_style=True)
    (tmp_path / "o.yaml").write_text(f"policies: {text}")
    for arguments in (["--policies", text], ["--config", str(tmp_path / "o.yaml")]):
        refused(sample, arguments, "sample", f"policies[0].{option}", capsys)


@pytest.mark.parametrize("option", list(TRAINER)[::6])
def test_the_options_of_the_trainer_in_rounds(option, tmp_path, capsys):
    outside = TRAINER[option][0]
    with pytest.raises(ValueError, match=f"^train.{option}: expected"):
        check(IterateConfig(train={option: outside[0]}))
    (tmp_path / "o.yaml").write_text(yaml.safe_dump({"train": {option: outside[0]}}))
    for arguments in ([f"--train.{option}={outside[0]}"], ["--config", str(tmp_path / "o.yaml")]):
        refused(iterate, arguments, "iterate", f"train.{option}", capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_line_and_file_take_what_is_at_the_edge(command, tmp_path):
    config_class = COMMANDS[command][1]
    edges = {option: inside[0] for option, (_, inside) in NUMBERS[command].items()}
    expected = config_class(**edges)
    (tmp_path / "o.yaml").write_text(yaml.safe_dump(edges))
    by_file = parse_config(config_class, ["--config", str(tmp_path / "o.yaml")])
    by_line = parse_config(config_class, [f"--{name}={value!r}" for name, value in edges.items()])
    assert by_file == by_line == expected
    assert parse_config(config_class, []) == config_class()


@pytest.mark.parametrize("config_class", [c for _, c in COMMANDS.values()] + [Policy, ExportConfig])
def test_defaults_fit(config_class):
    check(empty(config_class))


@given(st.integers(-9, 9) | st.floats() | st.booleans() | st.text(max_size=3) | st.none())
def test_any_value_is_taken_or_refused_by_what_it_is(value):
    """The rule of the options, written once more for one of each kind."""
    is_number = type(value) in (int, float)
    is_text = type(value) is str and "\0" not in value
    fits = {
        "rounds": type(value) is int and value >= 1,
        "steps_per_round": value is None or (type(value) is int and value >= 1),
        "kl_coef": is_number and 0 <= value < math.inf,
        "top_p": is_number and 0 < value <= 1,
        "finished_only": type(value) is bool,
        "base_url": value is None or is_text,
        "data": value is None or is_text,
    }
    for name, fit in fits.items():
        config = IterateConfig(**{name: value})
        if fit:
            check(config)
        else:
            with pytest.raises(ValueError, match=f"^{name}: expected .*, found "):
                check(config)


def test_export_too(capsys):
    with pytest.raises(ValueError, match="^merge: expected bool, found 'yes'$"):
        export(ExportConfig("a", "b", merge="yes"))
    assert export_command(["--output_dir", "b"]) == 2
    assert capsys.readouterr().err == "rrhf_fast.export: error: checkpoint: missing\n"


WRONG = {
    "unknown in a policy": (
        {"policies": [{"top": 1}]}, "policies[0].top: no such option (did you mean top_p?)",
    ),
    "dotted in a policy": (
        {"policies": [{}, {"extra_body.a": 1}]}, "policies[1].extra_body.a: no such option",
    ),
    "unknown in the trainer": (
        {"train": {"learning_rat": 1}},
        "train.learning_rat: no such option (did you mean learning_rate?)",
    ),
    "several": (
        {"train": {"do_train": True, "seeed": 1, "warmup_ratio": 0.1}},
        "train.do_train: no such option (nothing takes its place here); train.seeed: no such "
        "option (did you mean seed?); train.warmup_ratio: no such option (here: warmup_steps)",
    ),
    "of another trainer": (
        {"train": {"warmup_ratio": 0.1}}, "train.warmup_ratio: no such option (here: warmup_steps)",
    ),
    "dotted": ({"train.learning_rat": 1}, "train.learning_rat: no such option"),
    "removed": ({"train": {"lora_dropout": 0.1}}, "train.lora_dropout: no such option"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_unknown_names_within_options(case, tmp_path, capsys):
    options, problem = WRONG[case]
    (tmp_path / "o.yaml").write_text(yaml.safe_dump(options))
    assert iterate(["--config", str(tmp_path / "o.yaml")]) == 2
    start = f"rrhf_fast.iterate: error: config: {tmp_path}/o.yaml: {problem}"
    error = capsys.readouterr().err
    assert error.startswith(start) and error.count("\n") == 1
    if case != "dotted":
        with pytest.raises(ValueError) as raised:
            IterateConfig(**options)
        assert str(raised.value).startswith(problem)


KINDS = {
    "a list of what": ({"policies": [5]}, "policies: expected list of dict, found [5]"),
    "no list": ({"stop_strings": "a"}, "stop_strings: expected a list, [a], found 'a'"),
    "no mapping": ({"train": 5}, "train: expected dict, found 5"),
    "a choice": ({"on_bad_rows": "no"}, "on_bad_rows: expected error or skip, found 'no'"),
    "a word of YAML": (
        {"train": {"active_set": True}},
        "train.active_set: expected auto, 'on' or 'off', found True",
    ),
    "a word of another trainer": (
        {"train": {"report_to": "none"}},
        "train.report_to: expected a list, [none], found 'none' ([] is none, and the default)",
    ),
    "a number of another trainer": (
        {"train": {"max_steps": -1}},
        "train.max_steps: expected at least 1, at most 1000000000, found -1 (null is no limit, and "
        "the default)",
    ),
    "a switch": ({"finished_only": 1}, "finished_only: expected bool, found 1"),
    "one of several kinds": ({"data": 5}, "data: expected str, or list of str, found 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
def test_wrong_types_are_named_in_words(case, tmp_path):
    options, problem = KINDS[case]
    with pytest.raises(ValueError) as raised:
        check(IterateConfig(**options))
    assert str(raised.value) == problem
    (tmp_path / "o.yaml").write_text(yaml.safe_dump(options))
    with pytest.raises(ValueError) as raised:
        parse_config(IterateConfig, ["--config", str(tmp_path / "o.yaml")])
    assert str(raised.value) == problem


def test_files_of_earlier_versions_are_read(tmp_path):
    """They hold lora_dropout, which was always 0."""
    (tmp_path / "train.yaml").write_text("seed: 3\nlora_dropout: 0.0\n")
    config = parse_config(TrainConfig, ["--config", str(tmp_path / "train.yaml")])
    assert config == TrainConfig(seed=3)
    (tmp_path / "rounds.yaml").write_text("train: {seed: 3, lora_dropout: 0.0}\n")
    config = parse_config(IterateConfig, ["--config", str(tmp_path / "rounds.yaml")])
    assert config == IterateConfig(train=TrainConfig(seed=3))
    options = identity(config)
    earlier = options | {"train": options["train"] | {"lora_dropout": 0.0}}
    (tmp_path / "options.json").write_text(json.dumps(earlier))
    assert claim(str(tmp_path), options) == tmp_path
    with pytest.raises(ValueError, match="holds a run with another train"):
        claim(str(tmp_path), options | {"train": options["train"] | {"lora_dropout": 0.1}})


MAPPING = "{date: '2026', d: '007', c: '1e-5', e: 'no', f: 3, g: false, n: {m: '1'}}"


@pytest.mark.parametrize("by", ["command line", "file"])
def test_quoted_values_of_a_mapping_stay_strings(by, tmp_path):
    arguments = ["--chat_template_kwargs", MAPPING]
    if by == "file":
        (tmp_path / "run.yaml").write_text(f"chat_template_kwargs: {MAPPING}\n")
        arguments = ["--config", str(tmp_path / "run.yaml")]
    values = parse_config(TrainConfig, arguments).chat_template_kwargs
    expected = {"date": "2026", "d": "007", "c": "1e-5", "e": "no", "f": 3, "g": False}
    assert values == expected | {"n": {"m": "1"}}


def test_a_policy_may_have_a_name_that_looks_like_a_number():
    arguments = ["--policies", "[{method: openai, model: '123', source: 'no'}]"]
    (policy,) = parse_config(SampleConfig, arguments).policies
    assert (policy.model, policy.source) == ("123", "no")


def test_values_of_keys_on_the_command_line_are_read_as_yaml():
    arguments = ["--chat_template_kwargs.a", "1", "--chat_template_kwargs.b=false"]
    arguments += ["--lr_scheduler_kwargs.min_lr_rate", "0.1"]
    config = parse_config(TrainConfig, arguments)
    assert config.chat_template_kwargs == {"a": 1, "b": False}
    assert config.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    (policy,) = parse_config(SampleConfig, ["--policies.top_p", "0.3"]).policies
    assert policy.top_p == 0.3


SWITCHES = [
    (config_class, f.name)
    for config_class in (*(config for _, config in COMMANDS.values()), ExportConfig)
    for f in fields(config_class)
    if f.type in (bool, bool | None)
]


@pytest.mark.parametrize("config_class, name", SWITCHES)
def test_a_switch_may_stand_alone(config_class, name):
    needed = ["--checkpoint", "a", "--output_dir", "b"] if config_class is ExportConfig else []
    last = ["--output", "c"] if "output" in config_class.__dataclass_fields__ else []
    last = last or ["--output_dir", "b"]
    config = parse_config(config_class, [*needed, f"--{name}", "true", *last])
    assert getattr(config, name) is True
    for words in ([f"--{name}", *last], [*last, f"--{name}"]):
        assert parse_config(config_class, [*needed, *words]) == config
    assert getattr(parse_config(config_class, [*needed, f"--{name}", "false"]), name) is False
    with pytest.raises(ValueError, match=f"^{name}: expected .*found .maybe"):
        parse_config(config_class, [*needed, f"--{name}", "maybe"])


def test_a_switch_within_an_option_may_stand_alone():
    config = parse_config(IterateConfig, ["--train.use_peft", "--rounds", "3"])
    assert config.train.use_peft and config.rounds == 3
    for words in (["--seed"], ["--train.seed"], ["--policies"], ["--active_set"]):
        with pytest.raises(ValueError, match="expected a value, found none|no such option"):
            parse_config(IterateConfig, words)
