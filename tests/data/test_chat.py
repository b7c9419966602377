"""Training uses exactly the tokens that a chat template renders, or refuses the row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rrhf_fast.data.encode import decode_response
from rrhf_fast.data.load import RowReport
from rrhf_fast.data.rows import BadRow, Row
from rrhf_fast.data.tokenise import end_token_ids, tokenise_rows

EOS = "<eos>"
JOINS = (("Ċ", "cat"), ("]", "Ġ"), (":", "Ġ"), ("t", "Ċ"), ("Ċ", "Ċ"))
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>")
SPECIAL += ("<|return|>", "[gMASK]", "<sop>")
ADDED = ("<think>", "</think>", "\n\n")  # added, but not special


def make_tokenizer(template=None, *, eos=EOS, prefix=(), joins=()):
    """Letters and a cat, with or without a leading space. `joins` are further pairs of tokens that
    join, such as those on both sides of a prompt's end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat"), *joins]
    vocab = [*letters, *("".join(merge) for merge in merges)]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in (EOS, *SPECIAL)])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    if prefix:
        bpe.post_processor = processors.TemplateProcessing(
            single=" ".join([*prefix, "$A"]),
            special_tokens=[(token, bpe.token_to_id(token)) for token in prefix],
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def user(text="Say cat"):
    return [{"role": "user", "content": text}]


def row(prompt, *responses, **more):
    rewards = [1.0 / (i + 1) for i in range(len(responses))]
    return Row(prompt, list(responses), rewards, None, "f:1", **more)


def trained(tokenizer, row, **options):
    """Per response the tokens of the whole sequence, and where the response starts."""
    report = RowReport(read=1, kept=1)
    (query,), _ = tokenise_rows([row], tokenizer, report, max_length=9999, **options)
    prompt = query.prompt_ids.tolist()
    return [prompt + ids.tolist() for ids in query.response_ids], len(prompt)


def rendered(tokenizer, messages, answer, **kwargs):
    """The tokens that transformers gives the whole conversation."""
    *earlier, last = messages
    if last["role"] == "assistant":
        messages, answer = earlier, last["content"] + answer
    return tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": answer}], return_dict=False, **kwargs
    )


def assert_trained_is_rendered(tokenizer, row, **kwargs):
    sequences, _ = trained(tokenizer, row, **({"chat_template_kwargs": kwargs} if kwargs else {}))
    for answer, ids in zip(row.responses, sequences, strict=True):
        expected = rendered(tokenizer, row.prompt, answer, **kwargs)
        rest = tokenizer.decode(expected[len(ids) :])
        if expected[: len(ids)] != ids:  # a template without an end token
            assert ids[-1] == tokenizer.eos_token_id
            text, whole = tokenizer.decode(ids[:-1]), tokenizer.decode(expected)
            assert ids[:-1] == tokenizer(text)["input_ids"] and whole.startswith(text)
            rest = whole.removeprefix(text)
        assert not tokenizer.decode(tokenizer(rest)["input_ids"], skip_special_tokens=True).strip()


# --- Templates from building blocks

TURN = "<|im_start|>user\n{{ m.content }}<|im_end|>\n"
HEADERS = (
    "<|im_start|>assistant\n",
    "ASSISTANT:",
    "ASSISTANT: ",
    "[/INST]",
    "<|start|>assistant<|channel|>final<|message|>",
    "",
)
# Text that a template puts in front of an answer, and the part in its generation prompt.
FRONTS = (
    ("", ""),
    (" ", ""),
    (" ", " "),
    ("\n", ""),
    ("\n", "\n"),
    ("<think>\n\n</think>\n\n", ""),
    ("<think>\n\n</think>\n\n", "<think>\n"),
    ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
    ("", "<think>\n"),
    ("<|channel|>final<|message|>", "<|channel|>"),
)
ANSWERS = (
    "{{ m.content }}",
    "{{ m.content | trim }}",
    "{{ m.content.rstrip() }}",
    "{{ m.content | upper }}",
    "{{ m.content.split('</think>')[-1] }}",
    "{{ m.content }}{{ m.content }}",
    "{{ m.content[:5] }}",
    "{{ m.content | tojson }}",
    "",
)
ENDS = ("<|im_end|>\n", "<|im_end|>", " <|return|>", "\n", "", "<eos><|start|>", "\n\n<|end|>\n")
SYSTEMS = ("separate", "merged", "dropped")


