"""The guides say what is so: links lead somewhere, messages and metrics are those of the code, and
the commands of the first model run."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from rrhf_fast import TrainConfig, demo, rrhf_loss, train
from rrhf_fast.evaluate.caution import signs_of_harm
from rrhf_fast.evaluate.measures import Estimate
from rrhf_fast.model.config import LossConfig
from rrhf_fast.stages.other_names import OTHER_NAMES
from rrhf_fast.stages.parse import parse_config
from rrhf_fast.train.memory import memory_table
from tests import jsonl

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs" / "guides"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # which the guide names
# The shapes that the questions show the memory of.
SHAPES = {
    "qwen2": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
    "llama": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
}  # fmt: skip
CHECKPOINTED = {"activation_checkpointing": "full"}
LORA = "Llama-3.1-8B, --activation_checkpointing full --use_peft"


def text_of(path):
    return path.read_text(encoding="utf-8")


def rows_of(page):
    """The cells of each row of the page's tables, without heads."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines]
    return [row for row in rows if set(row[0]) != {"-"}]


def anchors_of(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    page = re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(text_of(file)), target


def test_each_guide_is_linked_from_the_readme_and_from_the_others():
    names = [path.name for path in GUIDES.glob("*.md")]
    assert len(names) == 5
    for page in (ROOT / "README.md", ROOT / "docs" / "questions.md", *GUIDES.glob("*.md")):
        for name in names:
            assert f"{name})" in text_of(page) or f"{name}#" in text_of(page) or page.name == name


def texts_of_the_code():
    """All texts in the package's code, those of f-strings in parts."""
    for path in (ROOT / "rrhf_fast").glob("**/*.py"):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_shown_are_printed():
    """Each part of a message between dots stands in the code."""
    code = "\n".join(texts_of_the_code())
    messages = [
        message
        for row in rows_of(text_of(GUIDES / "troubleshooting.md"))
        for message in re.findall(r"`([^`]+)`", row[0])
    ]
    assert len(messages) > 50
    for message in messages:
        for part in message.split("..."):
            # What stands in the place of dots may end in a colon or a bracket of its own.
            part = part.strip(" ():;,")
            assert part in code, message


def test_the_warnings_of_rounds_are_shown():
    low, high = Estimate(0.0, -0.1, 0.1), Estimate(1.0, 0.9, 1.1)
    before = {"reward": low, "perplexity": low, "distinct": high}
    after = before | {"perplexity": high, "distinct": low}
    said = signs_of_harm(before, after | {"reward": high}, "in round 0")
    said += signs_of_harm(before, after, "in round 0")
    shown = re.findall(r"^(warning: .*) \.\.\.$", text_of(GUIDES / "metrics.md"), re.MULTILINE)
    assert len(shown) == 3
    assert all(any(line.startswith(one) for line in said) for one in shown)


def test_each_metric_has_its_row(tmp_path):
    options = {"max_steps": 2, "eval_fraction": 0.25, "eval_max_new_tokens": 8}
    result = train(
        TrainConfig(
            model_name_or_path=str(demo.MODEL_DIR),
            train_data=str(demo.EVAL_FILE),
            output_dir=str(tmp_path / "out"),
            eval_reward_fn="rrhf_fast.demo.reward:score",
            **options,
        )
    )
    written = {name for record in result.metrics for name in record}
    assert {"loss", "active_fraction", "eval/reward"} <= written
    page = text_of(GUIDES / "metrics.md")
    for name in written | {"skipped", "mfu", "peak_memory_gib", "compiled_graphs"}:
        assert f"`{name}`" in page, name


def test_our_options_exist():
    """In the tables of names, every word of code of our column is an option or a value of one."""
    known = {field.name for field in fields(TrainConfig)}
    known |= {"torchrun", "TrainerCallback", "train", "runs", "latest", "null", "none", "forest"}
    known |= {"selective", "initial", "rrhf", "eval_", "training"}
    page = text_of(GUIDES / "from_trl.md")
    ours = [row[1] for row in rows_of(page) if len(row) > 1 and row[0] != "theirs"]
    words = {word for cell in ours for word in re.findall(r"`(?:--)?(\w+)", cell)}
    assert len(words) > 40 and words <= known, words - known


def test_names_of_others_are_those_of_the_guide():
    """Each hint for a name of another trainer names options, and those that the guide names."""
    ours = {field.name for field in fields(TrainConfig)}
    shown = {}
    for row in rows_of(text_of(GUIDES / "from_trl.md")):
        for name in re.findall(r"`(\w+)", row[0]):
            shown.setdefault(name, set()).update(re.findall(r"`(?:--)?(\w+)", row[1]))
    assert len(shown.keys() & OTHER_NAMES.keys()) > 20
    for name, options in OTHER_NAMES.items():
        assert name not in ours and set(options) <= ours, name
        assert not shown.get(name, set()) & ours or shown[name] & set(options), name


@pytest.mark.slow
def test_the_first_model_on_a_cpu(chat_model, tmp_path):
    """Every command of the guide for a CPU, on the embedded model in the place of SmolLM2."""
    page = text_of(GUIDES / "first_model.md")
    for code in re.findall(r'```python\n("""\w+\.py:.*?)```', page, re.DOTALL):
        name = re.match(r'"""(\w+\.py)', code)[1]
        (tmp_path / name).write_text(code, encoding="utf-8")
    blocks = re.findall(
        r"^On a CPU[^\n]*:\n\n```bash\n(.*?)```\n\n```text\n(.*?)```",
        page,
        re.MULTILINE | re.DOTALL,
    )
    assert len(blocks) == 5
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 600}
    printed = []
    for command, shown in [("python make_prompts.py", ""), *blocks]:
        command = command.replace(MODEL, chat_model).replace("python ", f"{sys.executable} ", 1)
        done = subprocess.run(["bash", "-c", command], **options)
        assert done.returncode == 0, done.stderr
        labels = set(re.findall(r"^([a-z][\w, %]*?)(?:  |$)", shown, re.MULTILINE))
        missing = {label for label in labels if label not in done.stdout}
        assert not missing, (missing, done.stdout)
        printed.append(done.stdout)
    prompts = jsonl.read(tmp_path / "prompts.jsonl")
    held_out = jsonl.read(tmp_path / "held_out.jsonl")
    assert not {json.dumps(row) for row in prompts} & {json.dumps(row) for row in held_out}
    rows = jsonl.read(tmp_path / "scored.jsonl")
    assert len(rows) == len(prompts) == 24 and len(held_out) == 12
    for row in rows:
        assert len(row["responses"]) == len(row["scores"]) and row["as_generated"]
    for name in ("model.safetensors", "metrics.jsonl", "training.png", "samples.jsonl"):
        assert (tmp_path / "trained" / name).exists()
    assert (tmp_path / "evaluation" / "report.html").exists()
    assert "samples that win" in printed[-1]


