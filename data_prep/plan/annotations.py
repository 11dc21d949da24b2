"""Annotations of scanned rows: columns that models give, and the filters that read them.

They come between scan and finish. `annotations/<settings>/<source file>.parquet` has a row per row that the
scan kept, with its id and the hash of its image, so that it is only ever joined to the row whose image it
describes. The finish then reads scan tables in which the filters on these columns have left their reasons.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import PLAN_AGAIN
from data_prep.dataset.records import parse_table, read_object
from data_prep.plan.filters import Filters, Row, split_filters
from data_prep.plan.scan import SCAN
from data_prep.plan.scan_tables import exact_hashes, read_scan, scan_key
from data_prep.sources.source import SourceFile
from data_prep.store.store import Store, StoreError
from model.common.errors import UserError
from model.common.records import canonical_json, checked

pc: Any = pyarrow.compute
"""Typed Any, because pyarrow creates its functions at import, where type checkers do not see them."""

FOLDER = "annotations"
FILTERS_KEY = f"{FOLDER}/filters.json"
TYPES = {"number": pa.float64(), "text": pa.string()}


def annotation_folder(config: DatasetConfig) -> str:
    """Return the folder of the tables, named by the settings that decide their values."""
    settings = []
    for annotator in config.annotations:
        record = asdict(annotator)
        del record["batch"]
        settings.append(record)
    return f"{FOLDER}/{hashlib.sha256(canonical_json(settings)).hexdigest()[:16]}"


def annotation_key(config: DatasetConfig, number: int) -> str:
    """Key of the table of source file `number`."""
    return f"{annotation_folder(config)}/{number:08d}.parquet"


def annotation_schema(config: DatasetConfig, widths: Mapping[str, int]) -> pa.Schema:
    """Return the columns of the tables.

    Args:
        config: the dataset's settings.
        widths: numbers of each embedding that is a column.
    """
    columns = [("id", pa.int64()), ("hash", pa.uint64())]
    for name, kind in config.annotation_columns.items():
        if kind != "embedding":
            columns.append((name, TYPES[kind]))
        elif name in widths:
            columns.append((name, pa.list_(pa.float16(), widths[name])))
    return pa.schema(columns)


def missing_annotations(config: DatasetConfig, dataset: Store, files: Sequence[SourceFile]) -> list[int]:
    """Return the numbers of the source files that are not annotated."""
    if not config.annotations:
        return []
    present = set(dataset.list(f"{annotation_folder(config)}/"))
    return [file.number for file in files if annotation_key(config, file.number) not in present]


def check_filters(config: DatasetConfig, dataset: Store, freeze: bool = False) -> None:
    """Compare the filters on annotations with those of the plan.

    Until the finish begins, they can be changed: what the columns have is known only then.

    Args:
        config: the dataset's settings.
        dataset: the dataset's store.
        freeze: store them if there are none yet.

    Raises:
        UserError: if they differ.
    """
    if not config.annotations:
        return
    record = canonical_json([asdict(settings) for settings in split_filters(config)[1]])
    if freeze:
        dataset.put_new(FILTERS_KEY, record)
    try:
        stored = read_object(dataset, FILTERS_KEY, partial(checked, list[dict[str, Any]]), PLAN_AGAIN)
    except FileNotFoundError:
        return
    if canonical_json(stored) != record:
        raise UserError(
            f"{dataset.uri} was planned with other filters on annotations: put them back, or give the "
            "dataset another `name`"
        )


def _parse(schema: pa.Schema, data: bytes) -> pa.Table:
    table = parse_table(data, columns=schema.names)
    if not table.schema.equals(schema):
        raise ValueError("it has other columns than the settings say")
    return table


def annotated_scan(config: DatasetConfig, dataset: Store, number: int) -> bytes:
    """Return the scan table of a file in which the filters on annotations have left their reasons.

    Raises:
        UserError: if it is not annotated.
        StoreError: if its annotations are damaged, or of other rows.
    """
    # Without the embeddings, which are large and no filter's business.
    key, schema = annotation_key(config, number), annotation_schema(config, {})
    way_out = "delete it, and run `python -m data_prep annotate` again"
    try:
        table = read_object(dataset, key, partial(_parse, schema), way_out)
    except FileNotFoundError as error:
        raise UserError(f"{dataset.uri}/{key}: missing: run `python -m data_prep annotate` again") from error
    values = dict(zip(table["id"].to_pylist(), table.select(schema.names[2:]).to_pylist(), strict=True))
    hashes = dict(zip(values, exact_hashes(table["hash"]).tolist(), strict=True))
    filters = Filters(split_filters(config)[1])

    sink = io.BytesIO()
    with pq.ParquetWriter(sink, SCAN, compression="zstd", write_page_checksum=True) as writer:
        for scanned in read_scan(dataset, scan_key(number)):
            reasons = np.array(scanned["reason"].to_pylist(), object)
            kept = np.flatnonzero(reasons == "")
            facts = scanned.select(["id", "height", "width"]).take(pa.array(kept, pa.int64())).to_pylist()
            own = exact_hashes(scanned["hash"])[kept].tolist()
            rows = []
            for fact, hash in zip(facts, own, strict=True):
                if hashes.get(fact["id"]) != hash:
                    raise StoreError(f"{dataset.uri}/{key}: has not the scan's images: {way_out}")
                rows.append(Row(values[fact["id"]], [], fact["height"], fact["width"]))
            filters.apply(rows)
            reasons[kept] = [row.reason for row in rows]
            column = SCAN.get_field_index("reason")
            writer.write_table(scanned.set_column(column, "reason", pa.array(reasons.tolist(), pa.string())))
    return sink.getvalue()
