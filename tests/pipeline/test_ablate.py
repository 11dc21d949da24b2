"""An ablation from scenes to its report, with the real programs, at the smallest size; and all rows of the
paper."""

import json
import logging
import math
import re

import pytest

from data_prep.__main__ import main as data_prep
from data_prep.dataset.snapshot_reader import read_snapshot
from pipeline import ablate
from pipeline.ablation.rows import PAPER_ROWS, make_jobs, read_ablation
from pipeline.checkpoint.checkpoints import load_weights
from pipeline.following.contrast import CONTRASTS
from pipeline.runtime.distributed import Distributed
from pipeline.runtime.run_log import read_reports
from pipeline.runtime.stopping import Stop
from pipeline.stage.config import load_stage
from pipeline.stage.corpus import open_datasets
from pipeline.training.trainer import Trainer
from tests.helpers import tiny_llm
from tests.helpers.distributed import on_ranks
from tests.helpers.tiny_dataset import CAUSAL, write_dataset, write_stage

pytestmark = pytest.mark.timeout(240)

PLAIN = 'prefix: "", suffix: "<end>"'
NOT_CAUSAL = 'prefix: "", reuse_prefix: false, layer: "-1", max_tokens: 70'
FAMILIES = {
    "a": (tiny_llm.llama, CAUSAL),
    "a_plain": (tiny_llm.llama, PLAIN),
    "b": (tiny_llm.gemma3, CAUSAL),
    "b_plain": (tiny_llm.gemma3, PLAIN),
    "t5": (tiny_llm.t5, f"encoder: t5, {NOT_CAUSAL}"),
    "clip": (tiny_llm.clip, f"encoder: clip, {NOT_CAUSAL}"),
}
ROLES = [f"families.{role}={role}" for role in FAMILIES]
ROWS = """
families: {role: a}
rows:
  full:
    title: Full refiner
    paper: 2.0
    settings: ["fusion.families=[${families.role}]", fusion.refiner_blocks=1]
  other: {title: Another LLM, paper: 1.0, settings: ["fusion.families=[absent]"]}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of a dataset of scenes with all the paper's families, and of a stage."""
    folder = tmp_path_factory.mktemp("ablation")
    source = "{kind: scenes, scenes: {count: 16, seed: 0}, captions: {list: list}}"
    dataset = write_dataset(folder, source, "list", FAMILIES)
    for step in ("plan", "pairs", "latents", "text", "snapshot"):
        data_prep([step, str(dataset)])
    write_stage(folder, "small", family="a")
    (folder / "rows.yaml").write_text(ROWS)
    return folder


@pytest.fixture
def run(world, monkeypatch):
    def run(*arguments):
        words = [str(world / "small.yaml"), "--scored", "4", "--segments", "2", *arguments]
        monkeypatch.setattr("sys.argv", ["ablate", *words])
        ablate.main()

    return run


def refused(run, capfd, says, *arguments):
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    assert exit.value.code == 2
    assert says in capfd.readouterr().err


