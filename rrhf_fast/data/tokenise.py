"""Rows -> tokens: prompt and responses with their end tokens, cut to the maximum lengths.

A string prompt and its responses are tokenised separately. Messages are tokenised as the chat
template renders them, each answer together with its prompt; the tokens that all answers of a row
have in common in front are the prompt.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rrhf_fast.data.chat import RENDERING, ChatTemplate, Conversation, refuse_reserved, render
from rrhf_fast.data.encode import Endings, added_prefix, encode, encode_responses
from rrhf_fast.data.load import RowReport
from rrhf_fast.data.rows import BadRow, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A response needs room for one token and its end token.
MIN_RESPONSE_LENGTH = 2
# Rows tokenised at once: enough to keep all cores busy, few enough to need little memory.
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class TokenisedQuery:
    """A row in tokens. Every response ends with the end token, which counts in its length."""

    prompt_ids: np.ndarray  # [P] int32
    response_ids: list[np.ndarray]  # k arrays [R_i] int32
    rewards: np.ndarray  # [k] float32, in the same order as the row's
    row: Row | None = None  # the source of the tokens

    @property
    def padded_width(self) -> int:
        """P + max R_i, the width of this query's rows when padded."""
        return len(self.prompt_ids) + max(len(ids) for ids in self.response_ids)


@dataclass
class TokenCounts:
    """How many `prompts` lost their head and how many `responses` their tail (never the end
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
    follows the generation prompt directly instead.

    Args:
        rows: what `load_rows` returned.
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token; messages need its chat
            template.
        report: counts rows and responses that only now turn out bad, and updates `kept`.
        max_length: prompt plus response. A prompt that leaves no room for a response is a bad row.
        max_prompt_length: longer prompts keep their tail (and the tokenizer's prefix).
        max_response_length: longer responses keep their head and the end token.
        chat_template_kwargs: see `ChatTemplate`.
        on_bad_rows: "error" or "skip".

    Returns:
        The queries, and how many prompts and responses were cut.

    Raises:
        ValueError: the tokenizer has no end token, or rows hold messages and it has no chat
            template.
        BadRow: a prompt is empty or fills the window, or the chat template rejects or changes
            messages, and `on_bad_rows` is "error".
    """
    queries, counts = tokenise_some(
        rows,
        tokenizer,
        report,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        max_response_length=max_response_length,
        chat_template_kwargs=chat_template_kwargs,
        on_bad_rows=on_bad_rows,
    )
    if not queries:
        first = next(iter(report.first.values()), "there are no rows")
        raise ValueError(
            "no row is left: every prompt is empty, too long or rejected by the chat template "
            f"(first: {first})"
        )
    report.kept = len(queries)
    return queries, counts


def tokenise_some(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    report: RowReport,
    *,
    max_length: int,
    max_prompt_length: int | None,
    max_response_length: int | None,
    chat_template_kwargs: dict[str, Any] | None,
    on_bad_rows: str,
) -> tuple[list[TokenisedQuery], TokenCounts]:
    """As `tokenise_rows`, for some rows of many: they may all be bad, and `kept` stays."""
    template = ChatTemplate(tokenizer, chat_template_kwargs or {})
    refuse_reserved(template.kwargs)
    _check_tokenizer(tokenizer, rows, template)
    prefix, endings = added_prefix(tokenizer), Endings(tokenizer)
    opening, joins_spaces = _generation_prompt(tokenizer), _joins_spaces(tokenizer)
    queries, counts = [], TokenCounts()
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        # Render the texts of each row.
        batch = []
        with RENDERING.many():
            for row in rows[start : start + _ROWS_AT_ONCE]:
                try:
                    texts, bad = _texts(row, template, endings)
                    if bad and (on_bad_rows == "error" or len(texts.responses) < 2):
                        raise bad[0]
                    report.leave_out(bad)
                    batch.append(texts)
                except BadRow as error:
                    report.skip(error, on_bad_rows)
        # Encode them all at once, then cut each row to the maximum lengths.
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
            rewards = _float32_rewards(row.rewards)
            queries.append(TokenisedQuery(prompt, response_ids, rewards, row))
            if tokenizer.chat_template and (note := _note(row.prompt, opening)):
                report.noted[note] += 1
            is_rendered = is_text and opening is not None and opening in row.prompt
            if joins_spaces and is_text and row.prompt.endswith(" ") and not is_rendered:
                report.noted["ends with a space"] += 1
    return queries, counts


