"""Pairs that are in an evaluation set, or that another program listed, are left out with a reason."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.config import DatasetConfig, DedupeConfig, ScenesConfig, SourceConfig
from data_prep.dataset.accounts import account
from data_prep.dataset.parts import read_plan, read_plan_record
from data_prep.pairs.pairs import run_pairs
from data_prep.plan import against
from data_prep.plan.against import EvaluationSets, evaluation_key
from data_prep.plan.budget import print_budget
from data_prep.plan.dedupe import Spool
from data_prep.plan.drop_list import find_rows
from data_prep.plan.finish import SETTINGS_KEY
from data_prep.plan.plan import run_plan
from data_prep.plan.rows import dropped_key
from data_prep.plan.scan import EVALUATION
from data_prep.plan.scan_tables import scan_key
from data_prep.sources.source import SourceFile
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.common.share import Share
from tests.helpers.plans import content, planned_ids, write_three_tars
from tests.helpers.raw_material import (
    ALONE,
    config_of,
    encoded,
    png,
    reasons_of,
    sample_members,
    smooth_image,
    write_parquet,
    write_tar,
)

DISTANCE = 4
BASES = [0x0123456789ABCDEF, 0xFEDCBA9876543210, 0, 0xFFFF0000FFFF0000]
hashes = st.builds(
    lambda base, bits: BASES[base] ^ sum(1 << bit for bit in bits),
    st.integers(0, 3),
    st.sets(st.integers(0, 63), max_size=5),
)
IMAGES = [png(number) for number in range(6)] + [
    encoded(smooth_image(number).resize((64, 64))) for number in range(3)
]
"""Six images, and three that look like the first ones."""


def write_images(folder, numbers):
    folder.mkdir(parents=True)
    for place, number in enumerate(numbers):
        (folder / f"{place:03d}.png").write_bytes(IMAGES[number])


def write_pairs(folder, numbers):
    members = []
    for place, number in enumerate(numbers):
        members += sample_members(f"{place:03d}", IMAGES[number], {"caption": f"caption {place}"})
    write_tar(folder, "a.tar", members)


def planned(config, *tasks):
    dataset = open_store(config.store, create=True).sub("ds")
    for task in tasks or (ALONE,):
        run_plan(config, dataset, task)
    return dataset


def rows_by_reason(dataset):
    table = pq.read_table(io.BytesIO(dataset.read(dropped_key(0)))).to_pylist()
    return {row["id"]: row["reason"] for row in table}


def expected_reasons(pairs, sets, near):
    """Judge rows one by one: against the sets, then against the rows that are left, for each kind of hash."""

    def alike(one, other):
        return one != other and one % 6 == other % 6

    reasons = {}
    for row, image in enumerate(pairs):
        for name, images in sets:
            if image in images:
                reasons.setdefault(row, f"dedupe: same file as in {name}")
        if row not in reasons and image in pairs[:row]:
            reasons[row] = "dedupe: same file"
    if near:
        kept = [row for row in range(len(pairs)) if row not in reasons]
        for row in kept:
            for name, images in sets:
                if any(alike(pairs[row], image) for image in images):
                    reasons.setdefault(row, f"dedupe: looks the same as in {name}")
        kept = [row for row in kept if row not in reasons]
        for row in kept:
            if any(alike(pairs[row], pairs[other]) for other in kept if other < row):
                reasons[row] = "dedupe: looks the same"
    return reasons


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=9),
    st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=3), min_size=1, max_size=2),
    st.booleans(),
)
def test_rows_are_dropped_as_if_the_images_of_the_sets_had_never_been_there(
    tmp_path_factory, pairs, sets, near
):
    folder = tmp_path_factory.mktemp("against")
    write_pairs(folder / "in", pairs)
    sources = []
    for number, images in enumerate(sets):
        write_images(folder / f"set{number}", images)
        sources.append(SourceConfig("folder", str(folder / f"set{number}")))
    names = [(source.path, images) for source, images in zip(sources, sets, strict=True)]
    expected = expected_reasons(pairs, names, near)
    dedupe = DedupeConfig(True, DISTANCE if near else None, sources)
    config = config_of(folder, ("webdataset", folder / "in"), dedupe=dedupe)
    if len(expected) == len(pairs):
        with pytest.raises(UserError, match="no pairs left"):
            planned(config)
        assert not list(open_store(config.store).sub("ds").list(""))
        return

    dataset = planned(config)
    assert rows_by_reason(dataset) == expected
    assert sorted(planned_ids(dataset)) == [row for row in range(len(pairs)) if row not in expected]
    record = read_plan_record(dataset)
    assert [(each["name"], each["images"], each["unreadable"]) for each in record["against"]] == [
        (name, len(images), 0) for name, images in names
    ]
    run_pairs(config, dataset, ALONE)
    assert account(dataset)[0].dropped_by_plan == len(expected)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(hashes, max_size=30),
    st.lists(st.lists(hashes | st.none(), max_size=12), min_size=1, max_size=3),
    st.integers(0, 6),
    st.sampled_from([4, 1 << 20]),
)
def test_comparison_with_the_sets_agrees_with_comparing_all(
    tmp_path_factory, rows, sets, distance, chunk_rows
):
    folder = tmp_path_factory.mktemp("sets")
    dataset = open_store(str(folder / "store"), create=True)
    files = [SourceFile(number, number, str(number)) for number in range(len(sets))]
    for number, images in enumerate(sets):
        table = [{"id": row, "reason": "", "hash": image, "phash": image} for row, image in enumerate(images)]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(table, EVALUATION), sink)
        dataset.put(evaluation_key(number), sink.getvalue())
    counts = [{"files": 1, "ignored": {}} for _ in sets]
    dataset.put("scan/against/sources.json", json.dumps(counts).encode())
    sources = [SourceConfig("folder", f"/{number}") for number in range(len(sets))]
    evaluation = EvaluationSets(DatasetConfig(dedupe=DedupeConfig(True, 3, sources)), dataset, files)

    values = np.array(rows, np.uint64)
    equal = [next((n for n, images in enumerate(sets) if row in images), against.NO_SET) for row in rows]
    assert evaluation.with_equal_hash(values).tolist() == equal

    spool = Spool(folder, "phashes")
    spool.add(values, np.arange(len(rows), dtype=np.int64))
    found = {}
    for ids, numbers in evaluation.near(spool, distance, chunk_rows):
        for id, number in zip(ids.tolist(), numbers.tolist(), strict=True):
            found[id] = min(number, found.get(id, number))
    spool.close()
    expected = {}
    for row, value in enumerate(rows):
        for number, images in enumerate(sets):
            known = [image for image in images if image is not None]
            if any((value ^ image).bit_count() <= distance for image in known):
                expected.setdefault(row, number)
    assert found == expected
    assert [each["unreadable"] for each in evaluation.counts()] == [
        sum(image is None for image in images) for images in sets
    ]


@pytest.fixture
def contaminated(tmp_path):
    """Three tars with nine pairs each, of which an evaluation set has three and a list two."""
    write_three_tars(tmp_path / "in")
    for name, numbers in (("a", (0, 13)), ("b", (26,))):
        rows = [{"image": png(number), "label": 3} for number in numbers]
        write_parquet(tmp_path / f"set/{name}.parquet", rows)
    write_ids(tmp_path / "ids.parquet", [1 << 32 | 2, 5, 5])
    dedupe = DedupeConfig(
        against=[SourceConfig("parquet", str(tmp_path / "set"))], drop=str(tmp_path / "ids.parquet")
    )
    return config_of(tmp_path, ("webdataset", tmp_path / "in"), dedupe=dedupe)


def write_ids(path, ids, name="id", kind=None):
    pq.write_table(pa.table({name: pa.array(ids, kind or pa.int64())}), path)


def test_any_number_of_tasks_drop_the_same_rows(contaminated, tmp_path):
    alone = planned(contaminated)
    set_name = contaminated.dedupe.against[0].path
    assert reasons_of(alone) == {
        f"dedupe: same file as in {set_name}": 3,
        "dedupe: listed in dedupe.drop": 2,
    }
    contaminated.store = str(tmp_path / "other")
    shared = planned(contaminated, *(Share(index, 4) for index in (3, 1, 0, 2)))
    assert content(alone) == content(shared)
    for key in list(shared.list("")):
        if key not in (SETTINGS_KEY, "scan/files.json", "scan/sources.json", scan_key(1), evaluation_key(1)):
            shared.delete(key)
    shared.delete("scan/against/files.json")
    planned(contaminated)
    assert content(alone) == content(shared), "a plan that was killed goes on"


def test_task_that_has_only_evaluation_files_is_waited_for(contaminated, capsys):
    dataset = open_store(contaminated.store, create=True).sub("ds")
    tasks = [Share(index, 5) for index in range(5)]
    assert [run_plan(contaminated, dataset, task) for task in tasks[:4]] == [None] * 4
    assert "1 of 5 source files are not scanned yet (tasks 4)" in capsys.readouterr().out
    assert run_plan(contaminated, dataset, tasks[4]) is not None


def test_the_plan_says_what_it_compared_and_which_ids_had_no_row(contaminated, tmp_path, capsys):
    write_ids(tmp_path / "ids.parquet", [5, -1, 9, 7 << 32, 1 << 62, None])
    (tmp_path / "set/readme.md").touch()
    write_parquet(tmp_path / "set/c.parquet", [{"image": b"damaged", "label": 1}])
    dataset = planned(contaminated)
    capsys.readouterr()
    print_budget(contaminated, dataset, read_plan(dataset), 400)
    out = capsys.readouterr().out
    set_name = contaminated.dedupe.against[0].path
    assert f"3 left out: dedupe: same file as in {set_name}\n" in out
    assert "1 left out: dedupe: listed in dedupe.drop\n" in out
    assert f"evaluation set {set_name}: 4 images, 0 of them unreadable, 1 .md ignored\n" in out
    assert "dedupe.drop: 6 ids, 5 of them match no row\n" in out


def test_an_evaluation_set_without_a_readable_image_is_warned_of(contaminated, tmp_path, capsys):
    write_parquet(tmp_path / "urls/a.parquet", [{"image": "https://a.org/1.png"}])
    contaminated.dedupe = DedupeConfig(against=[SourceConfig("parquet", str(tmp_path / "urls"))])
    dataset = planned(contaminated)
    capsys.readouterr()
    print_budget(contaminated, dataset, read_plan(dataset), 400)
    assert "1 images, 1 of them unreadable" in (out := capsys.readouterr().out)
    assert f"warning: no image of {tmp_path}/urls can be read" in out


def test_an_image_counts_whatever_its_record_and_captions_are(tmp_path):
    write_pairs(tmp_path / "in", [0, 1, 2])
    write_tar(
        tmp_path / "set", "a.tar", [("x.png", IMAGES[0]), ("x.json", b"{damaged"), ("y.png", IMAGES[1])]
    )
    dedupe = DedupeConfig(against=[SourceConfig("webdataset", str(tmp_path / "set"))])
    dataset = planned(config_of(tmp_path, ("webdataset", tmp_path / "in"), dedupe=dedupe))
    assert planned_ids(dataset) == [2]


def test_only_the_first_rows_of_a_limited_set_count(tmp_path):
    write_pairs(tmp_path / "in", [0, 1, 2])
    write_pairs(tmp_path / "set", [0, 1])
    dedupe = DedupeConfig(against=[SourceConfig("webdataset", str(tmp_path / "set"), limit=1)])
    dataset = planned(config_of(tmp_path, ("webdataset", tmp_path / "in"), dedupe=dedupe))
    assert sorted(planned_ids(dataset)) == [1, 2]


def test_sets_are_compared_also_where_duplicates_are_kept(tmp_path):
    write_pairs(tmp_path / "in", [0, 1, 1])
    write_images(tmp_path / "set", [0])
    dedupe = DedupeConfig(exact=False, against=[SourceConfig("folder", str(tmp_path / "set"))])
    dataset = planned(config_of(tmp_path, ("webdataset", tmp_path / "in"), dedupe=dedupe))
    assert sorted(planned_ids(dataset)) == [1, 2]


def test_settings_without_the_new_keys_are_recorded_as_before(contaminated):
    contaminated.dedupe = DedupeConfig(near=3)
    dataset = planned(contaminated)
    assert json.loads(dataset.read(SETTINGS_KEY))["dedupe"] == {"exact": True, "near": 3}
    assert not {"against", "drop"} & set(read_plan_record(dataset))
    assert not list(dataset.list("scan/against/"))
    assert not dataset.exists("scan/drop.json")


def test_other_sets_and_other_lists_are_refused(contaminated, tmp_path):
    planned(contaminated)
    first = contaminated.dedupe
    for dedupe in (
        replace(first, against=None),
        replace(first, drop=None),
        replace(first, against=[*first.against, SourceConfig("folder", "/elsewhere")]),
        replace(first, drop="elsewhere.parquet"),
    ):
        contaminated.dedupe = dedupe
        with pytest.raises(UserError, match="`dedupe` was"):
            planned(contaminated)


def test_a_list_that_changes_is_named_before_and_after_the_plan_is_made(contaminated, tmp_path, capsys):
    dataset = open_store(contaminated.store, create=True).sub("ds")
    assert run_plan(contaminated, dataset, Share(0, 2)) is None
    write_ids(tmp_path / "ids.parquet", [3])
    with pytest.raises(UserError, match=r"ids\.parquet has other ids than when .*/ds was planned"):
        run_plan(contaminated, dataset, Share(1, 2))

    # The same ids in another file are the same list.
    pq.write_table(
        pa.table({"score": [1.0, 2.0, 3.0], "id": pa.array([1 << 32 | 2, 5, 5], pa.uint64())}),
        tmp_path / "ids.parquet",
    )
    plan = run_plan(contaminated, dataset, Share(1, 2))
    assert plan is not None
    write_ids(tmp_path / "ids.parquet", [3])
    with pytest.raises(UserError, match="has other ids"):
        run_plan(contaminated, dataset, ALONE)
    (tmp_path / "ids.parquet").unlink()
    capsys.readouterr()
    assert run_plan(contaminated, dataset, ALONE) == plan
    assert "plan: cannot compare the ids with those of the plan: dedupe.drop: " in capsys.readouterr().out


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 5), max_size=5),
    st.lists(
        st.integers(-(2**63), 2**63 - 1)
        | st.builds(lambda f, r: f << 32 | r, st.integers(-1, 5), st.integers(0, 6))
    ),
)
def test_ids_match_exactly_the_rows_that_exist(sizes, ids):
    starts = np.concatenate([[0], np.cumsum(np.array(sizes, np.int64))]).astype(np.int64)
    rows = [file << 32 | row for file, size in enumerate(sizes) for row in range(size)]
    places = {id: place for place, id in enumerate(rows)}
    found = find_rows(np.array(ids, np.int64), starts)
    assert found.tolist() == [places.get(id, -1) for id in ids]


def test_a_list_drops_its_rows_and_changes_nothing_else(contaminated, tmp_path):
    contaminated.dedupe = DedupeConfig(near=DISTANCE)
    before = set(planned_ids(planned(contaminated)))
    listed = {0, 3, 1 << 32 | 1}
    write_ids(tmp_path / "ids.parquet", sorted(listed))
    contaminated.dedupe = DedupeConfig(near=DISTANCE, drop=str(tmp_path / "ids.parquet"))
    contaminated.store = str(tmp_path / "other")
    assert set(planned_ids(planned(contaminated))) == before - listed


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "no such file|a file, not a folder"),
        (lambda path: path.write_bytes(b"PAR1 and no more"), "not a readable parquet file"),
        (lambda path: path.write_bytes(b""), "not a readable parquet file"),
        (lambda path: write_ids(path, [1], "number"), r"no column `id` \(there are: number\)"),
        (lambda path: write_ids(path, ["1"], kind=pa.string()), "column `id` is string"),
        (lambda path: write_ids(path, [1.0], kind=pa.float64()), "column `id` is double"),
        (lambda path: path.symlink_to("/etc/passwd"), "dedupe.drop"),
    ],
)
def test_a_wrong_list_is_one_line(contaminated, tmp_path, write, message):
    path = tmp_path / "new/ids.parquet"
    path.parent.mkdir()
    write(path)
    contaminated.dedupe = DedupeConfig(drop=str(path))
    with pytest.raises(UserError, match=message) as error:
        planned(contaminated)
    assert str(error.value).isprintable()
    assert str(path) in str(error.value)


def test_a_list_in_a_missing_folder_is_one_line(contaminated, tmp_path):
    contaminated.dedupe = DedupeConfig(drop=str(tmp_path / "nowhere/ids.parquet"))
    with pytest.raises(UserError, match=r"dedupe\.drop: .*nowhere"):
        planned(contaminated)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([], r"dedupe\.against: 0 sources"),
        ([SourceConfig("folder", f"/{n}") for n in range(101)], r"dedupe\.against: 101 sources"),
        ([SourceConfig("folder")], r"dedupe\.against\[0\]\.path is empty"),
        ([SourceConfig("scenes")], r"dedupe\.against\[0\]: `scenes` and kind=scenes go together"),
        ([SourceConfig("parquet", "/data/a/")], r"dedupe\.against\[0\] is sources\[0\] \(/data/a/\)"),
        (
            [SourceConfig("folder", "/b"), SourceConfig("folder", "/data/./a")],
            r"against\[1\] is sources\[0\]",
        ),
        ([SourceConfig("mds", "s3://b/x")], r"against\[0\] is sources\[1\]"),
        ([SourceConfig("scenes", scenes=ScenesConfig(5, 7))], r"against\[0\] is sources\[2\] \(scenes\)"),
    ],
)
def test_wrong_sets_are_one_line(sets, message):
    sources = [SourceConfig("folder", "/data/a"), SourceConfig("mds", "s3://b/x/")]
    sources.append(SourceConfig("scenes", scenes=ScenesConfig(10, 7)))
    kinds = ["original", *sources[2].captions]
    with pytest.raises(UserError, match=message) as error:
        DatasetConfig(sources=sources, caption_kinds=kinds, dedupe=DedupeConfig(against=sets))
    assert str(error.value).isprintable()


def test_a_set_that_does_not_exist_is_one_line(contaminated, tmp_path):
    contaminated.dedupe = DedupeConfig(against=[SourceConfig("folder", str(tmp_path / "nowhere"))])
    with pytest.raises(UserError, match=r"dedupe\.against: .*nowhere"):
        planned(contaminated)


def test_more_images_than_fit_in_memory_are_refused(contaminated, monkeypatch):
    monkeypatch.setattr(against, "MAX_IMAGES", 2)
    with pytest.raises(UserError, match=r"dedupe\.against: more than 2 images"):
        planned(contaminated)


def test_scenes_of_another_seed_can_be_an_evaluation_set(tmp_path):
    scenes = [SourceConfig("scenes", scenes=ScenesConfig(6, seed, 3)) for seed in (1, 2)]
    config = config_of(
        tmp_path,
        caption_kinds=list(scenes[0].captions),
        sources=[scenes[0]],
        dedupe=DedupeConfig(against=[scenes[1]]),
    )
    record = read_plan_record(planned(config))
    assert [(each["name"], each["images"], each["unreadable"]) for each in record["against"]] == [
        ("scenes", 6, 0)
    ]


def test_sets_and_lists_can_be_in_a_bucket(tmp_path, s3):
    bucket = open_store(s3)
    for place in (1, 2):
        bucket.put(f"set/{place}.png", IMAGES[place])
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": [3, 9]}), sink)
    bucket.put("lists/ids.parquet", sink.getvalue())
    write_pairs(tmp_path / "in", range(5))
    against = [SourceConfig("folder", f"{s3}/set")]
    dedupe = DedupeConfig(against=against, drop=f"{s3}/lists/ids.parquet")
    dataset = planned(config_of(tmp_path, ("webdataset", tmp_path / "in"), dedupe=dedupe))
    assert sorted(planned_ids(dataset)) == [0, 4]
    assert read_plan_record(dataset)["drop"] == {"ids": 2, "unmatched": 1}
    dataset.delete("manifest.json")
    bucket.delete("lists/ids.parquet")
    with pytest.raises(UserError, match=r"dedupe\.drop: s3://.*ids\.parquet: no such file"):
        planned(config_of(tmp_path, ("webdataset", tmp_path / "in"), dedupe=dedupe))
