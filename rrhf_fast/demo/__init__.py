"""The embedded demo: the tiny model and scored rows behind `python -m rrhf_fast.train`.

`python -m experiments.make_demo` in the repository makes all of it: the text by a grammar, the
scores by reward.py, the model by training on that text. There is no outside data.
"""

from pathlib import Path

_HERE = Path(__file__).parent

# A LlamaForCausalLM and its tokenizer, in the format of transformers.
MODEL_DIR = _HERE / "model"
# Rows of prompt, responses, scores, sources. The held-out ones ask about tasks that are new to both
# model and training rows.
TRAIN_FILE = _HERE / "train.jsonl"
EVAL_FILE = _HERE / "eval.jsonl"

# Options of the default run, unless the caller sets them.
SETTINGS = {
    "model_name_or_path": str(MODEL_DIR),
    "train_data": str(TRAIN_FILE),
    "eval_data": str(EVAL_FILE),
    "eval_reward_fn": "rrhf_fast.demo.reward:score",
    "learning_rate": 1e-3,
    "train_batch_size": 16,
    "num_train_epochs": 4.0,
}
