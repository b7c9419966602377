"""A reward model of Hugging Face transformers."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification

from rrhf_fast.data.chat import RENDERING, render, with_answer
from rrhf_fast.data.checks import one_line
from rrhf_fast.data.messages import plain_content
from rrhf_fast.model.decoder import inference_dtype, load_tokenizer, max_positions
from rrhf_fast.model.pretrained import (
    check_vocabulary,
    load_pretrained,
    loading,
    refuse_adapters,
)
from rrhf_fast.score.config import ScorerConfig
from rrhf_fast.stages.bounded import TooMuch

Prompt = str | list[dict]
OPTION = "reward_model_name_or_path"


class RewardModel:
    """A sequence classifier with one label; its logit is the score."""

    def __init__(self, config: ScorerConfig):
        """Raises ValueError if there is no such model or it lacks a trained head of one label."""
        name, code = config.reward_model_name_or_path, config.trust_remote_code
        self.tokenizer = load_tokenizer(name, trust_remote_code=code, option=OPTION)
        with loading(name, OPTION):
            refuse_adapters(name, OPTION)
            try:
                model = load_pretrained(
                    AutoModelForSequenceClassification,
                    name,
                    dtype=inference_dtype(config.dtype),
                    trust_remote_code=code,
                )
            except ValueError as error:
                raise ValueError(f"not a reward model: {error}") from error
            if model.config.num_labels != 1:
                raise ValueError(f"expected a head of 1 label, found {model.config.num_labels}")
        self.model, self._name = model.to("cuda" if torch.cuda.is_available() else "cpu"), name
        self.max_length = config.reward_max_length
        if (window := max_positions(model)) is not None:
            # Models like RoBERTa start positions after the padding id.
            offset = (model.config.pad_token_id or 0) + 1 if _counts_from_padding(model) else 0
            self.max_length = min(self.max_length, window - offset)
        self._input = config.reward_input
        self._check_forward()

    def _check_forward(self) -> None:
        """Score any text, to fail early."""
        row = self.tokenizer("a", truncation=True, max_length=self.max_length)
        check_vocabulary([row["input_ids"]], self.model, self._name, OPTION)
        with loading(self._name, OPTION):
            try:
                self.score([dict(row)])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # any type, for a config that fits no code
                raise ValueError(f"it cannot compute ({one_line(error)})") from error

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[dict]:
        """The inputs of each response: input_ids, and token_type_ids if the tokenizer has them.

        Raises ValueError for `reward_input` "chat" without a chat template, or with one that
        rejects the messages.
        """
        with RENDERING.many():
            rows = [self._encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        ids = (row["input_ids"] for row in rows)
        check_vocabulary(ids, self.model, self._name, OPTION)
        return rows

    def _encode(self, prompt: Prompt, response: str) -> dict:
        tokenizer, how = self.tokenizer, self._input
        options = {"truncation": True, "max_length": self.max_length}
        if how == "auto":
            has_template = isinstance(prompt, list) and tokenizer.chat_template
            how = "chat" if has_template else "pair" if tokenizer.sep_token else "text"
        if how == "pair":
            # Truncate the prompt of a pair that is too long first.
            lengths = [
                len(tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"])
                for t in (plain_text(prompt), response)
            ]
            room = self.max_length - tokenizer.num_special_tokens_to_add(pair=True)
            options["truncation"] = "only_first" if lengths[1] < room else "longest_first"
            return tokenizer(plain_text(prompt), response, **options)
        if how == "chat":
            if not tokenizer.chat_template:
                raise ValueError("reward_input: the reward model's tokenizer has no chat template")
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            turns = with_answer(turns, response)
            try:
                text = render(tokenizer, turns)
            except TooMuch as error:
                raise ValueError(f"{OPTION}: {self._name}: the chat template {error}") from error
            except Exception as error:  # a template may raise anything
                shown = f"{one_line(turns, 80)}... ({one_line(error)})"
                problem = f"the reward model's chat template rejects {shown}"
                raise ValueError(f"reward_input: {problem}") from error
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = tokenizer(plain_text(prompt) + response, verbose=False)["input_ids"]
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids = [*ids, tokenizer.eos_token_id]
        return {"input_ids": ids[-self.max_length :]}

    @torch.no_grad()
    def score(self, rows: Sequence[dict]) -> list[float]:
        """The logits of one batch of encoded rows."""
        width = max(len(row["input_ids"]) for row in rows)
        pad = self._padding(rows)
        # A decoder's classifier reads the last token that is not padding.
        self.model.config.get_text_config().pad_token_id = pad
        batch = {"attention_mask": [[1] * len(row["input_ids"]) for row in rows]}
        batch |= {name: [row[name] for row in rows] for name in rows[0] if name != "attention_mask"}
        fill = {"input_ids": pad}
        inputs = {
            name: torch.tensor([ids + [fill.get(name, 0)] * (width - len(ids)) for ids in values])
            for name, values in batch.items()
        }
        inputs = {name: values.to(self.model.device) for name, values in inputs.items()}
        return self.model(**inputs).logits[:, 0].float().tolist()

    def _padding(self, rows: Sequence[dict]) -> int:
        """The tokenizer's padding token, or any other token, that no row contains (many tokenizers
        have no padding token, or use EOS): the classifier must not take a row's own token for
        padding."""
        used = set().union(*(row["input_ids"] for row in rows))
        pad = self.tokenizer.pad_token_id
        known = range(self.model.get_input_embeddings().num_embeddings)
        if pad in known and pad not in used:
            return pad
        return next(token for token in known if token not in used)


def plain_text(prompt: Prompt) -> str:
    """A prompt as one text, with empty lines between messages."""
    return prompt if isinstance(prompt, str) else "\n\n".join(map(plain_content, prompt))


def _counts_from_padding(model: torch.nn.Module) -> bool:
    return any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())