@st.composite
def templates(draw):
    header, (front, opened) = draw(st.sampled_from(HEADERS)), draw(st.sampled_from(FRONTS))
    answer, end = draw(st.sampled_from(ANSWERS)), draw(st.sampled_from(ENDS))
    system, ignores_flag = draw(st.sampled_from(SYSTEMS)), draw(st.booleans())
    is_reordered = draw(st.sampled_from([False] * 5 + [True]))
    body = "{% set ns = namespace(system='') %}"
    assistant = header + front + answer + end
    if is_reordered:
        body += "{% if messages[-1].role == 'assistant' %}{% set m = messages[-1] %}"
        body += assistant + "{% endif %}"
    body += "{% for m in messages %}{% if m.role == 'system' %}"
    if system == "separate":
        body += "<|im_start|>system\n{{ m.content }}<|im_end|>\n"
    elif system == "merged":
        body += "{% set ns.system = m.content + '\\n' %}"
    body += "{% elif m.role == 'user' %}" + TURN.replace("{{", "{{ ns.system }}{{")
    body += "{% else %}" + ("" if is_reordered else assistant) + "{% endif %}{% endfor %}"
    if not ignores_flag:
        body += "{% if add_generation_prompt %}" + header + opened + "{% endif %}"
    return body


ANSWERED = ("cat", " cat", "cat ", "\ncat", "\n\ncat", "dog", "assistant", ":", "]", "\t.\n", "é<")
ANSWERED += ("<think>\na\n</think>\n\nb", "a</think>b", "cat<|im_end|>", "rrhf-probe-answer")
words = st.sampled_from(ANSWERED) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9
).filter(str.strip)
prompts = st.sampled_from(
    (
        user(),
        [{"role": "system", "content": "Be brief."}, *user()],
        [*user("Hi"), {"role": "assistant", "content": "cat"}, *user("Again: ")],
        [*user(), {"role": "assistant", "content": "A "}],
        [*user(), {"role": "assistant", "content": "A cat"}],
    )
)


@given(templates(), prompts, st.lists(words, min_size=2, max_size=4))
def test_the_rendered_tokens_are_trained_or_the_row_is_refused(template, prompt, responses):
    tokenizer = make_tokenizer(template, joins=JOINS)
    # An end token in the answer counts as the template's.
    responses = [text.removesuffix("<|im_end|>") or "cat" for text in responses]
    try:
        assert_trained_is_rendered(tokenizer, row(prompt, *responses))
    except BadRow as error:
        assert str(error).startswith("f:1: ") and "template" in str(error)


# --- Where the answer begins, by kind of template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = "<|im_start|>user\nSay cat<|im_end|>\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"


def chatml(answer, opened):
    return (
        "{% for m in messages %}{% if m.role == 'user' %}" + TURN + "{% else %}"
        "<|im_start|>assistant\n" + answer + "<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + opened + "{% endif %}"
    )


