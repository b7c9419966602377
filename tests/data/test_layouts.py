"""Layouts of published datasets: each gives the expected row, and nothing is silently lost."""

import json
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rrhf_fast.data.columns import Columns
from rrhf_fast.data.layouts import LAYOUTS, canonical, layout_of
from rrhf_fast.data.load import load_drafts, load_rows
from rrhf_fast.data.rows import BadRow, parse_row
from rrhf_fast.data.sources import InMemory
from tests.drafts import parse_draft

BETTER, WORSE = "So it is.", "No idea."


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.title)
def test_the_example_of_each_layout(layout, tmp_path):
    assert layout_of(layout.example) is layout
    rows, report = load_rows(write(tmp_path / "rows.jsonl", layout.example, layout.example))
    row = rows[1]
    assert len(rows) == 2 and row.responses[row.rewards.index(max(row.rewards))].strip() == BETTER
    assert {text.strip() for text in row.responses} == {BETTER, WORSE}
    prompt = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
    assert "Why?" in prompt and BETTER not in prompt
    assert report.unused.keys() <= {"safer_response_id"}
    drafts, _ = load_drafts(str(tmp_path / "rows.jsonl"))
    assert (drafts[1].prompt, drafts[1].responses) == (row.prompt, row.responses)


def test_fields_that_parquet_fills_in_do_not_identify_a_layout():
    every = {name: None for layout in LAYOUTS for name in layout.example}
    for layout in LAYOUTS:
        assert parse_row(every | layout.example, "f:1") == parse_row(layout.example, "f:1")


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    "fields, scores",
    [
        ({}, [1.0, 0.0]),
        ({"score_chosen": 8.0, "score_rejected": 8.0}, [8.0, 8.0]),  # a tie
        ({"score_chosen": 0, "score_rejected": -3}, [0.0, -3.0]),
        ({"chosen_score": 2, "rejected_score": 1}, [2.0, 1.0]),
        ({"chosen-rating": 5, "rejected-rating": 4}, [5.0, 4.0]),
        ({"chosen_rating": 5, "rejected_rating": 5}, [5.0, 5.0]),
        ({"chosen_reward": 0.5, "rejected_reward": 0.25}, [0.5, 0.25]),
        ({"score_chosen": None, "score_rejected": None}, [1.0, 0.0]),
    ],
)
def test_scores_of_a_pair(fields, scores):
    assert parse_row(PAIR | fields, "f:1").rewards == scores


def test_a_pair_with_one_score_missing_or_bad_is_a_bad_row():
    kinds = {None: "missing score", "x": "wrong type", math.nan: "non-finite score"}
    for value, kind in kinds.items():
        with pytest.raises(BadRow, match="score_rejected: ") as caught:
            parse_row(PAIR | {"score_chosen": 8.0, "score_rejected": value}, "f:1")
        assert caught.value.kind == kind


def test_a_string_prompt_next_to_a_conversation(tmp_path):
    turns = [user("a"), assistant("b"), user("c")]
    pair = {"chosen": [*turns, assistant("d")], "rejected": [*turns, assistant("e")]}
    for prompt, unused in (("a", {}), ("c", {}), ("z", {"prompt": 1})):
        path = write(tmp_path / "rows.jsonl", pair | {"prompt": prompt})
        (row,), report = load_rows(path)
        assert row.prompt == turns and report.unused == unused
        (row,), _ = load_rows(path, columns={"prompt": "prompt"})
        assert row.prompt == turns


TRANSCRIPT = "\n\nHuman: Hi.\n\nAssistant: I say hi.\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    "chosen, rejected, prompt, responses",
    [
        (TRANSCRIPT + " I do.", TRANSCRIPT + " I don't.", TRANSCRIPT, [" I do.", " I don't."]),
        (TRANSCRIPT + " I do.", TRANSCRIPT + " I do.", TRANSCRIPT, [" I do."] * 2),
        (TRANSCRIPT + " Yes", TRANSCRIPT + " Yes, so.", TRANSCRIPT, [" Yes", " Yes, so."]),
    ],
)
def test_a_prompt_that_both_texts_begin_with(chosen, rejected, prompt, responses):
    row = parse_row({"chosen": chosen, "rejected": rejected}, "f:1")
    assert (row.prompt, row.responses) == (prompt, responses)


def test_texts_that_share_nothing_have_no_prompt():
    for chosen, rejected in (("a", "b"), ("a", "ab"), ("", "a")):
        with pytest.raises(BadRow, match="prompt: missing"):
            parse_row({"chosen": chosen, "rejected": rejected}, "f:1")


