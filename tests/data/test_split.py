"""Held-out rows: no prompt on both sides, about the requested share, and never none."""

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rrhf_fast.data.rows import Row
from rrhf_fast.data.split import count_shared, hold_out, prompt_key


def row(prompt, where="f:1", **fields):
    return Row(prompt, ["a", "b"], [1.0, 0.0], None, where, **fields)


def split(rows, fraction, seed):
    sides = hold_out([prompt_key(row) for row in rows], fraction, seed)
    return [[rows[i] for i in side] for side in sides]


def user(text):
    return [{"role": "user", "content": text}]


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=30),
    st.floats(0.001, 0.999),
    st.integers(0, 99),
    st.randoms(use_true_random=False),
)
def test_prompts_stay_together(sizes, fraction, seed, random):
    rows = [row(f"p{i}") for i, size in enumerate(sizes) for _ in range(size)]
    random.shuffle(rows)
    assume(0 < round(fraction * len(rows)) < len(rows))
    train, held_out = split(rows, fraction, seed)
    assert train and held_out
    assert count_shared(held_out, train) == 0
    assert sorted(map(id, train + held_out)) == sorted(map(id, rows))
    for side in (train, held_out):  # in the order of the rows
        assert [id(r) for r in side] == [id(r) for r in rows if any(r is s for s in side)]
    again = split(rows, fraction, seed)
    assert [list(map(id, side)) for side in again] == [list(map(id, s)) for s in (train, held_out)]
    assert abs(len(held_out) - round(fraction * len(rows))) <= max(sizes)


def test_the_rounded_share_is_held_out_if_each_prompt_has_one_row():
    for seed in range(3):
        train, held_out = split([row(f"p{i}") for i in range(10)], 0.25, seed)
        assert (len(train), len(held_out)) == (8, 2)


def test_the_seed_chooses_the_prompts():
    rows = [row(f"p{i // 2}", str(i)) for i in range(40)]
    chosen = Counter(
        prompt for seed in range(50) for prompt in {r.prompt for r in split(rows, 0.5, seed)[1]}
    )
    assert len(chosen) == 20 and all(5 < count < 45 for count in chosen.values())


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_share_that_rounds_to_none_or_all_is_refused(fraction):
    with pytest.raises(ValueError, match=f"eval_fraction: {fraction} of 9 rows leaves none"):
        split([row(f"p{i}") for i in range(9)], fraction, 0)


def test_one_prompt_cannot_be_split():
    with pytest.raises(ValueError, match="eval_fraction: 0.5 of 4 rows leaves none to train on"):
        split([row("p")] * 4, 0.5, 0)


def test_prompts_are_equal_whatever_surrounds_them():
    def key(prompt, **fields):
        return prompt_key(row(prompt, **fields))

    assert key("p") == key(user("p"))
    assert key([{"role": "user", "content": "p"}]) == key([{"content": "p", "role": "user"}])
    assert key(" p\n") == key([{"role": "system", "content": "Be brief."}, *user("p")])
    assert key(user("p"), tools=[{"name": "f"}]) == key("p", chat_template_kwargs={"a": 1})
    assert len({key("p"), key("q"), key([*user("p"), {"role": "assistant", "content": "q"}])}) == 3