THINKS = chatml(
    NO_THOUGHT + "{{ m.content }}",
    "{% if enable_thinking is defined and not enable_thinking %}"
    + NO_THOUGHT
    + "{% else %}<think>\n{% endif %}",
)
SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<eos>{% endif %}{% endfor %}"
)
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
KINDS = {
    "plain": (CHATML, QUESTION + "<|im_start|>assistant\n", "cat<|im_end|>"),
    "generation prompt opens a thought": (
        THINKS,
        QUESTION + "<|im_start|>assistant\n" + NO_THOUGHT,
        "cat<|im_end|>",
    ),
    "empty thought": (
        chatml(NO_THOUGHT + "{{ m.content }}", ""),
        QUESTION + "<|im_start|>assistant\n" + NO_THOUGHT,
        "cat<|im_end|>",
    ),
    "channel": (
        CHANNELS,
        "<|start|>user<|message|>Say cat<|end|><|start|>assistant<|channel|>final<|message|>",
        "cat<|return|>",
    ),
    # The tokenizer joins a space with the next word, so the model must write both.
    "space": (SPACED, "[INST] Say cat [/INST]", " cat<eos>"),
    "no generation prompt": (
        CHATML.partition("{% if add_generation_prompt %}")[0],
        QUESTION + "<|im_start|>assistant\n",
        "cat<|im_end|>",
    ),
    "trims": (
        CHATML.replace("m.content", "m.content | trim"),
        QUESTION + "<|im_start|>assistant\n",
        "cat<|im_end|>",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_in_front_of_an_answer_belongs_to_the_prompt(kind):
    template, prompt, answer = KINDS[kind]
    tokenizer = make_tokenizer(template)
    this = row(user(), "cat", "dog")
    assert_trained_is_rendered(tokenizer, this)
    (ids, _), start = trained(tokenizer, this)
    assert [tokenizer.decode(part) for part in (ids[:start], ids[start:])] == [prompt, answer]


@pytest.mark.parametrize(
    ("template", "answer", "problem"),
    [
        (CHATML.replace("m.content", "m.content | upper"), "cat", "changes the answer and renders"),
        (CHATML.replace("m.content", "m.content[:20]"), "cat " * 9, r"renders responses\[0\] as"),
        (CHATML.replace("{{ m.content }}", ""), "cat", "changes the answer"),
        (
            chatml("{{ m.content }}", "<think>\n"),
            "cat",
            r"ends with '.*<think>\\n', but .*samples need no such",
        ),
        (chatml("{{ m.content.split('</think>')[-1] }}", ""), "a</think>b", "changes the answer"),
    ],
)
def test_a_changed_answer_is_refused(template, answer, problem):
    tokenizer = make_tokenizer(template)
    with pytest.raises(BadRow, match=f"^f:1: responses.*{problem}"):
        trained(tokenizer, row(user(), answer, "dog"))


def test_the_error_suggests_arguments_that_make_prompt_and_conversation_agree():
    opened = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}"
    template = chatml("<think></think>{{ m.content }}", opened + "<think>\n{% endif %}")
    tokenizer, this = make_tokenizer(template), row(user(), "cat", "dog")
    with pytest.raises(BadRow, match="'{enable_thinking: false}' makes them agree"):
        trained(tokenizer, this)
    assert_trained_is_rendered(tokenizer, this, enable_thinking=False)


def test_an_answer_that_begins_within_the_generation_prompt():
    tokenizer = make_tokenizer(chatml("{{ m.content }}", "<think>\n"))
    this = row(user(), "<think>\na\n</think>\n\ncat", "<think>\nb")
    assert_trained_is_rendered(tokenizer, this)
    (ids, _), start = trained(tokenizer, this)
    assert tokenizer.decode(ids[:start]) == f"{QUESTION}<|im_start|>assistant\n<think>\n"
    assert tokenizer.decode(ids[start:]) == "a\n</think>\n\ncat<|im_end|>"


@pytest.mark.parametrize(
    ("suffix", "eos", "end"),
    [
        ("<|end|><|return|>\n", "<|return|>", "<|end|><|return|>"),
        ("<|end|><|return|>\n", EOS, "<|end|><|return|>"),
        ("<eos><|start|>", EOS, "<eos>"),  # the next turn begins
        ("<|end|>\n<eos>", EOS, "<|end|>"),  # the text ends
        ("\n<|end|>\n", EOS, "\n<|end|>"),
    ],
)
def test_the_end_of_an_answer(suffix, eos, end):
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>\n", suffix), eos=eos)
    (ids, _), start = trained(tokenizer, row(user(), "cat", "dog"))
    assert tokenizer.decode(ids[start:]) == "cat" + end
    assert ids[-1] in end_token_ids(tokenizer, [row(user(), "cat", "dog")])


def test_a_thought_in_an_answer_replaces_the_empty_one():
    thinks = "{% if '</think>' not in m.content %}" + NO_THOUGHT + "{% endif %}{{ m.content }}"
    tokenizer = make_tokenizer(chatml(thinks, ""))
    thoughts = "<think>\nCats.\n</think>\n\ncat"
    this = row(user(), "cat", thoughts)
    assert_trained_is_rendered(tokenizer, this)
    (first, second), start = trained(tokenizer, this)
    # The model would have to write the empty thought itself, so it is learned here.
    assert tokenizer.decode(second) == f"{QUESTION}<|im_start|>assistant\n{thoughts}<|im_end|>"
    assert tokenizer.decode(second[:start]) == f"{QUESTION}<|im_start|>assistant\n"
    assert tokenizer.decode(first[start:]) == f"{NO_THOUGHT}cat<|im_end|>"


def test_an_answer_that_continues_the_last_message():
    tokenizer = make_tokenizer(THINKS)
    this = row([*user(), {"role": "assistant", "content": "A "}], "cat", "\n\ndog")
    assert_trained_is_rendered(tokenizer, this)
    (ids, other), start = trained(tokenizer, this)
    prompt = f"{QUESTION}<|im_start|>assistant\n{NO_THOUGHT}A"
    assert tokenizer.decode(ids[:start]) == prompt  # the space joins the cat
    assert tokenizer.decode(ids[start:]) == " cat<|im_end|>"
    assert tokenizer.decode(other[start:]) == " \n\ndog<|im_end|>"


def test_tokens_that_join_prompt_and_answer_belong_to_the_answer():
    tokenizer = make_tokenizer(CHATML, joins=[("Ċ", "cat")])
    this = row(user(), "cat", "dog")
    assert_trained_is_rendered(tokenizer, this)
    (ids, other), start = trained(tokenizer, this)
    assert tokenizer.convert_ids_to_tokens(ids[start:]) == ["Ċcat", "<|im_end|>"]
    assert tokenizer.decode(other[start:]) == "\ndog<|im_end|>"


@pytest.mark.parametrize("by_row", [False, True])
def test_arguments_of_the_template(by_row):
    tokenizer = make_tokenizer(THINKS)
    kwargs = {"enable_thinking": False}
    this = row(user(), **({"chat_template_kwargs": kwargs} if by_row else {}))
    options = {} if by_row else {"chat_template_kwargs": kwargs}
    (query,), _ = tokenise_rows([this], tokenizer, RowReport(), max_length=999, **options)
    opening = tokenizer.decode(query.prompt_ids)
    assert opening == f"{QUESTION}<|im_start|>assistant\n{NO_THOUGHT}"
    assert_trained_is_rendered(tokenizer, row(user(), "cat", "dog"), **kwargs)


def test_a_template_by_name():
    tokenizer = make_tokenizer({"default": CHATML, "other": SPACED})
    assert_trained_is_rendered(tokenizer, row(user(), "cat", "dog"), chat_template="other")
    (ids, _), _ = trained(
        tokenizer, row(user(), "cat", "dog", chat_template_kwargs={"chat_template": "other"})
    )
    assert tokenizer.decode(ids) == "[INST] Say cat [/INST] cat<eos>"


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "return_tensors"])
def test_reserved_arguments_are_refused(name):
    with pytest.raises(ValueError, match=f"^chat_template_kwargs: {name} "):
        trained(make_tokenizer(CHATML), row(user(), "a", "b"), chat_template_kwargs={name: True})
    with pytest.raises(BadRow, match=f"^f:1: chat_template_kwargs: {name} "):
        trained(make_tokenizer(CHATML), row(user(), "a", "b", chat_template_kwargs={name: True}))


