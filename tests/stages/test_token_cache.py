"""Rows in tokens on disk: the same as in memory, found again only where nothing changed, whole or
not there at all."""

import json
import os
import random
import shutil
from dataclasses import asdict, replace
from datetime import date, timedelta
from pathlib import Path

import datasets
import numpy as np
import pytest

from rrhf_fast import demo
from rrhf_fast.data import files, fill
from rrhf_fast.data.checks import BadRow
from rrhf_fast.data.encode import encode
from rrhf_fast.data.fill import Recipe
from rrhf_fast.data.forest import forest_tokens
from rrhf_fast.data.load import load_rows
from rrhf_fast.data.padded import padded_tokens
from rrhf_fast.data.sources import InMemory
from rrhf_fast.data.split import prompt_key
from rrhf_fast.data.tokenise import learned_end_ids, tokenise_rows
from rrhf_fast.model.decoder import load_tokenizer
from rrhf_fast.stages import token_cache
from rrhf_fast.stages.token_cache import open_entry, tokenised

TOKENIZER = load_tokenizer(str(demo.MODEL_DIR))
ROWS = [json.loads(line) for line in demo.TRAIN_FILE.open()]


@pytest.fixture
def small_chunks(monkeypatch):
    """So that a few hundred rows need worker processes."""
    monkeypatch.setattr(files, "_CHUNK_BYTES", 4096)
    monkeypatch.setattr(files, "_CHUNK_RECORDS", 7)


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "cache")