def end_token_ids(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Return the tokens that end a response to these rows: EOS, and the chat template's end of turn
    if any row has messages. Raises BadRow if the template rejects an answer."""
    ends = {tokenizer.eos_token_id}
    with_messages = next((row for row in rows if isinstance(row.prompt, list)), None)
    if with_messages is not None:
        opening = ChatTemplate(tokenizer, chat_template_kwargs or {}).open(with_messages)
        ends.add(Endings(tokenizer).token(opening.suffix))
    return sorted(ends)


def learned_end_ids(queries: Sequence[TokenisedQuery]) -> list[int]:
    """Return the end tokens of the responses of these queries."""
    return sorted({int(ids[-1]) for query in queries for ids in query.response_ids})


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


@dataclass(frozen=True)
class _Texts:
    """The texts of a row: its prompt, and each response alone or in its conversation."""

    row: Row
    prompt: str
    responses: list[str | Conversation]
    end: int  # the end token


def _texts(row: Row, template: ChatTemplate, endings: Endings) -> tuple[_Texts, list[BadRow]]:
    """Render a row. Returns the texts of its good responses, and the errors of the others."""
    tokenizer = template.tokenizer
    if isinstance(row.prompt, str):
        responses = row.responses
        if not getattr(tokenizer, "split_special_tokens", False):  # there end tokens are texts
            responses = [_without_ends(text, (tokenizer.eos_token,)) for text in responses]
        return _Texts(row, row.prompt, responses, tokenizer.eos_token_id), []
    opening = template.open(row)
    end = endings.token(opening.suffix)
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
        if not endings.has_any(opening.suffix):  # EOS follows the answer, not a line end
            good[i] = good[i].without_last_space()
    row = row.pick(list(good)) if bad else row
    return _Texts(row, opening.text, list(good.values()), end), bad


def _generation_prompt(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The first line of what the chat template renders in front of an answer, which a text has if
    the template rendered it; None if it has none."""
    asked = [{"role": "user", "content": "Why?"}]
    try:
        without, text = (
            render(tokenizer, asked, add_generation_prompt=adds) for adds in (False, True)
        )
    except Exception:  # a template may reject anything, in any way
        return None
    added = text.removeprefix(without).strip() if text.startswith(without) else ""
    return added.splitlines()[0] if added else None


def _joins_spaces(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a space and the word after it are one token."""
    try:
        whole, before = encode(tokenizer, ["a a", "a "])
        return whole != before + encode_responses(tokenizer, ["a"])[0]
    except ValueError:  # it has no such letter
        return False


def _note(prompt: str | list[dict], opening: str | None) -> str | None:
    """What is worth a warning in a prompt for a tokenizer with a chat template: that it bypasses
    this, `text`, or that a message holds what this renders, `rendered twice`."""
    if isinstance(prompt, str):
        return None if opening is not None and opening in prompt else "text"
    asked = [str(message.get("content")) for message in prompt if message["role"] != "assistant"]
    is_in = opening is not None and any(opening in text for text in asked)
    return "rendered twice" if is_in else None


def _without_ends(response: str, ends: tuple[str, ...]) -> str:
    """Strip end tokens from a response, because one is added."""
    while (text := response.rstrip()).endswith(ends):
        response = text.removesuffix(next(end for end in ends if text.endswith(end)))
    return response


def _encode_rows(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[_Texts], endings: Endings
) -> Iterator[tuple[_Texts, list[int], list[list[int]]]]:
    """Yield for each row its texts, and the tokens of its prompt and of its responses, without end
    tokens.

    The prompt is the common beginning of the row's sequences, up to the first answer. If a
    tokenizer joins the end of the prompt with the start of an answer, the joint token belongs to
    the responses.
    """
    # Encode each distinct text once: conversations of a row mostly begin alike.
    parts = [part for row in rows for part in row.responses]
    alone = iter(encode_responses(tokenizer, [part for part in parts if isinstance(part, str)]))
    whole = [row.prompt for row in rows]
    for part in parts:
        if isinstance(part, Conversation):
            whole += [part.text[: part.start], part.text]
    whole = list(dict.fromkeys(whole))
    ids_of = dict(zip(whole, encode(tokenizer, whole), strict=True))
    # Separate each row's prompt from its responses.
    for row in rows:
        opening = ids_of[row.prompt]
        sequences, starts = [], []  # each answer with its prompt, and where the answer starts
        for part in row.responses:
            if isinstance(part, Conversation):
                sequences.append(endings.cut(ids_of[part.text], part.suffix))
                starts.append(_num_common(ids_of[part.text[: part.start]], sequences[-1]))
            else:
                sequences.append(opening + next(alone))
                starts.append(len(opening))
        prompt = sequences[0][: min(starts)] if sequences else opening
        for ids in sequences:
            prompt = prompt[: _num_common(prompt, ids)]
        yield row, prompt, [ids[len(prompt) :] for ids in sequences]


def _num_common(a: list[int], b: list[int]) -> int:
    """Return the length of the common beginning."""
    if b[: len(a)] == a:
        return len(a)
    return next(i for i in range(len(a)) if b[i : i + 1] != a[i : i + 1])


def _fit_prompt(
    ids: list[int], prefix: list[int], is_text: bool, max_length: int | None, counts: TokenCounts
) -> np.ndarray:
    """Return the tail of a prompt after the tokenizer's prefix. A text gets the prefix exactly
    once, even if it contains it; messages keep what the chat template renders."""
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
    if ids[-1:] == [end]:  # the text contained its own end token
        ids = ids[:-1]
    if len(ids) + 1 > limit:
        ids = ids[: limit - 1]
        counts.cut["responses"] += 1
    return np.array([*ids, end], dtype=np.int32)


def _float32_rewards(rewards: list[float]) -> np.ndarray:
    """Convert rewards to float32, or to their ranks where float32 would merge or overflow them: the
    loss depends only on their order."""
    exact = np.array(rewards, dtype=np.float64)
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
    if np.isfinite(rounded).all() and len(np.unique(rounded)) == len(np.unique(exact)):
        return rounded
    return np.unique(exact, return_inverse=True)[1].astype(np.float32)
