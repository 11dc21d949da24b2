"""Semantic duplicates: pairs within a cluster, the same for any tasks and engines; the smaller id stays."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import engines
from data_prep.config import DedupeConfig, SemanticConfig
from data_prep.dataset.parts import read_plan_record
from data_prep.engines import Ray
from data_prep.plan import finish, semantic
from data_prep.plan.plan import run_plan
from data_prep.plan.rows import dropped_key
from data_prep.plan.semantic import alike, embedding_key
from data_prep.plan.verdicts import SEMANTIC_REASON
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.common.share import Share
from tests.helpers.engines import DeadPool
from tests.helpers.plans import content
from tests.helpers.raw_material import ALONE, config_of, png, sample_members, write_tar

FILES, ROWS, WIDTH = 4, 5, 8
CENTERS = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0]
"""Orthogonal directions."""


@given(st.integers(0, 40), st.integers(1, 9), st.floats(0.0, 1.0), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_blocks_find_the_rows_that_are_alike_to_an_earlier_one(count, block, threshold, seed):
    vectors = np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    earlier = np.tril(np.ones((count, count), bool), -1)
    certain = ~(np.abs(cosines - threshold) < 1e-5).any(axis=1) if count else np.empty(0, bool)
    expected = ((cosines >= threshold) & earlier).any(axis=1)
    assert (alike(vectors, threshold, block) == expected)[certain].all()


def vector_of(number):
    """Every third image means the same as those of its remainder, up to a small angle."""
    noise = np.random.default_rng(number).normal(size=WIDTH) * 0.02
    return CENTERS[number % 3 if number % 2 else 3 + number % 5] + noise


def write_embeddings(dataset, dtype="float16", absent=(), ids=False, name="clip_embedding"):
    """Write an annotation of the rows of all files; the rows in `absent` have no embedding."""
    for file in range(FILES):
        rows = range(file * ROWS, (file + 1) * ROWS)
        vectors = [None if n in absent else vector_of(n).astype(dtype) for n in rows]
        column = pa.array(vectors, pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), WIDTH))
        columns = {name: column}
        if ids:
            columns["id"] = pa.array([file << 32 | n % ROWS for n in rows], pa.int64())
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink, row_group_size=2)
        dataset.put(embedding_key("clip", file), sink.getvalue())


def expected_drops(threshold, absent=()):
    """The ids that a loop over all pairs drops, up to half precision."""
    vectors = np.stack([vector_of(n).astype(np.float16).astype(np.float32) for n in range(FILES * ROWS)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    dropped = set()
    for n, vector in enumerate(vectors):
        earlier = [m for m in range(n) if m not in absent]
        if n not in absent and earlier and (vectors[earlier] @ vector).max() >= threshold:
            dropped.add(n // ROWS << 32 | n % ROWS)
    return dropped


def dropped_ids(dataset):
    ids = set()
    for file in range(FILES):
        table = pq.read_table(io.BytesIO(dataset.read(dropped_key(file))))
        assert set(table["reason"].to_pylist()) <= {SEMANTIC_REASON}
        ids |= set(table["id"].to_pylist())
    return ids


@pytest.fixture
def config(tmp_path, monkeypatch):
    for file in range(FILES):
        members = []
        for row in range(ROWS):
            members += sample_members(str(row), png(file * ROWS + row), {"caption": f"c {file} {row}"})
        write_tar(tmp_path / "in", f"{file}.tar", members)
    monkeypatch.setattr(finish, "MAX_GROUP_BYTES", 1)  # a group per file
    dedupe = DedupeConfig(semantic=SemanticConfig(clusters=1, threshold=0.9))
    return config_of(tmp_path, ("webdataset", tmp_path / "in"), dedupe=dedupe)


@pytest.fixture
def without_faiss(monkeypatch):
    """Replace FAISS by one centroid per direction of `CENTERS`, in numpy."""
    monkeypatch.setattr(semantic, "require", lambda extra, module: None)
    monkeypatch.setattr(
        semantic, "_train_centroids", lambda points, clusters, seed: CENTERS[:clusters].astype(np.float32)
    )
    monkeypatch.setattr(
        semantic, "_nearest", lambda centroids, vectors: (vectors @ centroids.T).argmax(axis=1)
    )


def plan_on(config, store, shares, **embeddings):
    config.store = str(store)
    dataset = open_store(config.store, create=True).sub("ds")
    write_embeddings(dataset, **embeddings)
    for share in [*shares, shares[0]]:
        run_plan(config, dataset, share)
    return dataset


@pytest.mark.parametrize("clusters", [1, 8])
def test_the_rows_are_those_of_a_loop_on_each_engine(config, without_faiss, tmp_path, clusters, monkeypatch):
    monkeypatch.setattr(semantic, "RANGE_BYTES", 100)  # several ranges of clusters
    monkeypatch.setattr(engines, "_pool", DeadPool(seed=1, dies=(1,)))
    config.dedupe.semantic.clusters = clusters
    contents = []
    for name, shares in {"a": [ALONE], "s": [Share(i, 3) for i in range(3)], "r": [Ray()]}.items():
        dataset = plan_on(config, tmp_path / name, shares)
        assert dropped_ids(dataset) == expected_drops(0.9)
        contents.append(content(dataset))
    assert contents[0] == contents[1] == contents[2]
    dropped = [file["dropped"] for file in read_plan_record(dataset)["files"]]
    assert sum(counts.get(SEMANTIC_REASON, 0) for counts in dropped) == len(expected_drops(0.9)) > 5


def test_tables_may_have_ids_floats_and_rows_without_embeddings(config, without_faiss, tmp_path):
    dataset = plan_on(config, tmp_path / "a", [ALONE], absent={1, 4}, dtype="float32", ids=True)
    assert dropped_ids(dataset) == expected_drops(0.9, absent={1, 4})


def test_with_faiss_clusters_are_the_directions(config, tmp_path):
    pytest.importorskip("faiss")
    config.dedupe.semantic.clusters = WIDTH
    dataset = plan_on(config, tmp_path / "a", [ALONE])
    again = plan_on(config, tmp_path / "b", [Share(i, 2) for i in range(2)])
    assert content(dataset) == content(again)
    # All that are alike have one direction, so at most a badly placed centroid divides them.
    assert dropped_ids(dataset) <= expected_drops(0.9)
    assert len(dropped_ids(dataset)) >= 0.7 * len(expected_drops(0.9))


def test_missing_and_wrong_tables_are_one_line(config, without_faiss, tmp_path, monkeypatch):
    config.store = str(tmp_path / "a")
    dataset = open_store(config.store, create=True).sub("ds")
    with pytest.raises(UserError, match=r"4 of 4 source files, such as 0:0.tar, have no annotation `clip`"):
        run_plan(config, dataset, ALONE)
    write_embeddings(dataset, name="other")
    with pytest.raises(UserError, match=r"no column `clip_embedding` \(there are: other\)"):
        run_plan(config, dataset, ALONE)
    table = pa.table({"clip_embedding": pa.array([[1.0], [2.0, 3.0], [], None, [4.0]])})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    dataset.put(embedding_key("clip", 0), sink.getvalue())
    with pytest.raises(UserError, match="lists of fixed size"):
        list(semantic.read_embeddings(dataset, config.dedupe.semantic, 0))
    write_embeddings(dataset)
    run_plan(config, dataset, ALONE)
    assert dropped_ids(dataset) == expected_drops(0.9)


def test_a_dataset_without_the_key_has_the_settings_that_it_always_had(config, tmp_path):
    config.dedupe.semantic = None
    dataset = open_store(config.store, create=True).sub("ds")
    run_plan(config, dataset, ALONE)
    assert "semantic" not in json.loads(dataset.read("dataset.json"))["dedupe"]


def test_without_faiss_the_message_names_the_extra(config, monkeypatch, tmp_path):
    monkeypatch.setattr("model.common.extras.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"\.\[semantic\]"):
        plan_on(config, tmp_path / "a", [ALONE])
