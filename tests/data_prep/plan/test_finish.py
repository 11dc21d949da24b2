"""Any number of tasks that share the finish of a plan, killed anywhere, write the same bytes as one loop."""

import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.config import DedupeConfig, FilterConfig, SourceConfig
from data_prep.dataset.parts import read_plan_record
from data_prep.plan import duplicates, finish, windows
from data_prep.plan.packs import pack, read_section, section_bytes
from data_prep.plan.plan import run_plan
from data_prep.plan.units import FINISH
from data_prep.store.local import LocalFolder
from data_prep.store.store import Store, StoreError, open_store
from model.common.errors import UserError
from model.common.share import Share
from tests.data_prep.store.test_faults import RandomFaults
from tests.helpers.plan_in_one_pass import plan_in_one_pass
from tests.helpers.plans import CAPTIONS, IMAGES, KINDS, content
from tests.helpers.raw_material import (
    ALONE,
    config_of,
    encoded,
    png,
    sample_members,
    smooth_image,
    write_parquet,
    write_tar,
)

SMALLER = [encoded(smooth_image(seed).resize((64, 64))) for seed in range(4)]
"""Images that look like the first four of `IMAGES`."""
ALL = [*IMAGES, *SMALLER]


class KilledError(BaseException):
    """The end of a task, which no code of ours catches."""


class Killed(LocalFolder):
    """A folder whose user is killed before or after one of its writes or deletions."""

    def __init__(self, root, writes, after):
        super().__init__(root)
        self.left, self.after = writes, after

    def counted(self, change, *arguments):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KilledError
        result = change(*arguments)
        if self.left == 0:
            raise KilledError
        return result

    def put(self, key, data):
        self.counted(super().put, key, data)

    def put_new(self, key, data):
        return self.counted(super().put_new, key, data)

    def delete(self, key):
        self.counted(super().delete, key)

    def delete_many(self, keys):
        # A request removes up to 1,000 objects, and a kill may come after any of them.
        for key in keys:
            self.counted(super().delete, key)


@pytest.fixture
def small_units(monkeypatch):
    """Make units so small that a few rows have many of each step."""
    monkeypatch.setattr(finish, "MAX_GROUP_BYTES", 1)
    monkeypatch.setattr(finish, "RANGE_BYTES", 5000)
    monkeypatch.setattr(duplicates, "SLICE_ROWS", 4)
    monkeypatch.setattr(windows, "UNIT_ROWS", 1)


writes = st.integers(1, 40) | st.integers(1, 200)
"""Writes and deletions before a kill; the removal of the units comes last."""
rows = st.tuples(st.integers(0, len(ALL) - 1), st.sampled_from(CAPTIONS))


@st.composite
def plans(draw):
    """Files of rows, and settings."""
    part_rows = draw(st.integers(1, 4))
    return {
        "files": draw(st.lists(st.lists(rows, max_size=9), min_size=2, max_size=5)),
        "evaluation": draw(st.lists(st.integers(0, len(ALL) - 1), max_size=3)),
        "listed": draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=4)),
        "dedupe": DedupeConfig(draw(st.booleans()), draw(st.sampled_from([None, 4]))),
        "settings": {"part_rows": part_rows, "shuffle_window": part_rows * draw(st.integers(1, 20))},
        "tasks": draw(st.integers(1, 4)),
        "kills": draw(st.lists(st.tuples(st.integers(0, 3), writes, st.booleans()), max_size=6)),
    }


def config_for(folder, plan):
    for number, samples in enumerate(plan["files"]):
        members = []
        for n, (image, text) in enumerate(samples):
            members += sample_members(str(n), ALL[image], {"caption": text})
        write_tar(folder / "in", f"{number}.tar", members)
    dedupe = plan["dedupe"]
    if plan["evaluation"]:
        members = [m for n in plan["evaluation"] for m in sample_members(f"{n}", ALL[n], {})]
        write_tar(folder / "sets", "a.tar", members)
        dedupe.against = [SourceConfig(path=str(folder / "sets"))]
    if plan["listed"]:
        write_parquet(folder / "ids.parquet", [{"id": file << 32 | row} for file, row in plan["listed"]])
        dedupe.drop = str(folder / "ids.parquet")
    source = ("webdataset", folder / "in")
    return config_of(
        folder,
        source,
        dedupe=dedupe,
        buckets=KINDS,
        filters=[FilterConfig("caption_url")],
        **plan["settings"],
    )


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans())
def test_tasks_killed_anywhere_write_the_bytes_of_one_loop(tmp_path_factory, small_units, plan):
    folder = tmp_path_factory.mktemp("finish")
    config = config_for(folder, plan)
    for task, writes, after in plan["kills"]:
        share = Share(task % plan["tasks"], plan["tasks"])
        with suppress(KilledError, UserError):
            run_plan(config, Store(Killed(folder / "store", writes, after), "ds/"), share)
    dataset = open_store(config.store, create=True).sub("ds")
    refusal, manifest = "", None
    try:
        for task in range(plan["tasks"]):
            manifest = run_plan(config, dataset, Share(task, plan["tasks"]))
    except UserError as error:
        refusal = str(error)
    if manifest is None:
        assert "no pairs left" in refusal
        assert not list(dataset.list(""))
        return
    expected = plan_in_one_pass(config, dataset)
    written = content(dataset)
    del written["dataset.json"]
    assert written.keys() == expected.keys()
    for key, data in written.items():
        assert data == expected[key], key
    assert not list(dataset.list(f"{FINISH}/"))


