"""Damaged records of a run: a checkpoint is passed over, a line costs that line, a cache is made again."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from data_prep.store.store import StoredFile, StoreError, hash_file, open_store
from model.common.errors import UserError
from model.common.records import SEAL, seal
from pipeline.checkpoint.checkpoints import Checkpoints, load_weights
from pipeline.checkpoint.manifest import parse_manifest
from pipeline.data import shard_cache
from pipeline.data.part_files import PartIndex
from pipeline.data.shard_cache import RECHECK_EVERY, ShardCache
from pipeline.operations.attempts import Ending, read_endings
from pipeline.runtime.attempt import Attempt, read_attempt
from pipeline.runtime.run_log import elapsed_seconds, latest_reports, read_events, read_lines
from pipeline.stage.config import CheckpointConfig
from tests.helpers import fake_snapshot as fake
from tests.helpers.damage import VALUES, damaged, edited

RUN = Path(__file__).parents[1] / "fixtures" / "before_the_house" / "run"
STEP = "step_000000004"
OLD = json.loads((RUN / "checkpoints" / STEP / "manifest.json").read_text())
SEALED = seal(OLD)
MANY = settings(suppress_health_check=list(HealthCheck), max_examples=80, deadline=None)


def parsed(data):
    """Return the manifest as plain JSON values, or None."""
    with suppress(ValueError):
        return json.loads(json.dumps(parse_manifest(data)))


@MANY
@given(damaged(SEALED))
def test_a_damaged_manifest_is_none(data):
    assert parsed(data) in (None, OLD)


@MANY
@given(edited({**OLD, SEAL: json.loads(SEALED)[SEAL]}))
def test_an_edited_manifest_is_none(record):
    assert parsed(json.dumps(record).encode()) in (None, OLD)


@MANY
@given(edited(OLD))
def test_an_edited_manifest_without_a_seal_is_whole_or_none(record):
    result = parsed(json.dumps(record).encode())
    assert result is None or result.keys() == OLD.keys()


@pytest.mark.parametrize("key", ["files", "layout", "ema", "optimizer", "trainer", "samples"])
@pytest.mark.parametrize("seals", [True, False])
def test_a_checkpoint_whose_manifest_lacks_a_field_is_passed_over(tmp_path, key, seals):
    for step in (3, 4):
        shutil.copytree(RUN / "checkpoints" / STEP, tmp_path / f"step_{step:09d}")
    record = {name: value for name, value in OLD.items() if name != key}
    (tmp_path / STEP / "manifest.json").write_bytes(seal(record) if seals else json.dumps(record).encode())
    assert Checkpoints(tmp_path, CheckpointConfig()).newest() == tmp_path / "step_000000003"


LAYOUTS = {
    "world": lambda layout: layout.update(world=0),
    "more ranks": lambda layout: layout.update(world=2),
    "shape": lambda layout: layout["groups"][0][0][1].__setitem__(0, 10**9),
    "lengths": lambda layout: layout["lengths"].pop(),
    "partition": lambda layout: layout.update(partition="other"),
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_that_does_not_fit_its_files_is_passed_over(change):
    record = json.loads(json.dumps(OLD))
    change(record["layout"])
    assert parsed(json.dumps(record).encode()) is None


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "replicated.safetensors"])
@pytest.mark.parametrize("change", ["byte", "cut", "gone"])
def test_a_checkpoint_that_is_named_is_checked_too(tmp_path, name, change):
    folder = tmp_path / "checkpoints" / STEP
    shutil.copytree(RUN / "checkpoints" / STEP, folder)
    assert len(load_weights(folder, "ema")) == len(load_weights(RUN, "ema"))
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if change != "gone":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if change == "byte" else data[:-9])
    with pytest.raises(UserError, match=f"{name}.*: name another checkpoint, or the run"):
        load_weights(folder, "raw")


# -- lines of metrics --

LINES = [
    {"event": "start", "time": 1.5, "step": 0, "samples": 0},
    {"step": 1, "samples": 8, "time": 2.5, "loss": 0.5, "grad_norm": None},
    {"event": "save", "time": 3.5, "step": 1},
    {"step": 2, "samples": 16, "time": 4.5, "loss": 0.25},
]


def read(folder, data):
    (folder / "metrics.jsonl").write_bytes(data)
    lines = list(read_lines(folder))
    latest_reports(lines)
    elapsed_seconds(lines)
    read_events(folder, "start")
    return lines


@given(damaged(json.dumps(LINES[1]).encode()))
@MANY
def test_a_damaged_line_costs_that_line(tmp_path, damage):
    before, after = (json.dumps(line).encode() + b"\n" for line in (LINES[0], LINES[3]))
    lines = read(tmp_path, before + damage.replace(b"\n", b"") + b"\n" + after)
    assert lines[0] == LINES[0]
    assert lines[-1] == LINES[3]
    assert len(lines) <= 3


@given(edited(LINES[1]))
@MANY
def test_an_edited_line_is_a_report_or_passed_over(tmp_path, line):
    read(tmp_path, json.dumps(line).encode() + b"\n")


@given(VALUES)
@MANY
def test_any_json_is_no_traceback(tmp_path, value):
    read(tmp_path, json.dumps(value).encode() + b"\n")


def test_a_torn_line_that_another_start_continued_is_passed_over(tmp_path, caplog):
    text = [json.dumps(line) + "\n" for line in LINES]
    assert read(tmp_path, "".join(text).encode()) == LINES
    assert not caplog.records
    torn = text[0] + text[1][:20] + text[2] + text[3] + text[1][:10]
    assert read(tmp_path, torn.encode()) == [LINES[0], LINES[3]]
    assert "metrics.jsonl: 1 damaged lines are passed over, the first is line 2" in caplog.text


def damaged_or_edited(record):
    return damaged(json.dumps(record).encode()) | edited(record).map(lambda other: json.dumps(other).encode())


ENDING = Ending("7", 0, "n1", 1.5, 2.5, "crash", "a fault", 3, True)
ATTEMPT = Attempt("7", 0, "n1", 1.5, "out.txt", {"rank_0.txt": 9})


@MANY
@given(
    damaged(json.dumps(asdict(ENDING)).encode())
    | edited(asdict(ENDING)).map(lambda x: json.dumps(x).encode())
)
def test_a_damaged_ending_costs_that_ending(tmp_path, line):
    whole = json.dumps(asdict(ENDING)).encode()
    (tmp_path / "attempts.jsonl").write_bytes(b"\n".join([whole, line.replace(b"\n", b""), whole, b""]))
    endings = read_endings(tmp_path)
    assert endings[0] == endings[-1] == ENDING
    assert len(endings) <= 3


@MANY
@given(
    damaged(json.dumps(asdict(ATTEMPT)).encode())
    | edited(asdict(ATTEMPT)).map(lambda x: json.dumps(x).encode())
)
def test_a_damaged_attempt_is_none(tmp_path, data):
    (tmp_path / "attempt.json").write_bytes(data)
    assert isinstance(read_attempt(tmp_path), Attempt | None)


# -- caches --


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshot")
    snapshot = fake.make(folder / "store", {"64x64": [4, 3]}, folder)
    return open_store(str(folder / "store")).sub("ds"), snapshot


def test_a_damaged_cached_index_is_made_again(stored, tmp_path):
    dataset, snapshot = stored
    cache = ShardCache(dataset, tmp_path, snapshot.id, None)
    path = PartIndex(cache, snapshot).paths["64x64"]
    whole = path.read_bytes()

    other_rows = whole.replace(b"\x04\0\0\0\0\0\0\0", b"\xff\0\0\0\0\0\0\0")
    for damage in (b"", whole[:100], whole[:-20], other_rows):
        path.write_bytes(damage)
        index = PartIndex(cache, snapshot)
        assert path.read_bytes() == whole
        assert index.rows("64x64").tolist() == [4, 3]
    # An index without its hash, as earlier versions left it, is made again too.
    path.with_name(f"{path.name}.xxh64").unlink()
    assert np.array_equal(PartIndex(cache, snapshot).rows("64x64"), [4, 3])


def rot(path):
    """Flip one bit of a file, and leave no trace in its size, time or inode."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_bit_rot_is_found_within_the_stated_number_of_openings(tmp_path, monkeypatch):
    store = open_store(str(tmp_path / "store"), create=True)
    store.put("part", bytes(1000))
    path = store.local_path("part")
    file = StoredFile("part", 1000, hash_file(path))
    hashed = []
    monkeypatch.setattr(shard_cache, "hash_file", lambda path: hashed.append(path) or hash_file(path))

    cache = ShardCache(store, tmp_path / "cache", "snapshot", None)
    for _ in range(10 * RECHECK_EVERY):
        cache.get(file, "family/64x64/00000", 0.0)
    assert len(hashed) in (10, 11)  # and once at the first use: about 1.6 % of the openings

    rot(path)

    def read_often():
        for _ in range(RECHECK_EVERY):
            cache.get(file, "family/64x64/00000", 0.0)

    with pytest.raises(StoreError, match="is damaged: run `python -m data_prep verify`"):
        read_often()


def test_a_rotten_file_of_a_cache_is_fetched_again(s3, tmp_path):
    store = open_store(s3)
    data = os.urandom(1000)
    store.put("part", data)
    (tmp_path / "file").write_bytes(data)
    file = StoredFile("part", 1000, hash_file(tmp_path / "file"))
    cache = ShardCache(store, tmp_path / "cache", "snapshot", None)
    path = cache.get(file, "family/64x64/00000", 0.0)
    rot(path)
    for _ in range(RECHECK_EVERY):
        cache.get(file, "family/64x64/00000", 0.0)
    assert path.read_bytes() == data


@pytest.mark.parametrize("note", [b"", b"{", b"[1]", b'["x", 3]', b"\xff", b"[" * 9999])
def test_a_damaged_note_of_a_failure_says_nothing(tmp_path, note):
    store = open_store(str(tmp_path / "store"), create=True)
    cache = ShardCache(store, tmp_path / "cache", "snapshot", None)
    path = cache._failure_path("family/64x64/00000")
    path.parent.mkdir(parents=True)
    path.write_bytes(note)
    cache._raise_failure("family/64x64/00000", 0.0)
