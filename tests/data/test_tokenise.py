"""Tokenising: BOS, end tokens, chat templates, cuts, and rewards that keep their order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rrhf_fast.data.encode import decode_response, encode_responses
from rrhf_fast.data.load import RowReport
from rrhf_fast.data.rows import BadRow, Row
from rrhf_fast.data.tokenise import end_token_ids, tokenise_rows

BOS, EOS, PAD, TURN = "<s>", "</s>", "<pad>", "<|end|>"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(*, adds_bos=True, template=None, **special):
    """Byte-level with one token per byte, so that lengths are easy to see."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [BOS, EOS, PAD, TURN, "<|user|>", "<|assistant|>", "<|system|>"]
    vocab = {token: i for i, token in enumerate([*names, *letters])}
    bpe = Tokenizer(models.BPE(vocab, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **({"bos_token": BOS, "eos_token": EOS, "pad_token": PAD} | special),
        additional_special_tokens=names[3:],
    )
    tokenizer.chat_template = template
    return tokenizer


def tokenise(tokenizer, *rows, **options):
    report = RowReport(read=len(rows), kept=len(rows))
    options = {"max_length": 64} | options
    return *tokenise_rows(rows, tokenizer, report, **options), report


def row(prompt="Why?", responses=("ab", "cde"), rewards=(1.0, 0.0), where="f:1"):
    return Row(prompt, list(responses), list(rewards), None, where)


def text(tokenizer, ids):
    return tokenizer.decode(ids)


def test_bos_in_front_and_end_token_at_the_end():
    tokenizer = make_tokenizer()
    (query,), _, _ = tokenise(tokenizer, row())
    assert text(tokenizer, query.prompt_ids) == "<s>Why?"
    assert [text(tokenizer, ids) for ids in query.response_ids] == ["ab</s>", "cde</s>"]
    assert query.prompt_ids.dtype == query.response_ids[0].dtype == np.int32
    assert query.padded_width == 5 + 4


def test_no_bos_if_the_tokenizer_adds_none():
    tokenizer = make_tokenizer(adds_bos=False)
    assert tokenizer.bos_token_id is not None
    (query,), _, _ = tokenise(tokenizer, row())
    assert text(tokenizer, query.prompt_ids) == "Why?"


@pytest.mark.parametrize("prompt", ["<s>Why?", "<s><s>Why?"])
def test_exactly_one_bos(prompt):
    tokenizer = make_tokenizer()
    (query,), _, _ = tokenise(tokenizer, row(prompt))
    assert text(tokenizer, query.prompt_ids) == "<s>Why?"


def test_exactly_one_end_token():
    tokenizer = make_tokenizer()
    (query,), _, _ = tokenise(tokenizer, row(responses=("ab</s>", "cd")))
    assert text(tokenizer, query.response_ids[0]) == "ab</s>"


def test_an_end_token_before_white_space_is_the_end():
    tokenizer = make_tokenizer()
    (query,), _, _ = tokenise(tokenizer, row(responses=("ab</s>\n", "cd\n")))
    assert [text(tokenizer, ids) for ids in query.response_ids] == ["ab</s>", "cd\n</s>"]
    tokenizer.split_special_tokens = True  # so that it is a text
    (query,), _, _ = tokenise(tokenizer, row(responses=("ab</s>", "ab")))
    assert [len(ids) for ids in query.response_ids] == [7, 3]


def test_the_end_token_is_learned_even_if_it_pads():
    tokenizer = make_tokenizer(pad_token=EOS)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (query,), _, _ = tokenise(tokenizer, row())
    assert all(ids[-1] == tokenizer.eos_token_id for ids in query.response_ids)


def test_messages_go_through_the_template_and_end_with_its_end_of_turn():
    tokenizer = make_tokenizer(template="{{ bos_token }}" + TEMPLATE)
    messages = [{"role": "user", "content": "Why?"}]
    queries, _, _ = tokenise(tokenizer, row(messages), row())
    assert text(tokenizer, queries[0].prompt_ids) == "<s><|user|>Why?<|end|><|assistant|>"
    assert text(tokenizer, queries[0].response_ids[0]) == "ab<|end|>"
    assert text(tokenizer, queries[1].response_ids[0]) == "ab</s>"  # plain text ends with EOS
    turn, eos = tokenizer.convert_tokens_to_ids([TURN, EOS])
    assert end_token_ids(tokenizer, [row(messages)]) == sorted([turn, eos])
    assert end_token_ids(tokenizer, [row()]) == [eos]


def test_a_template_without_end_of_turn_gets_eos():
    tokenizer = make_tokenizer(template=TEMPLATE.replace("<|end|>", " "))
    (query,), _, _ = tokenise(tokenizer, row([{"role": "user", "content": "Why?"}]))
    assert text(tokenizer, query.response_ids[0]) == "ab</s>"


def test_nothing_in_a_row_is_formatted_as_a_template():
    tokenizer = make_tokenizer(template=TEMPLATE)
    trap = "{{ 7 * 7 }}{% for %}"
    (query,), _, _ = tokenise(tokenizer, row([{"role": "user", "content": trap}], (trap, "a")))
    # For messages, the template adds BOS or not, as in `apply_chat_template`.
    assert text(tokenizer, query.prompt_ids) == f"<|user|>{trap}<|end|><|assistant|>"
    assert text(tokenizer, query.response_ids[0]) == trap + TURN


def test_messages_need_a_template_that_accepts_them():
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match="f:1: prompt holds messages, but tokenizer .* no chat"):
        tokenise(make_tokenizer(), row(messages))
    picky = make_tokenizer(template="{{ raise_exception('two users in a row') }}")
    with pytest.raises(BadRow, match=r"f:1: prompt: the chat template rejects .*two users in a"):
        tokenise(picky, row(messages))
    queries, _, report = tokenise(picky, row(messages), row(), on_bad_rows="skip")
    assert len(queries) == 1 and report.bad == {"rejected by the chat template": 1}


