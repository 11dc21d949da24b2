"""A damaged record gives its own data, or one line that names it: no traceback, no hang, no other data."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings

from data_prep.config import DedupeConfig, SourceConfig
from data_prep.dataset.parts import PLAN_KEY, read_commit, read_plan, read_plan_record, register_family
from data_prep.dataset.schema import PAIRS, Commit, Family, Manifest, Part
from data_prep.dataset.snapshot import take_snapshot
from data_prep.dataset.snapshot_reader import (
    HISTORY,
    last_taken,
    read_captions,
    read_constants,
    read_family,
    read_index,
    read_snapshot,
)
from data_prep.pairs.pairs import read_pairs
from data_prep.plan import pieces
from data_prep.plan.against import AGAINST_FOLDER, evaluation_key
from data_prep.plan.drop_list import DROP_KEY, recorded_hash
from data_prep.plan.finish import SETTINGS_KEY
from data_prep.plan.listing import FILES_KEY, FOLDER, SOURCES_KEY, source_counts, source_files
from data_prep.plan.manifest import MANIFEST, read_manifest
from data_prep.plan.pieces import freeze_pieces
from data_prep.plan.plan import check_settings
from data_prep.plan.rows import DROPPED, dropped_key
from data_prep.plan.scan import EVALUATION, SCAN
from data_prep.plan.scan_tables import read_scan, scan_key
from data_prep.report import _choose_rows as choose_rows
from data_prep.sources.source import OpenSources
from data_prep.store.store import Store, open_store
from model.common import records
from model.common.errors import UserError
from model.common.records import SEAL, parse_record, seal
from tests.helpers.damage import damaged, edited
from tests.helpers.fake_dataset import make_all
from tests.helpers.raw_material import config_of, png, prepare, sample_members, write_parquet, write_tar

PART = Part("64x64", 0)
MANY = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=60,
    deadline=None,
)


class Reader(NamedTuple):
    """A record in a store, and a function that reads it."""

    dataset: Store
    key: str
    read: Callable[[], Any]

    @property
    def path(self):
        return self.dataset.local_path(self.key)

    def outcome(self, data):
        """Return what the reader returns, or its error of one line, if the record had these bytes."""
        whole = self.path.read_bytes()
        self.path.write_bytes(data)
        try:
            return self.read()
        except UserError as error:
            line = str(error)
            assert line.isprintable(), line
            assert self.dataset.uri in line or "no snapshot" in line, line
            assert self.key in line or "no snapshot" in line or self.key == SETTINGS_KEY, line
            return error
        finally:
            self.path.write_bytes(whole)


def records_of_a_store(folder):
    """Return the readers of a small store by the kind of their record."""
    dataset = open_store(str(folder), create=True).sub("ds")
    make_all(dataset, {"64x64": [3, 2], "32x96": [2]})
    family = Family("constant", "text", {"model": "fake"}, {"width": 2, "scale": 0.5})
    family = register_family(dataset, family, {"mean": torch.arange(40.0)})

    rows = [dict.fromkeys(MANIFEST.names, 7) | {"key": f"k{n}", "captions": [], "path": "a"} for n in (1, 2)]
    manifest = "manifest/64x64/000000.parquet"
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, MANIFEST), path)
    dataset.put(manifest, path)
    hashes = {manifest: xxhash.xxh64_hexdigest(path.read_bytes())}
    counts = {"kept": {"original": 7}, "letters": {"original": 70}, "refused": {}}
    file = {"number": 0, "label": "a.tar", "rows": 9, "kept": 7, "dropped": {"caption: missing": 2}}
    dataset.put(PLAN_KEY, seal({"files": [file], "captions": counts, "manifest": hashes}))

    snapshot = take_snapshot(dataset, ["latents", "llm"])
    commit = read_commit(dataset, PAIRS, PART)
    tables = {file.key.rpartition(".")[2]: file.key for file in commit.files}
    readers = {
        "commit": (PART.commit_key(PAIRS), lambda: read_commit(dataset, PAIRS, PART)),
        "manifest": (Manifest.KEY, lambda: read_plan(dataset)),
        "plan": (PLAN_KEY, lambda: read_plan_record(dataset)),
        "family": (family.key, lambda: read_family(dataset, "constant")),
        "constants": (family.constants_key, lambda: read_constants(dataset, family)["mean"].tolist()),
        "snapshot": (snapshot.key, lambda: read_snapshot(dataset, snapshot.id)),
        "history": (f"{HISTORY}000000.json", lambda: last_taken(dataset)),
        "index": (snapshot.index_key("64x64"), lambda: read_index(dataset, snapshot, "64x64")),
        "rows": (manifest, lambda: read_manifest(dataset, PART, hashes)),
        "captions": (tables["parquet"], lambda: read_captions(dataset, PART, commit.ids_xxh64)),
        "pairs": (tables["tar"], lambda: read_pairs(dataset, commit, ["original"])),
    }
    return {name: Reader(dataset, *reader) for name, reader in readers.items()}


def records_of_a_plan(folder):
    """Return the readers of what `plan` writes and reads back."""
    members = []
    for n in range(3):
        members += sample_members(str(n), png(n), {"caption": f"number {n}" if n else ""})
    write_tar(folder / "in", "a.tar", members)
    (folder / "in/notes.md").touch()
    write_tar(folder / "set", "a.tar", sample_members("0", png(7), {}))
    pyarrow.parquet.write_table(pyarrow.table({"id": [99]}), folder / "ids.parquet")
    against = [SourceConfig("webdataset", str(folder / "set"))]
    dedupe = DedupeConfig(against=against, drop=str(folder / "ids.parquet"))
    rows = [{"image": f"{number}.png", "caption": f"number {number}"} for number in range(5)]
    write_parquet(folder / "paths/rows.parquet", rows, 2)
    config = config_of(folder, ("webdataset", folder / "in"), ("parquet", folder / "paths"), dedupe=dedupe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_ROWS", 2)
        dataset = prepare(config)
    opened = OpenSources(config, source_files(dataset))
    hashes = evaluation_key(0)
    readers = {
        "settings": (SETTINGS_KEY, lambda: check_settings(config, dataset)),
        "files": (FILES_KEY, lambda: source_files(dataset)),
        "sources": (SOURCES_KEY, lambda: source_counts(dataset)),
        "scan": ("scan/00000000.parquet", lambda: list(read_scan(dataset, "scan/00000000.parquet"))),
        "evaluation files": (f"{AGAINST_FOLDER}/files.json", lambda: source_files(dataset, AGAINST_FOLDER)),
        "evaluation": (hashes, lambda: list(read_scan(dataset, hashes, EVALUATION))),
        "cuts": (f"{FOLDER}/cuts.json", lambda: freeze_pieces(opened, dataset, FOLDER, scan_key)),
        "drop list": (DROP_KEY, lambda: recorded_hash(dataset)),
        "dropped": (dropped_key(0), lambda: choose_rows(dataset, dropped_key(0), DROPPED, Counter())),
    }
    return {name: Reader(dataset, *reader) for name, reader in readers.items()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    store, plan = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LI_DIT_RETRY_SECONDS", "0")  # a damaged payload is fetched again for ten minutes
        yield records_of_a_store(store) | records_of_a_plan(plan)


SEALED = ["commit", "manifest", "plan", "family", "snapshot", "history", "files", "sources", "cuts"]
HASHED = ["constants", "index", "rows", "captions", "pairs"]
TABLES = ["scan", "dropped"]
"""Tables of `plan` that no record names: their pages have checksums, their columns are checked."""


@pytest.fixture
def reader(stored, request):
    return stored[request.param]


@pytest.fixture
def whole(reader):
    """The record as it was written."""
    return reader.path.read_bytes()


@pytest.fixture
def right(reader):
    """What is read from it."""
    return reader.read()


def of(*names):
    return pytest.mark.parametrize("reader", names, indirect=True)


@of(*SEALED, *HASHED, "settings")
def test_damage_never_gives_other_data(reader, whole, right):
    @MANY
    @given(damaged(whole))
    def check(data):
        result = reader.outcome(data)
        assert isinstance(result, UserError) or result == right

    check()


@of(*TABLES)
def test_a_damaged_table_gives_rows_of_its_columns_or_an_error(reader, whole):
    @MANY
    @given(damaged(whole))
    def check(data):
        result = reader.outcome(data)
        if not isinstance(result, UserError):
            wanted = SCAN.names if reader.key.startswith("scan") else DROPPED.names
            for rows in result:
                # Those of the scan are tables, those that were dropped are dictionaries.
                assert list(getattr(rows, "column_names", rows)) == wanted

    check()


@of(*SEALED, "settings")
def test_edited_fields_are_noticed(reader, whole, right):
    @MANY
    @given(edited(json.loads(whole)))
    def check(record):
        result = reader.outcome(json.dumps(record).encode())
        # What differs from the record only in its form, such as the order of its keys, is the record.
        assert isinstance(result, UserError) or result == right

    check()


@of(*SEALED)
def test_edited_records_without_a_seal_are_whole_or_an_error(reader, whole, right):
    """As earlier versions wrote them: a change that fits the types cannot be noticed, any other one is."""
    record = json.loads(whole)
    record.pop(SEAL, None)
    assert reader.outcome(json.dumps(record).encode()) == right

    @MANY
    @given(edited(record))
    def check(record):
        result = reader.outcome(json.dumps(record).encode())
        assert isinstance(result, UserError | type(right))

    check()


@pytest.mark.parametrize("entries", [[[0, 0, "a.tar"], [1, 0, "b.tar"], [2, 1, "c.tar"]], [[0, 0, "a"]]])
def test_lists_of_files_of_earlier_versions_are_whole_or_an_error(stored, entries):
    files = stored["files"].outcome(json.dumps(entries).encode())
    assert [[file.number, file.source, file.name] for file in files] == entries

    @MANY
    @given(edited(entries))
    def check(entries):
        files = stored["files"].outcome(json.dumps(entries).encode())
        if not isinstance(files, UserError):
            assert [file.number for file in files] == list(range(len(files)))
            sources = [file.source for file in files]
            assert sorted(set(sources)) == list(range(len(set(sources))))

    check()


def test_a_payload_of_another_place_is_refused(stored):
    commit = stored["commit"].read()
    record = json.loads(commit.to_json())
    for key in ("../../etc/passwd", commit.files[0].key + "\x1b]0;title", "pairs/64x64/00001/x/pairs.tar"):
        record["files"][0]["key"] = key
        record.pop(SEAL, None)
        with pytest.raises(ValueError, match="not of this attempt"):
            Commit.from_json(seal(record))
    with pytest.raises(ValueError, match="3 rows in no file"):
        Commit.from_json(seal({**record, "files": []}))


def test_a_stray_file_in_the_history_is_named(stored):
    dataset = stored["history"].dataset
    stray = dataset.local_path(f"{HISTORY}000000.json~")
    stray.write_bytes(b"")
    with pytest.raises(UserError, match=r"000000\.json~: not an entry of the history: remove it"):
        read_snapshot(dataset)
    stray.unlink()


def test_size_and_depth_are_bounded(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="recursion limit"):
        parse_record(Manifest, b'{"a":' * 10_000 + b"1" + b"}" * 10_000)
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1000)
    path = Path(tmp_path, "record.json")
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it whole would take all memory
    with pytest.raises(UserError, match=r"record\.json: damaged: over 1,000 bytes: make it again"):
        records.read_record(path, Manifest, "make it again")


def test_a_seal_is_checked_whatever_the_form_of_the_record(stored):
    commit = stored["commit"].read()
    record = json.loads(commit.to_json())
    for form in (record, {SEAL: record[SEAL]} | record, dict(reversed(record.items()))):
        for text in (json.dumps(form), json.dumps(form, indent=2), json.dumps(form, separators=(",", ":"))):
            assert Commit.from_json(text.encode()) == commit
            for old, new in ((commit.attempt, "0" * 16), ("64x64", "64x65"), ("pairs.tar", "pairs.tax")):
                with pytest.raises(ValueError, match="does not match its hash"):
                    Commit.from_json(text.replace(old, new).encode())
    # what is sealed still has to fit the schema
    for wrong in ({"rows": -1}, {"rows": "3"}, {"more": 1}, {"attempt": "x"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Commit.from_json(seal({name: value for name, value in record.items() if name != SEAL} | wrong))
    # nor is anything read that is sealed and is no JSON
    for content in (b"[1}", b"}", b'"a}'):
        tail = f',"{SEAL}":"{xxhash.xxh64_hexdigest(content)}"}}'.encode()
        with pytest.raises(ValueError, match="JSON"):
            Commit.from_json(content[:-1] + tail)


class OnceForeign:
    """A store whose next answers are those of a proxy in front of it."""

    def __init__(self, dataset, answers):
        self.dataset, self.answers, self.reads = dataset, list(answers), 0

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def read(self, key, max_bytes=None):
        self.reads += 1
        return self.answers.pop(0) if self.answers else self.dataset.read(key)


@pytest.mark.parametrize(
    "answer", [b"", b"<html>busy</html>", b"<Error><Code>SlowDown</Code></Error>", b"{}"]
)
def test_one_foreign_answer_costs_a_second_read(stored, answer):
    whole = stored["manifest"].dataset
    dataset = OnceForeign(whole, [answer])
    assert read_plan(dataset) == read_plan(whole)
    assert dataset.reads == 2
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        read_plan(OnceForeign(whole, [answer] * 2))
