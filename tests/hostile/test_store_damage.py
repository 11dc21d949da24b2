"""A damaged, incomplete or unreadable store: commands say so in one line, and print no control codes."""

import json
import os
import subprocess
import sys
from tempfile import TemporaryDirectory

import pytest
import torch

from data_prep.dataset.parts import committed, read_commit, register_family
from data_prep.dataset.schema import PAIRS, Family, Part
from data_prep.dataset.snapshot import take_snapshot
from data_prep.dataset.snapshot_reader import check_payloads, read_constants, read_snapshot
from data_prep.dataset.verify import verify
from data_prep.store.store import StoreError, open_store
from model.common.errors import UserError, one_line
from model.common.records import seal
from pipeline.stage.corpus import check_files, open_corpus
from tests.helpers import fake_snapshot
from tests.helpers.fake_dataset import make_all

PART = Part("64x64", 1)
FAMILY = Family("constant", "text", {"model": "fake"}, {"width": 2, "scale": 0.5})


@pytest.fixture
def dataset(tmp_path):
    dataset = open_store(str(tmp_path / "store"), create=True).sub("ds")
    make_all(dataset, {"64x64": [2, 2]})
    return dataset


def problems(dataset, deep=True):
    return verify(dataset, deep).problems


def test_verify_reads_the_constants_of_families(dataset):
    family = register_family(dataset, FAMILY, {"mean": torch.arange(4.0)})
    assert problems(dataset) == []
    path = dataset.local_path(family.constants_key)
    data = path.read_bytes()
    for change in (data[:-1] + b"\x7f", data[:9], None):
        path.unlink()
        if change is not None:
            path.write_bytes(change)
        (problem,) = problems(dataset)
        assert family.constants_key in problem
        with pytest.raises(StoreError, match="encode family `constant` under another name"):
            read_constants(dataset, family)


def test_an_edited_family_is_refused_by_every_command(dataset):
    path = dataset.local_path("families/latents/family.json")
    path.write_bytes(path.read_bytes().replace(b'"channels":1', b'"channels":2'))
    for command in (take_snapshot, lambda dataset: read_commit_counts(dataset)):
        with pytest.raises(StoreError, match=r"latents/family\.json: damaged: its content does not match"):
            command(dataset)
    (problem,) = problems(dataset, deep=False)
    assert "latents/family.json" in problem


def read_commit_counts(dataset):
    from data_prep.dataset.garbage import collect_garbage

    return collect_garbage(dataset, -1, delete=True)


def test_a_missing_shard_is_told_before_a_job_starts(dataset):
    snapshot = take_snapshot(dataset)
    check_payloads(dataset, snapshot, ["latents", "llm"])
    (file,) = read_commit(dataset, "llm", PART).files
    dataset.delete(file.key)
    check_payloads(dataset, snapshot, ["latents"])
    with pytest.raises(StoreError, match="one of 1 such files: run `python -m data_prep verify`") as error:
        check_payloads(dataset, snapshot, ["latents", "llm"])
    assert file.key in str(error.value)
    with pytest.raises(StoreError, match="delete this commit and run the job again") as error:
        take_snapshot(dataset)
    assert file.key in str(error.value)
    assert read_snapshot(dataset) == snapshot


@pytest.mark.parametrize("counts", [3, [], None, {"tokens": "many"}, {"tokens": [1]}, {"tokens": True}])
def test_counts_of_another_type_are_damage(dataset, counts):
    record = json.loads(read_commit(dataset, PAIRS, PART).to_json())
    record.pop("xxh64")
    dataset.put(PART.commit_key(PAIRS), seal({**record, "counts": counts}))
    with pytest.raises(StoreError, match=r"commits/pairs/64x64/00001\.json: damaged: counts"):
        committed(dataset, PAIRS)
    assert len(problems(dataset)) == 3  # the part itself, and that of both families


def test_verify_says_what_it_did_not_look_at(dataset):
    assert "--deep" in verify(dataset).not_read
    assert "--deep" not in verify(dataset, deep=True).not_read
    assert "sources" in verify(dataset, deep=True).not_read


def test_control_characters_are_escaped(dataset):
    assert one_line("a\x1b]0;title\x07\nb\u202e \ud800") == r"a\x1b]0;title\x07 b\u202e \ud800"
    folder = dataset.local_path("commits/pairs/64x64/00001.json").parent
    (folder / "\x1b[2J\nerror: fake.json").write_bytes(b"{}")
    with pytest.raises(UserError, match="not a commit") as error:
        take_snapshot(dataset)
    shown = f"from model.common.errors import *; print_error(UserError({str(error.value)!r}))"
    result = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    assert result.stderr.count("\n") == 1
    assert result.stderr.strip().isprintable()


@pytest.fixture
def folder():
    """A folder, while this process is one that file modes hold for: root reads everything."""
    user = os.geteuid()
    with TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        os.seteuid(user or 65534)
        yield name
        os.seteuid(user)


def test_what_cannot_be_read_is_one_line(folder):
    store = open_store(f"{folder}/store", create=True)
    store.put("commits/pairs/a/00000.json", b"{}")
    path = store.local_path("commits/pairs/a/00000.json")
    path.chmod(0)
    with pytest.raises(StoreError, match=r"00000\.json: Permission denied"):
        store.read("commits/pairs/a/00000.json")
    path.parent.chmod(0)
    for command in (lambda: list(store.list("commits/")), lambda: store.put("commits/pairs/a/1", b"")):
        with pytest.raises(StoreError, match="Permission denied: correct its rights"):
            command()
    path.parent.chmod(0o700)


def test_links_that_lead_nowhere_are_no_objects(dataset):
    folder = dataset.local_path("pairs/x").parent
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("/nonexistent/file")
    before = list(dataset.list("pairs/"))
    assert not any(key.endswith(("loop", "gone")) for key in before)
    assert not dataset.exists("pairs/loop")
    assert problems(dataset) == []
    with pytest.raises(StoreError, match="Too many levels"):
        dataset.read("pairs/loop")


def test_a_folder_in_the_place_of_an_object_is_one_line(dataset):
    dataset.local_path("commits/pairs/64x64/00002.json").mkdir()
    with pytest.raises(StoreError, match="not a regular file: remove it"):
        dataset.read("commits/pairs/64x64/00002.json")


def test_pipes_and_absurd_sizes_are_one_line(dataset):
    before = list(dataset.list(""))
    pipe = dataset.local_path("commits/pairs/64x64/00002.json")
    os.mkfifo(pipe)
    assert list(dataset.list("")) == before
    with pytest.raises(StoreError, match="not a regular file: remove it"):
        dataset.read("commits/pairs/64x64/00002.json")
    pipe.unlink()
    with pipe.open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it whole would take all memory
    with pytest.raises(StoreError, match=r"00002\.json: damaged: over 4,294,967,296 bytes"):
        read_commit(dataset, PAIRS, Part("64x64", 2))


def test_a_missing_shard_is_told_by_the_checks_before_a_job(tmp_path):
    fake_snapshot.make(tmp_path / "store", {"64x64": [2]}, tmp_path)
    stage = fake_snapshot.stage(tmp_path / "store", tmp_path / "cache")
    corpus = open_corpus(stage)
    check_files(stage, corpus)
    store = corpus.sources[0].dataset
    (key,) = store.list("families/wide/64x64/")
    store.delete(key)
    with pytest.raises(StoreError, match="one of 1 such files") as error:
        check_files(stage, corpus)
    assert key in str(error.value)
