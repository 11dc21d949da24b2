"""Numbers of requests, counted on the wire between the store client and the endpoint, stay below formulas.

F source files, P parts, T tasks. Where a formula breaks, preparation of a billion pairs takes hours longer.
"""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.config import SourceConfig
from data_prep.dataset.parts import read_plan, read_plan_record
from data_prep.pairs.pairs import run_pairs
from data_prep.plan.manifest import read_manifest
from data_prep.plan.plan import run_plan
from data_prep.sources import ranges
from data_prep.sources.sample import Place
from data_prep.sources.source import OpenSources, list_files
from data_prep.sources.webdataset import WebDatasetSource
from data_prep.store.store import open_store
from model.common.share import Share
from tests.helpers.raw_material import ALONE, config_of, png, sample_members, write_tar

FILES, ROWS = 15, 4


@pytest.fixture
def config(tmp_path, proxy, s3):
    for number in range(FILES):
        members = []
        for row in range(ROWS):
            members += sample_members(str(row), png(number * ROWS + row), {"caption": f"{number} {row}"})
        write_tar(tmp_path / "in", f"{number:02d}.tar", members)
    return config_of(tmp_path, ("webdataset", tmp_path / "in"), store=s3, part_rows=5, workers=0)


@pytest.fixture
def dataset(config):
    return open_store(config.store, create=True).sub("ds")


def counted(proxy, function, *arguments):
    """Run a function, and return the number of its requests by kind: LIST, GET, HEAD, PUT, POST, DELETE."""
    proxy.requests.clear()
    function(*arguments)
    return Counter("LIST" if "list-type=2" in path else method for method, path, _ in proxy.requests)


def test_a_task_of_plan_lists_scan_tables_instead_of_asking_for_each(config, dataset, proxy):
    tasks = 3
    run_plan(config, dataset, Share(0, tasks))
    first = counted(proxy, run_plan, config, dataset, Share(1, tasks))
    again = counted(proxy, run_plan, config, dataset, Share(1, tasks))
    # A table per own file, and a fixed number of requests besides: not one per file of the others.
    assert first["PUT"] <= FILES / tasks + 4
    assert sum(first.values()) <= FILES / tasks + 15
    assert sum(again.values()) <= FILES / 1000 + 10


SETUP = 8
"""Requests of a task besides its list: settings, plan, counts, files, card, probe of conditional puts."""


@pytest.mark.parametrize("tasks", [1, 4])
def test_the_tasks_of_pairs_make_nine_requests_per_part_together(config, dataset, proxy, tasks):
    requests = {}
    for name, part_rows in (("few", 5), ("many", 1)):
        config.name, config.part_rows = name, part_rows
        dataset = open_store(config.store).sub(name)
        run_plan(config, dataset, ALONE)
        parts = len(read_plan(dataset).parts)
        total = Counter()
        for index in range(tasks):
            total += counted(proxy, run_pairs, config, dataset, Share(index, tasks))
        assert total["LIST"] <= tasks * (1 + parts / 1000)
        requests[parts] = sum(total.values())
        assert requests[parts] <= 9 * parts + tasks + SETUP * tasks
        again = counted(proxy, run_pairs, config, dataset, Share(0, tasks))
        assert sum(again.values()) <= parts / tasks + 1 + SETUP
    assert list(requests) == [FILES * ROWS / 5, FILES * ROWS]
    few, many = requests.values()
    assert many - few <= 9 * (FILES * ROWS - FILES * ROWS / 5)


def test_files_of_a_bucket_are_listed_with_their_versions(config, dataset, proxy, tmp_path):
    for path in (tmp_path / "in").iterdir():
        dataset.put(f"tars/{path.name}", path.read_bytes())
    config.sources[0].path = f"{dataset.uri}/tars"
    assert counted(proxy, list_files, config)["HEAD"] <= 2
    files, _ = list_files(config)
    sources = OpenSources(config, files)
    assert sources.changed(range(FILES)) == []
    dataset.put("tars/03.tar", b"another")
    assert sources.changed(range(FILES)) == ["0:03.tar"]


places = st.lists(
    st.builds(Place, st.integers(0, 120) | st.sampled_from([0, 60]), st.integers(0, 40)),
    min_size=1,
    max_size=12,
)


@given(places, st.sampled_from([0, 5, 20]), st.sampled_from([1, 30, 200]))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_near_images_of_a_tar_come_with_one_request(dataset, proxy, places, gap, joined):
    data = bytes(range(100))
    if not dataset.exists("tars/a.tar"):
        dataset.put("tars/a.tar", data)
    source = WebDatasetSource(SourceConfig("webdataset", f"{dataset.uri}/tars"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "MAX_GAP", gap)
        patch.setattr(ranges, "MAX_JOINED", joined)
        found = {}
        requests = counted(proxy, lambda: found.update(source.fetch("a.tar", places)))
    assert found == {n: data[at : at + length] for n, (at, length, _) in enumerate(places)}

    runs = []
    for start, length in sorted((at, length) for at, length, _ in places):
        end = start + length
        if not runs or start - runs[-1][1] > gap or max(end, runs[-1][1]) - runs[-1][0] > joined:
            runs.append([start, end])
        runs[-1][1] = max(runs[-1][1], end)
    assert requests == Counter({"GET": n} if (n := sum(start < end for start, end in runs)) else {})


def test_pairs_ask_once_for_the_images_of_a_chunk(config, dataset, proxy, tmp_path):
    for path in (tmp_path / "in").iterdir():
        dataset.put(f"tars/{path.name}", path.read_bytes())
    config.sources[0].path = f"{dataset.uri}/tars"
    run_plan(config, dataset, ALONE)
    run_pairs(config, dataset, ALONE)
    reads = [path for method, path, _ in proxy.requests if method == "GET" and path.endswith(".tar")]
    # The scan reads each tar once, in one piece; pairs, each file of each part.
    files = {(part, id >> 32) for part in read_plan(dataset).parts for id in ids_of(dataset, part)}
    assert len(reads) <= FILES + len(files) < FILES + FILES * ROWS


def ids_of(dataset, part):
    return read_manifest(dataset, part, read_plan_record(dataset)["manifest"])["id"].to_pylist()


def test_a_range_is_one_request(dataset, proxy):
    dataset.put("bytes", bytes(range(100)))
    for start, length, expected in ((0, 10, 10), (95, 10, 5), (100, 10, 0), (500, 10, 0)):
        requests = counted(proxy, dataset.read_range, "bytes", start, length)
        assert requests == {"GET": 1}
        assert dataset.read_range("bytes", start, length) == bytes(range(100))[start : start + expected]
    with pytest.raises(FileNotFoundError):
        dataset.read_range("absent", 3, 5)
