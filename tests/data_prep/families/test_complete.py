"""Weights that change under the same path are noticed although nothing is left to encode."""

import hashlib
import json

import pytest

from data_prep import __main__ as commands
from data_prep.config import LatentsConfig
from data_prep.dataset.parts import register_family
from data_prep.dataset.schema import CAPTIONS, Family
from data_prep.families.complete import already_encoded, latents_settings, text_settings
from data_prep.families.encode import encode_family
from data_prep.store.store import open_store
from model.common.hub import fingerprint
from model.config import TextConfig
from model.encoders.vae_files import CONFIG, WEIGHTS
from tests.helpers.fake_dataset import ALONE, encoder, make_pairs, plan


@pytest.fixture
def dataset(tmp_path):
    dataset = open_store(str(tmp_path / "store"), create=True)
    plan(dataset, {"64x64": [2, 1]})
    make_pairs(dataset)
    return dataset


def encode(dataset, family):
    encode_family(dataset, register_family(dataset, family, None), encoder(family), ALONE)


@pytest.fixture(params=["", "vae"])
def vae(tmp_path, request):
    """The folder of a VAE, or of a pipeline with one."""
    folder = tmp_path / "model" / request.param
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({"scaling_factor": 0.5, "shift_factor": None, "other": 1}))
    (folder / WEIGHTS).write_bytes(b"weights")
    return folder


@pytest.fixture
def latents(dataset, tmp_path, vae):
    latents = LatentsConfig(vae=str(tmp_path / "model"))
    identity = {
        "vae": "AutoencoderKL",
        "weights_sha256": hashlib.sha256(b"weights").hexdigest(),
        "scaling_factor": 0.5,
        "shift_factor": 0.0,
        "moments": "bf16",
    }
    info = {"vae": latents.vae, "revision": None, "scaling_factor": 0.5}
    encode(dataset, Family("latents", "latents", identity, info))
    return latents


@pytest.mark.parametrize(
    ("file", "data"), [(WEIGHTS, b"weightz"), (CONFIG, b'{"scaling_factor": 0.6}'), (CONFIG, b"{")]
)
def test_another_vae_under_the_same_path(dataset, latents, vae, file, data):
    assert already_encoded(dataset, "latents", latents_settings(latents), ALONE)
    (vae / file).write_bytes(data)
    assert not already_encoded(dataset, "latents", latents_settings(latents), ALONE)


@pytest.mark.parametrize(
    ("key", "value"), [("moments", "mean"), ("tiling", True), ("dtype", "bf16"), ("revision", "a")]
)
def test_other_settings_of_latents(dataset, latents, key, value):
    setattr(latents, key, value)
    assert not already_encoded(dataset, "latents", latents_settings(latents), ALONE)


def test_a_model_that_was_removed_is_not_needed(dataset, latents, vae):
    (vae / CONFIG).unlink()
    assert already_encoded(dataset, "latents", latents_settings(latents), ALONE)


@pytest.fixture(params=["folder", "gguf"])
def llm(tmp_path, request):
    """An LLM, and the file of its weights."""
    if request.param == "gguf":
        path = tmp_path / "a.gguf"
        path.write_bytes(b"GGUF and weights")
        return path, path
    folder = tmp_path / "llm"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = folder / "model.safetensors"
    weights.write_bytes((2).to_bytes(8, "little") + b"{}" + bytes(1000))
    return folder, weights


def test_another_llm_under_the_same_path(dataset, llm):
    path, weights = llm
    text = TextConfig(llm=str(path), name="llm")
    hashes = {
        True: lambda: fingerprint(path, [weights]),
        False: lambda: "sha256:" + hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    identity = {**text.identity, "weights": hashes[path.is_dir()]()}
    encode(dataset, Family("llm", "text", identity, {"quantisation": text.quantisation}))
    expected = text_settings(dataset, text)
    assert expected.always[CAPTIONS] is None
    assert already_encoded(dataset, "llm", expected, ALONE)
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    assert not already_encoded(dataset, "llm", text_settings(dataset, text), ALONE)


def test_the_command_then_makes_its_full_check(dataset, latents, vae, monkeypatch, capsys):
    class Arguments:
        family, task = None, ALONE

    class Config:
        pass

    Config.latents = [latents]
    checked = []
    monkeypatch.setattr(commands, "check_settings", lambda *_: None)
    monkeypatch.setattr(commands, "_load", lambda *names: lambda *_: checked.append(names[-1]))
    commands.latents(Config(), dataset, Arguments())
    assert checked == []
    assert "all parts of this task are encoded" in capsys.readouterr().out
    (vae / WEIGHTS).write_bytes(b"others")
    commands.latents(Config(), dataset, Arguments())
    assert checked == ["run_latents"]