def test_tools_reach_the_template_or_the_row_is_refused():
    tools = [{"type": "function", "function": {"name": "weather"}}]
    shows = "{% if tools %}<|start|>{{ tools[0].function.name }}{% endif %}"
    (ids, _), _ = trained(make_tokenizer(shows + CHATML), row(user(), "cat", "dog", tools=tools))
    assert make_tokenizer().decode(ids).startswith("<|start|>weather<|im_start|>user")
    with pytest.raises(BadRow, match="^f:1: tools: the chat template ignores them"):
        trained(make_tokenizer(CHATML), row(user(), "cat", "dog", tools=tools))


def test_a_dropped_system_message_is_refused():
    messages = [{"role": "system", "content": "Be brief."}, *user()]
    assert_trained_is_rendered(make_tokenizer(CHATML), row(messages, "cat", "dog"))
    drops = CHATML.replace("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", TURN)
    drops = drops.replace(TURN, "{% if m.role != 'system' %}" + TURN + "{% endif %}")
    with pytest.raises(BadRow, match="^f:1: prompt: the chat template drops the system message"):
        trained(make_tokenizer(drops), row(messages, "cat", "dog"))


SKIPS = "{% if m.role in ('user', 'assistant') %}"
SKIPS = CHATML.replace("<|im_start|>{{ m.role }}", SKIPS + "<|im_start|>{{ m.role }}").replace(
    "<|im_end|>\n{% endfor", "<|im_end|>\n{% endif %}{% endfor"
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]}


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_dropped_messages_are_refused(role):
    messages = [*user("Hi"), {"role": role, "content": 'It is "42"'}, *user()]
    assert_trained_is_rendered(make_tokenizer(CHATML), row(messages, "cat", "dog"))
    with pytest.raises(BadRow, match=rf"^f:1: prompt: .* drops the {role} message, prompt\[1\]"):
        trained(make_tokenizer(SKIPS), row(messages, "cat", "dog"))
    quotes = CHATML.replace(
        "{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}"
    )
    assert_trained_is_rendered(make_tokenizer(quotes), row(messages, "cat", "dog"))


