"""The stage `evaluate` on the embedded model, and its page."""

import json
import re
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_fast import demo, reference
from rrhf_fast.data.load import load_rows
from rrhf_fast.evaluate import evaluate
from rrhf_fast.evaluate.__main__ import main
from rrhf_fast.evaluate.config import EvaluateConfig
from rrhf_fast.evaluate.report import write_report
from rrhf_fast.evaluate.run import FILES as FILES_OF_A_RUN
from rrhf_fast.evaluate.run import _of_logps, read_side
from rrhf_fast.iterate.config import IterateConfig
from rrhf_fast.sample.config import SampleConfig
from rrhf_fast.stages.ranks import Ranks
from rrhf_fast.stages.run_folder import claim
from rrhf_fast.stages.terminal import as_text
from tests.jsonl import read, write

MODEL = str(demo.MODEL_DIR)
FILES = {"options.json", "samples.jsonl", "scored.jsonl", "by_prompt.json", "evaluation.json"}


@pytest.fixture(scope="module")
def worse(tmp_path_factory):
    """The embedded model with flattened logits, as the baseline."""
    folder = tmp_path_factory.mktemp("worse")
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.6)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(tmp_path):
    rows = read(demo.EVAL_FILE)[:8]
    return EvaluateConfig(
        model_name_or_path=MODEL,
        data=write(tmp_path / "rows.jsonl", rows),
        output_dir=str(tmp_path / "out"),
        reward_fn="rrhf_fast.demo.reward:score",
        num_samples=3,
        max_new_tokens=24,
        num_bootstrap=200,
    )


@pytest.mark.parametrize("size", [1, 2, 5])
def test_log_probs_are_computed_with_the_same_rows_on_any_number_of_ranks(size, config):
    """Each rank is a thread; the result of a batch says what was in it."""
    config, rows = replace(config, batch_size=3), [np.float64(number) for number in range(8)]
    barrier, said = threading.Barrier(size), [None] * size

    class Threads(Ranks):
        def gather(self, value):
            said[self.rank] = value
            barrier.wait(30)
            return list(said)

    def model(batch):
        return [[np.append(batch, row), "unread"] for row in batch]

    def measure(logps, row, i):
        assert logps[-1] == row and i == 0
        return logps.tolist()

    with ThreadPoolExecutor(size) as pool:
        ranks = [Threads(rank=rank, size=size) for rank in range(size)]
        tasks = [pool.submit(_of_logps, model, rows, measure, config, rank) for rank in ranks]
        results = [task.result() for task in tasks]
    batches = [[0, 1, 2], [3, 4, 5], [6, 7]]
    expected = [[[*batch, row], "unread"] for batch in batches for row in batch]
    assert results == [expected] * size


