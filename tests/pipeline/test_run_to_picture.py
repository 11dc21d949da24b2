"""From a run on disk to pictures by the commands themselves: parity, no pickle on the way, one line for each
wrong input."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from model.common.errors import UserError
from model.config import TEXT_IDENTITY, TextConfig
from pipeline import diffusers_pipeline, export, sample, web
from pipeline.diffusers_pipeline import LIDiTPipeline
from pipeline.inference import sampler
from pipeline.text import families as text_families
from pipeline.text.prompts import load_llm
from tests.helpers import fake_snapshot, trainer_tasks
from tests.helpers.distributed import on_ranks
from tests.helpers.export_and_draw import make_vae
from tests.helpers.tiny_commands import commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on a snapshot, and its export."""
    folder = tmp_path_factory.mktemp("trained")
    fake_snapshot.make(folder / "store", {"32x32": [20]}, folder)
    settings = {"samples": 16, "data__validation_parts": 0, "log__validate_every_samples": 0}
    settings |= {"sample__height": 32, "sample__width": 48, "sample__steps": 3}
    ((code, _),) = on_ranks(1, trainer_tasks.train, str(folder / "store"), str(folder), None, settings)
    assert code == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sampler, "load_vae", make_vae)
        export.export(folder / "small", folder / "exported", "ema", "fp32", "5GB")
    return folder / "small", folder / "exported"


@pytest.fixture
def command(monkeypatch):
    """Runs a program as from the shell."""
    return commands(monkeypatch)


@pytest.fixture
def no_pickle(monkeypatch):
    """Whatever opens a pickle fails."""

    def refuse(*_, **__):
        raise AssertionError("a pickle was opened")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    with pytest.raises(AssertionError, match="a pickle"):
        pickle.loads(pickle.dumps(1))


def test_run_export_and_pipeline_draw_the_same_picture_and_open_no_pickle(
    trained, command, no_pickle, tmp_path
):
    run, exported = trained
    command(export, run, tmp_path / "again", "--precision", "fp32")
    for source in (run, tmp_path / "again"):
        command(
            sample,
            source,
            "--prompt",
            "a red cat",
            "--images",
            2,
            "--out",
            tmp_path / "pictures" / source.name,
        )
    pipeline = LIDiTPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    for number, picture in enumerate(pipeline("a red cat", num_images_per_prompt=2, seed=0).images):
        for source in ("small", "again"):
            with Image.open(tmp_path / "pictures" / source / f"00000_{number:02d}.png") as drawn:
                assert drawn.size == (48, 32)
                assert (np.asarray(drawn) == np.asarray(picture)).all()


def test_raw_weights_and_bf16_are_exported_as_asked(trained, command, tmp_path):
    run, exported = trained
    command(export, run, tmp_path / "raw", "--weights", "raw", "--precision", "fp32")
    command(export, run, tmp_path / "half")
    ema, raw, half = (
        load_file(each / "transformer" / "diffusion_pytorch_model.safetensors")
        for each in (exported, tmp_path / "raw", tmp_path / "half")
    )
    assert any((ema[name] != raw[name]).any() for name in ema)
    assert all(torch.equal(half[name], ema[name].bfloat16()) for name in ema)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def is_no_run(run, exported):
    (run / "stage.yaml").unlink()


def has_other_weights(run, exported):
    stage = run / "stage.yaml"
    stage.write_text(stage.read_text().replace("  depth: 2", "  depth: 3"))


def is_of_another_model(run, exported):
    edit(exported / "model_index.json", _class_name="FluxPipeline", text=["transformers", "T5EncoderModel"])


def is_of_another_format(run, exported):
    for manifest in (run / "checkpoints").glob("step_*/manifest.json"):
        edit(manifest, format=7)
    edit(exported / "model_index.json", format=7)


RUNS = [
    (is_no_run, "no stage.yaml"),
    (has_other_weights, "another network"),
    (is_of_another_format, "format 7, this version reads format 1"),
]
EXPORTS = [
    (is_of_another_model, "holds a FluxPipeline of other parts"),
    (is_of_another_format, "format 7, this version reads format 1"),
]


@pytest.fixture
def copies(trained, tmp_path):
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in trained]


def refused(capsys, message, command, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        command(*arguments)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("spoil", "message"), RUNS)
def test_a_run_that_cannot_be_drawn_with_is_one_line_in_each_program(
    copies, command, capsys, tmp_path, spoil, message
):
    run, exported = copies
    spoil(run, exported)
    refused(capsys, message, command, sample, run, "--prompt", "a")
    refused(capsys, message, command, export, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pytest.importorskip("gradio")
    refused(capsys, message, command, web, run)


@pytest.mark.parametrize(("spoil", "message"), EXPORTS)
def test_an_export_that_cannot_be_drawn_with_is_one_line_in_each_program(
    copies, command, capsys, tmp_path, spoil, message
):
    run, exported = copies
    spoil(run, exported)
    refused(capsys, message, command, sample, exported, "--prompt", "a")
    refused(capsys, "no stage.yaml", command, export, exported, tmp_path / "out")
    with pytest.raises(UserError, match=message):
        LIDiTPipeline.from_pretrained(exported)
    pytest.importorskip("gradio")
    refused(capsys, message, command, web, exported)


def test_a_missing_llm_is_one_line_in_each_program(copies, command, capsys, monkeypatch):
    _, exported = copies
    for module in (text_families, diffusers_pipeline):
        monkeypatch.setattr(module, "load_llm", load_llm)
    config = exported / "text" / "config.json"
    families = json.loads(config.read_text())["families"]
    described = {name: getattr(TextConfig(), name) for name in TEXT_IDENTITY}
    for family in families:
        family["identity"] = described | {"llm": "package:no_such_llm", "prefix": ""}
    edit(config, families=families)
    refused(capsys, "no_such_llm", command, sample, exported, "--prompt", "a")
    with pytest.raises(UserError, match="no_such_llm"):
        LIDiTPipeline.from_pretrained(exported)("a")
