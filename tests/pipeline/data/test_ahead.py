"""Batches that are fetched ahead are the same, in the same order, and errors come when they are due."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.ahead import Ahead
from tests.helpers.networks import few

CPU = torch.device("cpu")


@few
@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_fetching_ahead_changes_no_item_and_takes_one_at_most(fetches):
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number

    ahead = Ahead(items(), CPU, lambda item: [])
    for number, fetch in enumerate(fetches):
        if fetch:
            ahead.fetch()
            ahead.fetch()
            assert made == list(range(number + 1))
        assert next(ahead) == number
        assert made == list(range(number + 1))
    assert ahead.waited() >= 0
    assert ahead.waited() == 0


def test_an_error_waits_for_its_item():
    def items():
        yield 1
        raise ValueError("the second")

    ahead = Ahead(items(), CPU, lambda item: [])
    ahead.fetch()
    assert next(ahead) == 1
    ahead.fetch()
    with pytest.raises(ValueError, match="the second"):
        next(ahead)
