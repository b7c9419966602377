"""Rows that cannot be used: named by file and line, counted where they are skipped, and nothing
that is written holds what JSON lacks."""

import csv
import gzip
import json
import re
from codecs import BOM_UTF8
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_fast import SampleConfig, ScoreConfig, demo, sample, score
from rrhf_fast.data.checks import MAX_DEPTH, BadRow
from rrhf_fast.data.load import load_drafts, load_rows
from rrhf_fast.data.sources import InMemory, read_records
from rrhf_fast.evaluate.run import read_side
from rrhf_fast.iterate.__main__ import main as iterate_main
from rrhf_fast.sample.__main__ import main as sample_main
from rrhf_fast.score.__main__ import main as score_main
from rrhf_fast.train.__main__ import main as train_main
from tests.jsonl import read, write

GOOD = {"prompt": "Why?", "responses": ["Because.", "No idea."], "scores": [1, 0]}
LONG = "7" * 5000
PROVIDED = ["--policies", "[{method: provided}]"]
REWARD = ["--reward_fn", "rrhf_fast.demo.reward:score"]


def strict(path):
    """The rows of a file, which must be JSON of valid Unicode."""

    def refuse(name):
        raise AssertionError(f"{path} holds {name}")

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    json.dumps(rows, ensure_ascii=False).encode()
    return rows


# --- Integers of thousands of digits, depth, bytes that are no text


def _as_lines(path, bad):
    path = path / "rows.jsonl"
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), bad, json.dumps(GOOD).encode()]))
    return str(path), f"{path}:2", 2


def _as_array(path, bad):
    path, good = path / "rows.json", json.dumps(GOOD).encode()
    path.write_bytes(b"[" + b",\n".join([good, bad, good]) + b"]")
    return str(path), f"{path}[1]", 2


PARTS = '"responses": ["]", "\\"{"], "scores": [1, 0]'
HARD = {
    "digits": f'{{"prompt": "{LONG}", "responses": ["a", "b"], "scores": [{LONG}, 0]}}',
    "digits elsewhere": f'{{"prompt": "a", {PARTS}, "n": -{LONG}}}',
    "digits alone": LONG,
    "deep": f'{{"prompt": "a", {PARTS}, "n": {"[" * 3000 + "]" * 3000}}}',
    "rather deep": f'{{"prompt": "a", {PARTS}, "n": {"[" * 65 + "]" * 65}}}',
    "latin": f'{{"prompt": "caf\xe9", {PARTS}}}'.encode("latin-1"),
}


@pytest.mark.parametrize("form", [_as_lines, _as_array])
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("load", [load_rows, load_drafts])
def test_a_row_that_cannot_be_read_is_one_bad_row(name, form, load, tmp_path):
    bad = HARD[name] if isinstance(HARD[name], bytes) else HARD[name].encode()
    path, where, good = form(tmp_path, bad)
    with pytest.raises(BadRow, match="^" + re.escape(where) + ": .*--on_bad_rows skip"):
        load(path)
    rows, report = load(path, on_bad_rows="skip")
    assert len(rows) == good and report.read == good + 1 and report.left_out() == {"skipped": 1}


def test_an_array_that_breaks_off_after_a_long_integer_is_one_line(tmp_path):
    for text in (f"[{LONG}", f'[{{"a": {LONG}', f'[{{"a": {LONG}}}, x]'):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(ValueError, match=r"rows\.json(\[\d\]|:1): (not JSON|expected)"):
            load_rows(str(tmp_path / "rows.json"), on_bad_rows="skip")


def test_byte_positions_are_those_of_the_file(tmp_path):
    bad = b'{"prompt": "\xc3\xa9\xff"}'
    for form in (_as_lines, _as_array):
        path, _, _ = form(tmp_path, bad)
        content = Path(path).read_bytes()
        with pytest.raises(BadRow, match=rf"not UTF-8 text \(byte {content.index(0xFF)} of"):
            load_rows(path)


