"""The whole method with a reward of your own: sample, score, train, evaluate.

python examples/own_reward.py [OUTPUT_DIR]

On the command line the reward is `--reward_fn examples.own_reward:reward`.
"""

import sys
from pathlib import Path

from rrhf_fast import RRHFTrainer, SampleConfig, ScoreConfig, TrainConfig, demo, sample, score


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """Short answers, best with 8 words."""
    return [-abs(len(response.split()) - 8) / 8 for response in responses]


def main(folder: Path) -> None:
    """Train the demo's model on its own samples, ranked by `reward`."""
    model = str(demo.MODEL_DIR)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(Path(demo.TRAIN_FILE).read_text().splitlines(keepends=True)[:16]))
    sampled, scored = str(folder / "sampled.jsonl"), str(folder / "scored.jsonl")
    policies = [{"method": "sample", "num_responses": 4, "max_new_tokens": 48}]
    sample(
        SampleConfig(data=str(prompts), output=sampled, model_name_or_path=model, policies=policies)
    )
    score(ScoreConfig(data=sampled, output=scored, reward_fn="examples.own_reward:reward"))
    options = {"train_batch_size": 4, "learning_rate": 1e-3, "eval_max_new_tokens": 48}
    args = TrainConfig(output_dir=str(folder / "trained"), num_train_epochs=2, **options)
    held_out = demo.EVAL_FILE
    result = RRHFTrainer(model, args, scored, str(held_out), reward_fn=reward).train()
    print(f"reward {result.before['reward']:.2f} -> {result.after['reward']:.2f}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for examples.own_reward
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_reward")
    folder.mkdir(parents=True, exist_ok=True)
    main(folder)
