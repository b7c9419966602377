"""Texts <-> tokens with one tokenizer: its prefix, the space in front of a text, end tokens."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from rrhf_fast.data.checks import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Return the tokens of texts, without the tokenizer's prefix and end token. Raises ValueError
    if the tokenizer cannot, for example without a token for unknown letters."""
    if not texts:
        return []
    from transformers import PreTrainedTokenizerFast  # slow to import

    # verbose=False: the tokenizer's warning about texts longer than the model's window would
    # mislead, because they are cut later.
    options = {"return_attention_mask": False, "verbose": False}
    # The library spends a third of its time on places in the text, which nobody needs here. Its own
    # call for the first text prepares the backend for the others.
    is_plain = (
        getattr(type(tokenizer), "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus
    )
    alone = texts[:1] if is_plain else texts
    try:
        ids = tokenizer(alone, add_special_tokens=False, **options)["input_ids"]
        rest = texts[len(alone) :]
        if rest:
            backend = tokenizer.backend_tokenizer
            ids += [e.ids for e in backend.encode_batch_fast(rest, add_special_tokens=False)]
        return ids
    except Exception as error:  # tokenizers raises a bare Exception
        problem = f"tokenizer {tokenizer.name_or_path} cannot encode a text ({one_line(error)})"
        raise ValueError(problem) from error


def encode_responses(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Return the tokens of texts that follow a prompt, without an end token."""
    with _mid_text(tokenizer):
        return encode(tokenizer, texts)


def decode_response(
    tokenizer: "PreTrainedTokenizerBase",
    ids: Sequence[int],
    end_token_ids: Sequence[int] | None = None,
) -> str:
    """Return the text of tokens that a model wrote after a prompt, without the end token (default:
    EOS). A leading space and other special tokens, such as those of a channel, are kept, so that
    `encode_responses` gives the same tokens."""
    ends = [tokenizer.eos_token_id] if end_token_ids is None else end_token_ids
    if len(ids) > 0 and ids[-1] in ends:
        ids = ids[:-1]
    with _mid_text(tokenizer):
        return tokenizer.decode(ids, skip_special_tokens=False)


@contextmanager
def _mid_text(tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Stop the tokenizer from adding the space that SentencePiece puts in front of a text, and
    from removing it in decoding: a response never starts a text."""
    # Only tokenizers written in Python have no backend; they stay unchanged.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    names = ("normalizer", "pre_tokenizer", "decoder")
    parts = {name: getattr(backend, name, None) for name in names}
    parts = {name: part for name, part in parts.items() if part is not None}
    # A part pickles as its JSON.
    as_json = {name: json.loads(part.__getstate__()) for name, part in parts.items()}
    changed = {name: _without_space(part) for name, part in as_json.items()}
    if changed == as_json:
        yield
        return
    empty_model = {"type": "BPE", "vocab": {}, "merges": []}
    donor = Tokenizer.from_str(json.dumps({"added_tokens": [], "model": empty_model} | changed))
    for name in changed:
        setattr(backend, name, getattr(donor, name))
    try:
        yield
    finally:
        for name, part in parts.items():
            setattr(backend, name, part)


def _without_space(part: dict[str, Any]) -> dict[str, Any] | None:
    """Return a part of a tokenizer, as JSON, without the steps that add or strip a leading space;
    None if nothing remains."""
    kind = part["type"]
    if kind == "Sequence":
        (name,) = part.keys() - {"type"}
        inner = [_without_space(step) for step in part[name]]
        return part | {name: [step for step in inner if step is not None]}
    if kind == "Prepend" or (kind == "Strip" and part.get("content") == " " and part["start"]):
        return None
    if kind == "Metaspace":
        return part | {"prepend_scheme": "never"}
    # A ByteLevel decoder has this field too, but ignores it.
    return part | {"add_prefix_space": False} if kind == "ByteLevel" else part


def added_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens that this tokenizer itself puts in front of a text. Often that is BOS, but
    many tokenizers never add their BOS, and some add other tokens."""
    ids, (plain,) = tokenizer("a")["input_ids"], encode(tokenizer, ["a"])
    places = (i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
    return list(ids[: next(places, 0)])


class Endings:
    """Finds how a chat template ends an answer, given the text that it renders after one.

    The end is the first run of special tokens in that text, up to EOS if the run contains it. The
    last token of the end is the end token; EOS if the text has no special tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        added = tokenizer.added_tokens_decoder.items()
        # Some tokenizers list runs of white space among the added tokens.
        self._special = {i for i, token in added if token.special or token.content.strip()}
        self._special |= set(tokenizer.all_special_ids)
        self._tokenizer = tokenizer
        self._cache: dict[str, tuple[int, int]] = {}

    def has_any(self, suffix: str) -> bool:
        """Return whether `suffix`, the text rendered after an answer, contains an end token."""
        return self._find(suffix)[1] > 0

    def token(self, suffix: str) -> int:
        """Return the end token of an answer after which `suffix` is rendered."""
        return self._find(suffix)[0]

    def cut(self, ids: list[int], suffix: str) -> list[int]:
        """Return the tokens of a text that ends with `suffix`, up to but without the end token."""
        specials = self._find(suffix)[1]
        at = (i for i in reversed(range(len(ids))) if ids[i] in self._special)
        return ids[: next(islice(at, specials - 1, None))] if specials else ids

    def _find(self, suffix: str) -> tuple[int, int]:
        """Return the end token, and the number of special tokens from it to the end of the text."""
        if suffix not in self._cache:
            ids, eos = encode(self._tokenizer, [suffix])[0], self._tokenizer.eos_token_id
            places = [i for i, token in enumerate(ids) if token in self._special]
            run = [i for number, i in enumerate(places) if i == places[0] + number]
            end = next((i for i in run if ids[i] == eos), run[-1] if run else None)
            rest = [] if end is None else [i for i in places if i >= end]
            self._cache[suffix] = (eos if end is None else ids[end], len(rest))
        return self._cache[suffix]