@pytest.mark.parametrize("start", [b"", BOM_UTF8], ids=["plain", "with a BOM"])
def test_byte_positions_are_right_for_each_of_many_records(start, tmp_path):
    path = tmp_path / "rows.json"
    records = [b'{"prompt": "\xc3\xa9\xff"}', b'{"prompt": "\xe2\x82\xac"}', b'"\xff\xff"'] * 3
    path.write_bytes(start + b" [" + b" ,\n ".join(records) + b"]")
    bad = [str(record) for _, record in read_records(str(path)) if isinstance(record, BadRow)]
    places = [int(re.search(r"byte (\d+) of", text)[1]) for text in bad]
    content = path.read_bytes()
    assert places == [m.start() for m in re.finditer(b"\xff+", content)] and len(places) == 6


def test_cells_with_long_integers_are_bad_rows(tmp_path):
    table = [
        ["p", '["a", "b"]', "[1, 0]"],
        ["p", '["a", "b"]', f"[{LONG}, 0]"],
        ['[{"role": "user", "content": "a", "n": ' + LONG + "}]", '["a", "b"]', "[1, 0]"],
        ["p", '["a", "b"]', '"' + LONG + '"'],
    ]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "responses", "scores"], *table])
    with pytest.raises(BadRow, match=r"rows.csv:3: scores: expected JSON"):
        load_rows(str(path))
    rows, report = load_rows(str(path), on_bad_rows="skip")
    assert len(rows) == 1 and report.bad.total() == 3 and report.read == 4
    columns = dict(zip(("prompt", "responses", "scores"), zip(*table, strict=True), strict=True))
    columns["responses"] = [["a", "b"]] * 4
    columns["scores"] = [[1.0, 0.0]] * 4
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(BadRow, match=r"rows.parquet\[2\]: prompt\[0\].n: holds float inf"):
        load_rows(str(tmp_path / "rows.parquet"))


def test_a_csv_row_in_another_encoding_is_a_bad_row(tmp_path):
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(b"prompt,chosen,rejected\na,b,c\ncaf\xe9,b,c\nd,e,f\n"))
    with pytest.raises(BadRow, match=":3: not UTF-8 text"):
        load_rows(str(path))
    rows, report = load_rows(str(path), on_bad_rows="skip")
    assert [row.prompt for row in rows] == ["a", "d"] and report.bad == {"not UTF-8": 1}


HUGE = 10**5000


class Odd:
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "bad",
    [
        GOOD | {"scores": [HUGE, 0]},
        GOOD | {"prompt": HUGE},
        GOOD | {"prompt": [{"role": "tool", "content": {"n": HUGE}}]},
        GOOD | {"prompt": [{"role": "tool", "content": [b"\xff"]}]},
        GOOD | {"prompt": b"\xff\xfe"},
        GOOD | {"chat_template_kwargs": {"n": -HUGE}},
        GOOD | {"prompt": Odd()},
        HUGE,
    ],
    ids=("score", "prompt", "tool", "bytes in a tool", "bytes", "template", "object", "no row"),
)
@pytest.mark.parametrize("group_by", [None, "prompt"])
def test_rows_in_memory_that_hold_no_json_are_bad_rows(bad, group_by):
    rows, kept = [GOOD, bad, GOOD], 2
    if group_by:
        single = [{"prompt": "a", "response": text, "score": n} for n, text in enumerate("bcd")]
        bad = {"prompt": HUGE, "response": HUGE} if bad is HUGE else bad | {"response": "e"}
        bad.pop("scores", None)
        rows, kept = [*single, bad | {"score": HUGE}], 1
    source = InMemory("train_dataset", rows)
    with pytest.raises(BadRow, match=rf"^train_dataset\[{len(rows) - 1 if group_by else 1}\]: "):
        load_rows(source, group_by=group_by)
    good, report = load_rows(source, group_by=group_by, on_bad_rows="skip")
    assert len(good) == kept and sum(report.left_out().values()) == 1 and report.read == len(rows)


def test_a_list_that_contains_itself_is_a_bad_row():
    circle = []
    circle.append(circle)
    source = InMemory("rows", [GOOD, GOOD | {"n": circle}])
    with pytest.raises(BadRow, match=r"^rows\[1\]: cannot be read"):
        load_rows(source)
    assert len(load_rows(source, on_bad_rows="skip")[0]) == 1


