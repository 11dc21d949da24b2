"""Users from a trained run to images by the commands: by name, fitted, exported, deleted."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.dataset import users
from data_prep.store.store import open_store
from model.common.errors import UserError
from pipeline import export, fit_user, forget_user, sample
from pipeline.checkpoint.checkpoints import load_weights
from pipeline.diffusers_pipeline import LIDiTPipeline
from pipeline.inference.images import read_settings
from tests.helpers import fake_snapshot, trainer_tasks, user_tasks
from tests.helpers.distributed import on_ranks
from tests.helpers.tiny_commands import commands

SIZES = {"sample__height": 32, "sample__width": 32, "sample__steps": 2, "data__validation_parts": 0}


@pytest.fixture
def command(monkeypatch):
    """Runs a program as from the shell."""
    return commands(monkeypatch)


def test_a_user_is_learned_sampled_fitted_exported_and_deleted(tmp_path, command, capsys):
    store, run = str(tmp_path / "store"), tmp_path / "users" / "small"
    fake_snapshot.make(store, {"32x32": [24]}, tmp_path, users=user_tasks.USERS)
    settings = {**SIZES, "samples": 16, "log__validate_every_samples": 0}
    on_ranks(1, trainer_tasks.train, store, str(tmp_path), None, settings)
    settings = {**SIZES, "start_from": str(tmp_path / "small"), "samples": 8 * 4}
    on_ranks(1, user_tasks.train, store, str(tmp_path / "users"), settings)

    def sampled(name, *options, source=run):
        command(sample, source, "--prompt", "a red cat", "--out", tmp_path / name, *options)
        with Image.open(tmp_path / name / "00000_00.png") as image:
            return np.asarray(image).astype(int)

    # by name, of which the image's record has the number
    guided = "--user-guidance", 30
    nobody, ours = sampled("nobody"), sampled("ours", "--user", "user 2", *guided)
    assert np.abs(ours - nobody).max() > 1
    assert np.array_equal(ours, sampled("number", "--user", "2", *guided))
    assert read_settings(tmp_path / "ours" / "00000_00.png")["user"] == "2"

    # a new user from two images
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a red cat")
    fitted = tmp_path / "new.safetensors"
    command(fit_user, run, "--pictures", pictures, "--out", fitted, "--steps", 2)
    assert np.abs(sampled("new", "--user", fitted, *guided) - nobody).max() > 1

    # an export, in which the user is a file
    exported = tmp_path / "exported"
    command(export, run, exported, "--precision", "fp32")
    assert np.array_equal(sampled("exported_image", "--user", "2", *guided, source=exported), ours)
    pipeline = LIDiTPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_user(exported / "users" / "00002.safetensors")
    image = pipeline("a red cat", seed=0, user_guidance=30.0).images[0]
    assert np.array_equal(np.asarray(image).astype(int), ours)

    # deletion, after which neither name nor number is anybody
    assert users.forget_user(open_store(store).sub("ds"), "user 2") == 2
    command(forget_user, run, 2)
    for user, message in (("user 2", "no user `user 2`"), ("2", "that user was deleted")):
        capsys.readouterr()
        with pytest.raises((SystemExit, UserError)):
            sampled("gone", "--user", user)
        assert message in capsys.readouterr().err
    assert not load_weights(run, "ema")["adapters.users.table.weight"][2].any()
    assert torch.isfinite(load_weights(run, "raw")["adapters.users.table.weight"]).all()
