"""A run and an export written before the code moved into sub-packages still resume, load and generate.

`tests/fixtures/before_the_house` was written by commit b394b20: a store, a run that was stopped at step 4 of
8, an export, and the numbers that b394b20 itself continued with. `half_prepared.tar.xz` has sources and three
stores that it left half done, and what it made of them in one go.
"""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from data_prep.config import load_dataset
from data_prep.dataset.parts import PLAN_KEY, committed
from data_prep.dataset.records import parse_table
from data_prep.dataset.schema import PAIRS, TABLE
from data_prep.dataset.verify import verify
from data_prep.pairs.pairs import run_pairs
from data_prep.plan.plan import run_plan
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.common.share import Share
from model.functional import CPU_HAS_BF16
from pipeline import diffusers_pipeline
from pipeline.checkpoint.checkpoints import load_weights
from pipeline.inference.sampler import SamplingParams
from pipeline.inference.source import load_export
from pipeline.stage.config import load_run
from tests.helpers import tiny_sampler

BEFORE = Path(__file__).parent / "fixtures" / "before_the_house"
HALF_PREPARED = BEFORE.parent / "half_prepared.tar.xz"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())
CPU = torch.device("cpu")


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_resumes_with_the_losses_that_it_would_have_had(tmp_path, world):
    # here, since the other tests run without the packages of training too
    from tests.helpers.distributed import on_ranks
    from tests.seams import seam_tasks

    shutil.copytree(BEFORE / "run", tmp_path / "runs" / "small")
    shutil.copytree(BEFORE / "store", tmp_path / "store")
    results = on_ranks(world, seam_tasks.resume_old, str(tmp_path))
    assert [code for code, _ in results] == [0] * world
    reports = results[0][1]
    assert [report["step"] for report in reports] == [report["step"] for report in EXPECTED["reports"]]
    for report, expected in zip(reports, EXPECTED["reports"], strict=True):
        for name in ("loss", "grad_norm", "lr", "loss_t0"):
            if expected[name] is None:  # no sample of the step fell into the bin
                assert name not in report
            else:
                # Another number of processes sums bf16 gradients in another order, and so does a CPU with
                # instructions for bf16: the files were made on one without.
                tolerance = 1e-5 if world == 1 and not CPU_HAS_BF16 else 2e-3
                assert report[name] == pytest.approx(expected[name], rel=tolerance), (report["step"], name)


def test_a_stage_with_nulls_for_the_presets_sizes_is_read(tmp_path):
    text = (BEFORE / "run" / "stage.yaml").read_text()
    assert "depth: 1" in text
    (tmp_path / "stage.yaml").write_text(text.replace("depth: 1", "depth: null"))
    assert load_run(tmp_path).dit(2).depth == 6  # the preset's
    assert load_run(BEFORE / "run").dit(2).width == 16
    assert all(tensor.isfinite().all() for tensor in load_weights(BEFORE / "run", "ema").values())


def test_an_export_generates_the_image_that_it_generated(monkeypatch):
    monkeypatch.setattr(
        diffusers_pipeline,
        "load_llm",
        lambda family, device: tiny_sampler.LetterLLM(tiny_sampler.WIDTHS[family.name]),
    )
    pipeline = diffusers_pipeline.LIDiTPipeline.from_pretrained(BEFORE / "export")
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(["a red cat"], seed=5, output_type="latent").images
    assert list(latents.shape) == EXPECTED["latents_shape"]
    assert latents.flatten()[:24].tolist() == pytest.approx(EXPECTED["latents"], rel=1e-4, abs=1e-5)
    pixels = pipeline(["a red cat"], seed=5, output_type="pt").images
    assert pixels.mean((2, 3)).flatten().tolist() == pytest.approx(EXPECTED["pixels_mean"], rel=1e-4)

    params = SamplingParams(3, 3.0, 16, 24)
    again = load_export(BEFORE / "export", CPU, torch.float32).latents(["a red cat"], [5], params)
    torch.testing.assert_close(again, latents)


def half_prepared(folder):
    """Unpack what b394b20 left half done; its settings name the folder of sources relative to this one."""
    with tarfile.open(HALF_PREPARED) as archive:
        archive.extractall(folder, filter="data")
    return json.loads((folder / "expected.json").read_text())


@pytest.mark.parametrize("left", ["scan_half", "finish_half", "pairs_half"])
def test_a_store_that_is_half_prepared_is_completed(tmp_path, monkeypatch, left):
    """Of `scan_half`, one of two tasks has scanned its files; of `finish_half`, a task was killed before it
    wrote `plan.json`; of `pairs_half`, one of two tasks has made its pairs."""
    expected = half_prepared(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = load_dataset(Path("dataset.yaml"), [f"store={left}"])
    dataset = open_store(left).sub("ds")
    before = {key: dataset.read(key) for key in dataset.list("")}
    run_plan(config, dataset, Share())
    run_pairs(config, dataset, Share())

    ids = {}
    for part, commit in committed(dataset, PAIRS).items():
        table = next(file.key for file in commit.files if file.key.endswith(TABLE))
        ids[f"{part.bucket}/{part.number:05d}"] = parse_table(dataset.read(table))["id"].to_pylist()
    assert ids == expected["ids"]
    dropped = {}
    for key in dataset.list("dropped/"):
        for row in parse_table(dataset.read(key)).to_pylist():
            dropped[str(row["id"])] = row["reason"]
    assert dropped == expected["dropped"]
    assert verify(dataset, deep=True).problems == []
    if left != "finish_half":  # whose manifest files are written again
        assert {key for key, data in before.items() if dataset.read(key) != data} == set()


def test_manifest_files_that_a_plan_of_an_earlier_version_names_are_not_replaced(tmp_path, monkeypatch):
    half_prepared(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = load_dataset(Path("dataset.yaml"), ["store=finish_half"])
    dataset = open_store("finish_half").sub("ds")
    dataset.put(PLAN_KEY, (tmp_path / "pairs_half/ds/manifest/plan.json").read_bytes())
    with pytest.raises(UserError, match=r"left by an older version .*: delete the folder manifest and run"):
        run_plan(config, dataset, Share())
    for key in list(dataset.list("manifest/")):
        dataset.delete(key)
    assert run_plan(config, dataset, Share()) is not None
