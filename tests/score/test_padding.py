"""Scores of a reward model do not depend on the batch, for classifiers of many families."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rrhf_fast import demo
from rrhf_fast.score import score
from rrhf_fast.score.config import ScoreConfig, ScorerConfig
from rrhf_fast.score.reward_model import RewardModel
from tests.jsonl import read, write

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
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
LONG = {"rope_parameters": LONG_ROPE | {"rope_theta": 1e4}, "original_max_position_embeddings": 8}
SEE_PADDING["phi3"] = GQA | LONG | {"bos_token_id": 0, "eos_token_id": 1}
PROMPTS = ["Why is it?", "Who?", "What do I need to fix the chair?", "Who?"]
RESPONSES = ["Because it is so.", "You.", "A hammer and nails.", "Me."]


@pytest.mark.parametrize("family", HEED_MASKS | SEE_PADDING)
@pytest.mark.parametrize("fillers", ["different", "equal"])
def test_scores_do_not_depend_on_the_batch(tmp_path, capsys, family, fillers):
    """Neither where all tokens that may fill a row are embedded alike, as unused ones may be."""
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
    if fillers == "equal":
        embedding = model.get_input_embeddings().weight
        embedding.data[: len(tokenizer) // 2] = embedding.data[0]
    model.save_pretrained(tmp_path)
    rewards = RewardModel(ScorerConfig(reward_model_name_or_path=str(tmp_path)))
    rows = rewards.encode(PROMPTS, RESPONSES)
    assert len({len(row["input_ids"]) for row in rows}) > 1
    alone = [score for row in rows for score in rewards.score([row])]
    assert rewards.score(rows) == pytest.approx(alone, abs=1e-5)
    assert ("depend on padding" in capsys.readouterr().out) == (family in SEE_PADDING)


def test_equal_responses_have_equal_scores(tmp_path):
    """In bfloat16 they differ by rounding where their batches have other widths."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    tokenizer.save_pretrained(tmp_path / "rm")
    size = {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("bert", **GQA, **size)
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "rm")
    rows = [
        {"prompt": p, "responses": [r + " And so on." * n for n in range(8)]}
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    config = ScoreConfig(
        data=write(tmp_path / "rows.jsonl", rows * 3),
        output=str(tmp_path / "scored.jsonl"),
        reward_model_name_or_path=str(tmp_path / "rm"),
        dtype="bfloat16",
        batch_size=5,
    )
    score(config)
    scores = [row["scores"] for row in read(config.output)]
    assert scores[:4] == scores[4:8] == scores[8:]
