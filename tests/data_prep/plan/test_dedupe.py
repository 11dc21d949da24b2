import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.plan.dedupe import Spool, exact_duplicates, near_duplicates, perceptual_hash
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
@given(st.lists(st.integers(0, 12) | st.integers(0, 2**64 - 1)), st.sampled_from([4, 16, 1 << 20]))
def test_exact_duplicates_are_all_but_the_first(tmp_path_factory, hashes, group_rows):
    spool = spool_of(tmp_path_factory.mktemp("d"), hashes)
    found = list(exact_duplicates(spool, group_rows))
    copies = {number * 3 for number, value in enumerate(hashes) if value in hashes[:number]}
    assert all_ids(ids for ids, _ in found) == copies
    firsts = [number * 3 for number, value in enumerate(hashes) if hashes.index(value) == number]
    assert all_ids(ids for _, ids in found) == {id for id in firsts if hashes.count(hashes[id // 3]) > 1}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=6)), max_size=40),
    st.integers(0, 6),
    st.sampled_from([4, 1 << 20]),
)
def test_near_duplicates_agree_with_comparing_all(tmp_path_factory, changes, distance, group_rows):
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
