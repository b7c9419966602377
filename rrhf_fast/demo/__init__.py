"""The embedded demo: the tiny model and scored rows behind `python -m rrhf_fast.train`.

`python -m rrhf_fast.demo.make` makes everything here: the text by the grammar in corpus.py, the
scores by reward.py, the model by training on that text. Nothing comes from elsewhere.
"""

from pathlib import Path

_HERE = Path(__file__).parent

MODEL_DIR = (
    _HERE / "model"
)  # LlamaForCausalLM and tokenizer, as AutoModel and AutoTokenizer read them
TRAIN_FILE = _HERE / "train.jsonl"  # rows of prompt, responses, scores, sources
EVAL_FILE = _HERE / "eval.jsonl"  # the same, about tasks that neither model nor rows have met
