"""A run that goes on says what has changed, and refuses what would make another network of it."""

import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.common.errors import UserError
from pipeline.runtime.finished import is_finished, mark_finished
from pipeline.stage.config import StageConfig, load_run, load_stage
from pipeline.training.resume import FIXED, FREE, changed_settings, record_stage, refuse_fresh_weights

STAGE = load_stage("demo")
RECORD = json.loads(json.dumps(asdict(STAGE)))


def leaves(settings, path=""):
    """Dotted names of all settings that are no groups."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{path}{field.name}.")
        else:
            yield path + field.name


def changed(key, value):
    record = json.loads(json.dumps(RECORD))
    *groups, name = key.split(".")
    group = record
    for each in groups:
        group = group[each]
    group[name] = value
    return record


def test_nothing_changed_is_nothing_told():
    assert changed_settings(Path("step_1"), RECORD, STAGE) == ""


@given(key=st.sampled_from(sorted(leaves(StageConfig()))))
def test_every_setting_that_differs_is_told_or_refused(key):
    record = changed(key, "another")
    if key.startswith(FIXED) and key not in FREE:
        with pytest.raises(UserError, match=f'step_1 with {key}=.* .was "another".*: set it back, or start'):
            changed_settings(Path("step_1"), record, STAGE)
    else:
        told = changed_settings(Path("step_1"), record, STAGE)
        assert told.startswith(f"{key}=")
        assert told.endswith('(was "another")')


@pytest.mark.parametrize("key", ["lora.alpha", "users.tokens"])
def test_what_an_adapter_computes_is_fixed(key):
    with pytest.raises(UserError, match=key):
        changed_settings(Path("step_1"), changed(key, 7), STAGE)
    assert changed_settings(Path("step_1"), changed("users.drop", 0.5), STAGE).startswith("users.drop=")


def test_records_of_other_versions_are_compared_as_far_as_they_go():
    record = changed("model.depth", None)  # a size of a preset, in early versions
    del record["objective"], record["optim"]["spike"]
    record["model"]["older_name"] = 1
    assert changed_settings(Path("step_1"), record, STAGE) == ""


def test_a_finished_run_goes_on_when_more_samples_are_asked_for(tmp_path):
    assert not is_finished(tmp_path, 96)
    mark_finished(tmp_path, 12, 100)  # a whole batch more than the 96 that were asked for
    assert is_finished(tmp_path, 96)
    assert is_finished(tmp_path, 100)
    assert not is_finished(tmp_path, 192)
    (tmp_path / "finished.json").write_text("{}")
    assert is_finished(tmp_path, 192)
    (tmp_path / "finished.json").write_text('{"sam')
    with pytest.raises(UserError, match=r"finished\.json: damaged: .*: remove it if the stage is not"):
        is_finished(tmp_path, 192)


def test_a_run_goes_on_from_fresh_weights_only_if_it_has_none_to_lose(tmp_path):
    stage = load_stage("demo", [f"runs={tmp_path}"])
    stage.run.mkdir()
    record_stage(stage)
    assert load_run(stage.run) == stage
    refuse_fresh_weights(stage.run)
    mark_finished(stage.run, 12, 96)
    with pytest.raises(UserError, match="no whole checkpoint, and the run was trained before"):
        refuse_fresh_weights(stage.run)
    record_stage(stage)  # it is not finished any more
    refuse_fresh_weights(stage.run)
    (stage.run / "checkpoints/step_000000004").mkdir(parents=True)
    with pytest.raises(UserError, match=f"remove {stage.run}"):
        refuse_fresh_weights(stage.run)
