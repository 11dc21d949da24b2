"""The frozen list of a dataset's source files, and the account of the files that the sources ignore.

The files of evaluation sets have such a list of their own, in another folder.
"""

from collections.abc import Sequence

from typing_extensions import TypedDict  # the standard library's has no checks before Python 3.12

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import PLAN_AGAIN
from data_prep.dataset.records import read_object
from data_prep.dataset.schema import SourceCounts
from data_prep.sources.source import SourceFile, list_files
from data_prep.store.store import Store
from model.common.errors import UserError
from model.common.records import STRICT, Count, checked, parse_record, seal

FOLDER = "scan"
FILES_KEY = f"{FOLDER}/files.json"
SOURCES_KEY = f"{FOLDER}/sources.json"


class FileList(TypedDict):
    """`scan/files.json`."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    files: list[tuple[Count, Count, str, str]]
    """Fields of each `SourceFile`, in order."""


class CountList(TypedDict):
    """`scan/sources.json`."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    sources: list[SourceCounts]
    """In the order of the dataset's YAML."""


def freeze_files(config: DatasetConfig, dataset: Store, folder: str = FOLDER) -> list[SourceFile]:
    """List the source files once for all tasks, so that files that are added later do not change ids.

    Args:
        config: the settings that name the sources.
        dataset: the dataset's store.
        folder: folder of the list.

    Raises:
        UserError: if a source has no files.
    """
    if not dataset.exists(f"{folder}/files.json"):
        files, inventories = list_files(config)
        counts = [SourceCounts(files=entry.found, ignored=dict(entry.ignored)) for entry in inventories]
        # The list comes last, so that it never exists without the counts.
        dataset.put_new(f"{folder}/sources.json", seal({"sources": counts}))
        entries = [[file.number, file.source, file.name, file.version] for file in files]
        dataset.put_new(f"{folder}/files.json", seal({"files": entries}))
    return source_files(dataset, folder)


def source_files(dataset: Store, folder: str = FOLDER) -> list[SourceFile]:
    """Return the dataset's frozen list of source files.

    Raises:
        UserError: if it was removed.
    """
    key = f"{folder}/files.json"
    try:
        return read_object(dataset, key, _parse_files, PLAN_AGAIN)
    except FileNotFoundError as error:
        raise removed(dataset, key) from error


def removed(dataset: Store, key: str) -> UserError:
    """Return the error of a task whose scan another one has removed; see `plan._nothing_left`."""
    return UserError(
        f"{dataset.uri}/{key}: does not exist any more: it was deleted, or another `plan` of this dataset "
        "found no pairs left and removed the scan: run plan again"
    )


def _parse_files(data: bytes) -> list[SourceFile]:
    # Earlier versions wrote the bare list, with neither a seal nor versions.
    if data.startswith(b"["):
        files = [SourceFile(*entry) for entry in checked(list[tuple[Count, Count, str]], data)]
    else:
        files = [SourceFile(*entry) for entry in parse_record(FileList, data)["files"]]

    source = 0
    for number, file in enumerate(files):
        # Ids of samples contain the number, and no source is without a file.
        if file.number != number or file.source not in (source, source + bool(number)):
            raise ValueError(f"file {number} of the list is not in its place")
        source = file.source
    return files


def source_counts(dataset: Store, folder: str = FOLDER) -> list[SourceCounts]:
    """Return the number of files, and of those ignored, of each source, as they were listed."""
    try:
        return read_object(dataset, f"{folder}/sources.json", _parse_counts, PLAN_AGAIN)
    except FileNotFoundError:
        return []  # the list is of an earlier version, which did not count them


def _parse_counts(data: bytes) -> list[SourceCounts]:
    if data.startswith(b"["):
        return checked(list[SourceCounts], data)
    return parse_record(CountList, data)["sources"]


def print_newer_files(config: DatasetConfig, dataset: Store) -> None:
    """Print how many source files came, or have changed, after the list was frozen."""
    try:
        files, _ = list_files(config)
    except UserError as error:
        # A finished plan needs no source any more.
        print(f"plan: cannot look for new source files: {error}")
        return

    known = {file.label: file.version for file in source_files(dataset)}
    newer = [file.label for file in files if file.label not in known]
    changed = [file.label for file in files if known.get(file.label) not in (None, "", file.version)]
    print_changed("plan", changed)
    if newer:
        print(
            f"plan: {len(newer):,} source files, such as {newer[0]}, came after the plan and are not in it: "
            "to include them, plan under another `name`"
        )


def print_changed(command: str, labels: Sequence[str]) -> None:
    """Print how many source files have changed since they were listed, if any have."""
    if labels:
        print(
            f"{command}: {len(labels):,} source files, such as {labels[0]}, have changed since they were "
            "listed, and what came since may be missing: to include it, plan under another `name`"
        )