@pytest.mark.parametrize(
    ("title", "shape", "options"),
    [
        ("Qwen2.5-1.5B, all weights\n", "qwen2", {}),
        ("Llama-3.1-8B, all weights, --activation_checkpointing full\n", "llama", CHECKPOINTED),
        (f"{LORA}\n", "llama", CHECKPOINTED | {"use_peft": True}),
        (
            f"{LORA} --load_in_4bit\n",
            "llama",
            CHECKPOINTED | {"use_peft": True, "load_in_4bit": True},
        ),
    ],
)
def test_the_memory_shown_is_what_the_dry_run_says(title, shape, options, tmp_path):
    if "use_peft" in options:
        pytest.importorskip("peft")
    AutoConfig.for_model(shape, **SHAPES[shape], dtype="bfloat16").save_pretrained(tmp_path)
    table = memory_table(TrainConfig(model_name_or_path=str(tmp_path), **options)).splitlines()
    shown = text_of(ROOT / "docs" / "questions.md").partition(f"\n{title}")[2]
    lines = re.split(r"\n(?:\n|```)", shown)[0].splitlines()
    assert len(lines) >= 2 and set(lines) <= set(table)


def logistic(d):
    return -torch.nn.functional.logsigmoid(d)


# TRL's losses by the difference of summed and of mean log-ratios, or mean log-probs without a
# reference (dpo_trainer.py, cpo_trainer.py); beta 0.1, simpo_gamma 0.5.
THEIRS = {
    "sigmoid": lambda sums, means, alone: logistic(0.1 * sums),
    "sigmoid_norm": lambda sums, means, alone: logistic(0.1 * means),
    "hinge": lambda sums, means, alone: torch.relu(1 - 0.1 * sums),
    "ipo": lambda sums, means, alone: (means - 1 / (2 * 0.1)) ** 2,
    "simpo": lambda sums, means, alone: logistic(0.1 * (alone - 0.5 / 0.1)),
}


def test_losses_are_theirs_with_the_options_shown():
    rows = rows_of(text_of(GUIDES / "from_trl.md"))
    shown = {
        name: row[1].split("`")[1].split()
        for row in rows
        for name in THEIRS
        if f"`{name}`" in row[0] and row[1].startswith("`--")
    }
    assert shown.keys() == THEIRS.keys()
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 3])
    logps, before = -3 * torch.rand(2, 1, 2, 5, generator=draw, dtype=torch.float64)
    mask = torch.arange(5) < lengths[:, None]
    sums, sums_before = (logps * mask).sum(-1)[0], (before * mask).sum(-1)[0]
    rise = sums - sums_before
    better, worse = 0, 1
    differences = [
        values[better] - values[worse] for values in (rise, rise / lengths, sums / lengths)
    ]
    for name, words in shown.items():
        words = [*words, "--sft_weight", "0", "--rank_reduction", "mean"]
        config = parse_config(TrainConfig, words)
        options = {field.name: getattr(config, field.name) for field in fields(LossConfig)}
        has_reference = options.pop("reference") == "initial"
        options.pop("compat")
        reference = sums_before[None] if has_reference else None
        rewards = torch.tensor([[1.0, 0.0]])
        out = rrhf_loss(logps, rewards, mask=mask[None], reference_logps=reference, **options)
        torch.testing.assert_close(out.loss, THEIRS[name](*differences), msg=name)
