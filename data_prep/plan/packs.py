"""Packs: objects with several sections, each read by itself. The steps of a plan exchange rows in them.

Every unit of one step reads its own section of the packs of the step before, so all rows are written and read
once, by any number of tasks. A pack has a table of its sections with their hashes: a range of an object,
unlike a whole one, is not checked by the store.
"""

import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np
import xxhash

from data_prep.dataset.parts import THREADS
from data_prep.dataset.records import read_checked
from data_prep.store.store import Store

HEADER = struct.Struct("<8sQQ")
"""Magic number, number of sections, and xxh64 of the table."""
MAGIC = b"lidit-p1"
ENTRY = np.dtype([("bytes", "<u8"), ("xxh64", "<u8")])
"""A section in the table."""
FIRST_READ = 1 << 16
"""Bytes of the first request: the table, and all of a small pack."""
WAY_OUT = "delete it and run plan again"


def pack(sections: Sequence[bytes]) -> bytes:
    """Return a pack of some sections, which may be empty."""
    table = np.empty(len(sections), ENTRY)
    table["bytes"] = [len(section) for section in sections]
    table["xxh64"] = [xxhash.xxh64_intdigest(section) for section in sections]
    entries = table.tobytes()
    header = HEADER.pack(MAGIC, len(sections), xxhash.xxh64_intdigest(entries))
    return b"".join([header, entries, *sections])


def read_section(dataset: Store, key: str, number: int, count: int) -> bytes:
    """Return one section of a pack, by one request, or two for a large one.

    Args:
        dataset: the dataset's store.
        key: key of the pack.
        number: the section.
        count: number of sections that the pack must have.

    Raises:
        FileNotFoundError: if there is no such pack.
        StoreError: if it is damaged.
    """

    def read() -> bytes:
        data, table = _read_table(dataset, key, count)
        ends = list(accumulate(table["bytes"].tolist(), initial=HEADER.size + count * ENTRY.itemsize))
        start, end = ends[number], ends[number + 1]
        section = data[start:end] if end <= len(data) else dataset.read_range(key, start, end - start)
        if len(section) != end - start or xxhash.xxh64_intdigest(section) != table["xxh64"][number]:
            raise ValueError(f"section {number} does not match its hash")
        return section

    return read_checked(dataset, key, read, WAY_OUT)


def section_bytes(dataset: Store, key: str, number: int, count: int) -> int:
    """Return the size of a section in bytes.

    Raises:
        FileNotFoundError: if there is no such pack.
        StoreError: if it is damaged.
    """

    def read() -> int:
        return int(_read_table(dataset, key, count)[1]["bytes"][number])

    return read_checked(dataset, key, read, WAY_OUT)


def _read_table(dataset: Store, key: str, count: int) -> tuple[bytes, np.ndarray]:
    """Return the first bytes of a pack, and the table of its sections (`ENTRY`)."""
    size = HEADER.size + count * ENTRY.itemsize
    data = dataset.read_range(key, 0, max(size, FIRST_READ))
    if len(data) < size:
        raise ValueError("too short")
    magic, sections, digest = HEADER.unpack_from(data)
    entries = data[HEADER.size : size]
    if (magic, sections) != (MAGIC, count) or digest != xxhash.xxh64_intdigest(entries):
        raise ValueError("its table of sections does not match its hash")
    return data, np.frombuffer(entries, ENTRY)


def read_sections(dataset: Store, keys: Sequence[str], number: int, count: int) -> Iterator[bytes]:
    """Yield the section of the same number of several packs, in order, several requests at once.

    Raises:
        FileNotFoundError: if there is no such pack.
        StoreError: if one is damaged.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        # In chunks, so that only few sections wait for their reader.
        for start in range(0, len(keys), THREADS):
            chunk = keys[start : start + THREADS]
            yield from pool.map(lambda key: read_section(dataset, key, number, count), chunk)
