"""`python -m pipeline.init`: the stage fits the dataset, the GPUs and their memory, and loads."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.config import BucketConfig, DatasetConfig, LatentsConfig
from data_prep.dataset.parts import PLAN_KEY
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.common.records import seal
from model.common.yaml_writing import as_yaml
from model.config import TextConfig
from pipeline import init
from pipeline.init import EPOCHS, MEMORY_SHARE, MIN_PAIRS, Chooser, Facts, stage_lines
from pipeline.operations.planning import Setup, make_plan
from pipeline.stage.config import load_stage
from tests.helpers import fake_snapshot

PART = 1024


def dataset_of(resolution=256, llms=2, kinds=("original",)):
    return DatasetConfig(
        name="set",
        store="/store",
        caption_kinds=list(kinds),
        buckets=BucketConfig(resolution, 1.0, 16),
        latents=[LatentsConfig(name="latents")],
        text=[TextConfig(name=f"llm{number}", llm="org/model") for number in range(llms)],
    )


def facts_of(rows, llms=2):
    return Facts(
        source="the plan",
        buckets={f"{number}x1": count for number, count in enumerate(rows)},
        parts={f"{number}x1": -(-count // PART) for number, count in enumerate(rows)},
        widths=(576,) * llms,
        channels=16,
        downsampling=8,
        prefix_tokens=40,
        caption_tokens=30,
        captions=1,
    )


def written(config, facts, gpus, memory=80.0, preset=""):
    """Write a stage, and load it."""
    choice, reasons = Chooser(config, facts, gpus, memory).choose(preset)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.yaml"
        path.write_text(as_yaml(list(stage_lines(config, facts, choice, reasons, gpus))))
        return choice, load_stage(str(path))


@settings(max_examples=2, deadline=None)  # an estimate of all presets takes seconds
@example(rows=[1_204_132], gpus=3, resolution=64, llms=1)
@given(
    rows=st.lists(st.integers(1, 3_000_000), min_size=1, max_size=4),
    gpus=st.sampled_from([0, 1, 3, 8, 24]),
    resolution=st.sampled_from([64, 256, 512, 1024]),
    llms=st.integers(1, 2),
)
def test_the_stage_fits_data_and_gpus(rows, gpus, resolution, llms):
    config, facts, world = dataset_of(resolution, llms), facts_of(rows, llms), max(1, gpus)
    if max(rows) < world:
        with pytest.raises(UserError, match="fewer than one per GPU"):
            Chooser(config, facts, gpus, 80.0)
        return

    choice, stage = written(config, facts, gpus)
    # The bucket is one batch at least, and every process has the same share, in equal micro-batches.
    assert world <= stage.global_batch <= max(rows)
    assert stage.global_batch % world == 0
    assert stage.global_batch // world % stage.engine.micro_batch == 0
    assert stage.samples % stage.global_batch == 0
    assert stage.checkpoint.every_samples % stage.global_batch == 0
    assert stage.optim.warmup_samples < stage.samples

    assert MIN_PAIRS[choice.preset] <= sum(rows)
    assert stage.model.preset == choice.preset
    assert (stage.sample.height, stage.sample.width) == (resolution, resolution)
    assert stage.fusion.families == [text.name for text in config.text]
    assert (stage.data.store, stage.data.dataset, stage.data.latents) == ("/store", "set", "latents")
    assert bool(stage.data.validation_parts) == (max(facts.parts.values()) >= init.VALIDATED_PARTS)

    # The estimate of what was written is that of what was chosen.
    setup = Setup(
        gpus=world,
        height=resolution,
        width=resolution,
        llm_widths=facts.widths,
        prefix_tokens=facts.prefix_tokens,
        caption_tokens=facts.caption_tokens,
        captions=1,
        pairs=facts.pairs,
    )
    plan = make_plan(stage, setup)
    assert plan == choice.plan
    if gpus:
        assert plan.total_memory <= MEMORY_SHARE * 80e9


def test_the_preset_grows_with_data_and_gpus():
    few, many, most = facts_of([5_000]), facts_of([2_000_000]), facts_of([300_000_000])
    config = dataset_of(512)

    def preset(facts, gpus):
        return Chooser(config, facts, gpus, 80.0).choose("")[0].preset

    assert preset(few, 64) == "tiny"
    assert preset(many, 0) == "tiny"
    assert preset(many, 8) == "li_dit_1b"
    assert preset(most, 8) == "li_dit_1b"
    assert preset(most, 512) == "li_dit_10b"


def test_small_memory_means_fewer_samples_at_once_and_recomputed_activations():
    config, facts = dataset_of(512), facts_of([2_000_000])
    at_once = []
    for memory in (80.0, 24.0):
        choice, stage = written(config, facts, 64, memory, "li_dit_1b")
        assert choice.plan.total_memory <= MEMORY_SHARE * memory * 1e9
        at_once.append((-stage.model.checkpoint_every, stage.engine.micro_batch))
    assert at_once == sorted(at_once, reverse=True)
    assert at_once[0] != at_once[-1]
    with pytest.raises(UserError, match="--preset li_dit_10b does not fit into 20 GB on 8 GPUs"):
        Chooser(config, facts, 8, 20.0).choose("li_dit_10b")


def test_several_kinds_of_captions_have_equal_weights():
    _, stage = written(dataset_of(kinds=("original", "blip")), facts_of([3_000]), 1)
    assert stage.data.caption_weights == {"original": 1.0, "blip": 1.0}


def test_a_stage_has_the_paper_s_number_of_passes():
    _, stage = written(dataset_of(), facts_of([2_000_000]), 8)
    assert stage.samples == pytest.approx(EPOCHS * 2_000_000, rel=0.001)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Write a dataset's YAML for a store with a snapshot; return its path."""
    monkeypatch.chdir(tmp_path)
    fake_snapshot.make(tmp_path / "store", {"64x64": [20, 12], "48x80": [4]}, tmp_path)
    captions = {"kept": {"original": 36}, "letters": {"original": 36 * 40}, "refused": {}}
    record = seal({"files": [], "captions": captions, "manifest": {}})
    open_store(str(tmp_path / "store")).sub("ds").put(PLAN_KEY, record)
    path = tmp_path / "ds.yaml"
    path.write_text(
        f"name: ds\nstore: {tmp_path}/store\nsources: [{{path: {tmp_path}}}]\n"
        "caption_kinds: [original, synthetic]\nbuckets: {resolution: 64, step: 16}\n"
        "latents: [{name: latents, vae: none}]\n"
        "text: [{name: small, llm: none}, {name: wide, llm: none}]\n"
    )
    return path


