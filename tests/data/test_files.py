"""Sources of rows: every kind of file gives the same records, and damage gives one clear line."""

import csv
import gzip
import json
import re
from datetime import datetime
from decimal import Decimal

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rrhf_fast.data.checks import BadRow
from rrhf_fast.data.load import load_drafts, load_rows
from rrhf_fast.data.sources import read_records

PAIRS = [
    {"prompt": f"Why {i}?\nTell.", "chosen": "So, é.", "rejected": 'No "idea".', "score_chosen": i}
    for i in range(3)
]
PAIRS = [pair | {"score_rejected": -1.5} for pair in PAIRS]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_zst(path, data):
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(data)


def write_table(path, records, delimiter=","):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, records[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)


WRITERS = {
    "rows.jsonl": lambda path: path.write_bytes(lines(PAIRS)),
    "rows.ndjson": lambda path: path.write_bytes(lines(PAIRS)),
    "rows.txt": lambda path: path.write_bytes(lines(PAIRS)),
    "lines.json": lambda path: path.write_bytes(lines(PAIRS)),
    "array.json": lambda path: path.write_text(json.dumps(PAIRS)),
    "indented.json": lambda path: path.write_text("\ufeff\n" + json.dumps(PAIRS, indent=2) + "\n"),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(PAIRS))),
    "array.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(PAIRS).encode())),
    "rows.jsonl.zst": lambda path: write_zst(path, lines(PAIRS)),
    "array.json.zst": lambda path: write_zst(path, json.dumps(PAIRS).encode()),
    "rows.parquet": lambda path: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(PAIRS), path
    ),
    "rows.csv": lambda path: write_table(path, PAIRS),
    "rows.tsv": lambda path: write_table(path, PAIRS, "\t"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path):
    WRITERS[name](tmp_path / name)
    rows, report = load_rows(str(tmp_path / name))
    assert [row.prompt for row in rows] == [pair["prompt"] for pair in PAIRS]
    assert rows[2].responses == ["So, é.", 'No "idea".'] and rows[2].rewards == [2.0, -1.5]
    assert all(type(text) is str for text in [rows[0].prompt, *rows[0].responses])
    assert report.read == report.kept == 3 and not report.unused
    assert all(row.where.startswith(str(tmp_path / name)) for row in rows)


def test_places_name_the_line_or_the_index(tmp_path):
    for name in ("rows.jsonl", "array.json", "rows.csv", "rows.parquet"):
        WRITERS[name](tmp_path / name)
    places = {
        name: [where.removeprefix(str(tmp_path / name)) for where, _ in read_records(path)]
        for name, path in ((name, str(tmp_path / name)) for name in WRITERS)
        if (tmp_path / name).exists()
    }
    assert places["rows.jsonl"] == [":1", ":2", ":3"]
    assert places["array.json"] == places["rows.parquet"] == ["[0]", "[1]", "[2]"]
    assert places["rows.csv"] == [":2", ":4", ":6"]  # each prompt takes two lines


def test_patterns_and_folders_are_read_in_order(tmp_path):
    for number in (2, 0, 1):
        (tmp_path / f"part-{number}.jsonl").write_bytes(lines([{"prompt": str(number)}]))
    (tmp_path / "notes.md").write_text("not rows")
    (tmp_path / ".hidden.jsonl").write_text("not rows")
    for source in (str(tmp_path), f"{tmp_path}/*.jsonl", f"{tmp_path}/part-[0-9].*"):
        assert [draft.prompt for draft in load_drafts(source)[0]] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="no file matches"):
        load_rows(f"{tmp_path}/*.csv")


def test_the_splits_of_a_folder(tmp_path):
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"prompt": name}]))

    def prompts(source):
        return [draft.prompt[:5] for draft in load_drafts(source)[0]]

    assert prompts(str(tmp_path)) == prompts(f"{tmp_path}:train") == ["train"]
    assert prompts(f"{tmp_path}:test") == ["test-"]
    with pytest.raises(ValueError, match="no split 'nonsense', only test, train"):
        prompts(f"{tmp_path}:nonsense")
    (tmp_path / "more.jsonl").write_bytes(lines([{"prompt": "more"}]))
    with pytest.raises(ValueError, match="more.jsonl names no split"):
        prompts(str(tmp_path))


def test_splits_have_synonyms(tmp_path):
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"prompt": name}]))
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')

    def prompts(source):
        return [draft.prompt for draft in load_drafts(source)[0]]

    assert prompts(str(tmp_path)) == ["train"]
    for split in ("val", "validation", "valid", "dev"):
        assert prompts(f"{tmp_path}:{split}") == ["val"]
    assert prompts(f"{tmp_path}:eval") == prompts(f"{tmp_path}:test") == ["test"]