def test_frames_and_datasets_hold_what_json_lacks(tmp_path):
    pandas = pytest.importorskip("pandas", reason="frames are pandas'")
    frame = pandas.DataFrame([GOOD] * 3)
    frame["prompt"] = pandas.array(["Why?", pandas.NA, pandas.NA], dtype="string")
    frame["time"] = [pandas.NaT, pandas.NaT, pandas.Timestamp("2020-01-02")]
    source = InMemory("frame", frame.to_dict("records"))
    good, report = load_drafts(source, on_bad_rows="skip")
    assert len(good) == 1 and report.bad == {"missing field": 2}
    assert good[0].others == {"time": None}


def test_depth_up_to_the_limit_is_used(tmp_path):
    deep = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    write(tmp_path / "rows.jsonl", [GOOD | {"n": deep}])
    config = SampleConfig(
        data=str(tmp_path / "rows.jsonl"),
        output=str(tmp_path / "out.jsonl"),
        policies=[{"method": "provided"}],
    )
    assert sample(config)["rows"] == 1
    assert strict(tmp_path / "out.jsonl")[0]["n"] == deep


# --- Halves of surrogate pairs, and other values that JSON lacks

HALF = "a\ud800"
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
ASK = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [{"role": HALF, "content": "a"}]},
        {"prompt": [ASK | {HALF: 1}]},
        {"prompt": [{"from": HALF, "value": "a"}]},
        {"prompt": [ASK, CALL | {"tool_calls": [{"function": {"arguments": {HALF: 1}}}]}]},
        {"prompt": [ASK, CALL | {"tool_calls": [{"function": {"arguments": {"a": [HALF]}}}]}]},
        {"prompt": [ASK, CALL | {"tool_calls": [{"n": float("nan")}]}]},
        {"prompt": [ASK, {"role": "tool", "content": {"n": float("inf")}}]},
        {"prompt": [ASK | {"name": HALF}]},
        {"sources": ["a", HALF]},
        {"finish_reasons": ["stop", HALF]},
        {"finish_reasons": ["stop", {"n": float("nan")}]},
        {"tools": [{HALF: 1}]},
        {"tools": [{"n": float("nan")}]},
        {"chat_template_kwargs": {HALF: 1}},
        {"chat_template_kwargs": {"n": float("inf")}},
        {"system": HALF},
        {"extra": HALF},
        {"extra": [{"deep": {"er": HALF}}]},
        {"extra": {HALF: 1}},
        {HALF: 1},
        {"failures": [{"error": HALF}]},
    ],
    ids=ascii,
)
@pytest.mark.parametrize("command", ["sample", "score"])
def test_what_cannot_be_written_is_a_bad_row(fields, command, tmp_path, capsys):
    data, output = write(tmp_path / "rows.jsonl", [GOOD, GOOD | fields]), tmp_path / "out.jsonl"
    main = {"sample": sample_main, "score": score_main}[command]
    options = ["--data", data, "--output", str(output)]
    options += PROVIDED if command == "sample" else REWARD
    assert main(options) == 2 and not output.exists()
    assert re.match(rf"rrhf_fast.{command}: error: \S*rows.jsonl:2: ", capsys.readouterr().err)
    assert main([*options, "--on_bad_rows", "skip"]) == 0
    assert len(strict(output)) == 1 and "1 skipped" in capsys.readouterr().out


