"""The whole method on a real model: sample stories, score their sentiment, train, sample again.

Reads the model stories260K from ../shared/models beside the repository; skips without it.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_fast import TrainConfig, train
from rrhf_fast.model.generate import sample_responses

MODEL = Path(__file__).parents[2] / "shared" / "models" / "stories260k"
NAMES = ["Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Lucy"]
PLACES = ["park", "garden", "beach", "forest", "house", "school"]


def happiness(prompts, responses):
    """The reward: VADER's sentiment, between -1 and 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(response)["compound"] for response in responses]


@pytest.mark.slow
def test_stories_become_happier(tmp_path):
    pytest.importorskip("vaderSentiment", reason="the reward is vaderSentiment")
    if not MODEL.exists():
        pytest.skip("the model stories260K is not there")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lm = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    prompts = [f"One day, {name} went to the {place}." for place in PLACES for name in NAMES]
    ids = [np.array(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    samples = [
        tokenizer.batch_decode(
            sample_responses(
                lm, ids, max_new_tokens=40, end_token_ids=[2], pad_token_id=0, seed=seed
            ),
            skip_special_tokens=True,
        )
        for seed in range(4)
    ]
    rows = []
    for prompt, responses in zip(prompts, zip(*samples, strict=True), strict=True):
        scores = happiness([prompt] * 4, responses)
        rows.append({"prompt": prompt, "responses": responses, "scores": scores})
    files = [tmp_path / "train.jsonl", tmp_path / "eval.jsonl"]
    held_out = len(NAMES)  # a place that training does not know
    for file, part in zip(files, (rows[:-held_out], rows[-held_out:]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))

    config = TrainConfig(
        model_name_or_path=str(MODEL),
        train_data=str(files[0]),
        eval_data=str(files[1]),
        output_dir=str(tmp_path / "out"),
        on_bad_rows="skip",
        learning_rate=1e-3,
        train_batch_size=4,
        num_train_epochs=4,
        sft_reduction="mean",
        eval_steps=1000,
        eval_samples=8,
        eval_max_new_tokens=40,
        eval_reward_fn=f"{__name__}:happiness",
    )
    result = train(config)
    accuracy = [r["rewards/accuracies"] for r in result.metrics if "loss" in r]
    assert np.mean(accuracy[-10:]) > np.mean(accuracy[:10]) + 0.1
    assert result.after["reward"] > result.before["reward"] + 0.1
