"""Text to tokens: the tokenizer's prefix once, an end token that is learned, cuts that keep what
matters.

A string prompt and its responses are tokenised apart. Messages are tokenised as the chat template
renders them, each answer together with its prompt; what all answers of a row have in front is the
prompt.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from rrhf_fast.data.chat import ChatTemplate, Conversation, refuse_reserved
from rrhf_fast.data.rows import BadRow, Row, RowReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A response needs room for one token and its end.
MIN_RESPONSE_LENGTH = 2
# Rows tokenised at once: enough for all cores, few enough that their texts take little memory.
_ROWS_AT_ONCE = 1024


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
    chat_template_kwargs: dict[str, Any] | None = None,
    on_bad_rows: str = "error",
) -> tuple[list[TokenisedQuery], TokenCounts]:
    """Tokenise rows; lengths are in tokens.

    The tokens of messages with an answer are those of the conversation that the chat template
    renders, up to its end token; EOS follows where it renders none. A response `as_generated`
    stands right behind the generation prompt instead.

    Args:
        rows: what `load_rows` returned.
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token; messages need its chat
            template.
        report: where rows that turn out bad only now are counted (`kept` is brought up to date).
        max_length: prompt plus response. A prompt that leaves no room for a response is a bad row.
        max_prompt_length: longer prompts keep their tail (and what the tokenizer puts in front).
        max_response_length: longer responses keep their head and the end token.
        chat_template_kwargs: see `ChatTemplate`.
        on_bad_rows: "error" or "skip".

    Returns:
        The queries, and what was cut.

    Raises:
        ValueError: the tokenizer has no end token, or messages meet a tokenizer without a chat
            template.
        BadRow: a prompt without tokens, one that fills the window, or messages that the chat
            template rejects or changes, and `on_bad_rows` is "error".
    """
    template = ChatTemplate(tokenizer, chat_template_kwargs or {})
    refuse_reserved(template.kwargs)
    _check_tokenizer(tokenizer, rows, template)
    prefix, endings = _added_prefix(tokenizer), _Endings(tokenizer)
    queries, counts = [], TokenCounts()
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = []
        for row in rows[start : start + _ROWS_AT_ONCE]:
            try:
                texts, bad = _texts(row, template, endings)
                if bad and (on_bad_rows == "error" or len(texts.responses) < 2):
                    raise bad[0]
                report.bad_responses.update(error.kind for error in bad)
                batch.append(texts)
            except BadRow as error:
                report.skip(error, on_bad_rows)
        for texts, prompt_ids, responses in _encode_rows(tokenizer, batch, endings):
            row = texts.row
            try:
                is_text = isinstance(row.prompt, str)
                prompt = _fit_prompt(prompt_ids, prefix, is_text, max_prompt_length, counts)
                room = max_length - len(prompt)
                _check_prompt(prompt, room, max_length, row)
            except BadRow as error:
                report.skip(error, on_bad_rows)
                continue
            limit = min(room, max_response_length or room)
            response_ids = [_fit_response(ids, texts.end, limit, counts) for ids in responses]
            queries.append(TokenisedQuery(prompt, response_ids, _ordered_rewards(row.scores), row))
    if not queries:
        raise ValueError(
            "no row is left: every prompt is empty, too long or rejected by the template"
        )
    report.kept = len(queries)
    return queries, counts


def end_token_ids(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """The tokens that end a response to these rows: EOS, and the chat template's end of turn if any
    has messages. Raises BadRow where the template rejects an answer."""
    ends = {tokenizer.eos_token_id}
    with_messages = next((row for row in rows if isinstance(row.prompt, list)), None)
    if with_messages is not None:
        opening = ChatTemplate(tokenizer, chat_template_kwargs or {}).open(with_messages)
        ends.add(_Endings(tokenizer).token(opening.behind))
    return sorted(ends)


def learned_end_ids(queries: Sequence[TokenisedQuery]) -> list[int]:
    """The tokens that responses of these queries end with."""
    return sorted({int(ids[-1]) for query in queries for ids in query.response_ids})


def encode_responses(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Tokens of texts that stand behind a prompt, without an end token."""
    with _mid_text(tokenizer):
        return _encode(tokenizer, texts)