def test_stages_pass_on_only_what_json_has(tmp_path):
    values = {
        "nan": (float("nan"), None),
        "inf": (-float("inf"), None),
        "list": ([1.0, float("nan")], [1.0, None]),
        "text": (b"caf\xc3\xa9", "café"),
        "bytes": (b"\xff", "/w=="),
        "decimal": (Decimal("1.50"), 1.5),
        "date": (date(2020, 1, 2), "2020-01-02"),
        "struct": ({"a": b"\xfe", "b": float("nan")}, {"a": "/g==", "b": None}),
        "numpy": (np.float32(0.5), 0.5),
        "whole": (2**63 - 1, 2**63 - 1),
    }
    columns = {name: [value] for name, (value, _) in values.items()}
    columns |= {name: [value] for name, value in GOOD.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    expected = {name: value for name, (_, value) in values.items()}
    options = {"data": str(tmp_path / "rows.parquet"), "output": str(tmp_path / "sampled.jsonl")}
    sample(SampleConfig(**options, policies=[{"method": "provided"}]))
    options = {"data": str(tmp_path / "sampled.jsonl"), "output": str(tmp_path / "scored.jsonl")}
    score(ScoreConfig(**options, reward_fn="rrhf_fast.demo.reward:score"))
    for name in ("sampled", "scored"):
        (row,) = strict(tmp_path / f"{name}.jsonl")
        assert {key: row[key] for key in expected} == expected


def nan_for_a(prompts, responses):
    return [{"a": float("nan"), "b": float("inf")}.get(text, 1.0) for text in responses]


def test_scores_that_json_lacks_are_recorded_as_reasons(tmp_path):
    data = write(tmp_path / "rows.jsonl", [GOOD | {"responses": list("abcd"), "scores": [1] * 4}])
    options = {"data": data, "output": str(tmp_path / "out.jsonl")}
    counts = score(ScoreConfig(**options, reward_fn=f"{__name__}:nan_for_a"))
    (row,) = strict(tmp_path / "out.jsonl")
    assert row["responses"] == ["c", "d"] and counts["unscored"] == 2
    assert [part["error"] for part in row["unscored"]] == ["a score of nan", "a score of inf"]


def test_penalties_of_scores_that_are_none(tmp_path):
    data = write(tmp_path / "rows.jsonl", [GOOD, GOOD | {"responses": ["A bowl.", "a"]}])
    reference = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    reference.get_input_embeddings().weight.data *= 1.1
    reference.save_pretrained(tmp_path / "reference")
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(tmp_path / "reference")
    config = ScoreConfig(
        data=data,
        output=str(tmp_path / "out.jsonl"),
        reward_fn=f"{__name__}:nan_for_a",
        model_name_or_path=str(demo.MODEL_DIR),
        reference_model_name_or_path=str(tmp_path / "reference"),
        kl_coef=1e-3,
    )
    score(config)
    first, second = strict(tmp_path / "out.jsonl")
    expected = [1 - 1e-3 * ratio for ratio in first["log_ratios"]]
    assert first["rewards"] == [1.0, 1.0] and first["scores"] == pytest.approx(expected)
    assert len(second["scores"]) == 1 and second["unscored"][0]["error"] == "a score of nan"
    with pytest.raises(ValueError, match="^kl_coef: expected at most 1e30"):
        score(replace(config, kl_coef=1e308, overwrite=True))


# --- What is skipped is counted, by every stage

MIXED = [
    GOOD,
    {"prompt": 3, "responses": ["a", "b"], "scores": [1, 0]},
    GOOD | {"responses": ["Yes.", "No.", None], "scores": [1, 0, 2]},
    {"responses": ["a", "b"]},
    {"prompt": "x", "responses": "no list", "scores": []},
]
KINDS = {"skipped: wrong type": 2, "skipped: missing field": 1, "bad_responses: wrong type": 1}


def _says_what_is_skipped(text, option):
    assert re.search(
        rf"^{option}: 3 rows skipped: 2 wrong type \(first: \S*rows.jsonl:2: prompt: .*\); "
        r"1 missing field \(first: \S*rows.jsonl:4: prompt: missing.*\)$",
        text,
        re.MULTILINE,
    )
    assert re.search(rf"^{option}: 1 response skipped: 1 wrong type \(first: ", text, re.MULTILINE)


@pytest.mark.parametrize("command", ["sample", "score"])
def test_stages_count_what_they_skip(command, tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", MIXED)
    options = {"data": data, "output": str(tmp_path / "out.jsonl"), "on_bad_rows": "skip"}
    if command == "sample":
        counts = sample(SampleConfig(**options, policies=[{"method": "provided"}]))
    else:
        counts = score(ScoreConfig(**options, reward_fn="rrhf_fast.demo.reward:score"))
    assert {name: counts[name] for name in KINDS} == KINDS
    assert (counts["rows"], counts["skipped"], counts["bad_responses"]) == (2, 3, 1)
    assert len(read(options["output"])) == 2
    _says_what_is_skipped(capsys.readouterr().out, "data")
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    words += ["--overwrite", "true", *(PROVIDED if command == "sample" else REWARD)]
    assert {"sample": sample_main, "score": score_main}[command](words) == 0
    out = capsys.readouterr().out
    _says_what_is_skipped(out, "data")
    assert "2 rows, " in out and ", 3 skipped, 1 bad_responses\n" in out


def test_score_skips_rows_without_responses(tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", [GOOD, {"prompt": "a"}])
    options = {"data": data, "output": str(tmp_path / "out.jsonl")}
    config = ScoreConfig(**options, reward_fn="rrhf_fast.demo.reward:score")
    with pytest.raises(BadRow, match="rows.jsonl:2: responses: missing"):
        score(config)
    config.on_bad_rows = "skip"
    counts = score(config)
    assert (counts["rows"], counts["skipped"], counts["skipped: missing field"]) == (1, 1, 1)


def test_prompts_that_a_local_model_cannot_read_are_counted(tmp_path, capsys):
    rows = [GOOD, {"prompt": "word " * 400}]
    config = SampleConfig(
        data=write(tmp_path / "rows.jsonl", rows),
        output=str(tmp_path / "out.jsonl"),
        model_name_or_path=str(demo.MODEL_DIR),
        policies=[{"method": "greedy", "max_new_tokens": 2}, {"method": "provided"}],
        on_bad_rows="skip",
    )
    counts = sample(config)
    assert (counts["rows"], counts["unanswered"]) == (2, 1)
    said = r"policies\[0\]: 1 row skipped: 1 prompt fills the window \(first: \S*rows.jsonl:2: "
    assert re.search(said, capsys.readouterr().out)


def test_shown_rows_say_what_is_skipped(tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", MIXED)
    options = ["--train_data", data, "--model_name_or_path", str(demo.MODEL_DIR)]
    assert train_main([*options, "--show_tokens", "9", "--on_bad_rows", "skip"]) == 0
    _says_what_is_skipped(capsys.readouterr().out, "train_data")


def test_iterate_counts_what_its_stages_skip(tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", MIXED)
    options = {
        "data": data,
        "eval_data": data,
        "ranking_data": data,
        "model_name_or_path": str(demo.MODEL_DIR),
        "output_dir": str(tmp_path / "out"),
        "rounds": "1",
        "steps_per_round": "1",
        "train.train_batch_size": "2",
        "num_samples": "1",
        "num_bootstrap": "2",
        "max_new_tokens": "3",
        "policies": "[{method: provided}]",
        "reward_fn": "rrhf_fast.demo.reward:score",
        "on_bad_rows": "skip",
    }
    assert iterate_main([word for name, v in options.items() for word in (f"--{name}", v)]) == 0
    out = capsys.readouterr().out
    evaluations, _, rounds = out.partition("round 1 of 1")
    _says_what_is_skipped(evaluations, "data")
    _says_what_is_skipped(evaluations, "ranking_data")
    _says_what_is_skipped(rounds.partition("sampled: ")[0], "data")


def test_scores_of_an_evaluation_are_numbers(tmp_path):
    row = {"prompt": "a", "responses": ["b"], "sources": ["model"]}
    path = write(tmp_path / "scored.jsonl", [row | {"scores": [1]}, row | {"scores": ["high"]}])
    with pytest.raises(ValueError, match=r"scored.jsonl:2: scores\[0\]: expected a number"):
        read_side(path, "model")


def test_fields_named_as_those_of_the_output_do_not_pass_for_them(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "scores": [9], "sources": "x", "id": 1}
    row |= {"criteria": [], "rewards": [1]}
    options = {"data": write(tmp_path / "rows.jsonl", [row]), "output": str(tmp_path / "out.jsonl")}
    sample(SampleConfig(**options, policies=[{"method": "provided"}]))
    (sampled,) = strict(tmp_path / "out.jsonl")
    assert sampled.keys() == {"prompt", "responses", "sources", "finish_reasons", "id"}
    assert sampled["sources"] == ["chosen", "rejected"]


def test_parquet_text_that_is_not_utf8_is_a_bad_row(tmp_path):
    path = tmp_path / "rows.parquet"
    texts = pyarrow.array([b"one", b"caf\xe9", b"two"]).cast(pyarrow.string(), safe=False)
    table = {"prompt": texts, "responses": [["a", "b"]] * 3, "scores": [[1, 0]] * 3}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    with pytest.raises(BadRow, match=r"rows.parquet\[1\]: not UTF-8 text"):
        load_rows(str(path))
    rows, report = load_rows(str(path), on_bad_rows="skip")
    assert [row.prompt for row in rows] == ["one", "two"] and report.bad == {"not UTF-8": 1}
