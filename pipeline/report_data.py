"""What a run's report says of its data: what it reads, and what was left out on the way there and why."""

from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.parts import read_plan, read_plan_record
from data_prep.schema import Snapshot
from data_prep.snapshot_reader import read_index, read_snapshot
from data_prep.store import Store
from model.errors import UserError
from pipeline.assembly import open_dataset
from pipeline.config import StageConfig


def data_of(stage: StageConfig) -> dict[str, Any]:
    """`note`, `families` (rows of a table) and `steps` (from rows read to rows used); the note alone where the store cannot be
    read from here."""
    try:
        dataset = open_dataset(stage)
        snapshot = read_snapshot(dataset, stage.data.snapshot)
        families, steps = _families(dataset, snapshot, stage), _steps(dataset, snapshot)
    except UserError as error:
        return {"note": f"Not known here: {error}.", "families": [], "steps": []}
    kept = " Text states are stored without padding and without the instruction, which is kept once."
    note = f"Snapshot {snapshot.id} of {snapshot.dataset}.{kept if stage.fusion.encode == 'families' else ''}"
    return {"note": note, "families": families, "steps": steps}


def _families(dataset: Store, snapshot: Snapshot, stage: StageConfig) -> list[dict[str, str]]:
    indexes = [read_index(dataset, snapshot, bucket) for bucket in snapshot.buckets]
    rows = []
    for name in [stage.data.latents, *stage.fusion.families]:
        if name not in snapshot.families:  # the trainer runs this LLM itself
            continue
        identity = snapshot.families[name].identity
        made_with = str(identity.get("llm") or identity.get("vae") or identity.get("model") or "").removeprefix("package:")
        pairs, size = (sum(sum(index[column].to_pylist()) for index in indexes) for column in ("rows", f"{name}.bytes"))
        rows.append({"name": name, "made_with": Path(made_with).name, "rows": f"{pairs:,}", "bytes": f"{size / pairs:,.0f}"})
    return rows


def _steps(dataset: Store, snapshot: Snapshot) -> list[dict[str, str]]:
    """From the rows of the sources to those of the snapshot: what each reason took, and what was left."""
    planned = sum(sum(rows) for rows in read_plan(dataset).buckets.values())
    used = sum(int(bucket["rows"]) for bucket in snapshot.buckets.values())
    taken: Counter[str] = Counter()
    try:
        files = read_plan_record(dataset)["files"]
    except FileNotFoundError:  # parts that were not made by `data_prep plan`
        files = []
    for file in files:
        taken.update(file["dropped"])
    missing = Counter(snapshot.left_out)
    missing["dropped when decoded in full"] = planned - used - missing.total()
    left = planned + taken.total()
    steps = [{"name": "rows of the sources", "taken": "", "left": f"{left:,}"}]
    for reason, count in [*taken.most_common(), *missing.most_common()]:
        if count:
            left -= count
            steps.append({"name": reason, "taken": f"-{count:,}", "left": f"{left:,}"})
    return [*steps, {"name": "pairs in the snapshot", "taken": "", "left": f"{left:,}"}]
