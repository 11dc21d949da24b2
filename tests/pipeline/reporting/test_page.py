"""The page of a run: curves of what its metrics hold and of nothing else, restarts and why, data used and
left out, grids."""

import base64
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from data_prep.dataset.parts import PLAN_KEY
from data_prep.store.store import open_store
from pipeline.reporting.curves import MAX_LINES, gate_lines, part_lines, scene_lines
from pipeline.reporting.page import build
from pipeline.stage.config import dump_stage
from pipeline.training.metrics import TIMESTEP_BINS
from tests.helpers import fake_snapshot

PLAIN = {
    "loss": 1.0,
    "grad_norm": 0.5,
    "samples_per_second": 9.0,
    **{f"loss_t{i}": 1.0 for i in range(TIMESTEP_BINS)},
}
EVERYTHING = {
    "mfu": 0.41,
    "goodput": 0.93,
    "skipped": 3.0,
    "loss_32x32": 1.0,
    "loss_32x64": 2.0,
    "loss_depth4": 1.0,
    "loss_depth2": 2.0,
    "gate_refiner_a_b_0": 0.1,
    "gate_collaborative_a_b_0": 0.2,
}
OPTIONAL = [
    "Loss by bucket", "Validation loss", "Loss by part", "Validation loss by part",
    "Validation loss of patches", "Difficulty of patches",
    "Scenes score", "Gates", "MFU", "Goodput",
]  # fmt: skip


