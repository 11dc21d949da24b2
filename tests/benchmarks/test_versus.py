"""The comparison of two checkouts runs on this one beside itself, and its interval holds what it should."""

import json

import numpy as np
import pytest

from benchmarks import versus


@pytest.mark.slow
def test_a_checkout_beside_itself(capsys):
    versus.main([str(versus.ROOT), "--turns", "1", "--images", "4", "--batches", "2"])
    goals = json.loads(capsys.readouterr().out.splitlines()[-1])["goals"]
    assert set(goals) == {"pairs_after_over_before", "loader_after_over_before"}
    assert all(goal["value"] > 0 for goal in goals.values())


def test_the_interval_is_around_the_ratio_and_narrower_with_more_turns():
    rng = np.random.default_rng(1)
    widths = []
    for turns in (10, 1000):
        speed = rng.uniform(1, 2, turns)  # of the machine, which both sides share
        before, after = speed * rng.normal(1, 0.02, turns), 1.1 * speed * rng.normal(1, 0.02, turns)
        ratio, low, high = versus.median_ratio(list(before), list(after))
        assert low <= ratio <= high
        assert 1.05 < low < high < 1.15
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
