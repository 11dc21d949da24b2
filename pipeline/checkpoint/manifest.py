"""A checkpoint's manifest: its schema and its reader, for which a damaged checkpoint does not exist."""

from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # the standard library's has no checks before Python 3.12

from model.common.errors import UserError
from model.common.records import STRICT, Count, Hash, parse_json, parse_record, read_bounded
from pipeline.checkpoint.files import rank_file
from pipeline.engine.layout import Layout

FORMAT = 1
MANIFEST = "manifest.json"
REPLICATED = "replicated.safetensors"


class LayoutRecord(TypedDict):
    """`Layout` as JSON."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    world: Annotated[int, Field(gt=0, lt=1 << 20)]
    partition: Literal["parameter", "flat"]
    groups: list[list[tuple[str, list[Count]]]]
    lengths: list[Count]


class OptimizerRecord(TypedDict):
    """State of the optimizer that is not in tensors."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    step: int
    groups: list[dict[str, Any]]
    moments: NotRequired[list[str]]


class FileRecord(TypedDict):
    """Size and hash of a file."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    bytes: Count
    xxh64: Hash


class ManifestRecord(TypedDict):
    """The manifest as JSON."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    format: Literal[1]
    step: Count
    samples: Count
    permanent: bool
    layout: LayoutRecord
    optimizer: OptimizerRecord
    ema: list[float]
    trainer: dict[str, Any]
    stage_xxh64: str
    files: dict[str, FileRecord]


def parse_manifest(data: bytes) -> dict[str, Any]:
    """Return a manifest.

    Raises:
        ValueError: if it is damaged, or of another format.
    """
    record: Any = parse_record(ManifestRecord, data)
    layout = Layout.from_json(record["layout"])
    # Other names could lead out of the folder, and a missing file would only be noticed when it is read.
    if set(record["files"]) != {rank_file(rank) for rank in range(layout.world)} | {REPLICATED}:
        raise ValueError("files: not one of each rank")

    # A layout of other shapes would cut the parameters out of the files at wrong places.
    if len(layout.lengths) != len(layout.groups):
        raise ValueError("layout: not one length per group")
    for length, group in zip(layout.lengths, layout.groups, strict=True):
        numels = [prod(shape) for _, shape in group]
        if layout.partition == "parameter":
            needed = sum(-(-numel // layout.world) for numel in numels)
        else:
            needed = -(-sum(numels) // layout.world)
        if needed > length:
            raise ValueError(f"layout: a group of {needed} elements per rank in {length}")
    if not all(isinstance(group.get("name"), str) for group in record["optimizer"]["groups"]):
        raise ValueError("optimizer.groups: a group without a name")
    return record


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a checkpoint's manifest, or None if it is missing, damaged, or of another format."""
    try:
        return parse_manifest(read_bounded(folder / MANIFEST))
    # A folder without a manifest may be what is left of a checkpoint whose deletion was interrupted.
    except (OSError, ValueError, UserError):
        return None


def refuse_other_format(folder: Path) -> None:
    """Refuse a checkpoint that another version wrote.

    Raises:
        UserError: if its manifest names another format.
    """
    try:
        format = parse_json(read_bounded(folder / MANIFEST))["format"]
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return
    if isinstance(format, int) and format != FORMAT:
        raise UserError(
            f"{folder}: checkpoint format {format}, this version reads format {FORMAT}: "
            "use the version of its run"
        )
