"""A real Ray cluster of three nodes on this machine: nodes, drivers and workers die, and the store ends as if
one process had written it. About two minutes; `test_engines.py` has the quick properties."""

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_prep.dataset.garbage import collect_garbage
from data_prep.dataset.parts import committed_parts, read_plan, register_family
from data_prep.dataset.verify import verify
from data_prep.engines import Ray, connected, run
from data_prep.families.encode import encode_family
from data_prep.pairs.pairs import run_pairs
from data_prep.plan.plan import run_plan
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.common.share import Share
from tests.data_prep.plan.test_finish import config_for
from tests.data_prep.test_engines import PLAN
from tests.helpers.engines import NumberStep, numbers, stored
from tests.helpers.fake_dataset import FAMILIES, encoder, make_families, make_pairs, plan
from tests.helpers.raw_material import ALONE

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parent.parent.parent
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}
DRIVER = """
from data_prep.engines import Ray, connected
from data_prep.store.store import open_store
from model.common.share import Share
from tests.helpers.fake_dataset import make_families
import sys
share = Ray() if sys.argv[2] == "ray" else Share.parse(sys.argv[2])
with connected(share):
    make_families(open_store(sys.argv[1]).sub("ds"), share, nap=0.2)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Start three nodes of one core each, with their own processes, and connect to them."""
    from ray.cluster_utils import Cluster

    # Paths of sockets have at most 107 characters.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(tmp_path_factory.mktemp("r")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # On a busy machine the processes of a node take a minute to find each other.
        patch.setenv("RAY_agent_register_timeout_ms", "300000")
        patch.setenv("RAY_worker_register_timeout_seconds", "300")
        # Workers import the tests' helpers.
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(ROOT)
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(**NODE)
        patch.setenv("RAY_ADDRESS", cluster.address)
        with connected(Ray()):
            yield cluster
        cluster.shutdown()


@pytest.fixture
def three_nodes(cluster):
    """Replace the nodes that an earlier test has killed."""
    while len(cluster.list_all_nodes()) < 3:
        cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    return cluster


@pytest.fixture
def dataset(tmp_path):
    """40 parts of pairs."""
    dataset = open_store(str(tmp_path / "store"), create=True).sub("ds")
    plan(dataset, {"64x64": [3] * 30, "64x96": [2] * 10})
    make_pairs(dataset)
    return dataset


def content_of(tmp_path, dataset):
    """Return what one process makes of the same pairs."""
    alone = open_store(str(tmp_path / "alone"), create=True).sub("ds")
    for key, data in ((key, dataset.read(key)) for key in dataset.list("")):
        if not key.startswith(("commits/latents", "commits/llm", "families/", "rollups/")):
            alone.put_new(key, data)
    make_families(alone)
    return stored(alone)


def wait_for_parts(dataset, family, count):
    for _ in range(6000):
        if len(committed_parts(dataset, family)) >= count:
            return
        time.sleep(0.05)
    pytest.fail(f"{family} never had {count} parts")


@pytest.mark.parametrize("actors", [1, 3])
def test_all_steps_write_the_bytes_of_one_process(three_nodes, tmp_path, actors):
    config = config_for(tmp_path, PLAN)
    contents = []
    for name, share in (("alone", ALONE), ("ray", Ray(actors=actors))):
        config.store = str(tmp_path / name)
        dataset = open_store(config.store, create=True).sub("ds")
        run_plan(config, dataset, share)
        run_pairs(config, dataset, share)
        make_families(dataset, share)
        result = verify(dataset, True, share)
        assert result.problems == []
        contents.append((stored(dataset), result))
    assert contents[0] == contents[1]


def test_a_node_that_dies_costs_nothing_but_time(three_nodes, dataset, tmp_path):
    expected = content_of(tmp_path, dataset)
    family = register_family(dataset, FAMILIES[0], None)
    _, *others = three_nodes.list_all_nodes()
    after = random.randint(1, 25)

    def kill():
        wait_for_parts(dataset, family.name, after)
        three_nodes.remove_node(others[-1], allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    encode_family(dataset, family, encoder(family, nap=0.2), Ray())
    killer.join()
    assert len(three_nodes.list_all_nodes()) == 2
    make_families(dataset, Ray())
    collect_garbage(dataset, -1, delete=True)
    assert stored(dataset) == expected
    assert verify(dataset, deep=True).problems == []


def test_a_driver_that_dies_leaves_what_is_done(three_nodes, dataset, tmp_path):
    expected = content_of(tmp_path, dataset)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, dataset.uri.removesuffix("/ds"), "ray"], cwd=ROOT
    )
    wait_for_parts(dataset, "latents", random.randint(1, 20))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    done = committed_parts(dataset, "latents")
    assert len(done) < 40
    before = {part: dataset.read(part.commit_key("latents")) for part in done}
    make_families(dataset, Ray())
    assert {part: dataset.read(part.commit_key("latents")) for part in done} == before
    collect_garbage(dataset, -1, delete=True)
    assert stored(dataset) == expected


def test_a_unit_that_kills_its_worker_is_named_and_the_others_are_done(three_nodes, dataset):
    step = NumberStep(dataset, 20, kill={"007"}, batch=4)
    with pytest.raises(UserError, match=r"1 of 20 units could not be done \(007: its worker was killed"):
        run(step, Ray())
    assert numbers(dataset) == set(step.units) - {"007"}


def test_an_array_task_and_a_ray_job_work_at_once(three_nodes, dataset, tmp_path):
    expected = content_of(tmp_path, dataset)
    uri = dataset.uri.removesuffix("/ds")
    task = subprocess.Popen([sys.executable, "-c", DRIVER, uri, "1/2"], cwd=ROOT)
    make_families(dataset, Ray(), nap=0.2)
    assert task.wait(600) == 0
    make_families(dataset, Share(0, 2))
    collect_garbage(dataset, -1, delete=True)
    assert stored(dataset) == expected
    assert len(read_plan(dataset).parts) == 40 == len(committed_parts(dataset, "llm"))


def test_the_command_uses_the_cluster_and_names_what_fails(three_nodes, tmp_path):
    config = config_for(tmp_path, PLAN)
    path = tmp_path / "ds.yaml"
    path.write_text(
        f"name: ds\nstore: {tmp_path}/s\nworkers: 0\npart_rows: 2\nimage_format: png\n"
        f"sources: [{{path: {config.sources[0].path}}}]\nbuckets: {{resolution: 32, step: 8}}\n"
        f"latents: [{{name: latents, vae: {tmp_path}/none}}]\n"
    )

    def command(*words):
        line = [sys.executable, "-m", "data_prep", *words, "--engine", "ray"]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)

    done = command("plan", str(path))
    assert done.returncode == 0, done.stderr
    failed = command("latents", str(path))
    assert failed.returncode == 2
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path}/none" in line