def test_ultrafeedback_takes_one_kind_of_score_per_row():
    def row(*completions):
        items = [{"response": f"r{i}", "model": "m"} | c for i, c in enumerate(completions)]
        return {"instruction": "p", "models": ["m"], "completions": items}

    def ratings(*values):
        return {str(i): {"Rating": value, "Rationale": ""} for i, value in enumerate(values)}

    first = {"overall_score": 7.5, "fine-grained_score": 4.0, "annotations": ratings("1", "2")}
    second = {"overall_score": 6.0, "fine-grained_score": 4.5, "annotations": ratings("5", "N/A")}
    assert parse_row(row(first, second), "f:1").rewards == [7.5, 6.0]
    second["overall_score"] = None
    assert parse_row(row(first, second), "f:1").rewards == [4.0, 4.5]
    del first["fine-grained_score"]
    assert parse_row(row(first, second), "f:1").rewards == [1.5, 5.0]
    second["annotations"] = ratings("N/A")
    with pytest.raises(BadRow, match=r"completions\[1\].overall_score: expected a number"):
        parse_row(row(first, second | {"fine-grained_score": None}), "f:1")


def test_shp_follows_the_label():
    record = {"history": "p", "human_ref_A": "a", "human_ref_B": "b"}
    assert parse_row(record | {"labels": 0, "score_A": 1, "score_B": 2}, "f:1").rewards == [1, 2]
    assert parse_row(record | {"labels": 0, "score_A": 2, "score_B": 1}, "f:1").rewards == [0, 1]
    assert parse_row(record | {"labels": 1}, "f:1").rewards == [1, 0]
    with pytest.raises(BadRow, match="labels: expected 0 or 1, found int 2"):
        parse_row(record | {"labels": 2}, "f:1")


def test_nectar_ranks_may_tie_or_be_missing(tmp_path):
    answers = [{"answer": str(i), "rank": rank} for i, rank in enumerate([1.0, 1.0, 3.0, None])]
    path = write(tmp_path / "rows.jsonl", {"prompt": "p", "answers": answers, "turns": 1})
    with pytest.raises(BadRow, match=r"answers\[3\].rank: expected a number, found NoneType"):
        load_rows(path)
    (row,), report = load_rows(path, on_bad_rows="skip")
    assert (row.rewards, row.sources) == ([-1.0, -1.0, -3.0], None)
    assert report.bad_responses == {"missing score": 1} and report.unused == {"turns": 1}


