from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.prepare_data import alike_hashes, different_hashes
from benchmarks.prepare_scale import comparisons
from data_prep.plan import runs
from data_prep.plan.dedupe import (
    ROW,
    Spool,
    block_choices,
    first_of_each_hash,
    near_duplicates,
    near_in_group,
    perceptual_hash,
)
from tests.helpers.raw_material import smooth_image


def spool_of(tmp_path, hashes):
    spool = Spool(tmp_path, "hashes")
    for start in range(0, len(hashes), 7):
        part = np.array(hashes[start : start + 7], np.uint64)
        spool.add(part, np.arange(start, start + len(part), dtype=np.int64) * 3)
    return spool


def all_ids(chunks):
    return set(np.concatenate([*chunks, np.empty(0, np.int64)]).tolist())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12) | st.integers(0, 2**64 - 1)))
def test_equal_hashes_are_found_with_their_first_row(hashes):
    rows = np.empty(len(hashes), ROW)
    rows["hash"], rows["id"] = hashes, np.arange(len(hashes)) * 3
    ids, firsts = first_of_each_hash(rows[::-1])
    expected = {
        3 * number: 3 * hashes.index(value) for number, value in enumerate(hashes) if hashes.count(value) > 1
    }
    assert dict(zip(ids.tolist(), firsts.tolist(), strict=True)) == expected


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=6)), max_size=40),
    st.integers(0, 6),
    st.sampled_from([4, 1 << 20]),
    st.sampled_from([1, 3, 1000]),
    st.sampled_from([0.0, 0.5, 5.0]),
)
def test_near_duplicates_agree_with_comparing_all(
    tmp_path_factory, monkeypatch, changes, distance, group_rows, run_rows, per_row
):
    monkeypatch.setattr(runs, "RUN_ROWS", run_rows)  # longer runs are cut again
    monkeypatch.setattr(runs, "ROW_COMPARISONS", per_row)  # and shorter ones where a row takes more
    bases = [0x0123456789ABCDEF, 0xFEDCBA9876543210, 0, 0xFFFF0000FFFF0000]
    hashes = [bases[base] ^ sum(1 << bit for bit in bits) for base, bits in changes]
    spool = spool_of(tmp_path_factory.mktemp("d"), hashes)
    expected = set()
    for number, value in enumerate(hashes):
        if any((value ^ earlier).bit_count() <= distance for earlier in hashes[:number]):
            expected.add(number * 3)
    assert all_ids(near_duplicates(spool, distance, group_rows)) == expected


def test_many_rows_in_small_groups(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, 3000, dtype=np.uint64)
    planted = base[:300] ^ np.uint64(0b101)
    spool = spool_of(tmp_path, np.concatenate([base, planted]).tolist())
    assert all_ids(near_duplicates(spool, 2, group_rows=256)) == {3 * number for number in range(3000, 3300)}
    spool.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("side", [40, 90])
def test_a_resized_image_looks_the_same_and_another_does_not(side):
    original = perceptual_hash(smooth_image(1, 64, 64))
    assert (original ^ perceptual_hash(smooth_image(1, side, side))).bit_count() <= 6
    assert (original ^ perceptual_hash(smooth_image(2, 64, 64))).bit_count() > 12


@pytest.mark.parametrize(
    ("hashes_of", "growth"),
    [
        pytest.param(alike_hashes, 1.3, marks=pytest.mark.slow),
        (different_hashes, 3.0),
        (partial(different_hashes, backgrounds=1), 1.5),
    ],
    ids=["products", "alike", "one background"],
)
def test_comparisons_per_row_are_bounded_where_many_images_are_alike(hashes_of, growth):
    """With the keys of a billion rows, of which these are the ones that are alike.

    Of `alike`, most passes of 24,000 rows are within the budget, and are compared without further cuts: so
    they may grow until they are not. Of `one background`, none is.
    """
    few, many = (comparisons(hashes_of(count, 0))[0] for count in (24_000, 96_000))
    assert max(few, many) <= runs.ROW_COMPARISONS
    assert many <= growth * few


def test_short_runs_are_cut_where_they_take_more_than_the_budget(monkeypatch):
    hashes = different_hashes(24_000, 0, backgrounds=1)
    bounded = comparisons(hashes)
    monkeypatch.setattr(runs, "ROW_COMPARISONS", 1e9)
    unbounded = comparisons(hashes)
    assert bounded[1] == unbounded[1] > 0
    assert 4 * bounded[0] < unbounded[0]


@pytest.mark.parametrize("flips", [0.0, 0.02])
def test_products_on_white_take_few_comparisons_and_none_is_missed(flips):
    """pHashes have 32 ones, so most pairs are an even distance apart; a flipped bit makes others."""
    rng = np.random.default_rng(1)
    rows = np.empty(3000, ROW)
    rows["hash"], rows["id"] = alike_hashes(len(rows), 1), rng.permutation(len(rows))
    flipped = np.uint64(1) << rng.integers(0, 64, len(rows), np.uint64)
    rows["hash"] ^= np.where(rng.random(len(rows)) < flips, flipped, np.uint64(0))

    found, count = set(), 0
    for blocks in block_choices(10**9, 3):
        ids, comparisons = near_in_group(rows, blocks, 3)
        found.update(ids.tolist())
        count += comparisons
    assert count <= 2 * len(rows)  # in 20 passes

    hashes = rows["hash"][np.argsort(rows["id"])]
    expected = []
    for start in range(0, len(hashes), 1000):
        distances = np.bitwise_count(hashes[start : start + 1000, None] ^ hashes[: start + 1000])
        is_near = np.tril(distances <= 3, start - 1).any(axis=1)
        expected += (start + np.flatnonzero(is_near)).tolist()
    assert found == set(expected)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 6), st.sampled_from([2, 10**5, 10**9]))
def test_a_pair_is_found_in_the_first_pass_whose_blocks_agree(data, distance, rows_in_all):
    choices = block_choices(rows_in_all, min(distance, 4))
    bits = data.draw(st.sets(st.integers(0, 63), max_size=distance))
    rows = np.empty(2, ROW)
    rows["hash"], rows["id"] = [5, 5 ^ sum(1 << bit for bit in bits)], [7, 3]
    for blocks in choices:
        if not any(start <= bit < end for bit in bits for start, end in blocks):
            break
    expected = [7] if len(bits) <= min(distance, 4) else []
    assert near_in_group(rows, blocks, min(distance, 4))[0].tolist() == expected
