"""Semantic duplicates: rows whose image embeddings are alike, within the clusters of a k-means.

The embeddings are tables of an annotation, one per source file. The steps, each in units (`units`):

    centroids  all                k-means over a sample of the rows that are still kept
    assigned   group              embeddings of these rows, split by ranges of clusters
    alike      range of clusters  rows that are alike to a row with a smaller id, split by group

Two rows are duplicates if they are in one cluster and the cosine of their embeddings is at least
`dedupe.semantic.threshold`. The one with the smaller id stays, which is the first in the order of the source
files. Pairs of rows in different clusters are not compared: that is the price of not comparing all with all.
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.config import SemanticConfig
from data_prep.dataset.records import count_groups, parse_table, read_object
from data_prep.plan.packs import pack
from data_prep.plan.scanned import MARK, Scanned, split
from data_prep.plan.verdicts import MEANS_SAME
from data_prep.store.store import Store, StoreError
from model.common.errors import UserError
from model.common.extras import require

FOLDER = "annotations"
AGAIN = "delete it and annotate again"
ANNOTATE = "write it before the plan is finished, or leave the key out"
POINTS_PER_CENTROID = 256
"""Rows of the sample per cluster. More hardly improve a k-means."""
MAX_SAMPLE_BYTES = 4 << 30
CLUSTER_ROWS = 4096
"""Mean rows of a cluster, unless `clusters` is set. Comparisons per row grow with it."""
MAX_CLUSTERS = 1 << 16
ITERATIONS = 20
RANGE_BYTES = 1 << 30
"""Bytes of the embeddings of a unit of the last step."""
BLOCK = 2048
"""Rows that are compared with all earlier ones of their cluster at once."""


def embedding_key(annotation: str, number: int) -> str:
    """Key of the table of an annotation of source file `number`."""
    return f"{FOLDER}/{annotation}/{number:08d}.parquet"


def read_embeddings(
    dataset: Store, settings: SemanticConfig, number: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the embeddings of a source file, a row group at a time.

    Args:
        dataset: the dataset's store.
        settings: names the annotation and its column: a list of float16 or float32 of fixed size, null for a
            row without an embedding. A column `id` has the ids of the rows; without it, rows are those of
            the file, in order.
        number: the source file.

    Yields:
        The ids of some rows, int64 [N], and their embeddings of length 1, fp32 [N, D].

    Raises:
        UserError: if there is no such table or column.
        StoreError: if the table is damaged.
    """
    key = embedding_key(settings.annotation, number)
    try:
        data, groups = read_object(dataset, key, lambda data: (data, count_groups(data, None)), AGAIN)
    except FileNotFoundError as error:
        raise UserError(f"dedupe.semantic: {dataset.uri}/{key} is missing: {ANNOTATE}") from error

    row = 0
    for group in range(groups):
        try:
            table = parse_table(data, group=group)
        except ValueError as error:
            raise StoreError(f"{dataset.uri}/{key}: damaged: {error}: {AGAIN}") from error
        if settings.column not in table.column_names:
            there = ", ".join(table.column_names)[:200]
            raise UserError(f"dedupe.semantic: {key}: no column `{settings.column}` (there are: {there})")
        ids = number << 32 | np.arange(row, row + len(table))
        if "id" in table.column_names:
            ids = table["id"].to_numpy()
        row += len(table)
        column = table[settings.column].combine_chunks()
        kind = column.type
        if not pa.types.is_fixed_size_list(kind) or not pa.types.is_floating(kind.value_type):
            raise UserError(
                f"dedupe.semantic: {key}: column `{settings.column}` is {kind}: write lists of fixed size of "
                "float16 or float32"
            )
        vectors = _unit_vectors(column.drop_null())
        finite = np.isfinite(vectors).all(axis=1)
        yield ids[column.is_valid().to_numpy(zero_copy_only=False)][finite], vectors[finite]


