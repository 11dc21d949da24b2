"""The data section of a run's report: what the run reads, and what was left out before it and why."""

from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.dataset.parts import PLAN_KEY, read_plan, read_plan_record
from data_prep.dataset.snapshot_reader import read_index
from model.common.errors import UserError
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import Corpus, open_corpus, read_families

MADE_WITH = ("llm", "vae", "space", "model")
"""Keys of a family's identity that name what it was made with."""


def describe_data(stage: StageConfig) -> dict[str, Any]:
    """Describe a stage's data.

    Returns:
        `note`, `families` (rows of a table) and `steps` (from the rows of the sources to those that the run
        reads). If the store cannot be read from here, only the note.
    """
    try:
        corpus = open_corpus(stage)
        families, steps = _families(corpus, stage), _steps(corpus)
    # the store may be on another machine; the rest of the report does not need it
    except UserError as error:
        return {"note": f"Not known here: {error}.", "families": [], "steps": []}

    note = f"Reads {corpus}."
    if stage.fusion.encode == "families":
        note += " Text states are stored without padding, and the states of the instruction only once."

    return {"note": note, "families": families, "steps": steps}


def _families(corpus: Corpus, stage: StageConfig) -> list[dict[str, str]]:
    indexes: list[Any] = []
    for source in corpus.sources:
        indexes += [read_index(source.dataset, source.snapshot, bucket) for bucket in source.snapshot.buckets]

    rows: list[dict[str, str]] = []
    # only the families that this run reads, since the snapshot may have those of other runs
    for name in read_families(stage):
        identity = corpus.families[name].identity
        made_with = next((str(identity[key]) for key in MADE_WITH if identity.get(key)), "")
        pairs = sum(sum(index["rows"].to_pylist()) for index in indexes)
        size = sum(sum(index[f"{name}.bytes"].to_pylist()) for index in indexes)
        rows.append(
            {
                "name": name,
                # the last name alone: the page may be published, and paths reveal users and clusters
                "made_with": Path(made_with.removeprefix("package:")).name,
                "rows": f"{pairs:,}",
                "bytes": f"{size / pairs:,.0f}",
            }
        )

    return rows


def _steps(corpus: Corpus) -> list[dict[str, str]]:
    """Return the steps from the rows of the sources to the rows that the run reads, with what each drops."""
    planned, used = 0, sum(corpus.rows.values())
    dropped: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    for source in corpus.sources:
        planned += sum(sum(rows) for rows in read_plan(source.dataset).buckets.values())
        # a partial snapshot lacks parts that were not ready when it was made
        missing.update(source.snapshot.left_out)
        if source.dataset.exists(PLAN_KEY):  # else the parts were not made by `data_prep plan`
            for file in read_plan_record(source.dataset)["files"]:
                dropped.update(file["dropped"])
    # `plan` reads only headers, so damaged images are found later, by `pairs`
    missing["dropped when decoded in full"] = planned - used - missing.total()

    # the steps go down from this number, and have to end at the rows that the run reads
    left = planned + dropped.total()
    steps = [{"name": "rows of the sources", "taken": "", "left": f"{left:,}"}]
    for reason, count in [*dropped.most_common(), *missing.most_common()]:
        if count:
            left -= count
            steps.append({"name": reason, "taken": f"-{count:,}", "left": f"{left:,}"})
    steps.append({"name": "pairs in the snapshot", "taken": "", "left": f"{left:,}"})

    return steps
