"""Only responses that the chat template changes have no log-probs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rrhf_fast.score.__main__ import main
from tests.data.test_chat import chatml, make_tokenizer, user
from tests.jsonl import read, write


@pytest.fixture
def model(tmp_path):
    tokenizer = make_tokenizer(chatml("{{ m.content.split('</think>')[-1] }}", ""))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def score(tmp_path, responses, *arguments):
    data = write(tmp_path / "rows.jsonl", [{"prompt": user(), "responses": responses}])
    out = tmp_path / "out.jsonl"
    code = main(["--data", data, "--output", str(out), *arguments])
    return code, read(out) if out.exists() else []


def letters(prompts, responses):
    return [float(len(response)) for response in responses]


@pytest.mark.parametrize("by", ["policy", "kl"])
def test_changed_responses_are_unscored_and_others_keep_their_scores(by, model, tmp_path, capsys):
    how = ["--policy_as_reward", "true", "--model_name_or_path", model]
    if by == "kl":
        how = ["--reward_fn", f"{__name__}:letters", "--kl_coef", "0.1"]
        how += ["--model_name_or_path", model, "--reference_model_name_or_path", model]
    code, (alone,) = score(tmp_path, ["cat", "dog"], *how)
    (tmp_path / "out.jsonl").unlink()
    assert code == 0
    responses = ["cat", "a</think>b", "dog"]
    assert score(tmp_path, responses, *how) == (2, [])
    assert "changes the answer" in capsys.readouterr().err.splitlines()[-1]
    code, (row,) = score(tmp_path, responses, *how, "--on_bad_rows", "skip", "--overwrite", "true")
    assert code == 0
    assert row["responses"] == ["cat", "dog"]
    assert row["scores"] == pytest.approx(alone["scores"], abs=1e-5)
    (unscored,) = row["unscored"]
    assert unscored["response"] == "a</think>b" and "changes the answer" in unscored["error"]