def test_overwrite_removes_the_journals_of_all_ranks(tmp_path):
    for name in ("samples.jsonl.journal", "samples.jsonl.journal.12", "options.json"):
        (tmp_path / name).write_text("{}")
    claim(str(tmp_path), {"seed": 1}, replaces=FILES_OF_A_RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["options.json"]


def test_every_measure_agrees_with_its_files(config, worse):
    config = replace(config, baseline=worse, reference_model_name_or_path=MODEL)
    config.ranking_data = config.data
    evaluation = evaluate(config)
    rows = read(Path(config.output_dir, "scored.jsonl"))
    assert {path.name for path in Path(config.output_dir).iterdir()} == FILES
    assert evaluation.prompts == len(rows) == 8 and evaluation.dropped == 0
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    for name, measures in (("model", evaluation.model), ("baseline", evaluation.baseline)):
        samples = [
            (row["prompt"], text, score, reason)
            for row in rows
            for text, score, source, reason in zip(
                row["responses"], row["scores"], row["sources"], row["finish_reasons"], strict=True
            )
            if source == name
        ]
        assert len(samples) == 24  # three per prompt, duplicates included
        # Reward, length and share of cut-off samples.
        assert measures["reward"].value == pytest.approx(np.mean([s[2] for s in samples]))
        assert measures["reward"].low < measures["reward"].value < measures["reward"].high
        lengths = [
            len(tokenizer(text, add_special_tokens=False)["input_ids"]) for _, text, _, _ in samples
        ]
        assert measures["tokens"].value == pytest.approx(np.mean(lengths))
        cut = np.mean([reason == "length" for *_, reason in samples])
        assert measures["cut_off"].value == pytest.approx(cut)
        # Perplexity, with log-probs by the reference implementation.
        total = count = 0
        for prompt, text, _, reason in samples:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += [tokenizer.eos_token_id] * (reason == "stop")
            prompt_ids = torch.tensor(tokenizer(prompt)["input_ids"])
            total += reference.response_logps(model, prompt_ids, torch.tensor(ids)).sum().item()
            count += len(ids)
        assert measures["perplexity"].value == pytest.approx(np.exp(-total / count), rel=1e-3)
    # One side against the other.
    assert evaluation.baseline["perplexity"].value > evaluation.model["perplexity"].value
    gain = evaluation.model["reward"].value - evaluation.baseline["reward"].value
    assert evaluation.comparison["reward_gain"].value == pytest.approx(gain)
    shares = [evaluation.comparison[name].value for name in ("win", "tie", "lose")]
    assert sum(shares) == pytest.approx(1)
    curve = [point.value for point in evaluation.best_of_n["model"]]
    assert curve == sorted(curve) and len(curve) == 3
    assert curve[0] == pytest.approx(evaluation.model["reward"].value)
    assert curve[-1] == pytest.approx(evaluation.model["best_of_n"].value)

    # Ranking accuracy, with p by the reference implementation.
    correct = pairs = 0
    for row in load_rows(config.data)[0]:
        prompt_ids = torch.tensor(tokenizer(row.prompt)["input_ids"])
        p = []
        for text in row.responses:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            logps = reference.response_logps(model, prompt_ids, torch.tensor(ids))
            p.append(reference.score(logps).item())
        better = [(i, j) for i in range(6) for j in range(6) if row.rewards[i] > row.rewards[j]]
        correct, pairs = correct + sum(p[i] > p[j] for i, j in better), pairs + len(better)
    assert evaluation.model["ranking_accuracy"].value == pytest.approx(correct / pairs)

    # The terms by prompt.
    by_prompt = json.loads(Path(config.output_dir, "by_prompt.json").read_text())
    assert len(by_prompt) == 7 and set(by_prompt) < set(evaluation.model)
    for name, sums in by_prompt.items():
        assert len(sums["numerators"]) == len(sums["denominators"]) == 8
        ratio = sum(sums["numerators"]) / sum(sums["denominators"])
        value = np.exp(-ratio) if name == "perplexity" else ratio
        assert evaluation.model[name].value == pytest.approx(value)


def test_a_model_ties_with_its_own_earlier_evaluation(config):
    first = evaluate(config)
    again = replace(config, output_dir=config.output_dir + "2")
    again.baseline = str(Path(config.output_dir, "scored.jsonl"))
    evaluation = evaluate(again)
    # As text, because NaN != NaN.
    assert str(evaluation.model) == str(first.model) == str(evaluation.baseline)
    assert evaluation.comparison["reward_gain"].value == 0
    assert evaluation.comparison["win"].value == evaluation.comparison["lose"].value
    # Of samples drawn otherwise the report warns, of scores from elsewhere there is none.
    other = replace(again, output_dir=config.output_dir + "4", num_samples=2)
    (warning,) = [line for line in evaluate(other).warnings if "otherwise" in line]
    assert "num_samples 3, here 2" in warning
    other.reward_fn = f"{__name__}:longest"
    with pytest.raises(ValueError, match="was scored otherwise .reward_fn .*score.*longest"):
        evaluate(other)
    other = replace(again, output_dir=config.output_dir + "3")
    other.data = write(Path(config.data), read(config.data)[:-1])
    with pytest.raises(ValueError, match="baseline: .* has other prompts"):
        evaluate(other)


def longest(prompts, responses):
    return list(map(len, responses))


def test_samples_end_where_those_for_training_do(config):
    """`iterate` passes its options on: what cuts the one must cut the other."""
    config = replace(config, stop_strings=["e"], max_prompt_length=4)
    evaluate(config)
    texts = [
        text for row in read(Path(config.output_dir, "samples.jsonl")) for text in row["responses"]
    ]
    assert texts and not any("e" in text for text in texts)
    drawn = {f.name for f in fields(SampleConfig)} & {f.name for f in fields(IterateConfig)}
    elsewhere = {"policies", "finished_only"}  # evaluations have a policy, and keep all samples
    assert drawn - elsewhere <= {f.name for f in fields(EvaluateConfig)}


def test_repeated_samples_count(config):
    evaluation = evaluate(replace(config, top_p=1e-9))  # only the likeliest token
    assert evaluation.model["distinct"].value == pytest.approx(1 / 3)
    assert evaluation.model["best_of_n"].value == pytest.approx(evaluation.model["reward"].value)
    assert len(evaluation.best_of_n["model"]) == 3


def test_it_resumes_and_refuses_other_options(config):
    evaluate(config)
    before = (Path(config.output_dir, "evaluation.json")).read_text()
    Path(config.output_dir, "evaluation.json").unlink()
    Path(config.output_dir, "scored.jsonl").unlink()
    evaluate(config)
    assert Path(config.output_dir, "evaluation.json").read_text() == before
    with pytest.raises(ValueError, match="output_dir: .* another num_samples, seed"):
        evaluate(replace(config, seed=1, num_samples=2))


def test_samples_of_a_changed_model_are_not_reused(tmp_path, config, worse, capsys):
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = replace(config, model_name_or_path=str(folder), num_samples=1)
    before = evaluate(config).model["reward"]
    assert evaluate(config).model["reward"] == before
    assert f"reusing {config.output_dir}/scored.jsonl" in capsys.readouterr().out
    shutil.copyfile(Path(worse, "model.safetensors"), folder / "model.safetensors")
    with pytest.raises(ValueError, match="another content of model_name_or_path"):
        evaluate(config)
    assert evaluate(replace(config, overwrite=True)).model["reward"] != before
    write(Path(config.data), read(config.data)[1:])
    with pytest.raises(ValueError, match="another content of data"):
        evaluate(config)


def test_overwrite_removes_an_evaluation_and_nothing_else(config):
    config = replace(config, num_samples=1, data=write(Path(config.data), read(config.data)[:1]))
    evaluate(config)
    Path(config.output_dir, "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files, for example mine.txt"):
        evaluate(replace(config, overwrite=True))
    assert {path.name for path in Path(config.output_dir).iterdir()} > FILES


def test_a_folder_with_other_files_is_left_alone(tmp_path, config):
    Path(config.output_dir).mkdir()
    samples = write(Path(config.output_dir, "samples.jsonl"), [{"prompt": "a"}])
    with pytest.raises(
        ValueError, match="output_dir: .* holds other files, for example samples.jsonl"
    ):
        evaluate(config)
    assert [str(path) for path in Path(config.output_dir).iterdir()] == [samples]


def test_damaged_options_are_named(config):
    Path(config.output_dir).mkdir()
    write(Path(config.output_dir, "samples.jsonl"), [{"prompt": "a"}])
    Path(config.output_dir, "options.json").write_text("{")
    with pytest.raises(ValueError, match="options.json is damaged"):
        evaluate(config)


@pytest.mark.parametrize(
    "option", ["model_name_or_path", "reference_model_name_or_path", "baseline"]
)
def test_a_bad_model_name_claims_no_folder(config, option):
    problem = f"^{option}: /no/such/model: no such folder, and no such model on the hub"
    with pytest.raises(ValueError, match=problem):
        evaluate(replace(config, **{option: "/no/such/model"}))
    assert not Path(config.output_dir).exists()
    claim(config.output_dir, {"seed": 1})
    claim(config.output_dir, {"seed": 2})  # the first has no results


BASELINES = {
    "missing": (None, "cannot be read"),
    "not evaluated": ([{"prompt": "a", "responses": ["b"], "scores": [1]}], "holds no scored samp"),
    "unscored": ([{"prompt": "a", "responses": ["b"]}], "base.jsonl:1: scores: expected one for"),
}


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_read_before_anything_is_sampled(tmp_path, config, name):
    rows, problem = BASELINES[name]
    if rows is not None:
        write(tmp_path / "base.jsonl", rows)
    config.baseline = str(tmp_path / "base.jsonl")
    with pytest.raises(ValueError, match=f"baseline: .*{problem}"):
        evaluate(config)
    assert not Path(config.output_dir).exists()


def test_blank_lines_of_a_baseline_are_skipped(tmp_path):
    row = {"prompt": "a", "responses": ["b"], "scores": [1], "sources": ["model"]}
    (tmp_path / "base.jsonl").write_text(f"\n{json.dumps(row)}\n\n")
    assert read_side(tmp_path / "base.jsonl", "model").rewards[0].tolist() == [1]


class Loads(HTMLParser):
    """Collect the addresses that a page would load."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        self.addresses += [
            value
            for name, value in attributes
            if name in ("src", "href") and not value.startswith("data:")
        ]


def test_the_page_is_self_contained_and_escapes_texts(tmp_path, config):
    rows = [{"prompt": "Is 1 < 2 & 3 > 2?\nAssistant:"}, {"prompt": read(config.data)[0]["prompt"]}]
    config.data = write(tmp_path / "escaped.jsonl", rows)
    evaluation = evaluate(config)
    tables, _ = write_report(evaluation, Path(config.output_dir))
    table = "\n".join(map(as_text, tables))
    assert "mean reward of a sample" in table and "tokens per sample, median" in table
    page = Path(config.output_dir, "report.html")
    text = page.read_text()
    parser = Loads()
    parser.feed(text)
    assert parser.addresses == [] and "url(" not in text
    assert "Is 1 &lt; 2 &amp; 3 &gt; 2?" in text
    assert Path(config.output_dir, "evaluation.png").stat().st_size > 10_000

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium to open the page in")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'browser'}", "--proxy-server=127.0.0.1:9"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=60)
    assert re.search(r"<td>Is 1 &lt; 2 &amp; 3 &gt; 2\?", done.stdout), done.stderr
    assert str(evaluation.sides["model"].rewards[0][0].round(3)) in done.stdout


def test_the_report_says_what_it_is_of_and_shows_the_worst_beside_the_best(tmp_path, config, worse):
    config = replace(config, baseline=worse, reference_model_name_or_path=MODEL, seed=3)
    evaluation = evaluate(config)
    _, notes = write_report(evaluation, Path(config.output_dir))
    written = json.loads(Path(config.output_dir, "evaluation.json").read_text())
    assert written["about"] == evaluation.about and written["warnings"] == notes
    assert any("only 8 prompts" in note for note in notes)
    page = Path(config.output_dir, "report.html").read_text()
    for text in ("model (local)", "rows.jsonl (local)", Path(worse).name, "seed: 3", *notes):
        assert escape(text) in page, text
    assert str(tmp_path) not in page and MODEL not in page and worse not in page

    table = page.partition("Best and worst samples")[2].partition("</table>")[0]
    cells = re.findall("<td>(.*?)</td>", table, re.DOTALL)
    rewards = [float(re.search(r"\((.*)\)$", cell)[1]) for cell in cells[1::2]]
    best, worst = rewards[::2], rewards[1::2]
    of_model = [row["scores"][:3] for row in read(Path(config.output_dir, "scored.jsonl"))]
    assert best == sorted((round(max(r), 3) for r in of_model), reverse=True)[:6]
    assert worst == sorted(round(min(r), 3) for r in of_model)[:6]


MISTAKES = {
    "no model": (["--data", "rows.jsonl", "--output_dir", "o"], "model_name_or_path: missing"),
    "no data": (["--model_name_or_path", MODEL, "--output_dir", "o"], "data: missing"),
    "no output": (["--model_name_or_path", MODEL, "--data", "rows.jsonl"], "output_dir: missing"),
    "itself as the judge": (["--policy_as_reward", "true"], "policy_as_reward: a model's own p"),
    "out of range": (["--top_p", "2"], "top_p: expected more than 0, at most 1, found 2"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, problem = MISTAKES[name]
    if "--policy_as_reward" not in arguments:
        arguments = [*arguments, "--reward_fn", "a:b"]
    else:
        arguments = [*arguments, "--model_name_or_path", MODEL]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("rrhf_fast.evaluate: error: ")
    assert problem in lines[0] and not list(tmp_path.iterdir())
