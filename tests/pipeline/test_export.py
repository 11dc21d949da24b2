"""The exported diffusers folder: same pictures as the run, byte-identical when saved again, one line for each
wrong folder."""

import json
import os
import pickle
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers.pipelines import pipeline_utils
from diffusers.utils import hub_utils
from PIL import Image

from data_prep.dataset.schema import Snapshot
from data_prep.store.store import open_store
from model.common.errors import UserError
from pipeline import diffusers_pipeline, sample
from pipeline.diffusers_pipeline import LIDiTPipeline
from pipeline.export import build_pipeline, export, make_card
from pipeline.inference.sampler import SamplingParams
from pipeline.inference.source import load_export, load_source
from pipeline.stage.config import dump_stage
from pipeline.stage.corpus import Corpus, Source
from tests.helpers.tiny_sampler import CPU, WIDTHS, LetterLLM, make_sampler, make_stage, sampler_with_families

PROMPTS = ["a red cat", "", "two dogs"]
SEEDS = [4, 9, 2**40]


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    monkeypatch.setattr(diffusers_pipeline, "load_llm", lambda family, device: LetterLLM(WIDTHS[family.name]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    saved = {}
    for objective in ("flow", "ddpm"):
        saved[objective] = tmp_path_factory.mktemp("exports") / objective
        pipeline = build_pipeline(sampler_with_families(objective))
        pipeline.card = {"README.md": "a card – with ümlauts".encode()}
        pipeline.save_pretrained(saved[objective])
    return saved


@pytest.fixture
def copied(folders, tmp_path):
    target = tmp_path / "export"
    for path in sorted(folders["flow"].rglob("*")):
        place = target / path.relative_to(folders["flow"])
        if path.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return target


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_the_pipeline_draws_the_very_latents_of_the_sampler(folders, objective):
    reference = make_sampler(objective).latents(PROMPTS, SEEDS, SamplingParams(3, 3.0, 16, 24))
    pipeline = LIDiTPipeline.from_pretrained(folders[objective])
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(PROMPTS, generator=generators(), output_type="latent").images
    assert torch.equal(drawn, reference)
    loaded = load_export(folders[objective], CPU, torch.float32)
    assert torch.equal(loaded.latents(PROMPTS, SEEDS, SamplingParams(3, 3.0, 16, 24)), reference)
    assert torch.equal(loaded.pixels(reference), make_sampler().pixels(reference))


def test_bf16_is_close(folders):
    reference = make_sampler().latents(PROMPTS, SEEDS, SamplingParams(3, 3.0, 16, 24))
    loaded = load_export(folders["flow"], CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.network.parameters()} == {torch.bfloat16}
    assert all(constants.mean.dtype == torch.float32 for constants in loaded.reader.constants.values())
    latents = loaded.latents(PROMPTS, SEEDS, SamplingParams(3, 3.0, 16, 24))
    assert (latents - reference).abs().max() < 0.1 * reference.std()


def test_fp16_draws_the_image_of_fp32(folders):
    drawn = []
    for dtype in (torch.float32, torch.float16):
        pipeline = LIDiTPipeline.from_pretrained(folders["flow"], torch_dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.transformer.dtype == dtype
        drawn.append(pipeline(PROMPTS, generator=generators(), output_type="pt").images)
    exact, half = drawn
    assert half.isfinite().all()
    assert abs(half.mean() - exact.mean()) < 0.01
    assert abs(half.std() - exact.std()) < 0.01
    assert (half - exact).abs().max() < 0.1 * exact.std()


def test_what_standardises_the_text_stays_exact_in_bf16(folders):
    exact, loaded = (
        LIDiTPipeline.from_pretrained(folders["flow"], torch_dtype=kind)
        for kind in (torch.float32, torch.bfloat16)
    )
    assert loaded.transformer.dtype == torch.bfloat16
    for ours, theirs in zip(loaded.text.parameters(), exact.text.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_saved_again_it_is_the_same_bytes_and_tells_no_path(folders, tmp_path):
    LIDiTPipeline.from_pretrained(folders["flow"]).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folders["flow"])
    assert not any(str(folders["flow"]).encode() in data for data in contents(tmp_path / "again").values())


def test_weights_keep_the_names_of_training_and_split_into_shards(tmp_path):
    sampler = sampler_with_families()
    build_pipeline(sampler).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    files = [path.name for path in (tmp_path / "shards" / "transformer").glob("*.safetensors")]
    assert len(files) > 2
    index = json.loads(
        (tmp_path / "shards" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    assert index["weight_map"].keys() == sampler.network.state_dict().keys()
    drawing = SamplingParams(2, 3.0, 16, 16)
    loaded = load_export(tmp_path / "shards", CPU, torch.float32)
    assert torch.equal(loaded.latents(["a"], [1], drawing), sampler.latents(["a"], [1], drawing))


def test_the_usual_arguments_of_a_call(folders):
    pipeline = LIDiTPipeline.from_pretrained(folders["flow"])
    pipeline.set_progress_bar_config(disable=True)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else None

    images = pipeline(
        "tea", num_images_per_prompt=2, seed=3, num_inference_steps=2, callback_on_step_end=callback
    ).images
    assert [image.size for image in images] == [(24, 16)] * 2
    assert [step for step, *_ in seen] == [0, 1]
    assert np.array_equal(np.asarray(images[0]), np.asarray(images[1]))  # the callback set both to zero
    first, second = pipeline("tea", num_images_per_prompt=2, seed=3, output_type="pt", return_dict=False)[0]
    assert not torch.equal(first, second)
    assert torch.equal(
        pipeline("tea", seed=4, output_type="pt").images[0].isfinite(),
        torch.ones_like(second, dtype=torch.bool),
    )
    array = pipeline(
        ["tea"], generator=torch.Generator().manual_seed(3), height=8, width=32, output_type="np"
    ).images
    assert array.shape == (1, 8, 32, 3)
    for wrong in ({"height": 10}, {"output_type": "gif"}, {"generator": generators()}, {"prompt": "x" * 99}):
        with pytest.raises(UserError):
            pipeline(**{"prompt": "tea", **wrong})


def test_a_compiled_network_still_draws(folders):
    pipeline = LIDiTPipeline.from_pretrained(folders["flow"])
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline("tea", seed=1, output_type="latent").images
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    torch.testing.assert_close(pipeline("tea", seed=1, output_type="latent").images, plain)


def test_the_sample_command_reads_an_export(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["sample", str(folders["flow"]), "--prompt", "tea", "--out", str(tmp_path)]
    )
    sample.main()
    with Image.open(tmp_path / "00000_00.png") as image:
        assert image.size == (24, 16)


def test_an_export_has_no_other_weights_to_choose(folders):
    with pytest.raises(UserError, match=r"one set of weights: leave out --weights 0\.5"):
        load_source(folders["flow"], "0.5", CPU, torch.float32)


def spoil_index(change):
    def spoil(folder):
        path = folder / "model_index.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return spoil


def only_pickles(folder):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            spoil_index(lambda index: {"_class_name": "FluxPipeline", "transformer": ["os", "system"]}),
            "holds a FluxPipeline of other parts",
        ),
        (spoil_index(lambda index: {**index, "text": ["os", "system"]}), "of other parts"),
        (spoil_index(lambda index: {**index, "format": 2}), "format 2"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "not a valid JSON"),
        (only_pickles, "damaged or not complete"),
        (lambda folder: (folder / "transformer" / "config.json").unlink(), "damaged or not complete"),
    ],
)
def test_a_wrong_folder_is_refused(copied, spoil, message):
    spoil(copied)
    with pytest.raises(UserError, match=message):
        load_source(copied, "ema", CPU, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_times": {"levels": 0}}, "patch_times: levels=0: set a number from 1"),
        ({"patch_times": {"level": 4}}, "patch_times: "),
        ({"adaptive": {"easy": "some"}}, "adaptive: easy: "),
        ({"solver": "dual_loop"}, "this network does not predict"),
    ],
)
def test_settings_of_an_export_are_checked_as_those_of_a_stage(copied, change, message):
    spoil_index(lambda index: {**index, **change})(copied)
    with pytest.raises(UserError, match=message) as refused:
        load_source(copied, "ema", CPU, torch.float32).check(
            SamplingParams(scheduler=change.get("solver", ""))
        )
    assert "\n" not in str(refused.value)


def test_an_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(UserError, match="exists"):
        export(tmp_path, tmp_path, "ema", "fp32", "5GB")


def test_constants_that_are_missing_are_not_made_up(copied):
    config = copied / "text" / "config.json"
    record = json.loads(config.read_text())
    record["families"][0]["name"] = "other"
    config.write_text(json.dumps(record))
    with pytest.raises(UserError):
        load_source(copied, "ema", CPU, torch.float32)


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_all_files_follow_the_umask(folders, tmp_path, umask):
    pipeline = LIDiTPipeline.from_pretrained(folders["flow"])
    before = os.umask(umask)
    try:
        pipeline.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


@pytest.fixture
def card(tmp_path, monkeypatch):
    """Return the card of a run in `tmp_path`."""
    run = tmp_path / "runs" / "small"
    stage = make_stage()
    stage.name, stage.runs, stage.data.store, stage.start_from = (
        "small",
        str(run.parent),
        str(tmp_path / "store"),
        "runs/before",
    )
    stage.checkpoint.upload = "s3://bucket/kept"
    snapshot = Snapshot(
        "ds", [], {}, {"16x24": {"parts": 1, "rows": 7, "content": "", "index_xxh64": ""}}, {}
    )
    corpus = Corpus([Source(open_store(str(tmp_path)), snapshot)])
    monkeypatch.setattr("pipeline.export.resolve", lambda stage: (stage, corpus))
    run.mkdir(parents=True)
    (run / "stage.yaml").write_text(dump_stage(stage))
    return make_card(run, sampler_with_families(), "ema", "fp32")["README.md"].decode()


def test_the_card_names_no_folder_of_the_machine(card, tmp_path):
    assert str(tmp_path) not in card
    assert "| Training pairs | 7 in 1" in card
    for line in ("runs: runs", "store: store", "start_from: runs/before", "upload: s3://bucket/kept"):
        assert line in card


def test_the_code_of_the_card_loads_the_folder_and_draws(card, folders, tmp_path, monkeypatch):
    """diffusers itself does not know the class, so no hub should show a call of its own."""
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "li-dit"
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("FOLDER", str(folders["flow"])), {})
    with Image.open("apple.png") as image:
        assert image.size == (24, 16)