def test_the_exact_name_of_a_split_takes_precedence(tmp_path):
    rows = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("validation", "val")}
    datasets.DatasetDict(rows).save_to_disk(tmp_path)
    for split, name in {"val": "val", "validation": "validation", "dev": "validation"}.items():
        assert load_drafts(f"{tmp_path}:{split}")[0][0].prompt == name


def test_a_folder_without_splits_has_none(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(PAIRS))
    with pytest.raises(ValueError, match="no split 'test', its file names mention none"):
        load_rows(f"{tmp_path}:test")
    (tmp_path / "a_dev.jsonl").write_bytes(
        lines(PAIRS)
    )  # held-out rows, which training must not read
    with pytest.raises(ValueError, match="no split 'train', only validation"):
        load_rows(str(tmp_path))


def test_splits_of_saved_datasets(tmp_path):
    table = datasets.Dataset.from_list(PAIRS)
    table.save_to_disk(tmp_path / "plain")
    datasets.Dataset.from_list(PAIRS, split="test").save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "two")
    for source in ("plain", "one", "one:test", "two:a"):
        assert len(load_rows(f"{tmp_path}/{source}")[0]) == 3
    for source, problem in {
        "plain:test": "no split 'test', the dataset was saved without splits",
        "plain:nonsense": "no split 'nonsense', the dataset was saved without splits",
        "one:train": "no split 'train', only test",
        "two": "no split 'train', only a, b",
        "two:c": "no split 'c', only a, b",
    }.items():
        with pytest.raises(ValueError, match=f"{source}: {problem}"):
            load_rows(f"{tmp_path}/{source}")
    next((tmp_path / "plain").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="the saved dataset cannot be loaded"):
        load_rows(str(tmp_path / "plain"))


