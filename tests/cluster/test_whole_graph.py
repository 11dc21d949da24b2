"""From raw pairs to pictures by one command, with the real programs, on a real Slurm."""

import json

import pytest
from PIL import Image

from model.vae import small_vae
from tests.data_prep.raw_material import picture
from tests.model import tiny_llm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(280)]

PAIRS = 32
DATASET = """
name: set
store: {here}/graph
sources: [{{kind: folder, path: {here}/raw}}]
caption_kinds: [original]
filters: [{{name: min_side, value: 24}}]
buckets: {{resolution: 32, max_aspect: 1.0, step: 16}}
part_rows: 8
image_format: png
workers: 0
latents: [{{name: latents, vae: {here}/vae}}]
text: [{{name: tiny, llm: {here}/llm, dtype: fp32, prefix: "{{instruction}} ", suffix: "<end>"}}]
"""
STAGE = """
runs: {here}/runs
samples: 64
global_batch: 8
data: {{store: {here}/graph, dataset: set, workers: 0}}
fusion: {{families: [tiny], mode: none, width: 32, heads: 2}}
model: {{depth: 2, width: 32, heads: 2, patch: 1}}
engine: {{reduce_bucket: 100000, prefetch_bucket: 100000, overlap_comm: false}}
checkpoint: {{every_samples: 32}}
sample: {{steps: 2, height: 32, width: 32}}
"""


def make_raw_pairs(folder):
    """Pictures with captions, one of them too small for the dataset's filter."""
    folder.mkdir()
    for number in range(PAIRS + 1):
        side = 48 if number < PAIRS else 16
        picture(number, side, side).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture number {number}")


def test_from_raw_pairs_to_pictures(slurm, training, tmp_path):
    make_raw_pairs(tmp_path / "raw")
    small_vae().save_pretrained(tmp_path / "vae")
    tiny_llm.make(tmp_path / "llm", tiny_llm.llama)
    for name, text in (("set", DATASET), ("first", STAGE), ("second", STAGE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(here=tmp_path))
    (tmp_path / "prompts.txt").write_text("a red apple\ntwo birds\n")
    training.settings.write_text(". cluster/env.sh\nSHARD_OPTIONS=(--array=0-1)\nENCODE_OPTIONS=(--array=0-1)\n")
    real = {"PYTHON": training.real_python, "DS_ACCELERATOR": "cpu", "PROMPTS": tmp_path / "prompts.txt"}

    stages = [str(tmp_path / f"{name}.yaml") for name in ("first", "second")]
    printed = training.type("cluster/pretrain.sh", "--nodes=2", str(tmp_path / "set.yaml"), *stages, **real)
    jobs = [line.split()[0] for line in printed.splitlines() if line[0].isdigit()]
    states = [slurm.wait_for(job, seconds=240)["JobState"] for job in jobs[-1:]]
    said = "\n".join(f"-- {path.name}\n{path.read_text()}" for path in sorted(training.logs.iterdir()))
    assert states == ["COMPLETED"], printed + said

    snapshot = json.loads(next((tmp_path / "graph/set/snapshots").glob("*/snapshot.json")).read_text())
    assert sum(bucket["rows"] for bucket in snapshot["buckets"].values()) == PAIRS, said
    assert sorted(snapshot["families"]) == ["latents", "tiny"]
    starts = [json.loads(line) for line in (tmp_path / "runs/second/metrics.jsonl").read_text().splitlines() if '"start"' in line]
    assert starts[0]["how"] == f"started from {tmp_path}/runs/first", said
    assert starts[0]["world"] == 2
    drawn = [json.loads(line) for line in (tmp_path / "runs/second/samples/index.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in drawn] == ["a red apple", "two birds"]
    for record in drawn:
        with Image.open(tmp_path / "runs/second/samples" / record["file"]) as image:
            assert image.size == (32, 32)