class Trap:
    """A pickle that touches a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("part", ["transformer", "text", "vae"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_planted_pickle_is_never_opened(copied, tmp_path, part, alone):
    weights = copied / part / "diffusion_pytorch_model.safetensors"
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.pt"):
        (copied / part / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    if alone:
        weights.unlink()
        with pytest.raises(UserError, match="damaged or not complete"):
            load_source(copied, "ema", CPU, torch.float32)
        with pytest.raises((OSError, ValueError)):
            LIDiTPipeline.from_pretrained(copied)
    else:
        load_source(copied, "ema", CPU, torch.float32)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_pushing_uploads_the_folder_with_the_runs_own_card(folders, tmp_path, monkeypatch, way):
    uploaded = {}

    def upload(repo_id, folder_path, **_):
        uploaded[repo_id] = contents(Path(folder_path))

    for module in (hub_utils, pipeline_utils):
        monkeypatch.setattr(module, "create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
        monkeypatch.setattr(
            module, "load_or_create_model_card", lambda *_, **__: hub_utils.ModelCard("made up")
        )
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    pipeline = LIDiTPipeline.from_pretrained(folders["flow"])
    if way == "push_to_hub":
        pipeline.push_to_hub("someone/tiny")
    else:
        pipeline.save_pretrained(str(tmp_path / "tiny"), push_to_hub=True, repo_id="someone/tiny")
    assert uploaded == {"someone/tiny": contents(folders["flow"])}


def test_cpu_offload_draws_the_same_and_moves_the_parts_in_the_order_of_their_use(folders):
    """The CPU stands for the accelerator here: the hooks are put in and run, though no tensor moves."""
    pipeline = LIDiTPipeline.from_pretrained(folders["flow"])
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline("tea", seed=1, output_type="pt").images
    pipeline.enable_model_cpu_offload(device="cpu:0")
    parts = [pipeline.text, pipeline.transformer, pipeline.vae]
    assert [hook.model for hook in pipeline._all_hooks] == parts
    assert [hook.hook.prev_module_hook for hook in pipeline._all_hooks] == [None, *pipeline._all_hooks[:2]]
    assert torch.equal(pipeline("tea", seed=1, output_type="pt").images, plain)