def decode_response(
    tokenizer: "PreTrainedTokenizerBase",
    ids: Sequence[int],
    end_token_ids: Sequence[int] | None = None,
) -> str:
    """The text of tokens that a model put behind a prompt, without the end token (default: EOS). A
    space that it begins with and other special tokens, such as a channel's, are kept, so that
    `encode_responses` finds the same tokens."""
    ends = [tokenizer.eos_token_id] if end_token_ids is None else end_token_ids
    if len(ids) > 0 and ids[-1] in ends:
        ids = ids[:-1]
    with _mid_text(tokenizer):
        return tokenizer.decode(ids, skip_special_tokens=False)


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


def _added_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What this tokenizer puts in front of a text by itself. Often that is BOS; many own a BOS that
    they never add, and some add other tokens."""
    ids, (plain,) = tokenizer("a")["input_ids"], _encode(tokenizer, ["a"])
    places = (i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
    return list(ids[: next(places, 0)])


def _check_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], template: ChatTemplate
) -> None:
    name = tokenizer.name_or_path
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name}: no eos_token, and responses must end with one")
    if tokenizer.chat_template or "chat_template" in template.kwargs:
        return
    if with_messages := next((row for row in rows if isinstance(row.prompt, list)), None):
        problem = f"prompt holds messages, but tokenizer {name} has no chat template"
        raise ValueError(f"{with_messages.where}: {problem}")


def _check_prompt(ids: np.ndarray, room: int, max_length: int, row: Row) -> None:
    if len(ids) == 0:
        problem = "prompt: no tokens, so nothing predicts a response's first token"
        raise BadRow("empty prompt", row.where, problem)
    if room < MIN_RESPONSE_LENGTH:
        raise BadRow(
            "prompt fills the window",
            row.where,
            f"prompt: {len(ids)} tokens leave no room for a response in max_length {max_length} "
            "(raise --max_length, or set --max_prompt_length to keep only the prompt's tail)",
        )


class _Endings:
    """The end of an answer: the first special tokens behind it, up to EOS if that is among them, or
    EOS if there are none."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        added = tokenizer.added_tokens_decoder.items()
        # Some tokenizers list runs of white space among these.
        self._special = {i for i, token in added if token.special or token.content.strip()}
        self._special |= set(tokenizer.all_special_ids)
        self._tokenizer = tokenizer
        self._found: dict[str, tuple[int, int]] = {}

    def has_any(self, behind: str) -> bool:
        """Whether there is an end token in what the template puts behind an answer."""
        return self._find(behind)[1] > 0

    def token(self, behind: str) -> int:
        """The end token where the template puts the text `behind` behind an answer."""
        return self._find(behind)[0]

    def cut(self, ids: list[int], behind: str) -> list[int]:
        """The tokens of a text that ends with `behind`, up to its end token, without it."""
        specials = self._find(behind)[1]
        at = (i for i in reversed(range(len(ids))) if ids[i] in self._special)
        return ids[: next(islice(at, specials - 1, None))] if specials else ids

    def _find(self, behind: str) -> tuple[int, int]:
        """The end token, and how many special tokens there are from it on."""
        if behind not in self._found:
            ids, eos = _encode(self._tokenizer, [behind])[0], self._tokenizer.eos_token_id
            places = [i for i, token in enumerate(ids) if token in self._special]
            first = [i for number, i in enumerate(places) if i == places[0] + number]
            end = next((i for i in first if ids[i] == eos), first[-1] if first else None)
            rest = [] if end is None else [i for i in places if i >= end]
            self._found[behind] = (eos if end is None else ids[end], len(rest))
        return self._found[behind]


@dataclass(frozen=True)
class _Texts:
    """What of a row is tokenised: its prompt, and each response alone or in its conversation."""

    row: Row
    prompt: str
    responses: list[str | Conversation]
    end: int  # the token