def test_ignored_tool_calls_are_refused():
    messages = [*user("Hi"), CALL, *user()]
    shows = CHATML.replace(
        "<|im_end|>", "{{ m.tool_calls[0].function.name if m.tool_calls else '' }}<|im_end|>"
    )
    assert_trained_is_rendered(make_tokenizer(shows), row(messages, "cat", "dog"))
    with pytest.raises(BadRow, match=r"^f:1: prompt: .* ignores the tool calls of prompt\[1\]"):
        trained(make_tokenizer(CHATML), row(messages, "cat", "dog"))


@pytest.mark.parametrize("content", ["", None])
def test_a_prompt_that_ends_with_a_tool_call_is_refused(content):
    with pytest.raises(BadRow, match="^f:1: prompt: its last message calls tools, so a tool's"):
        messages = [*user("Hi"), CALL | {"content": content}]
        trained(make_tokenizer(CHATML), row(messages, "cat", "dog"))


@pytest.mark.parametrize(
    "ending", ["<|im_end|>", "<|im_end|>\n", "<|im_end|><eos>", "\n<eos>", "<|im_end|>\n<|im_end|>"]
)
def test_end_tokens_in_an_answer_are_not_doubled(ending):
    tokenizer = make_tokenizer(CHATML)
    (ids, _), start = trained(tokenizer, row(user(), "cat" + ending, "dog"))
    assert tokenizer.decode(ids[start:]).replace("\n", "") == "cat<|im_end|>"
    with pytest.raises(BadRow, match=r"^f:1: responses\[0\]: nothing but the end token"):
        trained(tokenizer, row(user(), ending, "dog"))


