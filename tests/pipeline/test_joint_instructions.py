"""Images and clips of one run, each behind an instruction of its own."""

import pytest
import torch

from data_prep.__main__ import main as data_prep
from data_prep.dataset.snapshot_reader import read_constants, read_family
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.encoders.quantize import dequantize
from pipeline.data.loader import TrainingData
from pipeline.diffusers_pipeline import LIDiTText
from pipeline.inference.sampler import Sampler, SamplingParams
from pipeline.runtime.run_log import read_reports
from pipeline.stage.config import load_stage
from pipeline.stage.corpus import is_clip, resolve
from pipeline.training.inputs import NetworkInputs
from tests.helpers import pixel_space, tiny_llm
from tests.helpers.distributed import on_ranks
from tests.helpers.tiny_dataset import write_dataset, write_stage

pytestmark = pytest.mark.timeout(300)
FRAMES = 5
SOURCES = {
    "images": "{kind: scenes, scenes: {count: 12, seed: 0}, captions: {list: list}}",
    "clips": "{kind: moving_scenes, scenes: {count: 12, seed: 0, scale: 1.6}, captions: {list: list}}",
}
INSTRUCTIONS = {"images": "Describe the image:", "clips": "Describe the video and its motion:"}
BOTH = ("data.dataset=''", "data.datasets={images: {weight: 0.5}, clips: {weight: 0.5}}")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of images and one of clips, in one store, with a text family each."""
    folder = tmp_path_factory.mktemp("joint")
    for name, source in SOURCES.items():
        text = f'prefix: "{{instruction}} ", instruction: "{INSTRUCTIONS[name]}", suffix: "<end>"'
        path = write_dataset(folder, source, "list", {f"tiny_{name}": (tiny_llm.llama, text)})
        named = path.read_text().replace("name: set", f"name: {name}")
        named = named.replace(f"vae: {folder}/vae", "space: pixel_clips")
        path.write_text(f"{named}clips: {{frames: [{FRAMES}], fps: 8.0, format: webp}}\n")
        for step in ("plan", "pairs", "latents", "text", "snapshot"):
            data_prep([step, str(path)])
    return folder


def settings(*more, data=BOTH):
    """Settings of a stage that trains on both."""
    fusion = ["fusion.families=[tiny_images]", "fusion.clip_families=[tiny_clips]"]
    return [*data, *fusion, "model.predicts=clean", *more]


@pytest.fixture(scope="module")
def stage_file(folder):
    return write_stage(folder, "joint", "tiny_images")


def raw_prefix(folder, kind):
    """The states of a family's prefix, as the LLM gave them."""
    dataset = open_store(str(folder / "store")).sub(kind)
    return read_constants(dataset, read_family(dataset, f"tiny_{kind}"))["prefix_states"]


def test_each_batch_is_read_behind_its_own_instruction(folder, stage_file):
    stage, corpus = resolve(load_stage(str(stage_file), settings()))
    data = TrainingData(stage, corpus, 0, 1, CPU)
    inputs = NetworkInputs(stage, corpus, data.constants, torch.float32)
    prefixes = {kind: raw_prefix(folder, kind) for kind in SOURCES}
    assert len({len(prefix) for prefix in prefixes.values()}) == 2
    shared = data.constants["tiny_images"]

    seen = set()
    for batch, _ in data.batches():
        kind = "clips" if is_clip(batch.bucket) else "images"
        (text,) = inputs.condition(batch, torch.zeros(len(batch.ids))).texts
        assert text.prefix == len(prefixes[kind])

        # One standardization for both, so that a word is the same vector behind either instruction.
        raw = text.states * shared.std + shared.mean
        assert torch.allclose(raw[:, : text.prefix], prefixes[kind].float(), atol=1e-4)
        for row, (id, source) in enumerate(zip(batch.ids.tolist(), batch.sources.tolist(), strict=True)):
            assert (source == 1) == (kind == "clips")
            stored = stored_states(data, batch, row)
            own = raw[row, text.prefix : text.prefix + len(stored)]
            assert torch.allclose(own, stored, atol=1e-3), id
        seen.add(kind)
        if len(seen) == 2:
            break
    data.close()


def stored_states(data, batch, row):
    """The raw states of a sample's caption, from what is stored and the family's own mean and std."""
    ((name, packed),) = batch.texts.items()
    source = data.corpus.sources[int(batch.sources[row])]
    constants = read_constants(source.dataset, source.snapshot.families[name])
    mean, std = constants["mean"].float(), constants["spread"].float()
    first = sum(packed.counts[:row])
    tokens = slice(first, first + packed.counts[row])
    values, scales = packed.values[tokens], packed.scales[tokens]
    states = dequantize(values, scales, data.constants[name].quantization, mean, std, torch.float32)
    return states * std + mean


def test_a_run_trains_on_both_and_reads_prompts_behind_the_instruction_of_what_is_sampled(folder, stage_file):
    previews = ["sample.every_samples=16", "sample.prompts=[a cat]", f"sample.frames={FRAMES}"]
    assert on_ranks(1, pixel_space.train, str(stage_file), settings(*previews)) == [0]
    run = folder / "runs" / "joint"
    losses = {name for report in read_reports(run) for name in report if name.startswith("loss_32x32")}
    assert losses == {"loss_32x32", f"loss_32x32x{FRAMES}"}

    sampler = Sampler.from_run(run, "ema", CPU, torch.float32)
    sizes = {"images": 1, "clips": FRAMES}
    texts = {}
    for kind, frames in sizes.items():
        params = SamplingParams(steps=2, height=32, width=32, frames=frames)
        (texts[kind],) = sampler.condition(["a cat"], params).texts
        assert texts[kind].prefix == len(raw_prefix(folder, kind))
        assert torch.isfinite(sampler.latents(["a cat"], [0], params)).all()

    # An export's text part reads prompts as the run does.
    part = LIDiTText.from_reader(sampler.reader)
    part.save_pretrained(folder / "text")
    loaded = LIDiTText.from_pretrained(folder / "text")
    for kind, frames in sizes.items():
        ((read,),) = loaded(["a cat"], frames=frames)
        assert torch.equal(read.states, texts[kind].states)


@pytest.mark.parametrize(
    ("data", "changed", "says"),
    [
        (["data.dataset=images"], "", "the data has no clips"),
        (["data.dataset=clips"], "", "the data has no images"),
        (BOTH, "fusion.clip_families=[tiny_clips,tiny_clips]", "clip_families has 2 families"),
        (BOTH, "fusion.clip_families=[]", "no text family `tiny_images`: it has tiny_clips"),
        (BOTH, "fusion.clip_families=[other]", "no text family `other`"),
    ],
)
def test_families_that_do_not_fit_the_data_are_refused(stage_file, data, changed, says):
    with pytest.raises(UserError, match=says):
        resolve(load_stage(str(stage_file), settings(*([changed] if changed else []), data=data)))


def test_another_llm_is_refused(stage_file, monkeypatch):
    # The field in which the two do differ, in the place of the weights.
    monkeypatch.setattr("pipeline.stage.corpus.ENCODER", ("prefix",))
    with pytest.raises(UserError, match="was made with prefix=Describe the video"):
        resolve(load_stage(str(stage_file), settings()))