def _texts(row: Row, template: ChatTemplate, endings: _Endings) -> tuple[_Texts, list[BadRow]]:
    """The texts of a row's good responses, and what is wrong with the others."""
    tokenizer = template.tokenizer
    if isinstance(row.prompt, str):
        return _Texts(row, row.prompt, row.responses, tokenizer.eos_token_id), []
    opening = template.open(row)
    end = endings.token(opening.behind)
    end_texts = tuple(tokenizer.convert_ids_to_tokens(sorted({end, tokenizer.eos_token_id})))
    good, bad = {}, []
    for i, response in enumerate(row.responses):
        if row.as_generated is not None and row.as_generated[i]:
            good[i] = response
            continue
        try:
            answer = _without_ends(response, end_texts)
            good[i] = template.answer(row, opening, answer, f"responses[{i}]")
        except BadRow as error:
            bad.append(error)
            continue
        if not endings.has_any(opening.behind):  # EOS comes without the line's end in front
            good[i] = good[i].without_last_space()
    row = row.pick(list(good)) if bad else row
    return _Texts(row, opening.text, list(good.values()), end), bad


def _without_ends(response: str, ends: tuple[str, ...]) -> str:
    """The response without end tokens of its own: the template puts one there."""
    while (text := response.rstrip()).endswith(ends):
        response = text.removesuffix(next(end for end in ends if text.endswith(end)))
    return response


def _encode_rows(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[_Texts], endings: _Endings
) -> Iterator[tuple[_Texts, list[int], list[list[int]]]]:
    """For each row the tokens of its prompt and of its responses, without end tokens. The prompt is
    what all its sequences begin with, up to the first answer: where a tokenizer joins the end of
    the prompt with an answer's start, the joint token is the response's."""
    parts = [part for row in rows for part in row.responses]
    alone = iter(encode_responses(tokenizer, [part for part in parts if isinstance(part, str)]))
    whole = [row.prompt for row in rows]
    for part in parts:
        if isinstance(part, Conversation):
            whole += [part.text[: part.start], part.text]
    whole = list(dict.fromkeys(whole))  # a row's conversations mostly begin alike
    found = dict(zip(whole, _encode(tokenizer, whole), strict=True))
    for row in rows:
        opening = found[row.prompt]
        sequences, starts = [], []  # each answer with its prompt, and where it begins
        for part in row.responses:
            if isinstance(part, Conversation):
                sequences.append(endings.cut(found[part.text], part.behind))
                starts.append(_num_common(found[part.text[: part.start]], sequences[-1]))
            else:
                sequences.append(opening + next(alone))
                starts.append(len(opening))
        prompt = sequences[0][: min(starts)] if sequences else opening
        for ids in sequences:
            prompt = prompt[: _num_common(prompt, ids)]
        yield row, prompt, [ids[len(prompt) :] for ids in sequences]


def _num_common(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with."""
    if b[: len(a)] == a:
        return len(a)
    return next(i for i in range(len(a)) if b[i : i + 1] != a[i : i + 1])


def _fit_prompt(
    ids: list[int], prefix: list[int], is_text: bool, max_length: int | None, counts: TokenCounts
) -> np.ndarray:
    """The prompt's tail, behind the tokenizer's prefix: of a text once, also if the text brings it,
    and of messages as often as the chat template renders it."""
    head = prefix if is_text or ids[: len(prefix)] == prefix else []
    while prefix and ids[: len(prefix)] == prefix:
        ids = ids[len(prefix) :]
        if not is_text:
            break
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


def _ordered_rewards(scores: list[float]) -> np.ndarray:
    """Scores as float32. The loss sees only their order, so where float32 would merge or overflow
    them, ranks stand in."""
    exact = np.array(scores, dtype=np.float64)
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
    if np.isfinite(rounded).all() and len(np.unique(rounded)) == len(np.unique(exact)):
        return rounded
    return np.unique(exact, return_inverse=True)[1].astype(np.float32)