def test_from_scenes_to_a_report(world, run, capfd):
    arguments = ["--rows", str(world / "rows.yaml"), "--seeds", "1", "--contrast", "2"]
    run(*arguments)
    folder = world / "runs" / "small_ablation"
    score = json.loads((folder / "full/seed_0/score.json").read_text())
    assert 0 <= score["score"] <= 1
    assert [len(segments) for segments in score["segments"]] == [1, 2, 1, 2]
    assert len(list((folder / "full/seed_0/scenes").glob("0*.png"))) == 4 + 2 * len(CONTRASTS)
    # Two exchanged prompts are one pair.
    lengths = {kind: len(values) for kind, values in score["contrast"].items()}
    assert lengths == {**dict.fromkeys(CONTRASTS, 2), "exchanged": 1}
    table = (folder / "table.md").read_text()
    assert "| Full refiner | 2.00 |" in table
    assert "| chance | - |" in table
    assert f"| {' | '.join(CONTRASTS)} | validation loss |" in table
    assert "- Full refiner: last minus first segment " in table
    assert "Left out: Another LLM: no text family `absent`." in table
    page = (folder / "report.html").read_text()
    assert "<img" in page
    assert "Positional bias" in page

    # nothing is done again, and what was trained cannot be mixed with other settings or prompts
    before = (folder / "full/seed_0/metrics.jsonl").read_text()
    run(*arguments)
    assert (folder / "full/seed_0/metrics.jsonl").read_text() == before
    refused(run, capfd, "has images of other prompts", *arguments, "--scored", "5")
    refused(run, capfd, "exchanged prompts are pairs: give an even number", *arguments, "--contrast", "3")
    refused(
        run,
        capfd,
        "was trained with other settings than are asked for now (optim.lr=0.5)",
        *arguments,
        "optim.lr=0.5",
    )
    run(*arguments, "--dry-run")
    printed = capfd.readouterr().out
    assert "1 of 1 runs done" in printed
    assert "sbatch" not in printed


PARTS = {
    **dict.fromkeys(("a", "a_instruction", "b", "t5", "clip"), (1, 0, 0, 0)),
    **dict.fromkeys(
        ("a_refiner", "a_both", "a_causal", "b_refiner", "b_both", "t5_refiner", "clip_refiner"), (1, 2, 2, 0)
    ),
    "a_refiner_1": (1, 1, 1, 0), "a_refiner_3": (1, 3, 3, 0), "a_refiner_plain": (1, 2, 0, 0),
    "ab_concat": (2, 4, 4, 0), "ab_collaborative": (2, 4, 4, 1),
}  # fmt: skip
"""Row -> LLMs, blocks of their refiners, gated ones among them, collaborative blocks: in the weights of its
checkpoint."""


SOME_ROWS = ("a_causal", "a_refiner_plain", "ab_collaborative", "t5_refiner", "clip")


def parts_of(run):
    names = load_weights(run, "raw").keys()

    def count(pattern):
        return len({match[0] for name in names if (match := re.match(rf"fusion\.{pattern}", name))})

    block = r"refiners\.\d+\.blocks\.\d+\."
    return (
        count(r"projections\.\d+"),
        count(block),
        count(rf"{block}gates"),
        count(r"collaborative\.blocks\.\d+"),
    )


def train_all(configs):
    """Train each stage on this rank; the exit codes."""
    logging.disable(logging.INFO)
    return [Trainer(config, Distributed.from_environment(), Stop()).run() for config in configs]


@pytest.mark.parametrize("rows", [SOME_ROWS, pytest.param(tuple(PARTS), marks=pytest.mark.slow, id="all")])
def test_rows_of_the_paper_train(world, rows):
    """With encoders of each row's kind, T5 and CLIP among them: two steps by the real trainer, of the row's
    own network."""
    stage = str(world / "small.yaml")
    ablation = read_ablation(PAPER_ROWS, ROLES, rows)
    assert rows == SOME_ROWS or ablation.rows.keys() == read_ablation(PAPER_ROWS, [], []).rows.keys()
    base = load_stage(stage, [])
    settings = [f"name=rows_{len(rows)}", "engine.precision=fp32", "optim.warmup_samples=0"]
    jobs, left_out = make_jobs(
        stage, settings, ablation, 1, read_snapshot(open_datasets(base)[0], base.data.snapshot)
    )
    assert (len(jobs), left_out) == (len(rows), [])
    assert on_ranks(1, train_all, [job.stage for job in jobs]) == [[0] * len(jobs)]
    losses = {job.row: [report["loss"] for report in read_reports(job.run)] for job in jobs}
    assert all(len(each) == 2 and all(map(math.isfinite, each)) for each in losses.values())
    assert {job.row: parts_of(job.run) for job in jobs} == {row: PARTS[row] for row in rows}
    assert [job.row for job in jobs if job.stage.fusion.refiner == "causal"] == ["a_causal"]
