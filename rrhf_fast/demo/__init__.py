"""The embedded demo: the tiny model and scored rows behind `python -m rrhf_fast.train`.

`python -m rrhf_fast.demo.make` makes everything here: the text by the grammar in corpus.py, the
scores by reward.py, the model by training on that text. Nothing comes from elsewhere.
"""

from pathlib import Path

_HERE = Path(__file__).parent

# LlamaForCausalLM and its tokenizer, as transformers reads them.
MODEL_DIR = _HERE / "model"
# Rows of prompt, responses, scores, sources; the held-out ones ask about tasks that neither model
# nor training rows have met.
TRAIN_FILE = _HERE / "train.jsonl"
EVAL_FILE = _HERE / "eval.jsonl"

# Options of the default run, wherever the caller leaves them at their default.
SETTINGS = {
    "model_name_or_path": str(MODEL_DIR),
    "train_data": str(TRAIN_FILE),
    "eval_data": str(EVAL_FILE),
    "eval_reward_fn": "rrhf_fast.demo.reward:score",
    "learning_rate": 1e-3,
    "train_batch_size": 16,
    "num_train_epochs": 4.0,
}
