"""The stage `sample`: every policy on the embedded model, faulty endpoints, kills."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rrhf_fast import demo
from rrhf_fast.data.encode import encode_responses
from rrhf_fast.data.load import load_drafts
from rrhf_fast.model.generate import batches_by_length, generate_batch
from rrhf_fast.sample import local, sample
from rrhf_fast.sample.__main__ import main
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.stages.endpoint import EndpointDown
from tests.jsonl import read, write

MODEL = str(demo.MODEL_DIR)
STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
PROMPTS = [row["prompt"] for row in read(demo.EVAL_FILE)[:10]]


@pytest.fixture
def config(tmp_path):
    rows = [{"prompt": prompt, "id": i} for i, prompt in enumerate(PROMPTS)]
    return SampleConfig(
        data=write(tmp_path / "rows.jsonl", rows),
        output=str(tmp_path / "sampled.jsonl"),
        model_name_or_path=MODEL,
        batch_size=4,
    )


def policies(*policies, **shared):
    return [Policy(max_new_tokens=24, **shared, **policy) for policy in policies]


@pytest.fixture(scope="module")
def lm():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)


def test_what_a_person_should_know_of_the_samples(config, chat_model, capsys):
    """Texts that bypass the chat template, answers that the limit cut off, and rows that cannot be
    ranked."""
    words = ["--data", config.data, "--output", config.output, "--model_name_or_path", chat_model]
    policy = "[{method: sample, num_responses: 2, max_new_tokens: 1}]"
    assert main([*words, "--policies", policy]) == 0
    out = capsys.readouterr().out
    assert "policies[0]: warning: all are text, which bypasses the model's chat template" in out
    reasons = Counter(reason for row in read(config.output) for reason in row["finish_reasons"])
    assert reasons["length"] and f" {reasons['length']} cut off at the limit" in out
    finished = [*words, "--overwrite", "--finished_only", "--apply_chat_template"]
    assert main([*finished, "--policies", "[{method: greedy, max_new_tokens: 1}]"]) == 0
    out = capsys.readouterr().out
    assert "warning" not in out and "next: sample again, longer or more: no row has two" in out


def test_greedy_and_beam_equal_generate_on_single_prompts(config, lm):
    config.policies = policies({"method": "greedy"}, {"method": "beam", "num_responses": 3})
    sample(config)
    model, tokenizer = lm
    for i, row in enumerate(read(config.output)):
        assert row["id"] == i and row["prompt"] == PROMPTS[i]
        ids = tokenizer(PROMPTS[i], return_tensors="pt", return_token_type_ids=False)
        options = dict(**ids, max_new_tokens=24, do_sample=False)
        greedy = model.generate(**options)
        beams = model.generate(**options, num_beams=3, num_return_sequences=3)
        expected = [
            tokenizer.decode(out[ids["input_ids"].shape[1] :], skip_special_tokens=True)
            for out in (*greedy, *beams)
        ]
        assert row["responses"] == list(dict.fromkeys(expected))
        assert row["sources"][:2] == ["greedy", "beam"]


def test_finish_reasons_tell_whether_the_model_ended_the_response(config, lm):
    config.policies = policies({"method": "greedy"})
    sample(config)
    model, tokenizer = lm
    reasons = Counter()
    for row in read(config.output):
        (reason,) = row["finish_reasons"]
        reasons[reason] += 1
        ids = tokenizer(row["prompt"], return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)
        assert (out[0, -1] == tokenizer.eos_token_id) == (reason == "stop")
    assert reasons["stop"] and reasons["length"]
    config = replace(config, output=config.output + "2", finished_only=True)
    counts = sample(config)
    assert counts["unfinished"] == reasons["length"]
    assert all(set(row["finish_reasons"]) <= {"stop"} for row in read(config.output))


def test_diverse_beams_give_more_distinct_responses_than_beams(config):
    counts = {}
    for method in ("beam", "diverse_beam"):
        counts[method] = sample(
            replace(
                config,
                output=f"{config.output}-{method}",
                policies=policies({"method": method, "num_responses": 4}),
                max_prompt_length=None,
            )
        )
    openings = {
        method: np.mean(
            [
                len({response.split()[0] for response in row["responses"]})
                for row in read(f"{config.output}-{method}")
            ]
        )
        for method in counts
    }
    assert openings["diverse_beam"] > openings["beam"]


def test_sampling_depends_only_on_the_seed(config):
    config.policies = policies({"temperature": 0.9, "top_p": 0.9, "top_k": 50})
    outputs = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # the caller's random state is neither used nor changed
        before = torch.get_rng_state()
        run = replace(config, seed=seed, output=f"{config.output}-{number}")
        sample(run)
        assert torch.equal(torch.get_rng_state(), before)
        outputs.append(read(run.output))
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.skipif(not STORIES.exists(), reason="the model stories260K is missing")
def test_the_text_of_a_sample_has_the_sampled_tokens(config, monkeypatch):
    """SentencePiece's decoder drops a space and its encoder adds one. The model may also spell a
    word in other pieces than the tokenizer does, which no text can preserve."""
    drawn = []

    def keep(*arguments, **options):
        generated = generate_batch(*arguments, **options)
        drawn.extend(ids.tolist() for responses in generated for ids in responses)
        return generated

    monkeypatch.setattr(local, "generate_batch", keep)
    rows = [{"prompt": prompt} for prompt in ("One day, Lily", 'He said: "I', "They went home.")]
    config = replace(config, data=write(Path(config.data), rows), keep_all=True, batch_size=1)
    config.model_name_or_path = str(STORIES)
    config.policies = [Policy(num_responses=50, max_new_tokens=16)]
    sample(config)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    texts = sorted(text for row in read(config.output) for text in row["responses"])
    encoded = sorted(encode_responses(tokenizer, texts))
    same = Counter(map(tuple, encoded)) & Counter(
        tuple(token for token in ids if token not in tokenizer.all_special_ids) for ids in drawn
    )
    assert len(drawn) == 150 and same.total() >= 0.95 * 150
    assert {text[:1] == " " for text in texts} == {True, False}


def test_rows_batches_and_policies_draw_independently(tmp_path, config):
    config.data = write(tmp_path / "same.jsonl", [{"prompt": PROMPTS[0]}] * 4)
    config.batch_size, config.policies = 2, policies({}, {"source": "again"})
    sample(config)
    texts = [tuple(row["responses"][:4]) for row in read(config.output)]
    texts += [tuple(row["responses"][4:]) for row in read(config.output)]
    assert len(set(texts)) == 8  # rows of a batch, batches and policies


def test_provided_responses_and_their_sources(tmp_path, config):
    rows = [
        {"prompt": "a", "responses": ["1", "2", "", "1"], "scores": [1, 2, 3, 4]},
        {"prompt": "b", "chosen": "good", "rejected": "bad"},
        {
            "prompt": "c",
            "responses": ["x", "y", "z"],
            "sources": ["beam", "provided_good", "human"],
        },
        {"query": "d"},
    ]
    config = replace(config, data=write(tmp_path / "p.jsonl", rows))
    config.policies = [Policy(method="provided")]
    counts = sample(config)
    names = ("responses", "duplicates", "empty", "unrankable")
    assert [counts[name] for name in names] == [7, 1, 1, 1]
    sampled = read(config.output)
    assert [row["responses"] for row in sampled] == [
        ["1", "2"],
        ["good", "bad"],
        ["x", "y", "z"],
        [],
    ]
    assert [row["sources"] for row in sampled] == [
        ["provided", "provided"],
        ["chosen", "rejected"],
        ["beam", "provided_good", "human"],
        [],
    ]
    assert not any({"scores", "chosen", "query"} & set(row) for row in sampled)
    config = replace(config, output=config.output + "2", keep_all=True)
    config.policies = [Policy(method="provided", use_responses="provided")]
    sample(config)
    responses = [row["responses"] for row in read(config.output)]
    assert responses == [["", "1"], ["good", "bad"], ["y"], []]


def test_stop_strings_cut_and_count_as_an_end(config):
    config.policies = policies({"method": "greedy"}, {"method": "beam"}, {"top_k": 5})
    config.stop_strings = [" the", "."]
    config.keep_all = True
    sample(config)
    for row in read(config.output):
        for text, reason in zip(row["responses"], row["finish_reasons"], strict=True):
            assert " the" not in text and "." not in text
            assert reason == "stop" or len(text.split()) > 3


def test_messages_go_through_the_chat_template(tmp_path, lm):
    model, tokenizer = lm
    tokenizer.chat_template = (
        "{% for m in messages %}Human: {{ m.content }}\n{% endfor %}Assistant:"
    )
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    question = PROMPTS[0].removeprefix("Human: ").removesuffix("\nAssistant:")
    rows = [{"prompt": [{"role": "user", "content": question}]}, {"prompt": PROMPTS[0]}]
    config = SampleConfig(
        data=write(tmp_path / "chat.jsonl", rows),
        output=str(tmp_path / "out.jsonl"),
        model_name_or_path=str(folder),
        policies=policies({"method": "greedy"}),
    )
    sample(config)
    one, other = read(config.output)
    assert one["responses"] == other["responses"] and one["prompt"] == rows[0]["prompt"]


def test_several_models_in_one_yaml(tmp_path, config, lm):
    model, tokenizer = lm
    folder = tmp_path / "other"
    model.save_pretrained(folder)
    # Only the policy decides how to decode, not the checkpoint.
    GenerationConfig(repetition_penalty=9.0, eos_token_id=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = tmp_path / "config.yaml"
    file.write_text(
        f"data: {config.data}\noutput: {config.output}\nmodel_name_or_path: {MODEL}\n"
        "keep_all: true\n"
        "policies:\n- method: greedy\n  max_new_tokens: 8\n"
        f"- method: greedy\n  max_new_tokens: 8\n  model: {folder}\n"
        f"- method: greedy\n  max_new_tokens: 8\n  model: {folder}\n  source: mine\n"
    )
    assert main(["--config", str(file)]) == 0
    for row in read(config.output):
        assert row["sources"] == ["greedy", "greedy:other", "mine"]
        assert len(set(row["responses"])) == 1


@pytest.mark.slow
def test_killed_runs_end_with_the_same_file(config, killed_at_random):
    config.policies = policies(
        {"method": "diverse_beam", "num_responses": 2}, {"method": "sample"}, {"method": "provided"}
    )
    config.batch_size = 1
    sample(config)
    other = replace(config, output=config.output + "-killed")
    assert killed_at_random(sample, other, kills=4, seed=int.from_bytes(os.urandom(4))) == 4
    assert Path(other.output).read_bytes() == Path(config.output).read_bytes()


@pytest.fixture
def remote(config, openai_server):
    config.timeout, config.max_retries, config.max_concurrency = 60.0, 4, 8
    config.policies = [
        Policy(method="openai", model="echo", base_url=openai_server.url, num_responses=2)
    ]
    return config


def test_an_endpoint_is_asked_for_each_prompt_once(remote, openai_server):
    counts = sample(remote)
    assert counts["requests"] == len(openai_server.answered) == 10 and counts["responses"] == 20
    assert (counts["prompt_tokens"], counts["completion_tokens"]) == (70, 30)
    rows = read(remote.output)
    assert all(row["sources"] == ["openai:echo"] * 2 for row in rows)
    assert len({text for row in rows for text in row["responses"]}) == 20
    assert [row["prompt"] for row in rows] == PROMPTS


def test_requests_follow_the_policy(remote, openai_server):
    remote.stop_strings = ["\n\n"]
    options = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_new_tokens": 9}
    remote.policies = [replace(remote.policies[0], **options, extra_body={"min_p": 0.1})]
    sample(remote)
    for asked in openai_server.answered:
        assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (0.5, 0.9, 7)
        assert (asked["max_tokens"], asked["stop"], asked["min_p"]) == (9, ["\n\n"], 0.1)


def test_completions_get_the_prompt_unchanged(remote, openai_server):
    remote.policies[0].chat = False
    sample(remote)
    assert {request["prompt"] for request in openai_server.answered} == set(PROMPTS)


@pytest.mark.slow
def test_every_fault_is_retried_and_nothing_is_answered_twice(remote, openai_server):
    remote.policies[0].model, remote.timeout = "flaky", 5.0  # the server sleeps longer
    counts = sample(remote)
    assert counts["responses"] == 20
    asked = sorted(request["text"] for request in openai_server.answered)
    assert asked == sorted(PROMPTS)
    assert counts["failures"] == 0


def test_a_dying_server_loses_no_answer(remote, openai_server):
    remote.policies[0].model = "dies:3"  # after each start
    remote.max_retries = 0
    kept, deaths = set(), 0
    while True:
        asked = len(openai_server.answered)
        try:
            sample(remote)
            break
        except EndpointDown as error:
            assert "127.0.0.1" in str(error)
        deaths += 1
        journal = read(remote.output + ".journal")[1:]
        texts = {record["result"][0]["text"] for record in journal}
        assert kept < texts  # nothing is lost, and every start makes progress
        # Only answers under way when the server died are asked for again.
        assert len(texts - kept) <= len(openai_server.answered) - asked <= 3
        kept = texts
        openai_server.stop()
        openai_server.start()
    assert deaths >= 2
    texts = [text for row in read(remote.output) for text in row["responses"]]
    assert len(texts) == len(set(texts)) == 20 and kept < set(texts)
    assert len(openai_server.answered) - asked == 10 - len(kept)


def test_refusals_are_recorded_and_other_rows_proceed(tmp_path, remote):
    rows = [{"prompt": "fine"}, {"prompt": "forbidden"}, {"prompt": "fine too"}]
    remote.data = write(tmp_path / "refused.jsonl", rows)
    remote.policies[0].model = "refuses"
    counts = sample(remote)
    assert (counts["responses"], counts["failures"]) == (4, 2)
    refused = read(remote.output)[1]
    assert refused["responses"] == []
    assert refused["failures"][0]["source"] == "openai:refuses"
    assert "the prompt was filtered" in refused["failures"][0]["error"]


@pytest.mark.parametrize(
    "model, problem",
    [("wrong-key", "no such key"), ("garbage", "an answer that is not a completion")],
)
def test_an_unusable_endpoint_ends_the_run(remote, model, problem, capsys):
    remote.policies[0].model, remote.max_retries = model, 1
    with pytest.raises(EndpointDown, match=problem):
        sample(remote)


def test_an_endpoint_that_refuses_everything_writes_no_rows(tmp_path, remote):
    remote.data = write(tmp_path / "refused.jsonl", [{"prompt": "forbidden"}])
    remote.policies[0].model = "refuses"
    with pytest.raises(ValueError, match=r"policies\[0\]: every request was refused: .*filtered"):
        sample(remote)
    assert not os.path.exists(remote.output)


def test_if_all_requests_are_refused_none_is_kept(tmp_path, remote, openai_server):
    """All are asked again once the server is fixed; results of other policies are kept."""
    remote.data = write(tmp_path / "refused.jsonl", [{"prompt": "forbidden"}])
    remote.policies[0].model = "refuses"
    remote.policies = [*policies({"method": "greedy"}), *remote.policies]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"policies\[1\]: every request was refused"):
            sample(remote)
    records = read(remote.output + ".journal")
    assert records[-1] == {"forgotten": ["1/0"]}
    assert [r["key"] for r in records if "key" in r].count("1/0") == 2
    assert [r["key"] for r in records if "key" in r].count("0/batch 0") == 1


def test_a_bad_model_name_locks_nothing(tmp_path, config, capsys):
    arguments = ["--data", config.data, "--output", config.output]
    wrong = "[{method: greedy, max_new_tokens: 4}, {method: greedy, model: /no/such/model}]"
    right = ["--model_name_or_path", MODEL, "--policies"]
    for names, option in (
        (["--model_name_or_path", "/no/such/model"], "model_name_or_path"),
        ([*right, wrong], "policies[1].model"),
    ):
        assert main([*arguments, *names]) == 2
        problem = "/no/such/model: no such folder, and no such model on the hub could be loaded"
        assert capsys.readouterr().err == f"rrhf_fast.sample: error: {option}: {problem}\n"
    assert main([*arguments, *right, "[{method: greedy, max_new_tokens: 4}]"]) == 0


def test_samples_of_two_models_under_one_name_are_not_mixed(tmp_path, config, lm):
    model, tokenizer = lm
    folder = tmp_path / "model"
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    config.model_name_or_path, config.policies = str(folder), policies({"method": "greedy"})
    rows = [{"prompt": PROMPTS[0]}, {"prompt": "long " * 400}]
    config = replace(config, data=write(tmp_path / "two.jsonl", rows), batch_size=1)
    config.policies.append(Policy(method="openai", model="m", base_url="http://127.0.0.1:9"))
    config.on_bad_rows, config.max_retries = "skip", 0
    with pytest.raises(EndpointDown):
        sample(config)
    os.utime(folder / "model.safetensors")
    with pytest.raises(ValueError, match="unfinished work of a run with other .*models"):
        sample(config)


MISTAKES = {
    "no data": (["--output", "o.jsonl"], "data: missing"),
    "no output": (["--data", "rows.jsonl"], "output: missing"),
    "no model": (
        ["--data", "rows.jsonl", "--output", "o.jsonl"],
        "policies[0].model: missing",
    ),
    "two greedy responses": (
        ["--policies", "[{method: greedy, num_responses: 2}]"],
        "policies[0].num_responses: greedy gives 1, found 2",
    ),
    "uneven groups": (
        ["--policies", "[{method: diverse_beam, num_beams: 4, num_beam_groups: 3}]"],
        "policies[0].num_beam_groups: 4 beams cannot be dealt evenly into 3",
    ),
    "no such method": (["--policies", "[{method: magic}]"], "method"),
    "out of range": (["--policies", "[{temperature: 0}]"], "policies[0].temperature"),
    "no such rows": (["--data", "nowhere.jsonl", "--model_name_or_path", MODEL], "nowhere.jsonl"),
    "no key": (["--policies", "[{method: openai, model: m, api_key_env: NO_KEY}]"], "NO_KEY"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    arguments, problem = MISTAKES[name]
    if len(arguments) == 2 and name not in ("no data", "no output"):
        arguments = ["--data", "rows.jsonl", "--output", "o.jsonl", *arguments]
    elif "--output" not in arguments and name != "no output":
        arguments = ["--output", "o.jsonl", *arguments]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("rrhf_fast.sample: error: ")
    assert problem in lines[0]


def test_prompts_that_fill_the_window_are_left_out_or_stop_the_run(tmp_path, config):
    rows = [{"prompt": "long " * 400}, {"prompt": PROMPTS[0]}]
    config.data = write(tmp_path / "long.jsonl", rows)
    config.policies = policies({"method": "greedy"})
    with pytest.raises(ValueError, match="long.jsonl:1: prompt: .* leave no room"):
        sample(config)
    config = replace(config, on_bad_rows="skip", output=config.output + "2")
    assert sample(config)["unrankable"] == 2
    assert [len(row["responses"]) for row in read(config.output)] == [0, 1]
    config = replace(config, max_prompt_length=30, output=config.output + "3")
    sample(config)
    assert [len(row["responses"]) for row in read(config.output)] == [1, 1]


def test_batches_hold_items_of_similar_length():
    batches = batches_by_length([5, 1, 9, 1, 7], 2)
    assert batches == [[1, 3], [0, 4], [2]]
    assert batches_by_length([], 2) == []


def test_other_fields_are_kept_and_rows_read_back_as_drafts(config):
    config.policies = policies({"method": "sample"})
    sample(config)
    drafts, report = load_drafts(config.output)
    assert report.kept == len(PROMPTS)
    assert [draft.others for draft in drafts] == [{"id": i} for i in range(len(PROMPTS))]
