"""Answers that describe an image become captions as they are; all others are refused for the right reason."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.captioners.answers import CUT, LONG, REFUSED, REPEATS, judge_answer, repeats_itself
from data_prep.plan.captions import CONTROL, EMPTY

GOOD = [
    "A red house by the river.",
    "Two dogs, one of which seems to say: I'm sorry, I can't come.",
    "A sign reads “Sorry, we are closed”.",
    "Ein rotes Haus am Fluss.",
    "一只红色的猫坐在窗台上，看着外面的雨。",
    "The image shows a bridge.\n\nIn front of it, two boats.",
]


def judge(text, complete=True, letters=4000, refusals=()):
    return judge_answer(text, complete, letters, refusals)


@pytest.mark.parametrize("text", GOOD)
def test_descriptions_are_captions_on_one_line(text):
    assert judge(text) == (" ".join(text.split()), "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I'm sorry, but I can't help with that.", REFUSED),
        ("I’m unable to view images.", REFUSED),
        ("  **Sorry**, I can't.", REFUSED),
        ("As an AI language model, I ...", REFUSED),
        ("Please provide the image.", REFUSED),
        ("", EMPTY),
        ("\u200b \n", EMPTY),
        ("a \x1b[31mred house", CONTROL),
        ("a cat and a dog and " * 12, REPEATS),
        ("红色的猫。" * 60, REPEATS),
        ("x" * 4001, LONG),
    ],
)
def test_other_answers_have_a_reason(text, reason):
    if reason == LONG:
        text = " ".join(str(number) for number in range(1200))
    assert judge(text) == ("", reason)


def test_cut_answers_and_own_refusals():
    assert judge("A red house", complete=False).reason == CUT
    assert judge("NSFW content detected", refusals=["nsfw"]).reason == REFUSED
    # What turns in circles until it is cut is counted as that.
    assert judge("a cat and " * 40, complete=False).reason == REPEATS


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(24, 200), st.integers(3, 12))
def test_repetition_is_found_whatever_is_repeated(seed, words, times):
    chance = random.Random(seed)
    # Words as in a text: frequent ones come often.
    text = [f"w{int(chance.paretovariate(0.7)) % 500}" for _ in range(words)]
    distinct = len({tuple(text[place : place + 4]) for place in range(len(text) - 3)})
    if distinct > 0.9 * (len(text) - 3):
        assert not repeats_itself(" ".join(text))
        assert repeats_itself(" ".join(text * times))