def entries(folder):
    """What is in the cache folder."""
    return sorted(path.name for path in Path(folder, "tokenised").iterdir())


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mixed_rows(count, seed=0):
    """Rows of strings and messages, with ties, repeats, long texts and bad ones."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        row = {k: list(v) if isinstance(v, list) else v for k, v in draw.choice(ROWS).items()}
        kind = draw.randrange(8)
        if kind == 0:
            row["scores"][0] = row["scores"][1]
        elif kind == 1:
            row["responses"][2] = row["responses"][3]
        elif kind == 2:
            row["responses"][0] = " and so on" * 300
        elif kind == 3:
            row["scores"][1] = float("nan")
        elif kind == 4:
            row["prompt"] = [{"role": "user", "content": f"{number}?"}]
        elif kind == 5:
            row["extra"] = number
        rows.append(row if kind != 6 else {"prompt": "no responses"})
    return rows


LIMITS = {"max_length": 200, "max_response_length": 90}
CHAT = load_tokenizer(str(demo.MODEL_DIR))
CHAT.chat_template = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def assert_equal_to_memory(corpus, findings, sources, tokenizer=CHAT, **options):
    rows, report = load_rows(sources, on_bad_rows="skip", **options)
    queries, counts = tokenise_rows(rows, tokenizer, report, on_bad_rows="skip", **LIMITS)
    assert len(corpus) == len(queries)
    for place, query in enumerate(queries):
        mine = corpus[place]
        np.testing.assert_array_equal(mine.prompt_ids, query.prompt_ids)
        np.testing.assert_array_equal(mine.rewards, query.rewards)
        for ids, expected in zip(mine.response_ids, query.response_ids, strict=True):
            np.testing.assert_array_equal(ids, expected)
            assert ids.dtype == expected.dtype and ids.flags.writeable
        assert corpus.prompt(place) == query.row.prompt
        assert corpus.where(place) == query.row.where
    index = {
        "forest_tokens": map(forest_tokens, queries),
        "num_responses": (len(query.response_ids) for query in queries),
        "distinct_rewards": (len(np.unique(query.rewards)) for query in queries),
        "distinct_responses": (len({tuple(i) for i in q.response_ids}) for q in queries),
        "prompt_key": (prompt_key(query.row) for query in queries),
    }
    for name, expected in index.items():
        assert corpus.index[name].tolist() == list(expected), name
    assert corpus.padded_tokens.tolist() == list(map(padded_tokens, queries))
    expected = vars(report) | {"first": {key: str(error) for key, error in report.first.items()}}
    actual = vars(findings.report)
    assert actual | {"first": {k: str(e) for k, e in actual["first"].items()}} == expected
    assert findings.counts == counts and corpus.end_ids == learned_end_ids(queries)
    largest = max(ids.max() for q in queries for ids in (q.prompt_ids, *q.response_ids))
    assert findings.max_id == largest


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_corpus_holds_what_memory_would(tmp_path, folder, small_chunks, num_proc):
    sources = [write(tmp_path / f"{seed}.jsonl", mixed_rows(150, seed)) for seed in (1, 2)]
    recipe = Recipe(on_bad_rows="skip", **LIMITS)
    first = tokenised(sources, CHAT, recipe, folder=folder, num_proc=num_proc)
    again = tokenised(sources, CHAT, recipe, folder=folder)
    assert first.seconds is not None and again.seconds is None and again.folder == first.folder
    for entry in (first, again):
        assert_equal_to_memory(*open_entry(entry.folder), sources)
    # The library that users know opens it, too.
    assert len(datasets.Dataset.from_file(str(first.folder / token_cache.ROWS))) == len(
        open_entry(first.folder)[0]
    )


def test_rows_of_one_response_are_joined(tmp_path, folder, small_chunks):
    rows = [
        {"q": row["prompt"], "response": text, "score": score}
        for row in ROWS[:40]
        for text, score in zip(row["responses"], row["scores"], strict=True)
    ]
    rows[17] = {"q": 3}
    source = write(tmp_path / "rows.jsonl", rows)
    options = {"group_by": "q"}
    recipe = Recipe(on_bad_rows="skip", **options, **LIMITS)
    entry = tokenised([source], CHAT, recipe, folder=folder, num_proc=2)
    assert_equal_to_memory(*open_entry(entry.folder), source, **options)


def test_a_part_of_a_corpus(tmp_path, folder):
    source = write(tmp_path / "rows.jsonl", ROWS[:30])
    corpus, _ = open_entry(tokenised([source], TOKENIZER, Recipe(), folder=folder).folder)
    part = corpus.pick(np.array([4, 20, 7])).pick(np.array([2, 1]))
    assert [part.where(i) for i in range(len(part))] == [corpus.where(7), corpus.where(20)]
    np.testing.assert_array_equal(part[1].prompt_ids, corpus[20].prompt_ids)
    assert part.index["digest"].tolist() == corpus.index["digest"][[7, 20]].tolist()
    assert part.digest() != corpus.digest() == corpus.pick(np.arange(30)).digest()


@pytest.mark.parametrize("on_bad_rows", ["error", "skip"])
def test_mistakes_in_workers_are_those_of_memory(tmp_path, folder, small_chunks, on_bad_rows):
    for bad in ({"prompt": "p"}, {**ROWS[0], "prompt": "long " * 999}, "{not json"):
        lines = [json.dumps(row) for row in ROWS[:100]]
        lines[90:90] = [bad if isinstance(bad, str) else json.dumps(bad)]
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(lines))
        recipe = Recipe(on_bad_rows=on_bad_rows, max_length=200)
        if on_bad_rows == "skip":
            entry = tokenised([str(path)], TOKENIZER, recipe, folder=folder, num_proc=2)
            report = open_entry(entry.folder)[1].report
            assert (report.read, report.kept, report.bad.total()) == (101, 100, 1)
            continue
        with pytest.raises(BadRow) as problem:
            tokenised([str(path)], TOKENIZER, recipe, folder=folder, num_proc=2)
        assert str(problem.value).startswith(f"{path}:91: ")
        assert "--on_bad_rows skip" in str(problem.value)
        assert not entries(folder)  # nothing is left


def test_sources_without_a_usable_row(tmp_path, folder):
    source = write(tmp_path / "rows.jsonl", [{"prompt": "p"}] * 3)
    expected = (
        r"rows.jsonl: no usable row among the 3 read \(3 missing field; first: .*rows.jsonl:1"
    )
    with pytest.raises(ValueError, match=expected):
        tokenised([source], TOKENIZER, Recipe(on_bad_rows="skip"), folder=folder)
    with pytest.raises(ValueError, match="no_such.jsonl: cannot be read"):
        tokenised([str(tmp_path / "no_such.jsonl")], TOKENIZER, Recipe(), folder=folder)


def test_whatever_changes_tokens_changes_the_address(tmp_path, folder):
    source = write(tmp_path / "rows.jsonl", ROWS[:9])
    recipe = Recipe(**LIMITS)
    places = []

    def place(sources=(source,), tokenizer=TOKENIZER, recipe=recipe):
        entry = tokenised(list(sources), tokenizer, recipe, folder=folder)
        places.append(entry.folder)
        return entry.folder

    assert place() == place()
    others = {
        "max_length": 190,
        "max_response_length": 30,
        "max_prompt_length": 5,
        "on_bad_rows": "skip",
        "stop_strings": ["."],
        "columns": {"prompt": "prompt"},
        "apply_chat_template": True,
        "chat_template_kwargs": {"a": 1},
    }
    assert others.keys() <= asdict(recipe).keys()
    for name, value in others.items():
        place(tokenizer=CHAT, recipe=replace(recipe, **{name: value}))
    place(tokenizer=CHAT)
    other = load_tokenizer(str(demo.MODEL_DIR))
    other.add_tokens(["the"])
    place(tokenizer=other)
    place([source, source])
    write(tmp_path / "rows.jsonl", ROWS[:10])
    place()
    write(tmp_path / "rows.jsonl", ROWS[:9])
    assert place() == places[0]
    assert len(set(places)) == len(places) - 2


@pytest.mark.parametrize("place", ["tokenizer", "options", "row"])
def test_a_template_that_writes_the_date_is_rendered_anew_each_day(
    tmp_path, folder, monkeypatch, place
):
    dated = "{{ strftime_now('%d') }}" + CHAT.chat_template
    tokenizer, rows, options = load_tokenizer(str(demo.MODEL_DIR)), ROWS[:5], {}
    tokenizer.chat_template = CHAT.chat_template
    if place == "tokenizer":
        tokenizer.chat_template = dated
    elif place == "options":
        options = {"chat_template": dated}
    else:
        rows = [*rows, {**rows[0], "chat_template_kwargs": {"chat_template": dated}}]
    source = write(tmp_path / "rows.jsonl", rows)
    recipe = Recipe(chat_template_kwargs=options)

    class Tomorrow(date):
        @classmethod
        def today(cls):
            return date.today() + timedelta(days=1)

    seconds = [tokenised([source], tokenizer, recipe, folder=folder).seconds for _ in range(2)]
    monkeypatch.setattr(token_cache, "date", Tomorrow)
    seconds += [tokenised([source], tokenizer, recipe, folder=folder).seconds for _ in range(2)]
    assert [took is None for took in seconds] == [False, True, False, True]
    assert len(entries(folder)) == 1


def test_what_is_set_after_loading_changes_the_address(tmp_path, folder):
    rows = [{**ROWS[0], "prompt": f"</s> {i}"} for i in range(3)]
    source = write(tmp_path / "rows.jsonl", rows)
    tokenizer = load_tokenizer(str(demo.MODEL_DIR))
    first = tokenised([source], tokenizer, Recipe(), folder=folder)
    tokenizer("a b c", truncation=True, max_length=2, padding="max_length")  # leaves traces
    assert tokenised([source], tokenizer, Recipe(), folder=folder) == replace(first, seconds=None)
    tokenizer.split_special_tokens = True
    other = tokenised([source], tokenizer, Recipe(), folder=folder)
    assert other.folder != first.folder
    assert open_entry(other.folder)[0].digest() != open_entry(first.folder)[0].digest()


def test_a_dataset_that_is_transformed_as_it_is_read_is_not_kept(folder):
    dataset = datasets.Dataset.from_list(ROWS[:5])
    dataset.set_transform(lambda batch: batch)
    entry = tokenised([InMemory("d", dataset)], TOKENIZER, Recipe(), folder=folder)
    assert entry.is_temporary
    entry.close()


def test_nothing_but_our_own_leftovers_is_removed(tmp_path):
    """The folder may be any: that of a project, or a home."""
    source = write(tmp_path / "rows.jsonl", ROWS[:5])
    home = tmp_path / "home"
    ours = [f".{'0' * 32}-01234567", ".temporary-01234567", "1" * 32]
    theirs = [".git", ".ssh", "tokenised/.git", "tokenised/.hidden-01234567", "tokenised/mine"]
    for name in [*theirs, *(f"tokenised/{name}" for name in ours)]:
        (home / name).mkdir(parents=True)
        os.utime(home / name, (0, 0))
    fresh = home / "tokenised" / f".{'2' * 32}-01234567"  # another run is writing it
    fresh.mkdir()
    tokenised([source], TOKENIZER, Recipe(), folder=str(home))
    assert all((home / name).is_dir() for name in theirs) and fresh.is_dir()
    assert not any((home / "tokenised" / name).exists() for name in ours)


def test_a_cache_inside_a_source(tmp_path):
    write(tmp_path / "rows.jsonl", ROWS[:5])
    for took in (False, True):
        entry = tokenised([str(tmp_path)], TOKENIZER, Recipe(), folder=str(tmp_path / "cache"))
        assert (entry.seconds is None) == took
        (tmp_path / "log.txt").write_text(f"{took}")  # no rows: nothing changed


def test_without_locks_the_first_entry_stays(tmp_path, folder, monkeypatch):
    source = write(tmp_path / "rows.jsonl", ROWS[:9])
    monkeypatch.setattr(token_cache, "flock", lambda handle: None)
    work, depth = fill.fill, []

    def overtaken(file, *arguments, **options):
        """Another process, which does not see this one's lock, tokenises the same rows first."""
        if not depth:
            depth.append(1)
            assert tokenised([source], TOKENIZER, Recipe(), folder=folder).seconds is not None
        return work(file, *arguments, **options)

    monkeypatch.setattr(token_cache, "fill", overtaken)
    entry = tokenised([source], TOKENIZER, Recipe(), folder=folder)
    assert len(open_entry(entry.folder)[0]) == 9
    assert [name for name in entries(folder) if not name.endswith(".lock")] == [entry.folder.name]


