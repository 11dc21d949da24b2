"""The manifest: which sample is which row of which part. `plan` writes it, `pairs` reads it."""

import io
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import xxhash

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import PLAN_AGAIN, PLAN_KEY
from data_prep.dataset.records import hashed, parse_table, read_object
from data_prep.dataset.schema import Part
from data_prep.images.buckets import make_buckets
from data_prep.plan.scan import CAPTIONS
from data_prep.store.store import Store, StoreError
from model.common.errors import UserError

pc: Any = pyarrow.compute
"""Typed Any, because pyarrow creates its functions at import, where type checkers do not see them."""

# Far fewer objects than one per part, while a file is still small enough to be read whole for one part.
PARTS_PER_FILE = 16

MANIFEST = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.string()),
        ("captions", CAPTIONS),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("hash", pa.uint64()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("path", pa.string()),
    ]
)
"""Columns, with one row per planned sample, in order.

`manifest/<bucket>/<n>.parquet` holds parts 16 n to 16 n + 15, one row group per part.
"""


def _manifest_key(bucket: str, number: int) -> str:
    return f"manifest/{bucket}/{number:06d}.parquet"


def read_manifest(dataset: Store, part: Part, hashes: Mapping[str, str]) -> pa.Table:
    """Return the planned rows of one part, in order (`MANIFEST`).

    Args:
        dataset: the dataset's store.
        part: the part.
        hashes: xxh64 of each manifest file by key, as `plan.json` records them.

    Raises:
        StoreError: if they are missing or damaged.
    """
    number, group = divmod(part.number, PARTS_PER_FILE)
    key = _manifest_key(part.bucket, number)
    if key not in hashes:
        raise StoreError(f"{dataset.uri}/{PLAN_KEY}: does not name {key}: {PLAN_AGAIN}")

    check = hashed(hashes[key])
    try:
        return read_object(
            dataset, key, lambda data: parse_table(check(data), MANIFEST, group=group), PLAN_AGAIN
        )
    except FileNotFoundError as error:
        raise StoreError(f"{dataset.uri}/{key}: missing: {PLAN_AGAIN}") from error


class ManifestWriter:
    """Split kept rows by bucket, shuffle them in windows and write them part by part.

    `parts` maps each bucket to the rows of its parts so far, `hashes` each manifest file's key to its xxh64.
    """

    def __init__(self, config: DatasetConfig, dataset: Store, window: int) -> None:
        """Prepare to write.

        Args:
            config: the dataset's settings.
            dataset: the dataset's store.
            window: number of rows of one bucket that are shuffled together.
        """
        names = [bucket.name for bucket in make_buckets(config.buckets)]
        self._config = config
        self._dataset = dataset
        self._window = window
        self._waiting: dict[str, list[pa.Table]] = {name: [] for name in names}
        """Rows that do not fill a window yet."""
        self._ready: dict[str, list[pa.Table]] = {name: [] for name in names}
        """Parts that do not fill a file yet."""
        self._windows: Counter[str] = Counter()
        self.parts: dict[str, list[int]] = {name: [] for name in names}
        self.hashes: dict[str, str] = {}

    def add(self, table: pa.Table) -> None:
        """Add kept rows of one source file (a scan table)."""
        for name in pc.unique(table["bucket"]).to_pylist():
            rows = table.filter(pc.equal(table["bucket"], name)).select(MANIFEST.names).cast(MANIFEST)
            self._waiting[name].append(rows)

            # Full windows are written at once, so that memory stays bounded.
            while sum(map(len, self._waiting[name])) >= self._window:
                waiting = pa.concat_tables(self._waiting[name]).combine_chunks()
                self._waiting[name] = [waiting.slice(self._window)]
                self._shuffle_window(name, waiting.slice(0, self._window))

    def finish(self) -> dict[str, str]:
        """Write the remaining rows, and return the xxh64 of every manifest file by key."""
        for name, waiting in self._waiting.items():
            if sum(map(len, waiting)):
                self._shuffle_window(name, pa.concat_tables(waiting))
            if self._ready[name]:
                self._write(name, self._ready[name])
        return self.hashes

    def _shuffle_window(self, name: str, rows: pa.Table) -> None:
        """Shuffle one window of a bucket, cut it into parts, and write the files that are full."""
        # The 1 separates this random stream from that of the order of files.
        seed = [self._config.seed, 1, *name.encode(), self._windows[name]]
        self._windows[name] += 1
        order = np.random.default_rng(seed).permutation(len(rows))
        rows = rows.take(pa.array(order)).combine_chunks()

        step = self._config.part_rows
        self._ready[name] += [rows.slice(start, step) for start in range(0, len(rows), step)]
        while len(self._ready[name]) >= PARTS_PER_FILE:
            self._write(name, self._ready[name][:PARTS_PER_FILE])
            self._ready[name] = self._ready[name][PARTS_PER_FILE:]

    def _write(self, name: str, parts: list[pa.Table]) -> None:
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, MANIFEST, compression="zstd") as writer:
            # A row group per part: the number of a part within its file is that of its group.
            for part in parts:
                writer.write_table(part, row_group_size=max(1, len(part)))

        # Only the last file of a bucket has fewer parts, so the division is exact.
        key = _manifest_key(name, len(self.parts[name]) // PARTS_PER_FILE)
        self.parts[name] += [len(part) for part in parts]
        data = sink.getvalue()

        # A task that was killed, or one that finishes at the same moment, has written the same bytes.
        if not self._dataset.put_new(key, data) and self._dataset.read(key) != data:
            raise UserError(
                f"{self._dataset.uri}/{key}: left by an older version of this program: "
                "delete the folder manifest and run again"
            )
        self.hashes[key] = xxhash.xxh64_hexdigest(data)
