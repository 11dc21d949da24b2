"""The plan: which sample is which row of which part. Made once, by any number of tasks, then never changed.

Each task scans its share of the source files and commits one scan table per file (`scan/00000012.parquet`,
conditional put). The tasks that find all scan tables in the store finish the plan together (`finish`): they
drop duplicates across the dataset, shuffle the source files, split their rows by bucket and shuffle them in
windows; `manifest.json` is written last and makes the plan exist. All of it is a function of the settings and
the scan tables only, so any number of tasks, killed at any moment, write the same bytes.
"""

import json
from dataclasses import asdict
from functools import partial
from typing import Any

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import PLAN_AGAIN, read_plan
from data_prep.dataset.records import read_object
from data_prep.dataset.schema import Manifest
from data_prep.engines import run
from data_prep.images.buckets import make_buckets
from data_prep.plan.against import freeze_evaluation_files
from data_prep.plan.annotations import annotation_folder, check_filters, missing_annotations
from data_prep.plan.drop_list import freeze_drop_list, look_for_other_ids
from data_prep.plan.filters import Filters, split_filters
from data_prep.plan.finish import SETTINGS_KEY, finish_plan, remove_scan, remove_units
from data_prep.plan.listing import FILES_KEY, freeze_files, print_newer_files, removed
from data_prep.plan.pieces import remove_pieces
from data_prep.plan.scan_step import ScanStep
from data_prep.sources.sample import printable
from data_prep.store.store import Store, StoreError
from model.common.errors import UserError
from model.common.records import canonical_json, checked
from model.common.share import Share


def run_plan(config: DatasetConfig, dataset: Store, share: Share) -> Manifest | None:
    """Scan this share's files, and finish the plan if the files of all tasks are scanned.

    Args:
        config: the dataset's settings.
        dataset: the dataset's store.
        share: the source files that this task scans.

    Returns:
        The plan, or None while other tasks still scan.

    Raises:
        UserError: if the settings differ from those of the dataset in the store, if a source or an evaluation
            set has no files, if the drop list cannot be read or has changed, or if no pair is left.
    """
    if not config.sources:
        raise UserError("sources is empty: name at least one source in the dataset's YAML")

    # Built here only to raise errors before hours of work.
    of_sources, of_annotations = split_filters(config)
    Filters(of_sources)
    Filters(of_annotations)
    make_buckets(config.buckets, config.clip_frames)

    created = check_settings(config, dataset, create=True)
    # A plan never changes, so a second run only reads it.
    if dataset.exists(Manifest.KEY):
        freeze_files(config, dataset)
        if share.index == 0:
            # Of a task that was killed right after it finished the plan.
            remove_units(dataset)
            remove_pieces(config, dataset)
            print_newer_files(config, dataset)
            look_for_other_ids(config.dedupe.drop, dataset)
        return read_plan(dataset)

    try:
        freeze_drop_list(config.dedupe.drop, dataset)
        evaluation = freeze_evaluation_files(config, dataset)
        files = freeze_files(config, dataset)
    except UserError as error:
        # Without a list of files no task scans yet, so a wrong path can be corrected under the same name.
        if created and not isinstance(error, StoreError) and not dataset.exists(FILES_KEY):
            remove_scan(dataset)
            dataset.delete(SETTINGS_KEY)
        raise
    scan = ScanStep(config, dataset, files, evaluation)
    missing = set(scan.missing())
    if missing:
        # Of tables that do not exist any more: what is scanned now may differ.
        remove_units(dataset)
    own = share.owns(scan.units)
    todo = [key for key in own if key in missing]
    if len(todo) < len(own):
        print(f"plan: {len(own) - len(todo)} of {len(own)} {scan.noun_of_units} were scanned before")
    run(scan, share)
    # Last, so that a file that was still being written while it was read is named too.
    scan.print_changed(todo)
    missing = set(scan.missing())

    # Another plan may have removed everything meanwhile (`_nothing_left`). What this one wrote since would be
    # taken for the scan of whatever settings come next.
    if not dataset.exists(SETTINGS_KEY):
        remove_scan(dataset)
        raise removed(dataset, SETTINGS_KEY)

    if missing:
        # cluster/pairs.sh reads the numbers, to look whether these tasks are still in the queue.
        places = [place for place, key in enumerate(scan.units) if key in missing]
        tasks = sorted({Share.owner(place, len(scan.units), share.count) for place in places})
        print(
            f"plan: {len(missing)} of {len(scan.units)} {scan.noun_of_units} are not scanned yet (tasks "
            f"{', '.join(map(str, tasks))}); the last task to scan finishes the plan"
        )
        return None
    joining = scan.joining()
    if joining.units:
        run(joining, share)
    left = missing_annotations(config, dataset, files)
    if left:
        print(
            f"plan: {len(left)} of {len(files)} source files are not annotated yet: run `python -m data_prep "
            "annotate`, then plan again"
        )
        return None
    return finish_plan(config, dataset, files, evaluation, share)


def _settings_record(config: DatasetConfig) -> dict[str, Any]:
    """Return the settings that decide which pairs a dataset holds."""
    record = asdict(config)
    # A dataset may be moved, and families and users added to it, without a change to its pairs.
    for name in ("store", "workers", "latents", "captions", "text", "users"):
        del record[name]
    for source in record["sources"]:
        if source["scenes"] is None:
            del source["scenes"]  # records written before this setting existed do not have it
    if record["clips"] is None:
        del record["clips"]
    del record["annotations"]
    if config.annotations:
        # Filters on annotations can be changed until they are applied, see `check_filters`.
        record["filters"] = [asdict(settings) for settings in split_filters(config)[0]]
        record["annotations"] = annotation_folder(config)
    for name in ("against", "drop", "semantic"):
        if record["dedupe"][name] is None:
            del record["dedupe"][name]  # these neither
    return record


def check_settings(config: DatasetConfig, dataset: Store, create: bool = False) -> bool:
    """Compare the settings with those that the dataset was planned with.

    Args:
        config: the dataset's settings.
        dataset: the dataset's store.
        create: store the settings if the dataset has none yet.

    Returns:
        True if this call stored them.

    Raises:
        UserError: if they differ (the message names the keys), or if there is no plan and `create` is off.
    """
    record = _settings_record(config)
    check_filters(config, dataset)
    if create and dataset.put_new(SETTINGS_KEY, canonical_json(record)):
        return True
    try:
        stored = read_object(dataset, SETTINGS_KEY, partial(checked, dict[str, Any]), PLAN_AGAIN)
    except FileNotFoundError as error:
        if create:
            raise removed(dataset, SETTINGS_KEY) from error
        command = "python -m data_prep plan DATASET.yaml"
        raise UserError(f"{dataset.uri}: no plan yet: run `{command}` first") from error

    # Through JSON like the stored settings, so that both have the same types.
    current = json.loads(canonical_json(record))
    differences = []
    for name in sorted({*current, *stored}):
        if current.get(name) != stored.get(name):
            was, now = _short(stored.get(name)), _short(current.get(name))
            differences.append(f"`{printable(name)[:120]}` was {was}, is {now}")
    if differences:
        raise UserError(
            f"{dataset.uri} was planned with other settings: {'; '.join(differences)}: "
            "put them back, or give the dataset another `name`"
        )
    return False


def _short(value: Any) -> str:
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 120 else text[:117] + "..."