def write_run(folder, metrics, stage=None):
    folder.mkdir()
    (folder / "stage.yaml").write_text(dump_stage(stage or fake_snapshot.stage(folder / "no store", folder)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def reports(count, **values):
    return [
        {"step": step, "samples": 8 * step, "time": step, **PLAIN, **values} for step in range(1, count + 1)
    ]


def event(name, step, **fields):
    return {"event": name, "time": float(step), "step": step, "samples": 8 * step, **fields}


def titles(page):
    return re.findall(r"<section><h2>(.*?)</h2>", page)


def rows(page, title):
    """Texts of the cells of the table after a heading."""
    table = re.search(r"<table>.*?</table>", page[page.index(title) :], re.DOTALL)[0]
    return [re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]


def test_a_curve_is_there_if_and_only_if_the_metrics_hold_it(tmp_path):
    page = build(write_run(tmp_path / "plain", reports(3))).read_text()
    assert not set(titles(page)) & set(OPTIONAL)
    assert {"Training loss", "Loss by timestep", "Gradient norm", "Speed"} <= set(titles(page))
    events = [
        event("validation", 2, loss=1.5),
        event("scenes", 3, colour=0.4, seconds=7.0),
        event("elastic", 2, loss_depth4=1.4, loss_depth2=1.6),
        event("patches", 2, loss=1.4, loss_t0=1.2, **{"rank_correlation_t0.0625": 0.4}),
    ]
    page = build(write_run(tmp_path / "full", [*reports(3, **EVERYTHING), *events])).read_text()
    assert set(OPTIONAL) <= set(titles(page))
    for tile in ("<b>41.0%</b><span>MFU", "<b>93.0%</b><span>goodput", "<b>3</b><span>steps skipped"):
        assert tile in page
    for attribute in ('src="http', '<a href="http', "url(http", '<link rel="stylesheet"'):
        assert attribute not in page  # the page needs no other file and no network
    assert build(write_run(tmp_path / "empty", [])).exists()


def test_gates_are_a_line_a_block_or_where_they_are_many_their_mean():
    few = reports(2, gate_refiner_a_b_0=0.1, gate_refiner_a_b_1=0.3)
    assert gate_lines(few) == {
        "refiner a_b, block 1": ([8, 16], [0.1, 0.1]),
        "refiner a_b, block 2": ([8, 16], [0.3, 0.3]),
    }
    many = reports(2, **{f"gate_refiner_{llm}_{block}": block for llm in "xy" for block in range(MAX_LINES)})
    mean = (MAX_LINES - 1) / 2
    assert gate_lines(many) == {f"refiner {llm}, mean of blocks": ([8, 16], [mean, mean]) for llm in "xy"}


def test_parts_of_an_elastic_network_have_lines_of_their_own(tmp_path):
    lines = [
        event("scenes", 4, colour=0.1, following=0.2),
        event("scenes_depth2_patch4", 4, colour=0.3, following=0.4),
        event("scenes_depth2", 8, colour=0.5, following=0.6),
        *reports(1, loss_depth4_patch2=1.0, loss_32x32_depth4_patch2=1.0, loss_depth2_patch4=2.0),
    ]
    assert scene_lines(write_run(tmp_path / "run", lines)) == {
        "colour": ([32], [0.1]),
        "following": ([32], [0.2]),
        "following depth2_patch4": ([32], [0.4]),
        "following depth2": ([64], [0.6]),
    }
    rows = [line for line in lines if "event" not in line]
    assert part_lines(rows) == {"depth4_patch2": ([8], [1.0]), "depth2_patch4": ([8], [2.0])}


def test_scores_of_scenes_are_found_in_reports_and_in_events_and_count_as_last_drawn(tmp_path):
    lines = [
        event("scenes", 4, colour=0.1),
        event("scenes", 2, colour=0.2),
        event("scenes", 4, colour=0.3, how="text"),
    ]
    lines += [*reports(1, scenes_shape=0.5), event("save", 4, seconds=1.0)]
    assert scene_lines(write_run(tmp_path / "run", lines)) == {
        "colour": ([16, 32], [0.2, 0.3]),
        "scenes_shape": ([8], [0.5]),
    }


def test_restarts_and_why_stand_between_starts_and_stops(tmp_path):
    lines = [event("start", 0, how="started from fresh weights"), event("stop", 3, reason="SIGUSR1")]
    run = write_run(tmp_path / "run", [*lines, event("start", 5, how="resumed from step_3")])
    ending = {
        "job": "7",
        "restart": 0,
        "nodes": "n[1-2]",
        "started": 0.0,
        "ended": 4.0,
        "kind": "crash",
        "step": 3,
    }
    (run / "attempts.jsonl").write_text(
        json.dumps({**ending, "reason": "killed by signal 9 & gone", "requeued": True}) + "\n"
    )
    cells = [row[1:2] + row[4:] for row in rows(build(run).read_text(), "Starts, saves, stops and why")[1:]]
    assert cells == [
        ["start", "started from fresh weights"],
        ["stop", "SIGUSR1"],
        ["end of job 7.0: crash", "killed by signal 9 &amp; gone; on n[1-2]; queued again"],
        ["start", "resumed from step_3"],
    ]


def test_data_used_and_left_out(tmp_path):
    store = tmp_path / "store"
    fake_snapshot.make(store, {"16x16": [6, 4], "16x32": [5]}, tmp_path)
    stage = fake_snapshot.stage(store, tmp_path)
    page = build(write_run(tmp_path / "without", [], stage)).read_text()
    families = rows(page, "<h2>Data</h2>")[1:]
    assert [row[:1] + row[2:3] for row in families] == [[name, "15"] for name in ("latents", "small", "wide")]
    assert rows(page, "Used and left out") == [
        ["rows of the sources", "", "15"],
        ["pairs in the snapshot", "", "15"],
    ]
    file = {"number": 0, "label": "a.tar", "rows": 1220, "kept": 15}
    files = [
        {**file, "dropped": {"dedupe: same file": 1200, "bucket: too small": 2}},
        {**file, "dropped": {"bucket: too small": 3}},
    ]
    record = {"files": files, "captions": {"kept": {}, "letters": {}, "refused": {}}, "manifest": {}}
    open_store(str(store)).sub("ds").put_new(PLAN_KEY, json.dumps(record).encode())
    assert rows(build(write_run(tmp_path / "with", [], stage)).read_text(), "Used and left out") == [
        ["rows of the sources", "", "1,220"],
        ["dedupe: same file", "-1,200", "20"],
        ["bucket: too small", "-5", "15"],
        ["pairs in the snapshot", "", "15"],
    ]
    shutil.rmtree(store)
    page = build(tmp_path / "with").read_text()
    assert "Not known here" in page
    assert "Used and left out" not in page


@pytest.fixture
def chromium():
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here")
    return program


def test_the_slider_shows_the_grids_through_time(tmp_path, chromium):
    run = write_run(tmp_path / "run", [])
    (run / "grids").mkdir()
    for samples, colour in ((16, "red"), (8000, "blue")):
        Image.new("RGB", (64, 32), colour).save(run / "grids" / f"samples_{samples:012d}.png")
    images = [base64.b64encode(path.read_bytes()).decode() for path in sorted((run / "grids").iterdir())]
    page = build(run)
    moved = tmp_path / "moved.html"
    slide = 'const s = document.getElementById("slide"); s.value = 0; s.dispatchEvent(new Event("input"));'
    moved.write_text(page.read_text().replace("</body>", f"<script>{slide}</script></body>"))
    for path, label, image in (
        (page, "after 8,000 samples", images[1]),
        (moved, "after 16 samples", images[0]),
    ):
        command = [
            chromium,
            "--headless",
            "--no-sandbox",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            path.as_uri(),
        ]
        drawn = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
        assert f'id="when">{label}<' in drawn
        assert f"data:image/png;base64,{image}" in re.search(r'<img id="shown".*?>', drawn)[0]
