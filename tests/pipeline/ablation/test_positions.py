"""Positional curves of an ablation: every row's, in the panels of its tables."""

import pytest

from pipeline.ablation.positions import position_figure, positional_biases
from pipeline.ablation.rows import Ablation, Row


def score_of(segments):
    return {"score": 0.5, "attributes": {}, "chance": {}, "segments": segments, "loss": None}


FALLING = {0: score_of([[1.0], [1.0, 0.5]]), 1: score_of([[1.0], [0.5, 0.0]])}
"""Two seeds of a prompt of one segment and one of two."""


def test_a_row_has_the_curve_of_its_seeds_mean():
    (bias,) = positional_biases({"a": FALLING}).values()
    assert [bias.curve[0].mean, bias.curve[-1].mean] == pytest.approx([0.75, 0.25])
    assert bias.gap.mean == pytest.approx(-0.5)
    assert positional_biases({"a": {0: score_of([[1.0], [0.0]])}}) == {}


def test_every_row_of_a_table_is_drawn_even_if_there_are_more_rows_than_colors():
    rows = {f"row{number}": Row(title=f"LLM {number} <A>") for number in range(12)}
    tables = {"First & best": list(rows), "Second": ["row3"], "Without scores": ["other"]}
    ablation = Ablation(rows=rows, tables=tables)
    drawn = position_figure(ablation, positional_biases(dict.fromkeys(rows, FALLING)))
    assert drawn is not None
    # matplotlib writes each text as a comment beside its outlines
    for number in range(12):
        assert f"LLM {number} &lt;A&gt;" in drawn
    assert "Second" in drawn
    assert "Without scores" not in drawn
    assert position_figure(ablation, {}) is None