def test_configurations_and_splits_of_a_dataset_with_a_card(tmp_path):
    files = "".join(
        f"  - config_name: {name}\n    data_files:\n"
        f"    - split: {split}\n      path: {name}.jsonl\n"
        for name, split in (("easy", "train_prefs"), ("hard", "test_prefs"))
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    for name in ("easy", "hard"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([pair | {"id": name} for pair in PAIRS]))
    rows, report = load_rows(f"{tmp_path}:hard:test_prefs")
    assert len(rows) == 3 and rows[1].where == f"{tmp_path}[1]" and report.unused == {"id": 3}
    with pytest.raises(ValueError, match="train_prefs"):  # the only split
        load_rows(f"{tmp_path}:easy:nonsense")
    with pytest.raises(ValueError, match="expected name, name:split or name:config:split"):
        load_rows(f"{tmp_path}:a:b:c")


def test_a_path_may_contain_a_colon(tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "c:train.jsonl").write_bytes(lines(PAIRS))
    assert len(load_rows(str(folder / "c:train.jsonl"))[0]) == 3
    assert len(load_rows(str(folder))[0]) == len(load_rows(f"{folder}:train")[0]) == 3
    with pytest.raises(ValueError, match="is a file, which has no splits"):
        load_rows(f"{folder}/c:train.jsonl:test")


DAMAGED = {
    "cut.jsonl.gz": (gzip.compress(lines(PAIRS * 99))[:-20], "damaged, or not gzip"),
    "plain.jsonl.gz": (lines(PAIRS), "damaged, or not gzip"),
    "flipped.json.gz": (gzip.compress(lines(PAIRS))[:-8] + b"12345678", "damaged, or not gzip"),
    "plain.jsonl.zst": (lines(PAIRS), "cannot be read"),
    "text.parquet": (lines(PAIRS), "damaged, or not Parquet"),
    "empty.parquet": (b"", "damaged, or not Parquet"),
    "cut.json": (json.dumps(PAIRS).encode()[:-9], "[2]: not JSON from here on"),
    "comma.json": (b'[{"prompt": "a"},]', "[1]: not JSON from here on"),
    "two.json": (b"[{}] [{}]", ":1: expected nothing after the JSON array"),
    "glued.json": (b"[{}\n{}]", ":2: expected a comma or the end"),
    "array.jsonl": (json.dumps(PAIRS, indent=1).encode(), "expected a JSON object on each line"),
    "quote.csv": (b'prompt,chosen,rejected\na,b,c\n"d,e,f\n', ":3: not CSV"),
    "twice.csv": (b"a,a\n1,2\n", ":1: two columns have the same name"),
    "latin.csv": (b"prompt\ncaf\xe9\n", "not UTF-8 text"),
    "latin.json": (b'[{"prompt": "caf\xe9"}]', "not UTF-8 text (byte 16 of the file)"),
    "latin.jsonl": (b'\xef\xbb\xbf{"prompt": "caf\xe9"}', "not UTF-8 text (byte 18 of the file)"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_gives_one_line(name, tmp_path):
    data, problem = DAMAGED[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        for _, record in read_records(str(path)):
            if isinstance(record, BadRow):
                raise record
    assert problem in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["", ":test"])
def test_an_empty_name_does_not_mean_the_current_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(lines(PAIRS))
    with pytest.raises(ValueError, match="expected the name of a file, a folder or a dataset"):
        load_rows(source)


def test_empty_cells_are_missing_fields(tmp_path):
    names = ("sources", "tools", "system", "as_generated", "finish_reasons", "score_chosen")
    record = {"prompt": "a", "chosen": "b", "rejected": "c"}
    record |= dict.fromkeys((*names, "score_rejected"), "")
    write_table(tmp_path / "rows.csv", [record])
    (row,), _ = load_rows(str(tmp_path / "rows.csv"))
    assert (row.prompt, row.rewards, row.tools, row.as_generated) == ("a", [1, 0], None, None)


def test_an_empty_array_holds_no_row(tmp_path):
    (tmp_path / "rows.json").write_text(" [ ] ")
    with pytest.raises(ValueError, match=": no rows$"):
        load_rows(str(tmp_path / "rows.json"))


def test_a_number_of_thousands_of_digits_is_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(PAIRS) + b'{"prompt": ' + b"1" * 5000 + b"}\n")
    with pytest.raises(BadRow, match=r":4: expected a JSON object on one line"):
        load_rows(str(path))
    assert load_rows(str(path), on_bad_rows="skip")[1].bad == {"not JSON": 1}


def test_a_csv_row_of_another_length_is_a_bad_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected\na,b,c\nd,e\n\nf,g,h\n")
    with pytest.raises(BadRow, match=":3: expected 3 cells, found 2"):
        load_rows(str(path))
    rows, report = load_rows(str(path), on_bad_rows="skip")
    assert [row.prompt for row in rows] == ["a", "f"] and report.bad == {"unequal lengths": 1}


def test_cells_are_parsed_where_lists_and_numbers_are_expected(tmp_path):
    messages = json.dumps([{"role": "user", "content": "Why?"}])
    record = {"prompt": messages, "responses": '["a", "42"]', "scores": "[1, 0.5]"}
    write_table(tmp_path / "rows.csv", [record])
    (row,), _ = load_rows(str(tmp_path / "rows.csv"))
    assert row.prompt == [{"role": "user", "content": "Why?"}]
    assert (row.responses, row.rewards) == (["a", "42"], [1.0, 0.5])
    table = [
        {"q": "[{a", "one": "42", "two": "7", "good": "0.5", "bad": "x"},
        {"q": "b", "one": "c", "two": "d", "good": "", "bad": "1"},
    ]
    write_table(tmp_path / "table.csv", table)
    columns = {"prompt": "q", "responses": "[one, two]", "scores": "[good, bad]"}
    with pytest.raises(BadRow, match=r":2: scores\[1\]: expected a number, found str 'x'"):
        load_rows(str(tmp_path / "table.csv"), columns=columns)
    columns["scores"] = "[good, good]"
    rows, report = load_rows(str(tmp_path / "table.csv"), columns=columns, on_bad_rows="skip")
    assert [(row.prompt, row.responses, row.rewards) for row in rows] == [
        ("[{a", ["42", "7"], [0.5, 0.5])
    ]
    assert report.bad == {"missing score": 1}


def test_fields_that_parquet_fills_in_are_dropped(tmp_path):
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"city": "Ulm"}}}]
    other = [{"type": "function", "function": {"name": "g", "arguments": {"day": "Monday"}}}]
    records = [
        {
            "prompt": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": None, "tool_calls": made},
                {"role": "tool", "content": "Rain.", "name": "f"},
            ],
            "tools": [{"type": "function", "function": {"name": made[0]["function"]["name"]}}],
            "responses": ["Rain.", "Sun."],
            "scores": [1.0, 0.0],
        }
        for made in (calls, other)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
    rows, _ = load_rows(str(tmp_path / "rows.parquet"))
    assert [row.prompt[1]["tool_calls"] for row in rows] == [calls, other]
    assert rows[0].prompt[0] == {"role": "user", "content": "Weather?"}
    assert rows[0].prompt[1].keys() == {"role", "content", "tool_calls"}
    assert rows[1].tools == records[1]["tools"]


def test_values_without_a_json_type_are_passed_on_as_text(tmp_path):
    day = datetime(2026, 1, 2)
    records = [{"prompt": "a", "day": day, "cost": Decimal("1.5"), "raw": b"x", "more": [day]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
    (draft,), _ = load_drafts(str(tmp_path / "rows.parquet"))
    assert json.loads(json.dumps(draft.others))["cost"] == 1.5
    assert draft.others["day"].startswith("2026-01-02")


def test_a_device_is_refused():
    with pytest.raises(ValueError, match="^/dev/zero: expected a file, found a device$"):
        list(read_records("/dev/zero"))