def plan_of_many_units():
    return {
        "files": [[(n, "a fox"), (n + 1, "two"), (12, "x"), (14 + n, "y")] for n in range(4)],
        "evaluation": [3],
        "listed": [(0, 1)],
        "dedupe": DedupeConfig(True, 4),
        "settings": {"part_rows": 1, "shuffle_window": 1},
    }


def test_units_of_every_step_are_made(tmp_path, small_units):
    """The property above is about many units only if these settings give many."""
    config = config_for(tmp_path, plan_of_many_units())
    made = []

    class Watched(LocalFolder):
        def put_new(self, key, data):
            made.append(key)
            return super().put_new(key, data)

    open_store(config.store, create=True)
    run_plan(config, Store(Watched(tmp_path / "store"), "ds/"), ALONE)
    steps = [key.split("/")[3] for key in made if f"/{FINISH}/" in key]
    assert {step: steps.count(step) > 1 for step in steps} == {
        **dict.fromkeys(("hashes", "exact", "kept", "near", "copies", "rows", "windows"), True),
        "groups.json": False,
        "listed": False,
    } or steps.count("windows") == 1


def test_a_table_that_is_scanned_again_makes_all_units_again(tmp_path, small_units):
    for file in range(3):
        write_tar(tmp_path / "in", f"{file}.tar", sample_members("a", png(file), {"caption": f"{file}"}))
    config = config_of(tmp_path, ("webdataset", tmp_path / "in"))
    dataset = open_store(config.store, create=True).sub("ds")
    with pytest.raises(KilledError):
        run_plan(config, Store(Killed(tmp_path / "store", 12, True), "ds/"), ALONE)
    assert list(dataset.list(f"{FINISH}/rows")) or list(dataset.list(f"{FINISH}/exact"))
    dataset.delete("scan/00000001.parquet")
    write_tar(tmp_path / "in", "1.tar", sample_members("a", png(0), {"caption": "another"}))
    run_plan(config, dataset, ALONE)
    assert [file["dropped"] for file in read_plan_record(dataset)["files"]] == [
        {},
        {"dedupe: same file": 1},
        {},
    ]


def test_sections_of_a_pack_are_checked(tmp_path):
    dataset = open_store(str(tmp_path), create=True)
    sections = [b"", b"one", bytes(200_000), b"last"]
    dataset.put("pack", pack(sections))
    assert [read_section(dataset, "pack", number, 4) for number in range(4)] == sections
    assert [section_bytes(dataset, "pack", number, 4) for number in range(4)] == [0, 3, 200_000, 4]
    whole = pack(sections)
    damaged = [whole[:20], whole[:-1], whole[:-3] + b"x" + whole[-2:], b"x" + whole[1:], pack(sections[:3])]
    table = bytearray(whole)
    struct.pack_into("<Q", table, 24, 1)
    for data in [*damaged, bytes(table)]:
        dataset.put("pack", data)
        with pytest.raises(StoreError, match=r"pack: damaged: .*: delete it and run plan again"):
            read_section(dataset, "pack", 3, 4)
    with pytest.raises(FileNotFoundError):
        read_section(dataset, "absent", 0, 1)


def test_a_damaged_unit_is_named_and_can_be_deleted(tmp_path, small_units):
    for file in range(3):
        write_tar(tmp_path / "in", f"{file}.tar", sample_members("a", png(file), {"caption": f"{file}"}))
    config = config_of(tmp_path, ("webdataset", tmp_path / "in"))
    whole = open_store(str(tmp_path / "whole"), create=True).sub("ds")
    run_plan(config, whole, ALONE)
    dataset = open_store(config.store, create=True).sub("ds")
    with pytest.raises(KilledError):
        run_plan(config, Store(Killed(tmp_path / "store", 12, True), "ds/"), ALONE)
    for key in [key for key in dataset.list(f"{FINISH}/") if not key.endswith(".json")]:
        path = dataset.local_path(key)
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if np.frombuffer(data[8:16], "<u8") else b"")
    with pytest.raises(StoreError, match=r"damaged: .* delete it and run plan again") as error:
        run_plan(config, dataset, ALONE)
    for _ in range(20):
        dataset.delete(str(error.value).removeprefix(f"{dataset.uri}/").partition(":")[0])
        try:
            run_plan(config, dataset, ALONE)
            break
        except StoreError as again:
            error.value.args = again.args
    assert content(dataset) == content(whole)


@pytest.mark.timeout(250)
@pytest.mark.parametrize("seed", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_faults_of_the_network_change_no_byte(tmp_path, s3, proxy, small_units, monkeypatch, seed):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "60")
    config = config_for(tmp_path, plan_of_many_units())
    local = open_store(config.store, create=True).sub("ds")
    run_plan(config, local, ALONE)
    config.store = s3
    dataset = open_store(s3).sub("ds")
    proxy.faults = [RandomFaults(seed, 0.10)]
    for task in (1, 0, 2):
        run_plan(config, dataset, Share(task, 3))
    hits = proxy.faults[0].hits
    proxy.faults = []
    assert hits > 20
    assert content(dataset) == content(local)
