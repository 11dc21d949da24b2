"""An ablation from scenes to its report, with the real programs, at the smallest size."""

import json

import pytest

from data_prep.__main__ import main as data_prep
from model.vae import small_vae
from pipeline import ablate
from tests.model import tiny_llm

pytestmark = pytest.mark.timeout(240)

DATASET = """
name: set
store: {here}/store
sources: [{{kind: scenes, scenes: {{count: 16, seed: 0}}, captions: {{list: list}}}}]
caption_kinds: [list]
buckets: {{resolution: 32, max_aspect: 1.0, step: 16}}
part_rows: 8
image_format: png
workers: 0
latents: [{{name: latents, vae: {here}/vae}}]
text: [{{name: tiny, llm: {here}/llm, dtype: fp32, prefix: "{{instruction}} ", suffix: "<end>"}}]
"""
STAGE = """
name: small
runs: {here}/runs
samples: 16
global_batch: 8
data: {{store: {here}/store, dataset: set, workers: 0}}
fusion: {{families: [tiny], mode: none, width: 32, heads: 2}}
model: {{depth: 1, width: 32, heads: 2, patch: 1}}
engine: {{reduce_bucket: 100000, prefetch_bucket: 100000, overlap_comm: false}}
sample: {{steps: 2, height: 32, width: 32}}
log: {{tensorboard: false, every_steps: 1}}
"""
ROWS = """
families: {a: tiny}
rows:
  full: {title: Full refiner, paper: 2.0, settings: ["fusion.families=[${families.a}]", fusion.refiner_blocks=1]}
  other: {title: Another LLM, paper: 1.0, settings: ["fusion.families=[absent]"]}
"""


def test_from_scenes_to_a_report(tmp_path, capfd, monkeypatch):
    for name, text in (("set", DATASET), ("stage", STAGE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(here=tmp_path))
    (tmp_path / "rows.yaml").write_text(ROWS)
    small_vae().save_pretrained(tmp_path / "vae")
    tiny_llm.make(tmp_path / "llm", tiny_llm.llama)
    for step in ("plan", "pairs", "latents", "text", "snapshot"):
        data_prep([step, str(tmp_path / "set.yaml")])

    arguments = [str(tmp_path / "stage.yaml"), "--rows", str(tmp_path / "rows.yaml")]
    arguments += ["--seeds", "1", "--scored", "4", "--segments", "2"]
    monkeypatch.setattr("sys.argv", ["ablate", *arguments])
    ablate.main()
    folder = tmp_path / "runs" / "small_ablation"
    score = json.loads((folder / "full/seed_0/score.json").read_text())
    assert 0 <= score["score"] <= 1
    assert len(score["positions"]) == 2
    assert len(list((folder / "full/seed_0/scenes").glob("0*.png"))) == 4
    table = (folder / "table.md").read_text()
    assert "| Full refiner | 2.00 |" in table
    assert "| chance | - |" in table
    assert "Left out: Another LLM: no text family `absent`." in table
    assert "<img" in (folder / "report.html").read_text()

    # nothing is done again, and what was trained cannot be mixed with other settings
    before = (folder / "full/seed_0/metrics.jsonl").read_text()
    ablate.main()
    assert (folder / "full/seed_0/metrics.jsonl").read_text() == before
    (folder / "full/seed_0/score.json").unlink()
    monkeypatch.setattr("sys.argv", ["ablate", *arguments, "optim.lr=0.5"])
    with pytest.raises(SystemExit) as exit:
        ablate.main()
    assert exit.value.code == 2
    assert "was trained with other settings" in capfd.readouterr().err
