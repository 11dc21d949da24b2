"""cluster/ray.sh on a real Slurm with a real Ray, on one node: two on one machine share their ports."""

import sys

import pytest

from data_prep.__main__ import main
from data_prep.dataset.parts import committed_parts, read_plan
from data_prep.store.store import open_store
from tests.helpers.engines import stored

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]


def test_a_job_writes_the_bytes_of_one_process(slurm, training, tmp_path):
    texts = {}
    for name in ("alone", "ray"):
        texts[name] = tmp_path / f"{name}.yaml"
        texts[name].write_text(
            f"name: ds\nstore: {tmp_path}/{name}\nworkers: 0\npart_rows: 8\nimage_format: png\n"
            "sources: [{kind: scenes, scenes: {count: 60, seed: 1, file_rows: 16}, captions: {list: list}}]\n"
            "caption_kinds: [list]\nbuckets: {resolution: 32, step: 8}\n"
        )
    for step in ("plan", "pairs"):
        main([step, str(texts["alone"])])

    words = ("sbatch", "--parsable", "--nodes=1", "cluster/ray.sh", str(texts["ray"]))
    job = training.type(*words, PYTHON=sys.executable).strip()
    ended = slurm.wait_for(job, seconds=400)["JobState"]
    assert ended == "COMPLETED", "".join(path.read_text() for path in training.logs.iterdir())

    dataset, alone = (open_store(str(tmp_path / name)).sub("ds") for name in ("ray", "alone"))
    assert len(committed_parts(dataset, "pairs")) == len(read_plan(dataset).parts) > 3
    assert stored(dataset) == stored(alone)
