"""A run and an export written before the code moved into sub-packages still resume, load and generate.

`tests/fixtures/before_the_house` was written by commit b394b20: a store, a run that was stopped at step 4 of
8, an export, and the numbers that b394b20 itself continued with.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from model.functional import CPU_HAS_BF16
from pipeline import diffusers_pipeline
from pipeline.checkpoint.checkpoints import load_weights
from pipeline.inference.sampler import SamplingParams
from pipeline.inference.source import load_export
from pipeline.stage.config import load_run
from tests.helpers import tiny_sampler

BEFORE = Path(__file__).parent / "fixtures" / "before_the_house"
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
