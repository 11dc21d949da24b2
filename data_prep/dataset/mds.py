"""Shards in MDS, mosaicml-streaming's format, written and read as streams of rows.

The format is a count (uint32), the rows' offsets (uint32, one more than rows), a JSON header, then the rows: sizes (uint32) of
the columns of variable size, then the columns in order of their names. It is written here and not by streaming's MDSWriter,
which closes a valid-looking shard after an exception and takes seconds to import.
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from model.common.errors import UserError
from model.common.files import atomic_path, naming_full_disk

MAX_OFFSET = (1 << 32) - 1
"""Offsets are uint32."""

FIXED = {name: np.dtype(name) for name in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")}
FIXED |= {name: np.dtype(name) for name in ("float16", "float32", "float64")} | {"int": np.dtype(np.int64)}
VARIABLE = {"bytes": bytes, "str": bytes.decode, "jpeg": bytes, "png": bytes, "json": json.loads}
"""Encodings of variable size; images are handed out as the file that they are."""


def write_mds(path: Path, columns: dict[str, str], rows: Iterable[dict[str, Any]]) -> None:
    """Write one shard; `path` appears only when all rows are in it and on the disk.

    Args:
        path: the shard file.
        columns: name -> MDS encoding: `int`, `bytes` or `str`.
        rows: a dict a row, with just these columns.

    Raises:
        UserError: the shard would exceed 4 GiB, or the disk is full.
    """
    names = sorted(columns)
    sizes = [FIXED[columns[name]].itemsize if columns[name] in FIXED else None for name in names]
    header = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [],
        "size_limit": None,
        "column_names": names,
        "column_encodings": [columns[name] for name in names],
        "column_sizes": sizes,
    }
    config = json.dumps(header, sort_keys=True).encode()
    encoded = [_encoded(row, names, columns) for row in rows]
    offsets = np.cumsum([4 + 4 * (len(encoded) + 1) + len(config), *map(len, encoded)], dtype=np.int64)
    if offsets[-1] > MAX_OFFSET:
        raise UserError(
            f"{path}: {offsets[-1]:,} bytes, over the 4 GiB of an MDS shard: plan parts with fewer rows (`part_rows`)"
        )
    with naming_full_disk(path), atomic_path(path, durable=True) as temporary, temporary.open("xb") as file:
        file.write(struct.pack("<I", len(encoded)) + offsets.astype("<u4").tobytes() + config)
        file.writelines(encoded)


def _encoded(row: dict[str, Any], names: list[str], columns: dict[str, str]) -> bytes:
    if len(row) != len(names):
        raise ValueError(f"a row has columns {sorted(row)}, not {names}")
    sizes, data = [], []
    for name in names:
        encoding, value = columns[name], row[name]
        datum = np.array(value, FIXED[encoding]).tobytes() if encoding in FIXED else _variable(encoding, value)
        if encoding not in FIXED:
            sizes.append(struct.pack("<I", len(datum)))
        data.append(datum)
    return b"".join(sizes + data)


def _variable(encoding: str, value: Any) -> bytes:
    if encoding == "str":
        return value.encode()
    if encoding == "bytes" and isinstance(value, bytes):
        return value
    raise TypeError(f"cannot write {type(value).__name__} as `{encoding}`")


def read_mds(path: Path, columns: dict[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of one shard, in order, one in memory at a time.

    Args:
        path: the shard file.
        columns: name -> MDS encoding that the shard must have; None = take what it has.

    Raises:
        UserError: it is no MDS shard, is cut, or has other columns or an encoding that would run code (pickle).
    """
    with path.open("rb") as file:
        try:
            (count,) = struct.unpack("<I", file.read(4))
            offsets = np.frombuffer(file.read(4 * (count + 1)), "<u4").astype(np.int64)
            header = json.loads(file.read(int(offsets[0]) - file.tell()))
            found = dict(zip(header["column_names"], header["column_encodings"], strict=True))
        except (struct.error, ValueError, IndexError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not an MDS shard") from error
        if columns is not None and found != columns:
            raise UserError(f"{path}: has the columns {found}, not {columns}")
        decoders = {name: _decoder(path, name, encoding) for name, encoding in found.items()}
        for size in np.diff(offsets):
            data = file.read(int(size))
            if len(data) != size:
                raise UserError(f"{path}: the shard is cut: fetch it again")
            yield _decoded(data, decoders)


def _decoder(path: Path, name: str, encoding: str) -> tuple[int | None, Callable[[bytes], Any]]:
    """Size (None = variable) and conversion of a column."""
    if encoding in FIXED:
        dtype = FIXED[encoding]
        return dtype.itemsize, lambda data: np.frombuffer(data, dtype)[0].item()
    if encoding in VARIABLE:
        return None, VARIABLE[encoding]
    raise UserError(f"{path}: column `{name}` has the encoding `{encoding}`; readable are {', '.join([*FIXED, *VARIABLE])}")


def _decoded(data: bytes, decoders: dict[str, tuple[int | None, Callable[[bytes], Any]]]) -> dict[str, Any]:
    variable = sum(size is None for size, _ in decoders.values())
    sizes = iter(struct.unpack_from(f"<{variable}I", data))
    at = 4 * variable
    row = {}
    for name, (fixed, convert) in decoders.items():
        size = next(sizes) if fixed is None else fixed
        row[name] = convert(data[at : at + size])
        at += size
    return row
