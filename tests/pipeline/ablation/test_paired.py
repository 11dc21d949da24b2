"""Intervals over seeds and prompts: they cover the truth, whatever varies most."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ablation.paired import Spread, difference, paired_difference, prompt_scores, spread


def table_of(random, seeds, prompts, variances, mean):
    """Return a table whose seeds, prompts and rest vary as given."""
    of_seeds, of_prompts, rest = (math.sqrt(value) for value in variances)
    table = (
        mean + of_seeds * random.standard_normal((seeds, 1)) + of_prompts * random.standard_normal(prompts)
    )
    return table + rest * random.standard_normal((seeds, prompts))


@pytest.mark.parametrize(
    "variances",
    [(0.01, 0.0, 0.1), (0.0, 0.1, 0.01), (0.0, 0.0, 1.0), (0.001, 0.05, 0.2)],
    ids=["seeds", "prompts", "rest", "all"],
)
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_contains_the_truth_in_95_of_100_cases(variances, seeds):
    random = np.random.default_rng(1)
    results = [difference(table_of(random, seeds, 60, variances, 0.3), trial) for trial in range(200)]
    covered = np.mean([result.low <= 0.3 <= result.high for result in results])
    # Binomial: 0.95 of 200 trials lies above 0.9 with a probability of 0.997.
    assert covered > 0.9


def test_the_variances_are_found_again():
    random = np.random.default_rng(2)
    found = [spread(table_of(random, 6, 80, (0.02, 0.05, 0.1), 0.0)) for _ in range(200)]
    assert np.mean([one.seeds for one in found]) == pytest.approx(0.02, rel=0.2)
    assert np.mean([one.prompts for one in found]) == pytest.approx(0.05, rel=0.1)
    assert np.mean([one.rest for one in found]) == pytest.approx(0.1, rel=0.05)


def test_the_planned_width_is_that_of_the_runs():
    random, variances = np.random.default_rng(3), (0.001, 0.02, 0.1)
    results = [difference(table_of(random, 5, 200, variances, 0.0), trial) for trial in range(100)]
    width = np.mean([(result.high - result.low) / 2 for result in results])
    assert Spread(*variances).half_width(5, 200) == pytest.approx(width, rel=0.25)


def test_more_seeds_are_planned_for_narrower_intervals_and_never_where_prompts_limit():
    one = Spread(seeds=0.0004, prompts=0.01, rest=0.1)
    counts = [one.seeds_for(half, 512) for half in (0.05, 0.03, 0.02, 0.015)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    for half, count in zip((0.05, 0.03, 0.02, 0.015), counts, strict=True):
        assert one.half_width(count, 512) <= half
        assert count == 2 or one.half_width(count - 1, 512) > half
    assert one.seeds_for(0.005, 512) is None


@given(st.integers(2, 5), st.integers(2, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_equal_rows_are_never_decided_and_what_rows_share_cancels_out(seeds, prompts, seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 5, prompts)
    rows = {number: [random.random(length).tolist() for length in lengths] for number in range(seeds)}
    same = paired_difference(rows, rows)
    assert (same.mean, same.low, same.high, same.decided) == (0.0, 0.0, 0.0, False)

    better = {number: [[value + 0.1 for value in prompt] for prompt in row] for number, row in rows.items()}
    lead = paired_difference(better, rows)
    assert lead.mean == pytest.approx(0.1)
    assert lead.decided
    assert lead.low > 0


def test_one_seed_decides_nothing_and_other_seeds_are_left_out():
    alone = paired_difference({0: [[1.0]] * 9}, {0: [[0.0]] * 9})
    assert (alone.mean, alone.decided, str(alone)) == (1.0, False, "+100.0")
    assert paired_difference({0: [[1.0]]}, {1: [[1.0]]}) is None
    both = paired_difference({0: [[1.0]], 1: [[0.5]], 2: [[9.0]]}, {0: [[0.0]], 1: [[0.5]]})
    assert (both.seeds, both.mean) == (2, 0.5)


def test_a_prompt_counts_as_often_as_it_has_segments():
    scores = prompt_scores([[1.0], [0.0, 0.0, 0.0]])
    assert scores.mean() == pytest.approx(0.25)