def test_numbers_may_be_given_as_text():
    answers = [{"answer": "a", "rank": "1"}, {"answer": "b", "rank": "2.0"}]
    assert parse_row({"prompt": "p", "answers": answers}, "f:1").rewards == [-1.0, -2.0]
    rated = [{"response": "a", "overall_score": "8"}, {"response": "b", "overall_score": " 3.5"}]
    assert parse_row({"prompt": "p", "completions": rated}, "f:1").rewards == [8.0, 3.5]
    assert parse_row(PAIR | {"score_chosen": "8", "score_rejected": "3"}, "f:1").rewards == [8, 3]
    votes = {"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    assert parse_row(votes | {"score_A": "12", "score_B": "3"}, "f:1").rewards == [12.0, 3.0]
    with pytest.raises(BadRow, match=r"answers\[0\].rank: expected a number, found str 'first'"):
        parse_row({"prompt": "p", "answers": [{"answer": "a", "rank": "first"}]}, "f:1")


def test_alpaca_history_and_sharegpt_turns():
    record = {"instruction": "b", "input": "", "chosen": "c", "rejected": "d", "system": "s"}
    row = parse_row(record | {"history": [["x", "y"]]}, "f:1")
    system = {"role": "system", "content": "s"}
    assert row.prompt == [system, user("x"), assistant("y"), user("b")]
    with pytest.raises(BadRow, match=r"history\[0\]: expected \[question, answer\]"):
        parse_row(record | {"history": [["x"]]}, "f:1")
    turns = [("system", "s"), ("human", "x"), ("gpt", "y"), ("tool", "z"), ("human", "b")]
    conversations = [{"from": sender, "value": text} for sender, text in turns]
    row = parse_row({"conversations": conversations, "chosen": "c", "rejected": "d"}, "f:1")
    roles = [message["role"] for message in row.prompt]
    assert roles == ["system", "user", "assistant", "tool", "user"]
    bad = {"conversations": [{"from": "x", "value": "y"}], "chosen": 1, "rejected": 2}
    problem = r"f:1: conversations\[0\].from: expected human, gpt, system or tool"
    with pytest.raises(BadRow, match=problem):
        parse_row(bad, "f:1")


# --- One response per row

STEERED = [
    {"prompt": "p", "response": "a", "helpfulness": 4, "verbosity": 1},
    {"prompt": "q", "response": "b", "helpfulness": 0, "verbosity": 2},
    {"prompt": "p", "response": "c", "helpfulness": 2, "verbosity": 3},
    {"prompt": "q", "response": "d", "helpfulness": 3, "verbosity": 4},
]


def test_rows_of_one_prompt_are_joined_in_order_of_first_appearance(tmp_path):
    path = write(tmp_path / "rows.jsonl", *STEERED)
    rows, report = load_rows(path, group_by="prompt")
    assert [(row.prompt, row.responses, row.rewards) for row in rows] == [
        ("p", ["a", "c"], [4, 2]),
        ("q", ["b", "d"], [0, 3]),
    ]
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:2"]
    assert (report.read, report.kept, report.unused) == (4, 2, {"verbosity": 4})
    rows, report = load_rows(path, group_by="prompt", columns={"score": "verbosity"})
    assert [row.rewards for row in rows] == [[1, 3], [2, 4]]
    drafts, _ = load_drafts(path, group_by="prompt")
    assert [draft.responses for draft in drafts] == [["a", "c"], ["b", "d"]]


def test_lists_of_one_are_joined_with_the_responses(tmp_path):
    said = [
        {"sources": ["a"], "as_generated": [True], "finish_reasons": ["stop"]},
        {"sources": "b", "finish_reasons": ["length"]},
    ]
    records = [{"prompt": "p", "response": str(i), "score": i} | said[i] for i in range(2)]
    path = write(tmp_path / "rows.jsonl", *records)
    (row,), _ = load_rows(path, group_by="prompt")
    assert (row.sources, row.as_generated) == (["a", "b"], [True, False])
    (draft,), _ = load_drafts(path, group_by="prompt")
    assert draft.as_generated == [True, False]
    path = write(tmp_path / "two.jsonl", records[0] | {"sources": ["a", "b"]})
    with pytest.raises(BadRow, match="sources: expected one for each of the 1 responses, found 2"):
        load_rows(path, group_by="prompt")


def test_columns_apply_to_rows_of_one_response(tmp_path):
    records = [{"q": "p", "a": {"text": str(i)}, "text": "x", "votes": i} for i in range(2)]
    path = write(tmp_path / "rows.jsonl", *records)
    columns = {"prompt": "q", "response": "a.text", "score": "votes"}
    for group_by in ("prompt", "q"):
        (row,), report = load_rows(path, columns=columns, group_by=group_by)
        assert (row.prompt, row.responses, row.rewards) == ("p", ["0", "1"], [0, 1])
        assert report.unused == {"text": 2}
        (draft,), _ = load_drafts(path, columns=columns, group_by=group_by)
        assert draft.responses == ["0", "1"] and draft.others["text"] == "x"


def test_the_fields_that_a_path_begins_with():
    path = "a.b | [c[?d > `1`].e, join(',', f[].g), {h: i || j}, sort_by(k, &l)[0], @.m]"
    assert Columns({"prompt": path}).fields == {"a"}
    path = path.removeprefix("a.b | ").replace("@.m", "m.n")
    assert Columns({"prompt": path}).fields == {*"cfijkm"}


def test_the_error_without_group_by_suggests_it(tmp_path):
    path = write(tmp_path / "rows.jsonl", *STEERED)
    with pytest.raises(BadRow, match="responses: missing.*--group_by prompt"):
        load_rows(path)


def test_bad_rows_in_a_group(tmp_path):
    records = [
        *STEERED,
        {"prompt": "p", "response": " ", "helpfulness": 4},
        {"prompt": "p", "response": "e", "helpfulness": None},
        {"prompt": "p", "response": "f", "helpfulness": math.inf},
        {"prompt": "p", "helpfulness": 1},
        {"response": "g", "helpfulness": 1},
        {"prompt": "alone", "response": "h", "helpfulness": 1},
    ]
    path = write(tmp_path / "rows.jsonl", *records)
    for number, problem in ((5, "response: empty"), (6, "score: missing"), (9, "prompt: missing")):
        some = write(tmp_path / "some.jsonl", *STEERED, records[number - 1])
        with pytest.raises(BadRow, match=f":5: {problem}"):
            load_rows(some, group_by="prompt")
    rows, report = load_rows(path, group_by="prompt", on_bad_rows="skip")
    assert [row.responses for row in rows] == [["a", "c"], ["b", "d"]]
    assert report.bad == {"fewer than 2 responses": 1}
    assert sum(report.bad_responses.values()) == 5


def test_different_system_messages_are_different_prompts(tmp_path):
    records = [{"q": "p", "answer": str(i), "score": i, "system": str(i % 2)} for i in range(4)]
    rows, _ = load_rows(write(tmp_path / "rows.jsonl", *records), group_by="q")
    by_system = [(row.prompt[0]["content"], row.responses) for row in rows]
    assert by_system == [("0", ["0", "2"]), ("1", ["1", "3"])]


# --- Columns


def test_columns_find_any_layout(tmp_path):
    record = {
        "question": {"text": "Why?"},
        "answers": [{"text": "a", "votes": {"up": 3}}, {"text": "b", "votes": {"up": 1}}],
        "who": ["x", "y"],
        "id": 7,
    }
    columns = {
        "prompt": "question.text",
        "responses": "answers[].text",
        "scores": "answers[].votes.up",
        "sources": "who",
    }
    path = write(tmp_path / "rows.jsonl", record)
    (row,), report = load_rows(path, columns=columns)
    assert (row.prompt, row.responses, row.rewards) == ("Why?", ["a", "b"], [3, 1])
    assert row.sources == ["x", "y"] and report.unused == {"id": 1}
    (draft,), _ = load_drafts(path, columns=columns)
    assert draft.responses == ["a", "b"] and draft.others == {"id": 7}


def test_columns_map_some_fields_and_the_layout_the_others(tmp_path):
    record = {"task": "p", "system": None, "chosen": "a", "rejected": "b", "responses": ["x"]}
    columns = {"prompt": "task", "chosen": "chosen", "rejected": "rejected"}
    (row,), _ = load_rows(write(tmp_path / "rows.jsonl", record), columns=columns)
    assert (row.prompt, row.responses) == ("p", ["a", "b"])
    ultra = {"instruction": "i", "rewritten": "r"} | {
        "completions": [{"response": str(i), "overall_score": i, "fine": -i} for i in range(2)]
    }
    columns = {"prompt": "rewritten", "scores": "completions[].fine"}
    (row,), _ = load_rows(write(tmp_path / "rows.jsonl", ultra), columns=columns)
    assert (row.prompt, row.responses, row.rewards) == ("r", ["0", "1"], [0, -1])


def test_a_null_does_not_shift_scores_to_other_responses(tmp_path):
    answers = [{"text": None, "score": 1}, {"text": "a", "score": 2}, {"text": "b", "score": None}]
    answers += [{"text": "c", "score": 4}, {"text": "d", "score": 5, "hidden": True}]
    columns = {"prompt": "p", "responses": "answers[].text", "scores": "answers[].score"}
    path = write(tmp_path / "rows.jsonl", {"p": "q", "answers": answers})
    (row,), report = load_rows(path, columns=columns, on_bad_rows="skip")
    assert (row.responses, row.rewards) == (["a", "c", "d"], [2, 4, 5])
    assert sum(report.bad_responses.values()) == 2
    for field in ("text", "score"):
        columns["responses" if field == "text" else "scores"] = f"answers[?!hidden].{field}"
    (row,), _ = load_rows(path, columns=columns, on_bad_rows="skip")
    assert (row.responses, row.rewards) == (["a", "c"], [2, 4])


@pytest.mark.parametrize(
    "columns, problem",
    [
        ({"prompt": "q", "responses": "answer"}, "responses: 'answer' finds nothing; found"),
        ({"prompt": "nope"}, "prompt: 'nope' finds nothing; found the fields q, answers, id"),
        ({"prompt": "q", "responses": "answers[].t"}, "responses: .* finds nothing"),
        ({"prompt": "q", "system": "sytem"}, "system: 'sytem' finds nothing"),
        ({"prompt": "join('', id)"}, "prompt: .* fails"),
    ],
)
def test_a_path_that_finds_nothing_is_a_bad_row(columns, problem, tmp_path):
    path = write(tmp_path / "rows.jsonl", {"q": "p", "answers": ["a", "b"], "id": 1})
    with pytest.raises(BadRow, match=f"rows.jsonl:1: columns: {problem}"):
        load_rows(path, columns=columns)
    with pytest.raises(BadRow, match="rows.jsonl:1: responses: expected a list, found str"):
        load_rows(path, columns={"prompt": "q", "responses": "q"})


def test_the_error_for_an_unknown_layout_says_what_to_do(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"text": "a", "lab\nel": 1})
    with pytest.raises(BadRow) as caught:
        load_rows(path)
    message = str(caught.value)
    assert r"found the fields text, 'lab\nel'" in message and "\n" not in message
    assert "--columns" in message and "docs/data.md" in message
    assert message.endswith("rows with fewer than 2 good ones)")


