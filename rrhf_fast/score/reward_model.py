"""A reward model of Hugging Face transformers."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from transformers import AutoModelForSequenceClassification

from rrhf_fast.data.chat import RENDERING, render, with_answer
from rrhf_fast.data.checks import one_line
from rrhf_fast.data.messages import plain_content
from rrhf_fast.model.decoder import (
    inference_dtype,
    load_tokenizer,
    max_positions,
    rope_of_longest,
)
from rrhf_fast.model.pretrained import (
    check_vocabulary,
    load_pretrained,
    loading,
    refuse_adapters,
)
from rrhf_fast.score.config import ScorerConfig
from rrhf_fast.stages.bounded import TooMuch
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.ranks import local_device

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
        self.model, self._name = model.to(local_device()), name
        self.max_length = config.reward_max_length
        if (window := max_positions(model)) is not None:
            # Models like RoBERTa start positions after the padding id.
            offset = (model.config.pad_token_id or 0) + 1 if _counts_from_padding(model) else 0
            self.max_length = min(self.max_length, window - offset)
        self._input = config.reward_input
        self._sees_padding = self._check_forward()
        if self._sees_padding:
            problem = "its scores depend on padding, so responses are scored by length"
            say(f"note: {OPTION}: {name}: {problem}")

    def _check_forward(self) -> bool:
        """Score any text, to fail early; returns whether padding changes its score."""
        with loading(self._name, OPTION):
            text = "The sky is blue."
            row = dict(self.tokenizer(text, truncation=True, max_length=self.max_length))
            length = len(row["input_ids"])
            width = min(length + 8, self.max_length)
            check_vocabulary([row["input_ids"]], self.model, self._name, OPTION)
            try:
                pads = list(islice(self._paddings([row]), 2))
                alone = self._logits([row], pads[0], length)
                padded = [self._logits([row], pad, width) for pad in pads]
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # any type, for a config that fits no code
                raise ValueError(f"it cannot compute ({one_line(error)})") from error
        if rope_of_longest(self.model, self.max_length):
            return True
        # Of equal widths not even the rounding differs; between widths it does, by .02 in bfloat16.
        wide = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        pairs = ((padded[0], padded[-1], 1e-3), (alone, padded[0], wide))
        return not all(
            torch.allclose(one, other, rtol=near, atol=near / 10, equal_nan=True)
            for one, other, near in pairs
        )

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[dict]:
        """The inputs of each response: input_ids, and token_type_ids if the tokenizer has them.

        Raises ValueError for `reward_input` "chat" without a chat template, or with one that
        rejects the messages.
        """
        rows: list[dict | None] = [None] * len(prompts)
        numbers: dict[str, list[int]] = {}
        for number, prompt in enumerate(prompts):
            numbers.setdefault(self._how(prompt), []).append(number)
        encoders = {"pair": self._encode_pairs, "chat": self._encode_chats}
        for how, chosen in numbers.items():
            encode = encoders.get(how, self._encode_texts)
            encoded = encode([prompts[i] for i in chosen], [responses[i] for i in chosen])
            for number, row in zip(chosen, encoded, strict=True):
                rows[number] = row
        ids = (row["input_ids"] for row in rows)
        check_vocabulary(ids, self.model, self._name, OPTION)
        return rows

    def _how(self, prompt: Prompt) -> str:
        """How prompt and response are joined: as a "pair", "chat" or "text"."""
        if self._input != "auto":
            return self._input
        if isinstance(prompt, list) and self.tokenizer.chat_template:
            return "chat"
        return "pair" if self.tokenizer.sep_token else "text"

    def _encode_pairs(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[dict]:
        texts = list(map(plain_text, prompts))
        encoded = self.tokenizer(texts, list(responses), verbose=False)
        names = list(encoded)
        rows = [
            dict(zip(names, values, strict=True))
            for values in zip(*(encoded[name] for name in names), strict=True)
        ]
        for number, row in enumerate(rows):
            if len(row["input_ids"]) > self.max_length:
                rows[number] = self._truncated_pair(texts[number], responses[number])
        return rows

    def _truncated_pair(self, prompt: str, response: str) -> dict:
        """A pair that is too long loses tokens of its prompt first."""
        alone = self.tokenizer(response, add_special_tokens=False, verbose=False)
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        fits = len(alone["input_ids"]) < room
        how = {"truncation": "only_first" if fits else "longest_first"}
        return dict(self.tokenizer(prompt, response, max_length=self.max_length, **how))

    def _encode_chats(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[dict]:
        if not self.tokenizer.chat_template:
            raise ValueError("reward_input: the reward model's tokenizer has no chat template")
        with RENDERING.many():
            texts = [self._render(p, r) for p, r in zip(prompts, responses, strict=True)]
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [{"input_ids": ids[-self.max_length :]} for ids in encoded]

    def _render(self, prompt: Prompt, response: str) -> str:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = with_answer(turns, response)
        try:
            return render(self.tokenizer, turns)
        except TooMuch as error:
            raise ValueError(f"{OPTION}: {self._name}: the chat template {error}") from error
        except Exception as error:  # a template may raise anything
            shown = f"{one_line(turns, 80)}... ({one_line(error)})"
            problem = f"the reward model's chat template rejects {shown}"
            raise ValueError(f"reward_input: {problem}") from error

    def _encode_texts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[dict]:
        end = self.tokenizer.eos_token_id
        texts = [plain_text(p) + r for p, r in zip(prompts, responses, strict=True)]
        rows = []
        for ids in self.tokenizer(texts, verbose=False)["input_ids"]:
            if end is not None and ids[-1:] != [end]:
                ids = [*ids, end]
            rows.append({"input_ids": ids[-self.max_length :]})
        return rows

    def score(self, rows: Sequence[dict]) -> list[float]:
        """The logits of one batch of encoded rows."""
        by_length: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            by_length.setdefault(len(row["input_ids"]) * self._sees_padding, []).append(number)
        scores = [0.0] * len(rows)
        for numbers in by_length.values():
            some = [rows[number] for number in numbers]
            width, pad = max(len(row["input_ids"]) for row in some), next(self._paddings(some))
            for number, score in zip(numbers, self._logits(some, pad, width).tolist(), strict=True):
                scores[number] = score
        return scores

    @torch.no_grad()
    def _logits(self, rows: Sequence[dict], pad: int, width: int) -> torch.Tensor:
        """[B] float32, of rows filled up to `width` tokens with the token `pad`."""
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
        return self.model(**inputs).logits[:, 0].float()

    def _paddings(self, rows: Sequence[dict]) -> Iterator[int]:
        """The tokenizer's padding token, then other tokens, that no row contains (many tokenizers
        have no padding token, or use EOS): the classifier must not take a row's own token for
        padding."""
        used = set().union(*(row["input_ids"] for row in rows))
        known = range(self.model.get_input_embeddings().num_embeddings)
        pad = self.tokenizer.pad_token_id
        if pad in known and pad not in used:
            yield pad
        yield from (token for token in known if token not in used and token != pad)


def plain_text(prompt: Prompt) -> str:
    """A prompt as one text, with empty lines between messages."""
    return prompt if isinstance(prompt, str) else "\n\n".join(map(plain_content, prompt))


def _counts_from_padding(model: torch.nn.Module) -> bool:
    return any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())
