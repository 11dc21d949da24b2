"""The duplicates among all scanned rows, found in units that tasks share (`units`).

A group is a run of source files in the plan's order. The steps, each in units of its own:

    hashes  group               hashes of the rows that passed the filters, split into ranges of the hash
    exact   range of hashes     rows with the hash of a row with a smaller id, split by group
    kept    group               perceptual hashes of the rows that are still kept
    near    pass and slice      rows that look like a row with a smaller id, split by group
    ...                         rows that mean the same as one with a smaller id: see `semantic`
    listed  all                 rows that `dedupe.drop` names, split by group

Each reads what it needs of the step before. Verdicts are sparse: a code for the few rows that something
besides the filters decided.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.dataset.schema import DropListCounts
from data_prep.plan.against import EvaluationSets
from data_prep.plan.annotations import FOLDER, annotation_folder
from data_prep.plan.dedupe import (
    ROW,
    Spool,
    bit_mask,
    block_choices,
    first_of_each_hash,
    mixed,
    near_in_pass,
)
from data_prep.plan.drop_list import find_rows, frozen_ids
from data_prep.plan.packs import pack, section_bytes
from data_prep.plan.scan_tables import exact_hashes, read_scan
from data_prep.plan.scanned import MARK, PAIR, Scanned, first_verdicts, split
from data_prep.plan.semantic import SemanticDuplicates
from data_prep.plan.units import unit_keys
from data_prep.plan.verdicts import COPIED, KEPT, LIKE_SET, LISTED, LOOKS_SAME, MEANS_SAME, SAME_FILE

SLICE_ROWS = 1 << 28
"""Rows that a unit of the near duplicates compares: two minutes of one core, 4 GB of temporary disk."""


class Duplicates:
    """The steps, and the verdicts that follow from them."""

    def __init__(self, scanned: Scanned) -> None:
        self._scanned = scanned
        self._dedupe = scanned.config.dedupe
        self._passes: list[tuple[tuple[int, int], ...]] = []
        self._slices = 1
        semantic = scanned.config.dedupe.semantic
        self._semantic = None
        if semantic is not None:
            if semantic.annotation in [entry.name for entry in scanned.config.annotations]:
                # The tables of our own annotators are named by their settings.
                folder = annotation_folder(scanned.config).removeprefix(f"{FOLDER}/")
                semantic = replace(semantic, annotation=folder)
            self._semantic = SemanticDuplicates(scanned, semantic, self.file_rows, self._kept_ids)

    def find(self) -> None:
        """Make all units.

        Raises:
            UserError: if the disk is full, or the drop list cannot be read any more.
            SupersededError: if another task has finished the plan.
        """
        scanned = self._scanned
        groups = len(scanned.groups)
        scanned.make("hashes", groups, self._hash_group)
        if self._dedupe.exact:
            scanned.make("exact", scanned.ranges, self._find_equal)
        if self._dedupe.near is not None:
            scanned.make("kept", groups, self._keep_group)
            self._choose_passes()
            scanned.make("near", len(self._passes) * self._slices, self._find_near)
        if self._semantic is not None:
            self._semantic.find()
        if self._dedupe.drop is not None:
            scanned.make("listed", 1, self._find_listed)

    def file_rows(self, group: int) -> np.ndarray:
        """Return the number of rows of each file of a group, int64 [files of the group]."""
        return np.frombuffer(self._scanned.section("hashes", group, 0, 1 + self._scanned.ranges), "<i8")

    def drop_counts(self) -> DropListCounts | None:
        """Return the counts of `dedupe.drop`; None without that key."""
        if self._dedupe.drop is None:
            return None
        data = self._scanned.section("listed", 0, 0, 1 + len(self._scanned.groups))
        ids, unmatched = np.frombuffer(data, "<i8").tolist()
        return DropListCounts(ids=ids, unmatched=unmatched)

    def pairs(self, group: int) -> np.ndarray:
        """Return the exact duplicates among the rows of a group (`PAIR`)."""
        if not self._dedupe.exact:
            return np.empty(0, PAIR)
        return self._rows("exact", self._scanned.ranges, group, PAIR)

    def codes(self, group: int) -> np.ndarray:
        """Return what was decided on the rows of a group besides the first verdicts, uint8 [rows]."""
        scanned = self._scanned
        places = _Places(scanned.groups[group], self.file_rows(group))
        codes = self._image_codes(group, places)
        if self._semantic is not None:
            codes[places.of(self._semantic.marks(group)["id"])] = MEANS_SAME
        if self._dedupe.drop is not None:
            data = scanned.section("listed", 0, 1 + group, 1 + len(scanned.groups))
            rows = places.of(np.frombuffer(data, MARK)["id"])
            codes[rows[codes[rows] <= COPIED]] = LISTED
        return codes

    def verdicts(self, table: pa.Table, codes: np.ndarray) -> np.ndarray:
        """Return the verdicts on some rows, uint8 [rows].

        Args:
            table: the rows' `reason` and `hash`.
            codes: the part of `codes` that belongs to them.
        """
        first = first_verdicts(table, self._scanned.sets)
        return np.where(first == KEPT, codes, first)

    def _rows(self, step: str, units: int, group: int, dtype: np.dtype) -> np.ndarray:
        """Return a group's rows of all units of a step."""
        sections = self._scanned.sections(step, units, group, len(self._scanned.groups))
        return np.frombuffer(b"".join(sections), dtype)

    def _image_codes(self, group: int, places: "_Places") -> np.ndarray:
        """Return what the images' bytes and looks decide, uint8 [rows]."""
        scanned = self._scanned
        codes = self._exact_codes(group, places)
        if self._dedupe.near is not None:
            likes = np.frombuffer(scanned.section("kept", group, 1, 2), MARK)
            codes[places.of(likes["id"])] = likes["code"]
            units = len(self._passes) * self._slices
            codes[places.of(self._rows("near", units, group, MARK)["id"])] = LOOKS_SAME
        return codes

    def _kept_ids(self, group: int) -> np.ndarray:
        """Return the ids of the rows that neither a filter nor a duplicate has dropped, sorted, int64 [N]."""
        scanned = self._scanned
        codes = self._image_codes(group, _Places(scanned.groups[group], self.file_rows(group)))
        kept, row = [np.empty(0, np.int64)], 0
        for number in scanned.groups[group]:
            for table in read_scan(
                scanned.dataset, scanned.table_key(number), columns=["id", "reason", "hash"]
            ):
                verdicts = self.verdicts(table, codes[row : row + len(table)])
                row += len(table)
                kept.append(table["id"].to_numpy()[verdicts <= COPIED])
        return np.sort(np.concatenate(kept))

    def _exact_codes(self, group: int, places: "_Places") -> np.ndarray:
        codes = np.full(places.rows, KEPT, np.uint8)
        pairs = self.pairs(group)
        codes[places.of(pairs["id"])] = np.where(pairs["id"] == pairs["first"], COPIED, SAME_FILE)
        return codes

    def _hash_group(self, group: int) -> bytes:
        """Section 0 has the rows of each file, the others the hashes (`ROW`) of each range."""
        scanned = self._scanned
        counts, kept = [], [np.empty(0, ROW)]
        for number in scanned.groups[group]:
            counts.append(0)
            for table in read_scan(
                scanned.dataset, scanned.table_key(number), columns=["id", "reason", "hash"]
            ):
                counts[-1] += len(table)
                if self._dedupe.exact:
                    passed = first_verdicts(table, scanned.sets) == KEPT
                    kept.append(_rows_of(exact_hashes(table["hash"]), table["id"].to_numpy(), passed))

        rows = np.concatenate(kept)
        # Hashes are uniform, so equal ranges have about as many rows.
        place = ((rows["hash"] >> np.uint64(32)) * np.uint64(scanned.ranges)) >> np.uint64(32)
        return pack([np.array(counts, "<i8").tobytes(), *split(rows, place, scanned.ranges)])

    def _find_equal(self, number: int) -> bytes:
        scanned = self._scanned
        sections = scanned.sections("hashes", len(scanned.groups), 1 + number, 1 + scanned.ranges)
        rows = np.frombuffer(b"".join(sections), ROW)
        ids, firsts = first_of_each_hash(rows)
        pairs = np.empty(len(ids), PAIR)
        pairs["id"], pairs["first"] = ids, firsts
        return pack(scanned.by_group(pairs))

    def _keep_group(self, group: int) -> bytes:
        """Section 0 has the perceptual hashes of the rows that are still kept, section 1 the rows (`MARK`)
        that look like an image of an evaluation set."""
        scanned = self._scanned
        assert self._dedupe.near is not None
        places = _Places(scanned.groups[group], self.file_rows(group))
        codes = self._exact_codes(group, places)
        kept, row = [np.empty(0, ROW)], 0
        for number in scanned.groups[group]:
            columns = ["id", "reason", "hash", "phash"]
            for table in read_scan(scanned.dataset, scanned.table_key(number), columns=columns):
                verdicts = self.verdicts(table, codes[row : row + len(table)])
                row += len(table)
                ids = table["id"].to_numpy()
                kept.append(_rows_of(exact_hashes(table["phash"]), ids, verdicts <= COPIED))

        rows, likes = np.concatenate(kept), np.empty(0, MARK)
        if scanned.sets is not None:
            likes = self._like_sets(scanned.sets, rows, self._dedupe.near)
            rows = rows[~np.isin(rows["id"], likes["id"])]
        return pack([rows.tobytes(), likes.tobytes()])

    def _like_sets(self, sets: EvaluationSets, rows: np.ndarray, distance: int) -> np.ndarray:
        """Return the rows (`MARK`) that look like an image of a set; of several sets, the first counts."""
        marks = [np.empty(0, MARK)]
        with tempfile.TemporaryDirectory(prefix="li-dit-plan-") as folder:
            spool = Spool(Path(folder), "phashes")
            spool.add(rows["hash"], rows["id"])
            for ids, numbers in sets.near(spool, distance):
                mark = np.empty(len(ids), MARK)
                mark["id"], mark["code"] = ids, LIKE_SET + numbers
                marks.append(mark)
            spool.close()

        found = np.concatenate(marks)
        found = found[np.lexsort((found["code"], found["id"]))]
        return found[np.unique(found["id"], return_index=True)[1]]

    def _choose_passes(self) -> None:
        """Choose the blocks of each pass, and the slices, from the number of rows that are still kept."""
        groups, bytes = len(self._scanned.groups), 0
        for key in unit_keys("kept", groups):
            bytes += section_bytes(self._scanned.dataset, key, 0, 2)
        rows = bytes // ROW.itemsize
        assert self._dedupe.near is not None
        self._passes = block_choices(rows, self._dedupe.near)
        self._slices = max(1, -(-rows // SLICE_ROWS))

    def _find_near(self, unit: int) -> bytes:
        """Find the near duplicates of one slice of the keys of one pass."""
        scanned = self._scanned
        assert self._dedupe.near is not None
        number, part = divmod(unit, self._slices)
        blocks = self._passes[number]
        mask = bit_mask(blocks)
        found = [np.empty(0, np.int64)]
        with tempfile.TemporaryDirectory(prefix="li-dit-plan-") as folder:
            spool = Spool(Path(folder), "phashes")
            for section in scanned.sections("kept", len(scanned.groups), 0, 2):
                rows = np.frombuffer(section, ROW)
                rows = rows_of_slice(rows, mask, part, self._slices)
                spool.add(rows["hash"], rows["id"])
            for ids in near_in_pass(spool, blocks, self._dedupe.near):
                found.append(ids)
            spool.close()

        ids = np.unique(np.concatenate(found))
        marks = np.empty(len(ids), MARK)
        marks["id"], marks["code"] = ids, LOOKS_SAME
        return pack(scanned.by_group(marks))

    def _find_listed(self, _: int) -> bytes:
        """Section 0 has the number of ids and of those that no row has, the others the rows of each group."""
        scanned = self._scanned
        assert self._dedupe.drop is not None
        rows = np.zeros(len(scanned.files) + 1, np.int64)
        for group, files in enumerate(scanned.groups):
            rows[1 + np.array(files, np.int64)] = self.file_rows(group)
        starts = np.cumsum(rows)

        counts, known = np.zeros(2, "<i8"), [np.empty(0, np.int64)]
        for ids in frozen_ids(self._dedupe.drop, scanned.dataset):
            found = find_rows(ids, starts) >= 0
            counts += (len(ids), int((~found).sum()))
            known.append(ids[found])

        ids = np.unique(np.concatenate(known))
        marks = np.empty(len(ids), MARK)
        marks["id"], marks["code"] = ids, LISTED
        return pack([counts.tobytes(), *scanned.by_group(marks)])


def _rows_of(hashes: np.ndarray, ids: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the chosen rows as `ROW`."""
    rows = np.empty(int(chosen.sum()), ROW)
    rows["hash"], rows["id"] = hashes[chosen], ids[chosen]
    return rows


def rows_of_slice(rows: np.ndarray, mask: np.uint64, part: int, slices: int) -> np.ndarray:
    """Return the rows (`ROW`) of slice `part` of the keys, which are the bits of `mask`."""
    if slices == 1:
        return rows
    # By the low bits of the mixed key: the groups within a slice are made by the high ones.
    low = mixed(rows["hash"] & mask) & np.uint64(0xFFFFFFFF)
    return rows[(low * np.uint64(slices)) >> np.uint64(32) == part]


class _Places:
    """Places of sample ids among the rows of a group."""

    def __init__(self, files: Sequence[int], rows: np.ndarray) -> None:
        self.rows = int(rows.sum())
        order = np.argsort(files)
        self._files = np.array(files, np.int64)[order]
        self._starts = (np.cumsum(rows) - rows)[order]

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Return the number of each row in the group, int64 [N]."""
        return self._starts[np.searchsorted(self._files, ids >> 32)] + (ids & 0xFFFFFFFF)
