"""Text to tokens: prompt and response apart, one BOS, an end token that is learned, cuts that keep
what matters."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from rrhf_fast.data.rows import BadRow, Row, RowReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A response needs room for one token and its end.
MIN_RESPONSE_LENGTH = 2
# Rendered into the chat template to see what a template puts behind an answer.
_PROBE = "rrhf-probe-answer"


@dataclass(frozen=True)
class TokenisedQuery:
    """A row in tokens. Every response ends with the end token, which counts in its length."""

    prompt_ids: np.ndarray  # [P] int32
    response_ids: list[np.ndarray]  # k arrays [R_i] int32
    rewards: np.ndarray  # [k] float32, ordered as the row's scores are
    row: Row | None = None  # where the tokens come from

    @property
    def padded_width(self) -> int:
        """P + max R_i, the width of this query's rows when padded."""
        return len(self.prompt_ids) + max(len(ids) for ids in self.response_ids)


@dataclass
class TokenCounts:
    """What tokenising cut: `prompts` lost their head, `responses` their tail (never the end
    token)."""

    cut: Counter = field(default_factory=Counter)


def tokenise_rows(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    report: RowReport,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
    on_bad_rows: str = "error",
) -> tuple[list[TokenisedQuery], TokenCounts]:
    """Tokenise rows; lengths are in tokens.

    Args:
        rows: what `load_rows` returned.
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token; messages need its chat
            template.
        report: where rows that turn out bad only now are counted (`kept` is brought up to date).
        max_length: prompt plus response. A prompt that leaves no room for a response is a bad row.
        max_prompt_length: longer prompts keep their tail (and their BOS).
        max_response_length: longer responses keep their head and the end token.
        on_bad_rows: "error" or "skip".

    Returns:
        The queries, and what was cut.

    Raises:
        ValueError: the tokenizer has no end token, or messages meet a tokenizer without a chat
            template.
        BadRow: a prompt without tokens, one that fills the window, or messages that the chat
            template rejects, and `on_bad_rows` is "error".
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path}: no eos_token, and responses must end with one"
        )
    if any(isinstance(row.prompt, list) for row in rows) and not tokenizer.chat_template:
        where = next(row.where for row in rows if isinstance(row.prompt, list))
        raise ValueError(
            f"{where}: prompt holds messages, but tokenizer {tokenizer.name_or_path} "
            "has no chat template"
        )

    usable, texts, end_of_turn = [], [], None
    for row in rows:
        try:
            text = _prompt_text(tokenizer, row)
            if end_of_turn is None and isinstance(row.prompt, list):
                end_of_turn = _end_of_turn(tokenizer, row)
        except BadRow as error:
            report.skip(error, on_bad_rows)
            continue
        usable.append(row)
        texts.append(text)
    bos = _added_bos(tokenizer)
    all_prompts = _encode(tokenizer, texts)
    all_responses = iter(
        encode_responses(tokenizer, [text for row in usable for text in row.responses])
    )

    queries, counts = [], TokenCounts()
    for row, prompt_ids in zip(usable, all_prompts, strict=True):
        responses = [next(all_responses) for _ in row.responses]
        end = tokenizer.eos_token_id if isinstance(row.prompt, str) else end_of_turn
        try:
            prompt = _fit_prompt(prompt_ids, bos, max_prompt_length, counts)
            room = max_length - len(prompt)
            if len(prompt) == 0:
                raise BadRow(
                    "empty prompt",
                    row.where,
                    "prompt: no tokens, so nothing predicts a response's first token",
                )
            if room < MIN_RESPONSE_LENGTH:
                raise BadRow(
                    "prompt fills the window",
                    row.where,
                    f"prompt: {len(prompt)} tokens leave no room for a response in max_length "
                    f"{max_length} (raise --max_length, or set --max_prompt_length to keep only "
                    "the prompt's tail)",
                )
        except BadRow as error:
            report.skip(error, on_bad_rows)
            continue
        limit = min(room, max_response_length or room)
        response_ids = [_fit_response(ids, end, limit, counts) for ids in responses]
        queries.append(TokenisedQuery(prompt, response_ids, _ordered_rewards(row.scores), row))
    if not queries:
        raise ValueError(
            "no row is left: every prompt is empty, too long or rejected by the template"
        )
    report.kept = len(queries)
    return queries, counts


def end_token_ids(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row]) -> list[int]:
    """The tokens that end a response to these rows: EOS, and the chat template's end of turn if any
    has messages. Raises BadRow where the template rejects an answer."""
    ends = {tokenizer.eos_token_id}
    with_messages = next((row for row in rows if isinstance(row.prompt, list)), None)
    if with_messages is not None:
        ends.add(_end_of_turn(tokenizer, with_messages))
    return sorted(ends)


def encode_responses(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Tokens of texts that stand behind a prompt, without an end token."""
    with _mid_text(tokenizer):
        return _encode(tokenizer, texts)


