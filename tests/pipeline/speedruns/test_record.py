"""Records of the speedrun: the clock, the rules, and the leaderboard."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.common.errors import UserError
from model.common.records import seal
from pipeline.speedruns.board import in_order, leaderboard, learning_curves, score_points, write_board
from pipeline.speedruns.record import (
    has_reached,
    mean_seconds,
    read_checked,
    read_log,
    seconds_to,
    seconds_to_target,
)
from pipeline.speedruns.track import FIXED, PROMPTS, TRACKS, changed_settings, load_entry

JUDGED = [f"sample.scenes={PROMPTS}", "sample.every_samples=6400"]
OTHER = {
    "data.datasets": "{a: {weight: 1.0}, b: {weight: 1.0}}",
    "data.validation_parts": "3",
    "sample.scenes": "7",
    "sample.scenes_scale": "2.0",
    "sample.height": "64",
    "sample.width": "64",
}
"""Another value of each fixed setting; a word does for the others."""


def log_of(seed=0, speed=100.0, segments=(0.5, 0.92, 0.95)):
    """A run of reports every 3,200 samples at a speed, and scores every 6,400 samples."""
    ends = range(3200, 6400 * len(segments) + 1, 3200)
    return {
        "seed": seed,
        "snapshot": "abc",
        "reports": [
            {"step": end // 64, "samples": end, "loss": 1.0, "samples_per_second": speed} for end in ends
        ],
        "scores": [
            {
                "samples": 6400 * number,
                **dict.fromkeys(("segment", "colour", "shape", "size", "texture"), share),
            }
            for number, share in enumerate(segments, 1)
        ],
    }


def record_of(**changes):
    runs = [log_of(seed) for seed in range(3)]
    record = {
        "format": 1,
        "track": "cpu",
        "name": "first",
        "change": "the first one",
        "settings": JUDGED,
        "conditions": "today",
        "runs": runs,
        "seconds": mean_seconds(runs),
    }
    return record | changes


def write(path, record):
    path.write_bytes(seal(record))
    return path


def write_metrics(run, lines):
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@given(st.lists(st.floats(1.0, 1e4), min_size=2, max_size=8), st.data())
@settings(deadline=None, max_examples=50)
def test_the_clock_is_the_time_of_the_steps_and_stops_at_the_first_right_score(speeds, data):
    log, seconds = log_of(segments=(0.0,) * len(speeds)), []
    for number, report in enumerate(log["reports"]):
        report["samples_per_second"] = speeds[number // 2]
        seconds.append(3200 / speeds[number // 2])
    target = data.draw(st.integers(0, len(speeds) - 1))
    log["scores"][target]["segment"] = 0.9
    assert seconds_to_target(log) == pytest.approx(sum(seconds[: 2 * (target + 1)]))
    # between two reports, the speed of the later one
    assert seconds_to(log, 3200 + 1600) == pytest.approx(seconds[0] + seconds[1] / 2)


def test_the_mean_is_that_of_all_seeds_or_none():
    assert seconds_to_target(log_of()) == 128.0
    assert mean_seconds([log_of(speed=100.0), log_of(speed=50.0)]) == 192.0
    assert mean_seconds([log_of(), log_of(segments=(0.1, 0.2))]) is None
    assert mean_seconds([]) is None


def test_a_record_that_keeps_the_rules_is_read(tmp_path):
    record = read_checked(write(tmp_path / "first.json", record_of()))
    assert record["seconds"] == 128.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seconds": 60.0}, "its log says 128.0 seconds, not 60.0"),
        ({"runs": [log_of(0), log_of(1)], "seconds": 128.0}, "2 different seeds"),
        ({"runs": [log_of(0), log_of(0), log_of(1)]}, "2 different seeds"),
        ({"runs": [log_of(0), log_of(1), log_of(2, segments=(0.1,))]}, "not every seed"),
        ({"settings": ["sample.scenes_scale=2.0", *JUDGED]}, "sample.scenes_scale is the same for all"),
        ({"settings": [*JUDGED, "model.depht=3"]}, "depht"),
        ({"track": "tpu"}, "the tracks are cpu, gpu"),
        ({"seconds": -1.0}, "seconds"),
        ({"format": 2}, "format"),
    ],
)
def test_a_record_that_breaks_a_rule_is_one_line(tmp_path, change, words):
    with pytest.raises(UserError, match=words) as error:
        read_checked(write(tmp_path / "first.json", record_of(**change)))
    assert "\n" not in str(error.value)


def test_a_log_out_of_order_or_of_other_data_is_refused(tmp_path):
    record = record_of()
    record["runs"][1]["reports"].reverse()
    with pytest.raises(UserError, match="not in order"):
        read_checked(write(tmp_path / "a.json", record))
    record = record_of()
    record["runs"][1]["snapshot"] = "other"
    with pytest.raises(UserError, match="different snapshots"):
        read_checked(write(tmp_path / "b.json", record))


@pytest.mark.parametrize("key", FIXED)
def test_what_is_fixed_cannot_be_changed(key):
    value = OTHER.get(key, "another")
    with pytest.raises(UserError):
        load_entry(TRACKS["cpu"], [f"{key}={value}"])


def test_changed_settings_are_named_whatever_the_text_says():
    assert changed_settings(TRACKS["cpu"], []) == []
    given_settings = ["optim.lr=0.5", "global_batch=32"]
    assert sorted(changed_settings(TRACKS["cpu"], given_settings)) == ["global_batch", "optim.lr"]


@pytest.mark.parametrize("name", TRACKS)
def test_the_shipped_stages_are_judged_by_the_rules(name):
    stage = load_entry(TRACKS[name], [])
    assert stage.sample.scenes == PROMPTS
    assert stage.sample.every_samples


def test_the_log_is_read_from_a_runs_metrics(tmp_path):
    log = log_of()
    lines = [{"event": "start", "time": 0.0, "step": 0, "samples": 0, "snapshot": "abc"}]
    lines += [{**report, "time": 1.0, "grad_norm": 0.1} for report in log["reports"]]
    lines += [
        {"event": "scenes", "time": 2.0, "step": 1, "caption": 0.1, **scores} for scores in log["scores"]
    ]
    write_metrics(tmp_path, lines)
    assert read_log(tmp_path, 0) == log


def test_scores_of_scenes_without_sizes_and_textures_are_a_record(tmp_path):
    record = record_of()
    for scores in (scores for log in record["runs"] for scores in log["scores"]):
        del scores["size"], scores["texture"]
        scores["count"] = 0.5
    assert read_checked(write(tmp_path / "plain.json", record))["runs"] == record["runs"]
    lines = [{"event": "scenes", "time": 2.0, **scores} for scores in record["runs"][0]["scores"]]
    write_metrics(tmp_path, lines)
    assert read_log(tmp_path, 0)["scores"] == record["runs"][0]["scores"]


@pytest.mark.parametrize(
    ("segments", "reports", "enough"), [((0.5, 0.9), 4, True), ((0.5, 0.9), 3, False), ((0.5, 0.8), 4, False)]
)
def test_a_seed_is_done_once_a_score_reaches_the_target_and_a_report_times_it(
    tmp_path, segments, reports, enough
):
    log = log_of(segments=segments)
    lines = [{**report, "time": 1.0} for report in log["reports"][:reports]]
    lines += [{"event": "scenes", "time": 2.0, **scores} for scores in log["scores"]]
    assert not has_reached(read_log(tmp_path / "not begun", 0))
    write_metrics(tmp_path, lines)
    assert has_reached(read_log(tmp_path, 0)) is enough


def faster_record(**changes):
    """The record, twice as fast."""
    fast = copy.deepcopy(record_of(**changes))
    for log in fast["runs"]:
        log["reports"] = [{**report, "samples_per_second": 200.0} for report in log["reports"]]
    fast["seconds"] = mean_seconds(fast["runs"])
    return fast


def test_the_board_orders_records_and_escapes_what_others_wrote():
    slow, fast = record_of(), faster_record(name="second", change="a | <b>\nc")
    assert in_order([fast, slow], "cpu") == [slow, fast]
    rows = [line for line in leaderboard([fast, slow]).splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| first", "| second"]
    assert "50%" in rows[2]
    assert "a \\| &lt;b> c" in rows[2]
    assert "No record yet." in leaderboard([fast, slow])


def test_the_board_has_a_figure_per_track_with_records_which_is_the_same_each_time(tmp_path):
    page, records = tmp_path / "speedrun.md", [record_of(), faster_record(name="second")]
    write_board(page, records)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speedrun.md", "speedrun_cpu.svg"]
    assert "(speedrun_cpu.svg)" in page.read_text()
    drawn = (tmp_path / "speedrun_cpu.svg").read_text()
    assert drawn.startswith("<svg")
    assert drawn == learning_curves(records) != learning_curves(records[:1])


def test_a_learning_curve_is_the_mean_of_the_seeds_as_far_as_all_go():
    record = record_of(runs=[log_of(0), log_of(1, speed=50.0), log_of(2, segments=(0.2, 0.92))])
    minutes, shares = score_points(record)
    assert minutes == pytest.approx([(64 + 128 + 64) / 180, (128 + 256 + 128) / 180])
    assert shares == [[0.5, 0.5, 0.2], [0.92, 0.92, 0.92]]
