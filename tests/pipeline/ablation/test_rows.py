"""Rows, units and verdicts of an ablation."""

import math
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_prep
from data_prep.config import load_dataset
from data_prep.dataset.schema import Family, Snapshot
from model.common.errors import UserError
from model.config import DiTConfig
from model.fusion import TextFusion
from pipeline.ablation.rows import PAPER_ROWS, Ablation, Row, SeedMean, make_jobs, orderings, read_ablation
from pipeline.stage.config import dump_stage, load_stage

ROLES = [f"families.{role}={role}" for role in ("a", "a_plain", "b", "b_plain", "t5", "clip")]
PAPER = {  # T2I-avg of tables 2, 3, 5 and 6
    "Table 2": [38.72, 48.41, 54.02, 56.79, 60.31],
    "Table 3": [48.82, 49.52, None, None, 38.11, 53.81, 38.72, 45.84, 54.02],
    "Table 5": [48.25, 54.02, 55.13, 53.47],
    "Table 6": [56.79, 56.13, 58.32, 60.31],
}


def snapshot(*families):
    texts = {name: Family(name, "text", {"llm": name}, {"width": 8}) for name in families}
    latents = {"latents": Family("latents", "latents", {}, {"channels": 16})}
    return Snapshot("set", ["original"], {**latents, **texts}, {}, {})


def test_the_papers_rows_are_its_tables():
    ablation = read_ablation(PAPER_ROWS, ROLES, [])
    numbers = {
        title.split(":")[0]: [ablation.rows[name].paper for name in rows]
        for title, rows in ablation.tables.items()
    }
    assert numbers == PAPER


def test_rows_differ_only_in_their_settings_and_seeds():
    ablation = read_ablation(PAPER_ROWS, ROLES, [])
    jobs, left_out = make_jobs("demo", ["samples=640"], ablation, 2, snapshot("a", "a_plain", "b", "b_plain"))
    assert left_out == [
        "T5: no text family `t5`", "T5, refiner: no text family `t5`",
        "CLIP: no text family `clip`", "CLIP, refiner: no text family `clip`",
    ]  # fmt: skip
    assert len(jobs) == 2 * 13
    assert len({job.run for job in jobs}) == len(jobs)
    first = jobs[0].stage
    for job in jobs:
        assert (job.stage.samples, job.stage.data.snapshot, job.stage.model) == (
            640,
            first.data.snapshot,
            first.model,
        )
        assert job.stage.data.seed == job.seed
    fusions = [(str(job.stage.fusion)) for job in jobs if job.seed == 0]
    assert len(set(fusions)) == len(fusions)


def test_one_row_in_several_tables_is_trained_once():
    ablation = read_ablation(PAPER_ROWS, ROLES, ["a_both", "ab_concat"])
    assert ablation.tables.keys() == {"Table 2: what each component adds", "Table 6: fusing LLMs"}
    jobs, _ = make_jobs("demo", [], ablation, 1, snapshot("a", "b"))
    assert [job.row for job in jobs] == ["a_both", "ab_concat"]


@pytest.mark.parametrize(("only", "says"), [(["nothing"], "row `nothing` does not exist")])
def test_an_unknown_row_is_named(only, says):
    with pytest.raises(UserError, match=says):
        read_ablation(PAPER_ROWS, ROLES, only)


def test_changed_settings_are_refused(tmp_path):
    ablation = Ablation(rows={"one": Row("one", ["fusion.families=[a]", "fusion.mode=none"])})
    (job,), _ = make_jobs("demo", [f"runs={tmp_path}"], ablation, 1, snapshot("a"))
    job.check([])
    job.run.mkdir(parents=True)
    (job.run / "stage.yaml").write_text(dump_stage(job.stage))
    job.check(["a circle"])
    (other,), _ = make_jobs("demo", [f"runs={tmp_path}", "optim.lr=0.5"], ablation, 1, snapshot("a"))
    with pytest.raises(UserError, match=r"other settings than are asked for now \(optim.lr=0.5\)"):
        other.check(["a circle"])
    job.prompts.write_text("a circle\na star")
    job.check(["a circle", "a star"])
    with pytest.raises(UserError, match="has images of other prompts"):
        job.check(["a circle"])