def decode_response(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of tokens that a model put behind a prompt, without special tokens; a space that it
    begins with is kept, so that `encode_responses` finds the same tokens."""
    with _mid_text(tokenizer):
        return tokenizer.decode(ids, skip_special_tokens=True)


@contextmanager
def _mid_text(tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Inside the block the tokenizer neither adds the space that SentencePiece puts in front of a
    text, nor takes it away when it decodes: a response is no beginning."""
    # Only tokenizers written in Python have no backend; they stay as they are.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    names = ("normalizer", "pre_tokenizer", "decoder")
    found = {name: getattr(backend, name, None) for name in names}
    found = {name: part for name, part in found.items() if part is not None}
    # What pickle keeps of a part is its JSON.
    parts = {name: json.loads(part.__getstate__()) for name, part in found.items()}
    changed = {name: _without_space(part) for name, part in parts.items()}
    if changed == parts:
        yield
        return
    nothing = {"type": "BPE", "vocab": {}, "merges": []}
    donor = Tokenizer.from_str(json.dumps({"added_tokens": [], "model": nothing} | changed))
    for name in changed:
        setattr(backend, name, getattr(donor, name))
    try:
        yield
    finally:
        for name, part in found.items():
            setattr(backend, name, part)


def _without_space(part: dict[str, Any]) -> dict[str, Any] | None:
    """A part of a tokenizer, as JSON, without what adds or strips a space in front."""
    kind = part["type"]
    if kind == "Sequence":
        (name,) = part.keys() - {"type"}
        inner = [_without_space(step) for step in part[name]]
        return part | {name: [step for step in inner if step is not None]}
    if kind == "Prepend" or (kind == "Strip" and part.get("content") == " " and part["start"]):
        return None
    if kind == "Metaspace":
        return part | {"prepend_scheme": "never"}
    # A decoder of this kind has the field too, but does nothing with it.
    return part | {"add_prefix_space": False} if kind == "ByteLevel" else part


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: texts longer than the model's window are cut below, so the tokenizer's warning
    # would mislead.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]


def _added_bos(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The BOS that this tokenizer puts in front of a text by itself. Many own a BOS that they never
    add."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _fit_prompt(
    ids: list[int], bos: int | None, max_length: int | None, counts: TokenCounts
) -> np.ndarray:
    """One BOS in front if the tokenizer adds one (a chat template or the text may bring it), and
    the prompt's tail."""
    head = []
    if bos is not None:
        head = [bos]
        while ids[:1] == head:
            ids = ids[1:]
    if max_length is not None and len(head) + len(ids) > max_length:
        ids = ids[len(head) + len(ids) - max_length :]
        counts.cut["prompts"] += 1
    return np.array(head + ids, dtype=np.int32)


def _fit_response(ids: list[int], end: int, limit: int, counts: TokenCounts) -> np.ndarray:
    if ids[-1:] == [end]:  # the text brought its own end token
        ids = ids[:-1]
    if len(ids) + 1 > limit:
        ids = ids[: limit - 1]
        counts.cut["responses"] += 1
    return np.array([*ids, end], dtype=np.int32)


def _prompt_text(tokenizer: "PreTrainedTokenizerBase", row: Row) -> str:
    if isinstance(row.prompt, str):
        return row.prompt
    return _rendered(tokenizer, row, row.prompt, add_generation_prompt=True)


def _rendered(
    tokenizer: "PreTrainedTokenizerBase", row: Row, messages: list[dict], **options
) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template raises what it likes, say on two user turns in a row
        what = "these messages" if messages is row.prompt else "an answer behind these messages"
        problem = f"prompt: the chat template rejects {what} ({error})"
        raise BadRow("rejected by the chat template", row.where, problem) from error


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase", row: Row) -> int:
    """The first special token that the chat template puts behind an assistant's answer; EOS if it
    puts none."""
    answered = [*row.prompt, {"role": "assistant", "content": _PROBE}]
    text = _rendered(tokenizer, row, answered)
    behind = _encode(tokenizer, [text.rpartition(_PROBE)[2]])[0]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in behind if token in special), tokenizer.eos_token_id)


def _ordered_rewards(scores: list[float]) -> np.ndarray:
    """Scores as float32. The loss sees only their order, so where float32 would merge or overflow
    them, ranks stand in."""
    exact = np.array(scores, dtype=np.float64)
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
    if np.isfinite(rounded).all() and len(np.unique(rounded)) == len(np.unique(exact)):
        return rounded
    return np.unique(exact, return_inverse=True)[1].astype(np.float32)