def test_a_template_may_reject_an_answer():
    guard = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = make_tokenizer(template=guard + TEMPLATE)
    messages = [{"role": "user", "content": "a"}]
    problem = r"f:1: prompt: the chat template rejects an answer after these messages \(no\)"
    with pytest.raises(BadRow, match=problem):
        tokenise(tokenizer, row(messages))
    with pytest.raises(BadRow, match=problem):
        end_token_ids(tokenizer, [row(messages)])
    queries, _, report = tokenise(tokenizer, row(messages), row(), on_bad_rows="skip")
    assert len(queries) == 1 and report.bad == {"rejected by the chat template": 1}


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(ValueError, match="no eos_token"):
        tokenise(make_tokenizer(eos_token=None), row())


def test_an_empty_prompt_needs_a_bos():
    assert len(tokenise(make_tokenizer(), row(""))[0][0].prompt_ids) == 1
    with pytest.raises(BadRow, match="f:1: prompt: no tokens"):
        tokenise(make_tokenizer(adds_bos=False), row(""))


def test_cuts_keep_the_prompts_tail_and_the_end_token():
    tokenizer = make_tokenizer()
    (query,), counts, _ = tokenise(
        tokenizer, row("0123456789", ("abcdef", "ab")), max_prompt_length=5, max_response_length=4
    )
    assert text(tokenizer, query.prompt_ids) == "<s>6789"
    assert [text(tokenizer, ids) for ids in query.response_ids] == ["abc</s>", "ab</s>"]
    assert counts.cut == {"prompts": 1, "responses": 1}


def test_max_length_cuts_responses_only():
    tokenizer = make_tokenizer()
    (query,), counts, _ = tokenise(tokenizer, row("0123", ("abcdef", "ab")), max_length=9)
    assert text(tokenizer, query.prompt_ids) == "<s>0123"
    assert [text(tokenizer, ids) for ids in query.response_ids] == ["abc</s>", "ab</s>"]
    assert counts.cut == {"responses": 1}