def test_the_interval_is_students():
    estimate = SeedMean.of([0.1, 0.2, 0.3])
    assert estimate.mean == pytest.approx(0.2)
    assert estimate.half == pytest.approx(
        4.302653 * 0.1 / math.sqrt(3), rel=1e-5
    )  # t of 2 degrees of freedom
    assert str(estimate) == "20.0 ± 24.8"
    assert str(SeedMean.of([0.5])) == "50.0"


def scores_of(values):
    contrast = {"distant": values, **({"negation": [0.5]} if values[0] > 0.5 else {})}
    return {"segments": [[value] for value in values], "contrast": contrast}


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=3, max_size=5), st.floats(0.01, 0.5)
)
def test_a_constant_lead_holds_whatever_the_noise_that_both_share(noise, lead):
    ablation = Ablation(
        rows={"low": Row("low", paper=1.0), "high": Row("high", paper=2.0), "own": Row("own")},
        tables={"t": ["low", "high", "own"]},
        pairs={"t": [["own", "low"]]},
    )
    low = {seed: scores_of(values) for seed, values in enumerate(noise)}
    high = {seed: scores_of([value + lead for value in values]) for seed, values in enumerate(noise)}
    (held,) = orderings(ablation, {"low": low, "high": high})["t"]
    assert (held.better, held.verdict) == ("high", "holds")
    (lost,) = orderings(ablation, {"low": high, "high": low})["t"]
    assert lost.verdict == "reversed"
    (alone,) = orderings(ablation, {"low": {0: low[0]}, "high": {0: high[0]}})["t"]
    assert alone.verdict == "undecided"
    assert orderings(ablation, {"low": low})["t"] == []
    # What only some runs were asked for is not compared.
    assert held.contrast["distant"].mean == pytest.approx(lead)
    assert held.contrast.keys() <= {"distant", "negation"}
    (own,) = orderings(ablation, {"low": low, "own": high})["t"]
    assert (own.better, own.worse, own.verdict) == ("own", "low", "holds")


@pytest.mark.parametrize("pairs", ["{t: [[a, b]]}", "{rows: [[a]]}", "{rows: [[a, c]]}"])
def test_pairs_are_two_rows_of_a_table(tmp_path, pairs):
    path = tmp_path / "rows.yaml"
    path.write_text(f"rows: {{a: {{}}, b: {{}}}}\npairs: {pairs}\n")
    with pytest.raises(UserError, match=r"pairs of|does not exist"):
        read_ablation(path, [], [])
    path.write_text("rows: {a: {}, b: {}}\npairs: {rows: [[b, a]]}\n")
    assert read_ablation(path, [], []).pairs == {"rows": [["b", "a"]]}


def test_one_llm_has_the_parameters_of_two_in_the_rows_that_say_so():
    ablation = read_ablation(PAPER_ROWS.with_name("binding.yaml"), [], [])

    def parameters(row, widths):
        stage = load_stage("binding", ablation.rows[row].settings)
        sizes = DiTConfig(depth=4, width=192, heads=4, patch=8, channels=3)
        return sum(parameter.numel() for parameter in TextFusion(stage.fusion, widths, sizes).parameters())

    two = parameters("ab", [576, 640])
    assert two == 1_816_128
    assert parameters("a_deep", [576]) / two == pytest.approx(0.991, abs=0.001)
    assert parameters("a_wide", [576]) / two == pytest.approx(1.014, abs=0.001)


def test_rows_of_the_binding_ablation_load_and_have_the_families_of_its_dataset():
    ablation = read_ablation(PAPER_ROWS.with_name("binding.yaml"), [], [])
    dataset = load_dataset(Path(data_prep.__file__).parent / "datasets" / "binding.yaml", [])
    families = [text.name for text in dataset.text]
    assert set(chain.from_iterable(ablation.tables.values())) == set(ablation.rows)
    for row in ablation.rows.values():
        stage = load_stage("binding", row.settings)
        assert set(stage.fusion.families) <= set(families)
        assert stage.data.dataset == dataset.name
    pairs = [pair for table in ablation.pairs.values() for pair in table]
    assert ["ab", "a_deep"] in pairs
    assert all(len(set(pair)) == 2 for pair in pairs)