# --- Properties

texts = st.text(alphabet="ab :\n", min_size=1, max_size=6).filter(str.strip)
numbers = st.integers(-3, 3)
rows = st.tuples(texts, st.lists(st.tuples(texts, numbers), min_size=2, max_size=2))


@given(rows)
def test_a_row_is_the_same_in_every_layout(row):
    prompt, ((a, x), (b, y)) = row
    assume(not (a.startswith(prompt) and b.startswith(prompt)))  # the pair would repeat the prompt
    own = {"prompt": prompt, "responses": [a, b], "scores": [x, y]}
    head = f"\n\nHuman: {prompt}\n\nAssistant:"
    completions = [{"response": a, "overall_score": x}, {"response": b, "overall_score": y}]
    answers = [{"answer": a, "rank": -x}, {"answer": b, "rank": -y}]
    sides = {"chosen": a, "rejected": b}
    written = {
        "UltraFeedback": {"instruction": prompt, "completions": completions},
        "Nectar": {"prompt": prompt, "answers": answers},
        "pairs": sides | {"prompt": prompt, "score_chosen": x, "score_rejected": y},
        "Orca DPO pairs": sides | {"question": prompt, "chosen_score": x, "rejected_score": y},
        "Alpaca pairs": sides | {"instruction": prompt, "rating_chosen": x, "rating_rejected": y},
    }
    expected = parse_row(own, "f:1")
    for title, record in written.items():
        assert layout_of(record).title == title
        parsed = parse_row(record, "f:1")
        assert (parsed.prompt, parsed.responses, parsed.rewards) == (
            prompt,
            [a, b],
            expected.rewards,
        )
    parsed = parse_row({"chosen": f"{head} {a}", "rejected": f"{head} {b}"}, "f:1")
    assert (parsed.prompt, parsed.responses) == (head, [f" {a}", f" {b}"])
    messages = {"chosen": [user(prompt), assistant(a)], "rejected": [user(prompt), assistant(b)]}
    parsed = parse_row(messages, "f:1")
    assert (parsed.prompt, parsed.responses) == ([user(prompt)], [a, b])