def test_a_prompt_that_fills_the_window_is_refused():
    tokenizer = make_tokenizer()
    assert tokenise(tokenizer, row("0" * 7), max_length=10)[0]
    with pytest.raises(BadRow, match="f:1: prompt: 9 tokens leave no room .* max_length 10"):
        tokenise(tokenizer, row("0" * 8), max_length=10)
    queries, _, report = tokenise(tokenizer, row("0" * 8), row(), max_length=10, on_bad_rows="skip")
    assert len(queries) == report.kept == 1 and report.bad == {"prompt fills the window": 1}
    with pytest.raises(ValueError, match="no row is left"):
        tokenise(tokenizer, row("0" * 8), max_length=10, on_bad_rows="skip")


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(words, st.lists(words, min_size=2, max_size=4))
def test_any_text_decodes_to_itself(prompt, responses):
    tokenizer = make_tokenizer()
    (query,), _, _ = tokenise(
        tokenizer, row(prompt, responses, [0.0] * len(responses)), max_length=999
    )
    assert text(tokenizer, query.prompt_ids) == BOS + prompt
    for ids, response in zip(query.response_ids, responses, strict=True):
        assert text(tokenizer, ids) == response + EOS


def make_sentencepiece(kind):
    """A tokenizer that adds a leading space in one of two ways; it has letters, and bytes for
    other characters."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = [BOS, EOS, *bytes_, *"▁.,abcdeH", "▁a", "▁H"]
    merges = [("▁", "a"), ("▁", "H")]
    ids = {token: i for i, token in enumerate(vocab)}
    bpe = Tokenizer(models.BPE(ids, merges, byte_fallback=True, fuse_unk=True))
    space, end = decoders.Replace("▁", " "), [decoders.ByteFallback(), decoders.Fuse()]
    if kind == "prepend":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        bpe.normalizer = normalizers.Sequence(steps)
        bpe.decoder = decoders.Sequence([space, *end, decoders.Strip(" ", 1, 0)])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        bpe.decoder = decoders.Sequence([decoders.Metaspace(split=False), *end])
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS)


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1))
def test_no_space_is_added_between_prompt_and_response(kind, response):
    tokenizer = make_sentencepiece(kind)
    before = tokenizer("a b")["input_ids"]
    (query,), _, _ = tokenise(tokenizer, row("a", [response, " a"], [0.0, 0.0]), max_length=9999)
    assert query.prompt_ids.tolist() == tokenizer.convert_tokens_to_ids([BOS, "▁a"])
    assert query.response_ids[1].tolist() == tokenizer.convert_tokens_to_ids(["▁a", EOS])
    assert decode_response(tokenizer, query.response_ids[0]) == response
    together = np.concatenate([query.prompt_ids, query.response_ids[0]])
    assert tokenizer.decode(together, skip_special_tokens=True) == "a" + response
    assert tokenizer("a b")["input_ids"] == before  # unchanged


def test_punctuation_after_a_prompt_gets_no_space():
    tokenizer = make_sentencepiece("prepend")
    assert tokenizer.tokenize(". H") == ["▁", ".", "▁H"]
    (ids,) = encode_responses(tokenizer, [". H"])
    assert tokenizer.convert_ids_to_tokens(ids) == [".", "▁H"]


@given(
    st.lists(
        st.sampled_from([0.0, 1.0, 1 + 1e-9, 1 + 2e-9, 1e-320, -1e300, 1e300, 1.7e308])
        | st.floats(allow_nan=False, allow_infinity=False),
        min_size=2,
        max_size=6,
    )
)
def test_rewards_are_finite_and_keep_their_order(rewards):
    this = row(responses=["a"] * len(rewards), rewards=rewards)
    (query,), _, _ = tokenise(make_tokenizer(), this)
    assert query.rewards.dtype == np.float32 and np.isfinite(query.rewards).all()
    for a, reward in enumerate(rewards):
        for b, other in enumerate(rewards):
            assert (query.rewards[a] < query.rewards[b]) == (reward < other)


def test_prompts_that_end_with_a_space_are_noted():
    """Where the tokenizer joins spaces with words, so that models hardly know a space alone."""
    rows = row("Who? "), row("Who?"), row([{"role": "user", "content": "Who? "}])
    tokenizer = make_sentencepiece("prepend")
    tokenizer.chat_template = TEMPLATE
    *_, report = tokenise(tokenizer, *rows)
    assert "warning: 1 of 3 prompts end with a space" in report.warnings()["spaces"]
    *_, report = tokenise(make_tokenizer(template=TEMPLATE), *rows)  # joins nothing
    assert "spaces" not in report.warnings()