def failed(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        init.main(list(map(str, arguments)))
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_prepared_store_passes_the_dry_run(prepared, monkeypatch, capsys):
    from pipeline import train

    init.main([str(prepared), "--gpus", "2"])
    stage = load_stage("ds_stage.yaml")
    assert stage.fusion.families == ["small", "wide"]
    # 32 of the 36 pairs are in the largest bucket.
    assert stage.global_batch == 8

    monkeypatch.setattr("sys.argv", ["train", "ds_stage.yaml", "--dry-run"])
    train.main()
    assert "LLM widths [6, 10]" in capsys.readouterr().out
    assert "Widths of the states: 6, 10." in Path("ds_stage.yaml").read_text()

    assert "never overwritten" in failed(capsys, prepared, "--gpus", "2")
    assert "cannot be written" in failed(capsys, prepared, "--gpus", "2", "--out", prepared / "a.yaml")


def test_what_does_not_fit_is_one_line(prepared, capsys):
    assert "`text` names no family" in failed(capsys, prepared, "--gpus", "1", "text=[]")
    assert "`latents` names no family" in failed(capsys, prepared, "--gpus", "1", "latents=[]")
    assert "take fewer GPUs" in failed(capsys, prepared, "--gpus", "64")
    assert "no plan yet" in failed(capsys, prepared, "--gpus", "1", "name=other")
    assert "give numbers above 0" in failed(capsys, prepared, "--gpus", "-1")
    assert "no preset fits" in failed(capsys, prepared, "--gpus", "1", "--gpu-memory", "0.01")
    assert not Path("ds_stage.yaml").exists()