def test_an_answer_entirely_within_the_generation_prompt_is_refused():
    for template, answer in (
        (chatml("{{ m.content }}", NO_THOUGHT), NO_THOUGHT),
        (chatml("A:{{ m.content | replace('A:', '') }}", "A:"), "A:"),
    ):
        with pytest.raises(BadRow, match=r"leaves nothing of responses\[0\]"):
            trained(make_tokenizer(template), row(user(), answer, "dog"))


def test_no_prefix_is_added_to_what_the_template_renders():
    tokenizer = make_tokenizer(CHATML, prefix=("[gMASK]", "<sop>"))
    assert_trained_is_rendered(tokenizer, row(user(), "cat", "dog"))
    (ids, _), start = trained(tokenizer, row(user(), "cat", "dog"), max_prompt_length=5)
    assert start == 5 and tokenizer.decode(ids[start:]) == "cat<|im_end|>"
    tokenizer.chat_template = "[gMASK]<sop>" + CHATML
    (ids, _), start = trained(tokenizer, row(user(), "cat", "dog"), max_prompt_length=5)
    assert start == 5 and tokenizer.decode(ids[:2]) == "[gMASK]<sop>"


# --- Samples of the model itself

SAMPLE = "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Hi"


def test_samples_keep_special_tokens_except_the_end_token():
    tokenizer = make_tokenizer(CHANNELS, eos="<|return|>")
    drawn = tokenizer(SAMPLE + "<|return|>")["input_ids"]
    assert decode_response(tokenizer, drawn) == SAMPLE
    assert decode_response(tokenizer, drawn[:-1]) == SAMPLE  # cut off by a limit
    turn = tokenizer.convert_tokens_to_ids("<|end|>")
    assert decode_response(tokenizer, [*drawn[:5], turn], [turn]) == tokenizer.decode(drawn[:5])


def test_a_sample_directly_follows_the_generation_prompt():
    tokenizer = make_tokenizer(CHANNELS, eos="<|return|>")
    this = row(user(), SAMPLE, "cat", as_generated=[True, False])
    (sample, answer), start = trained(tokenizer, this)
    opening = tokenizer.apply_chat_template(user(), add_generation_prompt=True, return_dict=False)
    assert sample == opening + tokenizer(SAMPLE + "<|return|>")["input_ids"]
    assert answer == rendered(tokenizer, user(), "cat")
    # The template adds no header to the sample; both continue with a channel.
    assert sample[:start] == answer[:start] == opening


def test_a_sample_is_trained_as_generated_even_if_the_template_would_change_it():
    tokenizer = make_tokenizer(chatml("{{ m.content.split('</think>')[-1] }}", "<think>\n"))
    this = row(user(), "a</think>b", "c</think>d", as_generated=[True, True])
    (ids, _), start = trained(tokenizer, this)
    assert tokenizer.decode(ids[start:]) == "a</think>b<|im_end|>"
    assert tokenizer.decode(ids[:start]) == f"{QUESTION}<|im_start|>assistant\n<think>\n"


# --- The prefix of a tokenizer


@pytest.mark.parametrize("prompt", ["Hi", "[gMASK]<sop>Hi"])
def test_a_prefix_other_than_bos(prompt):
    tokenizer = make_tokenizer(prefix=("[gMASK]", "<sop>"))
    (ids, _), start = trained(tokenizer, row(prompt, "cat", "dog"))
    assert ids[:start] == tokenizer("Hi")["input_ids"]
    tokenizer.chat_template = "[gMASK]<sop>" + CHATML
    assert_trained_is_rendered(tokenizer, row(user(), "cat", "dog"))


def test_a_cut_prompt_keeps_the_prefix():
    tokenizer = make_tokenizer(prefix=("[gMASK]", "<sop>"))
    (ids, _), start = trained(tokenizer, row("0123456789", "cat", "dog"), max_prompt_length=4)
    assert tokenizer.decode(ids[:start]) == "[gMASK]<sop>89"
