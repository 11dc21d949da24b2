"""What a run's report says of its data: what it reads, and what was left out on the way there and why."""

from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.dataset.parts import read_plan, read_plan_record
from data_prep.dataset.snapshot_reader import read_index
from model.common.errors import UserError
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import Corpus, open_corpus, read_families


def data_of(stage: StageConfig) -> dict[str, Any]:
    """`note`, `families` (rows of a table) and `steps` (from rows read to rows used); the note alone where the store cannot be
    read from here."""
    try:
        corpus = open_corpus(stage)
        families, steps = _families(corpus, stage), _steps(corpus)
    except UserError as error:
        return {"note": f"Not known here: {error}.", "families": [], "steps": []}
    kept = " Text states are stored without padding and without the instruction, which is kept once."
    note = f"Reads {corpus}.{kept if stage.fusion.encode == 'families' else ''}"
    return {"note": note, "families": families, "steps": steps}


def _families(corpus: Corpus, stage: StageConfig) -> list[dict[str, str]]:
    indexes = [read_index(one.dataset, one.snapshot, bucket) for one in corpus.sources for bucket in one.snapshot.buckets]
    rows = []
    for name in read_families(stage):
        identity = corpus.families[name].identity
        made_with = next((str(identity[key]) for key in ("llm", "vae", "space", "model") if identity.get(key)), "")
        made_with = made_with.removeprefix("package:")
        pairs, size = (sum(sum(index[column].to_pylist()) for index in indexes) for column in ("rows", f"{name}.bytes"))
        rows.append({"name": name, "made_with": Path(made_with).name, "rows": f"{pairs:,}", "bytes": f"{size / pairs:,.0f}"})
    return rows


def _steps(corpus: Corpus) -> list[dict[str, str]]:
    """From the rows of the sources to those that the run reads: what each reason took, and what was left."""
    planned, used = 0, sum(corpus.rows.values())
    taken: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    for one in corpus.sources:
        planned += sum(sum(rows) for rows in read_plan(one.dataset).buckets.values())
        missing.update(one.snapshot.left_out)
        try:
            files = read_plan_record(one.dataset)["files"]
        except FileNotFoundError:  # parts that were not made by `data_prep plan`
            files = []
        for file in files:
            taken.update(file["dropped"])
    missing["dropped when decoded in full"] = planned - used - missing.total()
    left = planned + taken.total()
    steps = [{"name": "rows of the sources", "taken": "", "left": f"{left:,}"}]
    for reason, count in [*taken.most_common(), *missing.most_common()]:
        if count:
            left -= count
            steps.append({"name": reason, "taken": f"-{count:,}", "left": f"{left:,}"})
    return [*steps, {"name": "pairs in the snapshot", "taken": "", "left": f"{left:,}"}]
