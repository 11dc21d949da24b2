"""The rows of elastic networks fit the stage that they are for."""

from data_prep.dataset.schema import Family, Snapshot
from pipeline.ablation.rows import PAPER_ROWS, make_jobs, read_ablation
from pipeline.stage.config import load_stage


def test_the_rows_of_elastic_networks_load_with_the_patches_that_they_are_for():
    ablation = read_ablation(PAPER_ROWS.with_name("elastic.yaml"), [], [])
    settings = ["model.patch=4", "data.dataset=set"]
    family = load_stage("speedrun", settings).fusion.families[0]
    text = Family(family, "text", {"llm": family}, {"width": 8})
    jobs, left_out = make_jobs("speedrun", settings, ablation, 1, Snapshot("set", [], {family: text}, {}, {}))
    assert not left_out
    stages = {job.row: job.stage for job in jobs}
    assert list(stages) == ["plain", "half", "elastic", "sandwich", "light", "segments"]
    assert {stage.model.patch for stage in stages.values()} == {4}
    assert {name for name, stage in stages.items() if stage.elastic.elastic} == set(stages) - {"half"}
    assert stages["half"].model.depth == stages["elastic"].elastic.depths[-1]
