"""The manifest: which sample is which row of which part. `plan` writes it, `pairs` reads it."""

import io
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_prep.dataset.parts import PLAN_AGAIN, PLAN_KEY
from data_prep.dataset.records import hashed, parse_table, read_object
from data_prep.dataset.schema import Part
from data_prep.plan.scan import CAPTIONS
from data_prep.store.store import Store, StoreError
from model.common.errors import UserError

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


def write_manifest(dataset: Store, bucket: str, number: int, parts: Sequence[pa.Table]) -> dict[str, str]:
    """Write one manifest file.

    Args:
        dataset: the dataset's store.
        bucket: the bucket.
        number: number of the file in the bucket.
        parts: rows (`MANIFEST`) of its at most `PARTS_PER_FILE` parts.

    Returns:
        The xxh64 of the file by its key.

    Raises:
        UserError: if the file exists with other content, and so do the counts of the plan that it is of.
    """
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, MANIFEST, compression="zstd") as writer:
        # A row group per part: the number of a part within its file is that of its group.
        for part in parts:
            writer.write_table(part, row_group_size=max(1, len(part)))

    key = _manifest_key(bucket, number)
    data = sink.getvalue()
    # A task that was killed, or one that makes the same unit at this moment, has written the same bytes; an
    # older version of this program perhaps not.
    if not dataset.put_new(key, data) and dataset.read(key) != data:
        if dataset.exists(PLAN_KEY):  # with the hashes of what is there
            raise UserError(
                f"{dataset.uri}/{key}: left by an older version of this program: "
                "delete the folder manifest and run again"
            )
        dataset.put(key, data)
    return {key: xxhash.xxh64_hexdigest(data)}