names = sorted({name for layout in LAYOUTS for name in layout.example} | {"system", "tools"})
names += ["history", "as_generated", "finish_reasons", "chat_template_kwargs", "role", "content"]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from([*names, "from", "value", "type"]), children, max_size=3)
    ),
    max_leaves=8,
)
parts = values | st.sampled_from([part for layout in LAYOUTS for part in layout.example.values()])


@given(st.sampled_from(LAYOUTS), st.dictionaries(st.sampled_from(names), parts, max_size=4))
def test_any_record_gives_a_valid_row_or_one_line(layout, changes):
    for record in (changes, layout.example | changes):
        for parse in (parse_row, parse_draft):
            try:
                row = parse(record, "file:1")
            except BadRow as error:
                assert str(error).startswith("file:1: ") and "\n" not in str(error)
                continue
            assert isinstance(row.prompt, str) or row.prompt[-1]["role"]
            if parse is parse_row:
                assert len(row.responses) == len(row.rewards) >= 2
                assert all(text.strip() for text in row.responses)
                assert all(math.isfinite(score) for score in row.rewards)


def test_prompts_that_are_messages_as_json_are_so_in_every_layout():
    text = json.dumps([{"role": "user", "content": "Why?"}])
    for layout in LAYOUTS:
        canon = canonical(layout.example, "f:1")
        if canon.prompt_name not in layout.example or isinstance(canon.prompt, list):
            continue
        record = {k: v for k, v in layout.example.items() if k not in ("input", "system")}
        row = parse_row(record | {canon.prompt_name: text}, "f:1")
        assert row.prompt == json.loads(text), layout.title
    with pytest.raises(BadRow, match="^f:1: instruction: expected a string, found list"):
        parse_row({"instruction": text, "input": "a", "output": ["b", "c"]}, "f:1")


def test_a_bad_field_of_one_response_costs_only_that_response():
    rows = [{"prompt": "a", "response": text, "score": n} for n, text in enumerate("bcd")]
    for bad in (
        {"as_generated": 3},
        {"finish_reasons": 3},
        {"model": "\ud800"},
        {"sources": [1, 2]},
    ):
        source = InMemory("rows", [*rows, rows[0] | {"response": "x"} | bad])
        for load in (load_rows, load_drafts):
            with pytest.raises(BadRow, match=r"^rows\[3\]: (as_gen|finish|sources)"):
                load(source, group_by="prompt")
            (row,), report = load(source, group_by="prompt", on_bad_rows="skip")
            assert row.responses == ["b", "c", "d"] and report.bad_responses.total() == 1