def test_a_folder_that_is_removed_meanwhile(tmp_path, folder, monkeypatch):
    source = write(tmp_path / "rows.jsonl", ROWS[:9])

    def removing(file, *arguments, **options):
        findings = fill.fill(file, *arguments, **options)
        shutil.rmtree(folder)
        return findings

    monkeypatch.setattr(token_cache, "fill", removing)
    with pytest.raises(ValueError, match="data_cache_dir: .* was removed while it was written"):
        tokenised([source], TOKENIZER, Recipe(), folder=folder)


def test_rows_that_nothing_identifies_are_kept_for_their_run_alone(tmp_path, folder):
    rows = InMemory("train_dataset", ROWS[:20])
    entry = tokenised([rows], TOKENIZER, Recipe(), folder=folder)
    corpus, _ = open_entry(entry.folder)
    other = tokenised([rows], TOKENIZER, Recipe(), folder=folder)
    assert entry.folder.exists() and other.folder != entry.folder
    entry.close(), other.close()
    assert not entries(folder)
    assert corpus.where(3) == "train_dataset[3]" and len(corpus[19].response_ids) == 6
    # `datasets` says what its rows are.
    named = InMemory("train_dataset", datasets.Dataset.from_list(ROWS[:20]))
    places = [tokenised([named], TOKENIZER, Recipe(), folder=folder) for _ in range(2)]
    assert places[0].folder == places[1].folder and places[1].seconds is None


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "a bit": flip,
    "gone": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "counts": lambda file: file.write_bytes(file.read_bytes().replace(b"20", b"21")),
    "a file in its place": lambda file: (shutil.rmtree(file.parent), file.parent.touch()),
}