def _unit_vectors(column: pa.Array) -> np.ndarray:
    """Return lists of numbers as vectors of length 1, fp32 [N, D]; a vector of zeros stays one."""
    vectors = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    vectors = vectors.reshape(len(column), column.type.list_size)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float32).tiny)


def alike(vectors: np.ndarray, threshold: float, block: int = BLOCK) -> np.ndarray:
    """Return which rows have a cosine of at least `threshold` with an earlier row.

    Args:
        vectors: vectors of length 1, fp32 [N, D].
        threshold: minimum cosine.
        block: rows to compare at once.

    Returns:
        Booleans, [N].
    """
    found = np.zeros(len(vectors), bool)
    for start in range(0, len(vectors), block):
        some = vectors[start : start + block]
        for first in range(0, start + len(some), block):
            cosines = some @ vectors[first : min(first + block, start + len(some))].T  # [B, B]
            if first == start:
                # A row is compared with the earlier ones only.
                cosines = np.tril(cosines, -1) - np.triu(np.full_like(cosines, 2.0))
            found[start : start + block] |= (cosines >= threshold).any(axis=1)
    return found


class SemanticDuplicates:
    """The steps, and the rows that they find."""

    def __init__(
        self,
        scanned: Scanned,
        settings: SemanticConfig,
        file_rows: Callable[[int], np.ndarray],
        kept_ids: Callable[[int], np.ndarray],
    ) -> None:
        """Find nothing yet.

        Args:
            scanned: the scanned files.
            settings: threshold and clusters.
            file_rows: returns the rows of each file of a group, int64 [files].
            kept_ids: returns the ids of the rows of a group that are still kept, sorted, int64 [N].

        Raises:
            UserError: if FAISS is not installed.
        """
        require("semantic", "faiss")
        self._scanned = scanned
        self._settings = settings
        self._file_rows = file_rows
        self._kept_ids = kept_ids

    def find(self) -> None:
        """Make all units.

        Raises:
            UserError: if a table of embeddings is missing.
            SupersededError: if another task has finished the plan.
        """
        scanned = self._scanned
        name = self._settings.annotation
        annotated = set(scanned.dataset.list(f"{FOLDER}/{name}/"))
        missing = [file for file in scanned.files if embedding_key(name, file.number) not in annotated]
        if missing:
            raise UserError(
                f"dedupe.semantic: {len(missing):,} of {len(scanned.files):,} source files, such as "
                f"{missing[0].label}, have no annotation `{name}`: {ANNOTATE}"
            )
        scanned.make("centroids", 1, self._train)
        scanned.make("assigned", len(scanned.groups), self._assign)
        scanned.make("alike", self._ranges, self._find_alike)

    def marks(self, group: int) -> np.ndarray:
        """Return the duplicates of a group (`MARK`)."""
        sections = self._scanned.sections("alike", self._ranges, group, len(self._scanned.groups))
        return np.frombuffer(b"".join(sections), MARK)

    @cached_property
    def _shape(self) -> tuple[int, int, int]:
        """Clusters, width of the embeddings, and ranges of clusters."""
        data = self._scanned.section("centroids", 0, 0, 2)
        clusters, width, ranges = np.frombuffer(data, "<i8").tolist()
        return clusters, width, ranges

    @property
    def _ranges(self) -> int:
        return self._shape[2]

    @property
    def _row(self) -> np.dtype:
        """A row of a section: half precision is enough for a cosine that is compared with a threshold."""
        return np.dtype([("id", "<i8"), ("cluster", "<i4"), ("vector", "<f2", (self._shape[1],))])

    def _embeddings(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids, int64 [N], and the embeddings, fp32 [N, D], of a group's kept rows."""
        kept = self._kept_ids(group)
        ids, vectors = [np.empty(0, np.int64)], []
        for number in self._scanned.groups[group]:
            for some, embeddings in read_embeddings(self._scanned.dataset, self._settings, number):
                chosen = np.isin(some, kept)
                if chosen.any():
                    ids.append(some[chosen])
                    vectors.append(embeddings[chosen])
        if len({each.shape[1] for each in vectors}) > 1:
            raise UserError(
                f"dedupe.semantic: embeddings of several widths in `{self._settings.annotation}`: "
                "annotate all files with one model"
            )
        return np.concatenate(ids), np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32)

    def _train(self, _: int) -> bytes:
        """Section 0 has clusters, width and ranges; section 1 the centroids, fp32 [clusters, D]."""
        scanned = self._scanned
        rows = sum(int(self._file_rows(group).sum()) for group in range(len(scanned.groups)))
        wanted = self._settings.clusters or math.ceil(rows / CLUSTER_ROWS)
        sample, count = [], 0
        # Groups are in a random order of the source files, so the first ones are a sample.
        for group in range(len(scanned.groups)):
            vectors = self._embeddings(group)[1]
            if len(vectors):
                sample.append(vectors)
                count += len(vectors)
            enough = POINTS_PER_CENTROID * min(wanted, MAX_CLUSTERS)
            if count >= enough or (count and count * vectors.shape[1] * 4 > MAX_SAMPLE_BYTES):
                break
        points = np.concatenate(sample) if sample else np.zeros((1, 1), np.float32)
        clusters, width = max(1, min(wanted, MAX_CLUSTERS, len(points))), points.shape[1]
        ranges = max(1, min(clusters, math.ceil(rows * 2 * width / RANGE_BYTES)))
        header = np.array([clusters, width, ranges], "<i8").tobytes()
        return pack([header, _train_centroids(points, clusters, scanned.config.seed).tobytes()])

    def _assign(self, group: int) -> bytes:
        """Section i has the rows of the i-th range of clusters."""
        clusters, width, ranges = self._shape
        ids, vectors = self._embeddings(group)
        rows = np.empty(len(ids), self._row)
        if len(ids):
            if vectors.shape[1] != width:
                raise UserError(
                    f"dedupe.semantic: embeddings of width {vectors.shape[1]} and {width} in "
                    f"`{self._settings.annotation}`: annotate all files with one model"
                )
            data = self._scanned.section("centroids", 0, 1, 2)
            centroids = np.frombuffer(data, "<f4").reshape(clusters, width)
            rows["id"], rows["vector"] = ids, vectors
            rows["cluster"] = _nearest(centroids, vectors)
        return pack(split(rows, rows["cluster"].astype(np.int64) * ranges // clusters, ranges))

    def _find_alike(self, number: int) -> bytes:
        scanned = self._scanned
        groups = len(scanned.groups)
        sections = scanned.sections("assigned", groups, number, self._ranges)
        rows = np.frombuffer(b"".join(sections), self._row)
        rows = rows[np.lexsort((rows["id"], rows["cluster"]))]
        bounds = np.flatnonzero(np.diff(rows["cluster"])) + 1
        found = [np.empty(0, np.int64)]
        for cluster in np.split(rows, bounds):
            vectors = cluster["vector"].astype(np.float32)
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
            found.append(cluster["id"][alike(vectors, self._settings.threshold)])
        ids = np.concatenate(found)
        marks = np.empty(len(ids), MARK)
        marks["id"], marks["code"] = ids, MEANS_SAME
        return pack(scanned.by_group(marks))


def _train_centroids(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Return the centroids of a spherical k-means, fp32 [clusters, D], each of length 1."""
    import faiss  # pyright: ignore[reportMissingImports]

    # A FAISS of few points per cluster warns on every call.
    means: Any = faiss.Kmeans(
        points.shape[1],
        clusters,
        niter=ITERATIONS,
        seed=1 + seed % (2**31 - 2),
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_CENTROID,
    )
    means.train(np.ascontiguousarray(points))
    return np.ascontiguousarray(means.centroids, "<f4")


def _nearest(centroids: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the cluster of each vector, int64 [N]."""
    import faiss  # pyright: ignore[reportMissingImports]

    index: Any = faiss.IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids))
    return index.search(np.ascontiguousarray(vectors), 1)[1][:, 0]
