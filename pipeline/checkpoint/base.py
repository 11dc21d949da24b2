"""The frozen weights of a run with `freeze: base`: one copy per run, which all of its checkpoints share.

<run>/base/
  00000.safetensors, ...    fp32 weights, in files of bounded size
  base.json                 sizes and hashes of these files: written last

A checkpoint of such a run contains the trained parameters alone. The copy keeps the run readable when the run
that it started from goes on, or is removed.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict  # the standard library's has no checks before Python 3.12

from data_prep.store.store import Store, hash_file
from model.common.errors import UserError
from model.common.files import naming_full_disk, write_atomic
from model.common.records import STRICT, parse_record, read_bounded, seal
from pipeline.checkpoint.files import Written, write_tensors
from pipeline.checkpoint.manifest import FileRecord
from pipeline.checkpoint.weights import ExportedWeights

FOLDER, RECORD = "base", "base.json"
FILE_VALUES = 500_000_000
"""Values in a file, at most, unless a single tensor has more."""
_AGAIN = "bring it back from a copy, or train the run again"


class BaseRecord(TypedDict):
    """`base.json`."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    format: Literal[1]
    files: dict[Annotated[str, Field(pattern=r"^[0-9]{5}\.safetensors$")], FileRecord]


def save_base(run: Path, weights: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Write the run's copy of the weights `names`; the tensors are read one file at a time.

    Raises:
        UserError: if the disk is full.
    """
    folder = run / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # what a start that was killed has left
    with naming_full_disk(folder):
        folder.mkdir(parents=True)
        files: dict[str, Written] = {}
        for number, group in enumerate(_groups(weights, names)):
            file = f"{number:05d}.safetensors"
            files[file] = write_tensors(folder / file, {name: weights[name].cpu() for name in group})
        record = {"format": 1, "files": {name: asdict(file) for name, file in files.items()}}
        write_atomic(folder / RECORD, seal(record), durable=True)


def _groups(weights: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[list[str]]:
    group, values = [], 0
    for name in names:
        size = weights[name].numel()
        if group and values + size > FILE_VALUES:
            yield group
            group, values = [], 0

        group.append(name)
        values += size
    yield group


def upload_base(run: Path, store: Store) -> None:
    """Copy the run's frozen weights into `base/` of a store, whose record comes last; once is enough.

    Args:
        run: its folder.
        store: where the run's checkpoints are copied to.
    """
    record = (run / FOLDER / RECORD).read_bytes()
    key = f"{FOLDER}/{RECORD}"
    # A run that was started again from nothing has other weights under the same names.
    if store.exists(key) and store.read(key, max_bytes=2 * len(record)) == record:
        return
    for name in parse_record(BaseRecord, record)["files"]:
        store.put(f"{FOLDER}/{name}", run / FOLDER / name)
    store.put(key, record)


def has_base(run: Path) -> bool:
    """Return True if the run has a copy of frozen weights."""
    return (run / FOLDER / RECORD).exists()


def open_base(run: Path, check: bool = True) -> ExportedWeights:
    """Open the run's frozen weights, which are read one by one.

    Args:
        run: its folder.
        check: compare the files with their hashes, which reads all of them.

    Raises:
        UserError: if they are missing or damaged.
    """
    folder = run / FOLDER
    try:
        record = parse_record(BaseRecord, read_bounded(folder / RECORD))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / RECORD}: {error}: {_AGAIN}") from error

    for name, file in record["files"].items():
        path = folder / name
        size = path.stat().st_size if path.exists() else -1
        if size != file["bytes"] or (check and hash_file(path) != file["xxh64"]):
            raise UserError(f"{path}: missing or not what was written: {_AGAIN}")
    return ExportedWeights([folder / name for name in record["files"]])


class WithBase(Mapping[str, Tensor]):
    """The weights of a checkpoint with those of the frozen network below it."""

    def __init__(self, trained: Mapping[str, Tensor], base: ExportedWeights) -> None:
        self._trained, self._base = trained, base
        shapes = getattr(trained, "shapes", None) or {
            name: tuple(value.shape) for name, value in trained.items()
        }
        self.shapes: dict[str, tuple[int, ...]] = {**base.shapes, **shapes}

    def __getitem__(self, name: str) -> Tensor:
        return self._trained[name] if name in self._trained else self._base[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
