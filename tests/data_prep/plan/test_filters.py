import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config import FilterConfig
from data_prep.plan.captions import (
    CONTROL,
    EMPTY,
    HUGE,
    MAX_CAPTIONS,
    MISSING,
    NOT_TEXT,
    NOT_UTF8,
    TOO_MANY,
    Caption,
    Cleaned,
    gather_captions,
)
from data_prep.plan.expressions import ColumnExpression
from data_prep.plan.filters import URL, Filters, Row
from model.common.errors import UserError


def judged(filters, *captions, height=100, width=100, **record):
    row = Row(
        record, [Caption("original", text) for text in captions or ("a red fox in the snow",)], height, width
    )
    Filters([FilterConfig(**entry) for entry in filters]).apply([row])
    return row


@pytest.mark.parametrize(
    ("entry", "good", "bad"),
    [
        ({"name": "min_side", "value": 64}, {"height": 64, "width": 900}, {"height": 63, "width": 900}),
        ({"name": "max_aspect", "value": 3}, {"height": 30, "width": 90}, {"height": 30, "width": 91}),
        ({"name": "min_value", "column": "aesthetic", "value": 4.7}, {"aesthetic": 4.7}, {"aesthetic": 4.69}),
        ({"name": "min_value", "column": "aesthetic", "value": 4.7}, {"aesthetic": 5}, {}),
        ({"name": "min_value", "column": "aesthetic", "value": 4.7}, {"aesthetic": 5}, {"aesthetic": "5"}),
        (
            {"name": "min_value", "column": "aesthetic", "value": 4.7},
            {"aesthetic": 5},
            {"aesthetic": float("nan")},
        ),
        ({"name": "max_value", "column": "punsafe", "value": 0.5}, {"punsafe": 0}, {"punsafe": 10**400}),
        ({"name": "one_of", "column": "lang", "value": ["en", "zh"]}, {"lang": "zh"}, {"lang": None}),
        (
            {"name": "expression", "value": "height * width >= 5000 and lang != 'xx'"},
            {"lang": "en"},
            {"lang": "xx"},
        ),
        ({"name": "expression", "value": "score is None or score > 1"}, {}, {"score": 0.5}),
    ],
)
def test_row_filters(entry, good, bad):
    assert judged([entry], **good).reason == ""
    assert judged([entry], **bad).reason.startswith(entry["name"])


@pytest.mark.parametrize(
    ("entry", "good", "bad"),
    [
        ({"name": "caption_url"}, "a photo. nice", "see https://example.org/x"),
        ({"name": "caption_url"}, "a 3.5 litre engine", "photos at www.example.org"),
        ({"name": "caption_file_name"}, "a dog", "IMG_2041.JPG"),
        ({"name": "caption_file_name"}, "version 2.png of nothing", "holiday-final.webp"),
        ({"name": "caption_tags"}, "a cat, a dog and a mouse", "cat, dog, mouse, cute animals, pet"),
        (
            {"name": "caption_tags"},
            "On the left, a tree. On the right, a house, a car, a dog",
            "#sun #sea #sand #fun",
        ),
        ({"name": "caption_min_length", "value": 3}, "fox", "ox"),
        ({"name": "caption_max_length", "value": 3}, "fox", "foxes"),
        ({"name": "caption_without", "value": ["Stock Photo"]}, "a photo", "dog - stock photo 12"),
    ],
)
def test_caption_filters_drop_captions_and_the_row_with_the_last(entry, good, bad):
    assert judged([entry], good).reason == ""
    mixed = judged([entry], bad, good)
    assert (mixed.reason, [caption.text for caption in mixed.captions], len(mixed.refused)) == ("", [good], 1)
    assert judged([entry], bad, bad).reason.startswith(entry["name"])


def test_the_first_reason_counts():
    filters = [{"name": "min_side", "value": 200}, {"name": "caption_url"}]
    assert judged(filters, "http://x.org/").reason.startswith("min_side")
    assert judged(filters[::-1], "http://x.org/").reason.startswith("caption_url")


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "nonsense"},
        {"name": "min_side"},
        {"name": "min_side", "value": True},
        {"name": "min_value", "value": 3},
        {"name": "one_of", "column": "lang", "value": "en"},
        *(
            {"name": "expression", "value": text}
            for text in ("", "a >", "__import__('os')", "a.b > 1", "a[0] == 1", "f'{a}' == 'x'")
        ),
        *(
            {"name": "expression", "value": text}
            for text in ("(lambda: 1)() > 0", "[x for x in a] == 1", "a > 1 and lower(a) == 'x'")
        ),
        *(
            {"name": "expression", "value": text}
            for text in ("matches(a, '(')", "a in []", "a in [1, 'x']", "1 + 1", "a ** 9 > 1")
        ),
        {"name": "expression", "value": "(" * 5000 + "a" + ")" * 5000},
        {"name": "expression", "value": 7},
    ],
)
def test_wrong_filters_are_refused_at_once(entry):
    with pytest.raises(UserError):
        Filters([FilterConfig(**entry)])


VALUES = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text()
    | st.lists(st.integers())
    | st.just("\ud800")
)


@settings(deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries({}, optional={"a": VALUES, "b": VALUES, "t": VALUES}), min_size=1, max_size=6
    )
)
def test_expressions_survive_any_values(rows):
    text = (
        "a > 1.5 and not b and (contains(t, 'x') or len(t) < 3 or t in ['p', 'q']) "
        "and abs(-a) / 2 < 9 and a != 0"
    )
    values = ColumnExpression(text).evaluate(rows)
    assert len(values) == len(rows)
    assert set(values) <= {True, False, None}