@pytest.mark.parametrize("name", [token_cache.ROWS, token_cache.SUMMARY])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_again(tmp_path, folder, name, damage):
    source = write(tmp_path / "rows.jsonl", ROWS[:20])
    entry = tokenised([source], TOKENIZER, Recipe(), folder=folder)
    before = open_entry(entry.folder)[0].digest()
    if damage == "counts" and name == token_cache.ROWS:
        pytest.skip("counts are in the summary")
    DAMAGE[damage](entry.folder / name)
    again = tokenised([source], TOKENIZER, Recipe(), folder=folder)
    assert again.seconds is not None and open_entry(again.folder)[0].digest() == before
    assert entries(folder) == [entry.folder.name]


def test_a_folder_that_cannot_be_used(tmp_path, monkeypatch):
    source = write(tmp_path / "rows.jsonl", ROWS[:5])
    (tmp_path / "file").touch()
    wrong = str(tmp_path / "file" / "x")
    with pytest.raises(ValueError, match="data_cache_dir: .*file/x cannot be used"):
        tokenised([source], TOKENIZER, Recipe(), folder=wrong)
    monkeypatch.setenv("RRHF_FAST_CACHE", wrong)
    with pytest.raises(ValueError, match="RRHF_FAST_CACHE: .*file/x cannot be used"):
        tokenised([source], TOKENIZER, Recipe())
    # Without a home there is no default folder.
    monkeypatch.delenv("RRHF_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", wrong)
    entry = tokenised([source], TOKENIZER, Recipe())
    assert entry.is_temporary and len(open_entry(entry.folder)[0]) == 5
    entry.close()
    assert not entry.folder.exists()


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, folder, monkeypatch):
    source = write(tmp_path / "rows.jsonl", ROWS[:9])

    def changing(file, *arguments, **options):
        found = fill.fill(file, *arguments, **options)
        write(tmp_path / "rows.jsonl", ROWS[:10])
        return found

    monkeypatch.setattr(token_cache, "fill", changing)
    with pytest.raises(ValueError, match=r"rows.jsonl: changed while it was read"):
        tokenised([source], TOKENIZER, Recipe(), folder=folder)
    assert not entries(folder)


def test_encoding_many_texts_is_encoding_each():
    texts = [text for row in ROWS[:20] for text in row["responses"]] + ["", "<s>", "é\u2028 a", " "]
    expected = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encode(TOKENIZER, texts) == expected
    limited = load_tokenizer(str(demo.MODEL_DIR))
    limited(texts, truncation=True, max_length=3, padding=True)  # the backend remembers this
    assert encode(limited, texts) == expected
