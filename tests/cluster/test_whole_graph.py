"""From raw pairs to pictures by one command, with the real programs, on a real Slurm."""

import json

import pytest
from PIL import Image

from tests.helpers.raw_material import smooth_image
from tests.helpers.tiny_dataset import write_dataset, write_stage

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

PAIRS = 32


def make_raw_pairs(folder):
    """Pictures with captions, one of them too small for the dataset's filter."""
    folder.mkdir()
    for number in range(PAIRS + 1):
        side = 48 if number < PAIRS else 16
        smooth_image(number, side, side).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture number {number}")


def test_from_raw_pairs_to_pictures(slurm, training, tmp_path):
    make_raw_pairs(tmp_path / "raw")
    graph = tmp_path / "graph"
    dataset = write_dataset(graph, f"{{kind: folder, path: {tmp_path}/raw}}", "original")
    with dataset.open("a") as file:
        file.write("filters: [{name: min_side, value: 24}]\n")
    stages = [str(write_stage(graph, name)) for name in ("first", "second")]
    (tmp_path / "prompts.txt").write_text("a red apple\ntwo birds\n")
    training.settings.write_text(
        ". cluster/env.sh\nSHARD_OPTIONS=(--array=0-1)\nENCODE_OPTIONS=(--array=0-1)\n"
    )
    real = {"PYTHON": training.real_python, "DS_ACCELERATOR": "cpu", "PROMPTS": tmp_path / "prompts.txt"}

    printed = training.type("cluster/pretrain.sh", "--nodes=2", str(dataset), *stages, **real)
    jobs = [line.split()[0] for line in printed.splitlines() if line[0].isdigit()]
    states = [slurm.wait_for(job, seconds=480)["JobState"] for job in jobs[-1:]]
    said = "\n".join(f"-- {path.name}\n{path.read_text()}" for path in sorted(training.logs.iterdir()))
    assert states == ["COMPLETED"], printed + said

    snapshot = json.loads(next((graph / "store/set/snapshots").glob("*/snapshot.json")).read_text())
    assert sum(bucket["rows"] for bucket in snapshot["buckets"].values()) == PAIRS, said
    assert sorted(snapshot["families"]) == ["latents", "tiny"]
    starts = [
        json.loads(line)
        for line in (graph / "runs/second/metrics.jsonl").read_text().splitlines()
        if '"start"' in line
    ]
    assert starts[0]["how"] == f"started from {graph}/runs/first", said
    assert starts[0]["world"] == 2
    drawn = [
        json.loads(line) for line in (graph / "runs/second/samples/index.jsonl").read_text().splitlines()
    ]
    assert [record["prompt"] for record in drawn] == ["a red apple", "two birds"]
    for record in drawn:
        with Image.open(graph / "runs/second/samples" / record["file"]) as image:
            assert image.size == (32, 32)