@given(st.lists(st.tuples(st.floats(-5, 5), st.sampled_from(["en", "zh", "xx"])), min_size=1))
def test_expressions_agree_with_python(rows):
    text = "-1 < a * 2 - 1 <= 3 and (lang in ['en', 'zh'] or startswith(lang, 'x') and a < 0)"
    values = ColumnExpression(text).evaluate([{"a": a, "lang": lang} for a, lang in rows])

    def expected(a, lang):
        return -1 < a * 2 - 1 <= 3 and (lang in ["en", "zh"] or (lang.startswith("x") and a < 0))

    assert values == [expected(a, lang) for a, lang in rows]


@pytest.mark.parametrize(
    ("value", "texts", "refused"),
    [
        ("a fox", ["a fox"], []),
        ("  a \n\t fox ", ["a fox"], []),
        (["a", "b", "a", None], ["a", "b"], []),
        ("狐狸 في الثلج", ["狐狸 في الثلج"], []),
        (None, [], [MISSING]),
        ("", [], [EMPTY]),
        ("a\x00b", [], [CONTROL]),
        ("a\ud800b", [], [NOT_UTF8]),
        ("x" * (1 << 20), [], [HUGE]),
        (7, [], [NOT_TEXT]),
        ({"a": 1}, [], [NOT_TEXT]),
        (["", "good"], ["good"], [EMPTY]),
    ],
)
def test_captions_are_gathered_or_refused(value, texts, refused):
    captions, reasons = gather_captions({"caption": value}, {"original": "caption"})
    assert [caption.text for caption in captions] == texts
    assert reasons == refused


@given(st.lists(VALUES), st.lists(st.text()))
def test_captions_never_fail_and_stay_text(values, texts):
    captions, refused = gather_captions({"a": values, "b": texts}, {"original": "a", "synthetic": "b"})
    assert all(
        caption.text.encode() and caption.text == " ".join(caption.text.split()) for caption in captions
    )
    assert captions or refused


@pytest.mark.parametrize("text", ["\ufeff", "\u200b\n", "\u00ad", "\u2060 \u200d", "\ufe0f", "\u0301"])
def test_captions_of_invisible_characters_are_empty(text):
    assert gather_captions({"txt": text}, {"original": "txt"}) == ([], [EMPTY])


@pytest.mark.parametrize("text", ["\ufeffa fox", "\ufeff  a fox\r\n", "a  fox"])
def test_a_byte_order_mark_is_no_part_of_a_caption(text):
    assert gather_captions({"txt": text}, {"original": "txt"}) == ([Caption("original", "a fox")], [])


@pytest.mark.parametrize("text", ["🦊", "👩‍🚀", "\U0001fae9", "é", ".", "क्ष"])
def test_a_caption_with_one_visible_character_is_kept(text):
    assert gather_captions({"txt": text}, {"original": "txt"})[0] == [Caption("original", text)]


def test_fields_of_nested_records():
    record = {"meta": {"short": "a fox", "all": ["one", "two"], "deep": {"er": "three"}}, "a.b": "dotted"}
    for field, texts in (
        ("meta.short", ["a fox"]),
        ("meta.all", ["one", "two"]),
        ("meta.deep.er", ["three"]),
        ("a.b", ["dotted"]),
    ):
        assert [caption.text for caption in gather_captions(record, {"original": field})[0]] == texts
    for field in ("meta.absent", "absent.short", "meta.short.er"):
        assert gather_captions(record, {"original": field}) == ([], [MISSING])


class Counting(str):
    """A string that counts how often it is compared."""

    compared = 0

    def __eq__(self, other):
        Counting.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__

    def removeprefix(self, prefix):
        return self

    def split(self):
        return [self]


@pytest.mark.parametrize("count", [100, 1000])
def test_captions_of_a_row_are_compared_in_linear_time(count, monkeypatch):
    monkeypatch.setattr("data_prep.plan.captions.clean_caption", lambda text: Cleaned(text, ""))
    Counting.compared = 0
    captions, _ = gather_captions({"txt": [Counting(n) for n in range(count)]}, {"original": "txt"})
    assert len(captions) == count
    assert Counting.compared <= 2 * count


def test_a_row_has_a_limited_number_of_captions():
    captions, refused = gather_captions({"txt": [str(n) for n in range(10**5)]}, {"original": "txt"})
    assert len(captions) == MAX_CAPTIONS
    assert refused == [TOO_MANY]


SIMPLE_URL = re.compile(
    r"https?://|\bwww\.[a-z0-9-]+\.|\b[a-z0-9-]+\.(?:com|net|org|io|co\.uk|ru|cn|de)\b(?:/|$|\s)",
    re.IGNORECASE,
)
"""Finds the same, in quadratic time."""


@settings(max_examples=500)
@given(st.lists(st.sampled_from(["a", "-", ".", "com", "é", "_", " ", "ſ", "/", "www.", "1", "co.uk", "\n"])))
def test_urls_are_found_as_by_the_simple_expression(pieces):
    text = "".join(pieces)
    assert bool(URL.search(text)) == bool(SIMPLE_URL.search(text))


@pytest.mark.parametrize("unit", ["a-", "-", "a", "a.", ".com", "a-.co", "www"])
def test_captions_of_any_repeated_text_are_searched_in_linear_time(unit):
    # In quadratic time, each of these would take half a minute.
    assert not URL.search(unit * (60000 // len(unit)) + "~")
