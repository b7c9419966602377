"""Scores of a reward model do not depend on the batch, for classifiers of many families."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rrhf_fast import demo
from rrhf_fast.score.config import ScorerConfig
from rrhf_fast.score.reward_model import RewardModel

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GQA = SIZES | {"num_key_value_heads": 2}
HEED_MASKS = {
    "bert": SIZES,
    "roberta": SIZES,
    "deberta-v2": SIZES
    | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "conv_kernel_size": 3},
    "modernbert": SIZES | {"global_attn_every_n_layers": 2, "local_attention": 8},
    "longformer": SIZES | {"attention_window": [8, 8]},
    "mpnet": SIZES,
    "llama": GQA,
    "mixtral": GQA | {"num_local_experts": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
SEE_PADDING = {
    "fnet": SIZES,
    "convbert": SIZES,
    "yoso": SIZES,
    "mobilebert": SIZES,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}
PROMPTS = ["Why is it?", "Who?", "What do I need to fix the chair?", "Who?"]
RESPONSES = ["Because it is so.", "You.", "A hammer and nails.", "Me."]


@pytest.mark.parametrize("family", HEED_MASKS | SEE_PADDING)
def test_scores_do_not_depend_on_the_batch(tmp_path, capsys, family):
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = (HEED_MASKS | SEE_PADDING)[family]
    size = {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(family, **sizes, **size)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():  # initial weights are too small for padding to show
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    rewards = RewardModel(ScorerConfig(reward_model_name_or_path=str(tmp_path)))
    rows = rewards.encode(PROMPTS, RESPONSES)
    assert len({len(row["input_ids"]) for row in rows}) > 1
    alone = [score for row in rows for score in rewards.score([row])]
    assert rewards.score(rows) == pytest.approx(alone, abs=1e-5)
    assert ("depend on padding" in capsys.readouterr().out) == (family in SEE_PADDING)
