import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.config import FilterConfig
from data_prep.plan.captions import (
    CONTROL,
    EMPTY,
    HUGE,
    MISSING,
    NOT_TEXT,
    NOT_UTF8,
    Caption,
    gather_captions,
)
from data_prep.plan.expressions import ColumnExpression
from data_prep.plan.filters import Filters, Row
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
