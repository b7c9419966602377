"""Runs on every rank: python -m torch.distributed.run --nproc_per_node N stages.py FOLDER URL

Each stage, in FOLDER/<number of ranks, 0 without torchrun>/<case>. Without torchrun it creates the
inputs, and the files that those of the ranks are compared with. URL is that of openai_server.py.
"""

import importlib
import os
import sys
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from rrhf_fast import demo
from rrhf_fast.stages.command import leave

MODEL = str(demo.MODEL_DIR)
REWARD = "rrhf_fast.demo.reward:score"
SHORT = "max_new_tokens: 9"
POLICIES = {
    "greedy": f"[{{method: greedy, {SHORT}}}]",
    "sampled": f"[{{method: provided}}, {{method: sample, num_responses: 2, {SHORT}}}]",
    "beams": f"[{{method: beam, num_responses: 2, {SHORT}}}, {{method: diverse_beam, {SHORT}}}]",
    "two models": f"[{{model: OTHER, {SHORT}}}, {{method: greedy, {SHORT}}}]",
    "endpoint": "[{method: openai, model: server, num_responses: 2, base_url: URL}]",
}
SAMPLE = {"data": "INPUTS/train.jsonl", "output": "OUT.jsonl", "model_name_or_path": MODEL}
SAMPLE |= {"batch_size": 3, "send_seed": "true"}
SCORE = {"data": "INPUTS/train.jsonl", "output": "OUT.jsonl", "batch_size": 3}
KL = {"model_name_or_path": MODEL, "reference_model_name_or_path": "OTHER", "kl_coef": 0.1}
EVALUATE = {
    "data": "INPUTS/eval.jsonl", "output_dir": "OUT", "reward_fn": REWARD, "num_bootstrap": 50,
    "model_name_or_path": MODEL, "reference_model_name_or_path": "OTHER", "batch_size": 3,
    "ranking_data": "INPUTS/eval.jsonl", "max_new_tokens": 9, "num_samples": 2,
}  # fmt: skip
CASES = {name: ("sample", SAMPLE | {"policies": text}) for name, text in POLICIES.items()} | {
    "reward model": ("score", SCORE | {"reward_model_name_or_path": "INPUTS/reward"}),
    "reward function": ("score", SCORE | KL | {"reward_fn": REWARD}),
    "log-probs": ("score", SCORE | KL | {"policy_as_reward": "true"}),
    "judge": ("score", SCORE | {"judge_model": "judge", "base_url": "URL"}),
    "evaluate": ("evaluate", EVALUATE | {"baseline": "OTHER"}),
    "iterate": ("iterate", EVALUATE | {
        "data": "INPUTS/train.jsonl", "eval_data": "INPUTS/eval.jsonl", "rounds": 1,
        "policies": POLICIES["sampled"], "train.max_steps": 2, "train.train_batch_size": 4,
        "train.learning_rate": 1e-3}),
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Rows, another model, and a reward model that reads prompt and response as one text."""
    folder.mkdir()
    for source, count in ((demo.TRAIN_FILE, 11), (demo.EVAL_FILE, 7)):
        lines = source.read_text().splitlines(keepends=True)[:count]
        (folder / source.name).write_text("".join(lines))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=577, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "other")
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    for name in ("other", "reward"):
        AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(folder / name)


def main() -> int:
    folder, url, num_ranks = Path(sys.argv[1]), sys.argv[2], os.environ.get("WORLD_SIZE", "0")
    inputs = folder / "inputs"
    if num_ranks == "0":
        make_inputs(inputs)
    for name, (stage, options) in CASES.items():
        places = {"INPUTS": str(inputs), "OTHER": str(inputs / "other"), "URL": url}
        places["OUT"] = str(folder / num_ranks / name)
        words = []
        for option, value in options.items():
            for place, path in places.items():
                value = str(value).replace(place, path)
            words += [f"--{option}", value]
        if code := importlib.import_module(f"rrhf_fast.{stage}.__main__").main(words):
            return code
    return 0


if __name__ == "__main__":
    leave(main)
