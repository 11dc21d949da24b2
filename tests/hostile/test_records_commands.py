"""Damaged records of the commands that measure, draw and report: one line, or a record of the right form."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from model.common.errors import UserError
from model.common.records import read_record, seal
from pipeline.ablation.rows import Score
from pipeline.demo import Measured, Phases
from pipeline.demonstration.plan import Plan
from pipeline.evaluation.answers import Scorer
from pipeline.evaluation.common import BenchImage
from pipeline.evaluation.images import read_plan
from pipeline.follow import PromptSettings, make_prompts
from pipeline.operations.preflight import NodeReport, read_reports
from pipeline.reporting.extra import read_extra
from pipeline.reporting.page import build
from pipeline.runtime.finished import Finished, is_finished
from pipeline.runtime.settings_record import record_settings
from pipeline.stage.config import dump_stage
from tests.helpers import fake_snapshot
from tests.helpers.damage import damaged, edited
from tests.helpers.learned import LEARNED

MANY = settings(suppress_health_check=list(HealthCheck), max_examples=120, deadline=None)
IMAGES = [BenchImage("00000.png", "a cat", (1, 2), {"id": "7"}), BenchImage("a/1.png", "", (3,))]


def read_as(schema):
    return lambda path: read_record(path, schema, "remove it")


def prompts_of(path):
    """Make few of the prompts: their number may be large after damage."""
    record = read_record(path, PromptSettings, "remove it")
    assert record.keys() == RECORDS["prompts.json"][0].keys()
    return make_prompts({**record, "count": min(record["count"], 3)})


def phases_of(path):
    found = Phases(path).seconds
    assert all(isinstance(value, float | int) for value in found.values())
    return found


def compare_settings(path):
    record_settings(path, RECORDS["settings.json"][0])


RECORDS = {
    "plan.json": (
        {"weights": "ema", "pictures": [asdict(image) for image in IMAGES]},
        lambda path: read_plan(path.parent)[0],
    ),
    "demo_plan.json": (asdict(Plan(8.0, 6400, 64)), read_as(Plan)),
    "measured.json": ({"learned": LEARNED, "images": {"share": 0.2}}, read_as(Measured)),
    "phases.json": ({"1 pairs": 3.5, "2 VAE": 70.0}, phases_of),
    "report_extra.json": (
        {
            "tiles": [{"label": "seconds", "value": "3"}],
            "phases": [{"name": "1 pairs", "seconds": 3.5}],
            "learned": LEARNED,
            "pictures_note": "a note",
            "licences": "MIT",
        },
        lambda path: read_extra(path.parent),
    ),
    "prompts.json": (
        {"prompts": "scenes", "count": 4, "segments": None, "kind": "list", "aspect": 1.0, "seed": 3},
        prompts_of,
    ),
    "score.json": (
        {
            "score": 0.5,
            "attributes": {"shape": 0.5},
            "chance": {"shape": 0.2},
            "segments": [[0.5]],
            "loss": None,
        },
        read_as(Score),
    ),
    "scorer.json": ({"models": {"vqa": {"name": "x", "revision": "y"}}, "template": "{}?"}, read_as(Scorer)),
    "settings.json": ({"minutes": 8.0, "names": ["a", "b"]}, compare_settings),
    "finished.json": (asdict(Finished(100, 800, 12.0)), lambda path: is_finished(path.parent, 800)),
    "rank_00000.json": (
        asdict(NodeReport("n1", 0, 0, 8, [("gpu", "too hot")], {"torch": "2"}, 1.0, 2.0, 3.0)),
        lambda path: read_reports(path.parent),
    ),
}


@pytest.fixture(params=RECORDS)
def place(request, tmp_path):
    return tmp_path / request.param


def outcome(path, data):
    """Return what is read from the data, or the error, which is one line that names the file."""
    path.write_bytes(data)
    try:
        return RECORDS[path.name][1](path)
    except UserError as error:
        return error


def check_line(path, error):
    assert "\n" not in str(error)
    assert str(path.parent) in str(error)


def test_damage_of_a_sealed_record_never_gives_another(place):
    whole = seal(RECORDS[place.name][0])
    right = outcome(place, whole)
    assert not isinstance(right, UserError)

    @MANY
    @given(damaged(whole))
    def check(data):
        result = outcome(place, data)
        if isinstance(result, UserError):
            check_line(place, result)
        else:
            # Damage of the seal's own name makes it one more field of a record that may have others.
            assert result == right or (
                place.name in ("scorer.json", "score.json") and result.items() > right.items()
            )

    check()


def test_edited_fields_without_a_seal_are_a_record_of_the_same_form_or_one_line(place):
    right = outcome(place, json.dumps(RECORDS[place.name][0]).encode())
    assert not isinstance(right, UserError)

    @MANY
    @given(edited(RECORDS[place.name][0]))
    def check(record):
        result = outcome(place, json.dumps(record).encode())
        if isinstance(result, UserError):
            check_line(place, result)
        else:
            assert isinstance(result, type(right))

    check()


@pytest.mark.parametrize("aspect", [1e16, 1e-16, 101.0])
def test_prompts_of_an_endless_strip_are_refused(tmp_path, aspect):
    """Its grid would have more places than there is memory for."""
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({**RECORDS["prompts.json"][0], "aspect": aspect}))
    with pytest.raises(UserError, match="aspect"):
        prompts_of(path)


@pytest.mark.parametrize("file", ["../../secret.png", "/etc/passwd", "", "a/../../b.png"])
def test_a_planned_image_stays_inside_its_folder(tmp_path, file):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"pictures": [asdict(BenchImage(file, "a", (1,)))]}))
    with pytest.raises(UserError, match="is not a path inside images/"):
        read_plan(tmp_path)


def test_a_report_whose_image_is_gone_names_it(tmp_path):
    stage = fake_snapshot.stage(tmp_path / "no store", tmp_path)
    (tmp_path / "stage.yaml").write_text(dump_stage(stage))
    (tmp_path / "report_extra.json").write_text('{"pictures": [{"caption": "a", "drawn": "gone.png"}]}')
    with pytest.raises(UserError, match=r"gone.png: No such file or directory, and the report shows it"):
        build(tmp_path)


def test_phases_that_were_torn_are_one_line(tmp_path):
    phases = Phases(tmp_path / "phases.json")
    phases("1 pairs", lambda: None)
    assert Phases(tmp_path / "phases.json").seconds.keys() == {"1 pairs"}
    Path(phases.file).write_text(Path(phases.file).read_text()[:-3])
    with pytest.raises(UserError, match=r"phases.json: damaged: .*: remove .* to start over"):
        Phases(tmp_path / "phases.json")
