"""A damaged record gives its own data, or one line that names it: no traceback, no hang, no other data."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings

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
from data_prep.plan.manifest import MANIFEST, read_manifest
from data_prep.store.store import open_store
from model.common import records
from model.common.errors import UserError
from model.common.records import SEAL, parse_record, seal
from tests.helpers.damage import damaged, edited
from tests.helpers.fake_dataset import make_all

PART = Part("64x64", 0)
MANY = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=60,
    deadline=None,
)


class Records:
    """A small store, and for each kind of record its key and a function that reads it."""

    def __init__(self, folder):
        self.dataset = dataset = open_store(str(folder), create=True).sub("ds")
        make_all(dataset, {"64x64": [3, 2], "32x96": [2]})
        family = Family("constant", "text", {"model": "fake"}, {"width": 2, "scale": 0.5})
        family = register_family(dataset, family, {"mean": torch.arange(40.0)})

        rows = [
            dict.fromkeys(MANIFEST.names, 7) | {"key": f"k{n}", "captions": [], "path": "a"} for n in (1, 2)
        ]
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
        table = next(file.key for file in commit.files if file.key.endswith(".parquet"))
        self.readers = {
            "commit": (PART.commit_key(PAIRS), lambda: read_commit(dataset, PAIRS, PART)),
            "manifest": (Manifest.KEY, lambda: read_plan(dataset)),
            "plan": (PLAN_KEY, lambda: read_plan_record(dataset)),
            "family": (family.key, lambda: read_family(dataset, "constant")),
            "constants": (family.constants_key, lambda: read_constants(dataset, family)["mean"].tolist()),
            "snapshot": (snapshot.key, lambda: read_snapshot(dataset, snapshot.id)),
            "history": (f"{HISTORY}000000.json", lambda: last_taken(dataset)),
            "index": (snapshot.index_key("64x64"), lambda: read_index(dataset, snapshot, "64x64")),
            "rows": (manifest, lambda: read_manifest(dataset, PART, hashes)),
            "captions": (table, lambda: read_captions(dataset, PART, commit.ids_xxh64)),
        }

    def outcome(self, name, data):
        """Return what the reader returns, or the line of its error, if the record had these bytes."""
        key, read = self.readers[name]
        path = self.dataset.local_path(key)
        whole = path.read_bytes()
        path.write_bytes(data)
        try:
            return read()
        except UserError as error:
            line = str(error)
            assert line.isprintable(), line
            assert key in line or "no snapshot" in line, line
            return error
        finally:
            path.write_bytes(whole)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return Records(tmp_path_factory.mktemp("store"))


NAMES = [
    "commit",
    "manifest",
    "plan",
    "family",
    "constants",
    "snapshot",
    "history",
    "index",
    "rows",
    "captions",
]
JSON = ["commit", "manifest", "plan", "family", "snapshot", "history"]


@pytest.mark.parametrize("name", NAMES)
def test_damage_never_gives_other_data(stored, name):
    key, read = stored.readers[name]
    whole, right = stored.dataset.read(key), read()

    @MANY
    @given(damaged(whole))
    def check(data):
        result = stored.outcome(name, data)
        assert isinstance(result, UserError) or result == right

    check()


@pytest.mark.parametrize("name", JSON)
def test_edited_fields_are_noticed_by_the_seal(stored, name):
    key, read = stored.readers[name]
    whole, right = json.loads(stored.dataset.read(key)), read()

    @MANY
    @given(edited(whole))
    def check(record):
        result = stored.outcome(name, json.dumps(record).encode())
        # What differs from the record only in its form, such as the order of its keys, is the record.
        assert isinstance(result, UserError) or result == right

    check()


@pytest.mark.parametrize("name", JSON)
def test_edited_records_without_a_seal_are_whole_or_an_error(stored, name):
    """As earlier versions wrote them: a change that fits the types cannot be noticed, any other one is."""
    key, read = stored.readers[name]
    whole, right = json.loads(stored.dataset.read(key)), read()
    whole.pop(SEAL, None)
    assert stored.outcome(name, json.dumps(whole).encode()) == right

    @MANY
    @given(edited(whole))
    def check(record):
        result = stored.outcome(name, json.dumps(record).encode())
        assert isinstance(result, UserError | type(right))

    check()


def test_a_payload_of_another_place_is_refused(stored):
    commit = read_commit(stored.dataset, PAIRS, PART)
    record = json.loads(commit.to_json())
    for key in ("../../etc/passwd", commit.files[0].key + "\x1b]0;title", "pairs/64x64/00001/x/pairs.tar"):
        record["files"][0]["key"] = key
        record.pop(SEAL, None)
        with pytest.raises(ValueError, match="not of this attempt"):
            Commit.from_json(seal(record))
    with pytest.raises(ValueError, match="3 rows in no file"):
        Commit.from_json(seal({**record, "files": []}))


def test_a_stray_file_in_the_history_is_named(stored):
    stray = stored.dataset.local_path(f"{HISTORY}000000.json~")
    stray.write_bytes(b"")
    with pytest.raises(UserError, match=r"000000\.json~: not an entry of the history: remove it"):
        read_snapshot(stored.dataset)
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
    dataset = OnceForeign(stored.dataset, [answer])
    assert read_plan(dataset) == read_plan(stored.dataset)
    assert dataset.reads == 2
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        read_plan(OnceForeign(stored.dataset, [answer] * 2))
