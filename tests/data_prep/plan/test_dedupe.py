import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.plan import dedupe
from data_prep.plan.dedupe import (
    ROW,
    Spool,
    bit_mask,
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
)
def test_near_duplicates_agree_with_comparing_all(
    tmp_path_factory, monkeypatch, changes, distance, group_rows, run_rows
):
    monkeypatch.setattr(dedupe, "RUN_ROWS", run_rows)  # longer runs are cut again
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


def test_comparisons_stay_linear_where_many_images_are_alike():
    """Hashes that agree on half of their bits, as those of objects on white do, and on few of the others."""
    rng = np.random.default_rng(0)
    shared = np.uint64(0x00FF00FF00FF00FF)
    per_row = {}
    for rows_in_all in (6000, 24000, 96000):
        rows = np.empty(rows_in_all, ROW)
        noise = rng.integers(0, 2**64, rows_in_all, np.uint64)
        few = rng.integers(0, 2**64, 40, np.uint64)[rng.integers(0, 40, rows_in_all)]
        rows["hash"] = (few & shared) | (noise & ~shared)
        rows["id"] = np.arange(rows_in_all)
        # The keys are those of a billion rows, of which these are the ones that are alike.
        masks = [bit_mask(blocks) for blocks in block_choices(10**9, 3)]
        counts = [near_in_group(rows, mask, 3)[1] for mask in masks]
        per_row[rows_in_all] = sum(counts) / rows_in_all
    assert per_row[24000] <= 5
    assert per_row[96000] <= 5
