"""Stages: each shipped one is whole, and a wrong key or value is one line that names it."""

from dataclasses import fields, is_dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.common.errors import UserError
from pipeline.stage.config import STAGES, StageConfig, dump_stage, load_run, load_stage

SHIPPED = sorted(file.stem for file in STAGES.glob("*.yaml"))


def keys(schema=StageConfig, path=""):
    """Dotted names of all settings."""
    for field in fields(schema):
        inner = field.default_factory if callable(field.default_factory) else None
        if is_dataclass(inner):
            yield from keys(inner, f"{path}{field.name}.")
        else:
            yield path + field.name


def test_the_documented_stages_are_shipped():
    assert SHIPPED == [
        "ablation_256",
        "binding",
        "demo",
        "demo_scenes",
        "demo_video",
        "demo_video_images",
        "hunyuan_text",
        "li_dit_10b_1024",
        "li_dit_10b_512",
        "li_dit_1b_256",
        "li_dit_1b_256_patch_times",
        "patch_times_ablation",
        "scenes_ablation",
        "speedrun",
        "speedrun_gpu",
        "video_1b_256_long",
        "video_1b_256_short",
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_stage_is_consistent(name):
    stage = load_stage(name)
    dit = stage.dit(16)
    assert stage.name == name
    assert stage.fusion.families
    # Families of this name are pixels; all others have 8 of them in a position.
    pixels = dit.patch * (1 if stage.data.latents == "pixels" else 8)
    assert stage.sample.height % pixels == 0
    assert stage.sample.width % pixels == 0
    assert stage.optim.warmup_samples < stage.samples
    assert stage.checkpoint.every_samples >= stage.global_batch
    assert all(weight > 0 for weight in stage.data.caption_weights.values())


@pytest.mark.parametrize(
    ("name", "depth", "width", "heads"), [("li_dit_1b_256", 28, 1152, 16), ("li_dit_10b_512", 48, 2816, 44)]
)
def test_sizes_are_the_papers(name, depth, width, heads):
    dit = load_stage(name).dit(16)
    assert (dit.depth, dit.width, dit.heads, dit.patch) == (depth, width, heads, 2)


@pytest.mark.parametrize("setting", ["model.channels=4", "model.axes=3", "model.time_levels=2"])
def test_sizes_that_the_data_or_the_objective_decide_are_refused_where_they_differ(setting):
    name, value = setting.removeprefix("model.").split("=")
    with pytest.raises(
        UserError, match=rf"model.{name}={value}: the data and the objective say .*: leave it out"
    ):
        load_stage("demo", [setting]).dit(16)
    assert load_stage("demo", ["model.channels=4"]).dit(4).channels == 4


def test_a_chain_starts_from_the_run_before():
    assert load_stage("li_dit_10b_1024").start_from == str(load_stage("li_dit_10b_512").run)


@settings(max_examples=60, deadline=None)
@given(key=st.sampled_from(sorted(keys())), typo=st.integers(0, 100))
def test_a_mistyped_key_is_named(key, typo):
    place = typo % len(key)
    wrong = key[:place] + "_x_" + key[place:]
    with pytest.raises(UserError) as error:
        load_stage("demo", [f"{wrong}=1"])
    assert "_x_" in str(error.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optm.lr=1", "Did you mean: 'optim'"),
        ("optim.lr=fast", "optim.lr"),
        ("fusion.mode=mean", "collaborative"),
        ("fusion.mode=none", "fusion.mode"),
        ("fusion.refiner_blocks=0", "fusion.refiner_blocks"),
        ("samples=1", "samples"),
        ("data.caption_drop=2", "data.caption_drop"),
        ("data.canonical_nodes=3", "data.canonical_nodes"),
        ("ema=[1.0]", "ema"),
        ("name=../x", "name"),
        ("data.workers=", "data.workers"),
        ("data.workers", "write key=value"),
    ],
)
def test_a_wrong_value_is_named(override, says):
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        load_stage("demo", [override])


def test_an_override_without_a_value_empties_text_and_unsets_what_may_be_unset():
    stage = load_stage(
        "demo",
        ["data.dataset=", "data.store=", "data.tokens_per_batch=", "data.datasets={a: {}, b: {store: x}}"],
    )
    assert (stage.data.dataset, stage.data.store, stage.data.tokens_per_batch) == ("", "", None)
    assert list(stage.data.datasets) == ["a", "b"]


def test_an_unknown_stage_or_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean `demo`"):
        load_stage("dmeo", [])
    with pytest.raises(UserError, match="did you mean `tiny`"):
        load_stage("demo", ["model.preset=tinny"]).dit(16)


def test_a_file_that_is_not_a_stage(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_stage(str(tmp_path / "none.yaml"), [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("optim: [")
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_stage(str(broken), [])


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(1e-8, 1),
    batch=st.integers(1, 4096),
    families=st.lists(st.sampled_from("abc"), min_size=1, unique=True),
)
def test_a_run_keeps_its_stage(tmp_path_factory, lr, batch, families):
    run = tmp_path_factory.mktemp("run")
    stage = load_stage(
        "demo", [f"optim.lr={lr!r}", f"global_batch={batch}", f"fusion.families=[{','.join(families)}]"]
    )
    (run / "stage.yaml").write_text(dump_stage(stage))
    assert load_run(run) == stage


def test_a_folder_that_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match="not a run's folder"):
        load_run(tmp_path)
