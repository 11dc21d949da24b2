"""Users of a dataset: dense numbers from a column of any source, in the snapshot without a name."""

import json
from dataclasses import replace

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.config import UserColumnConfig
from data_prep.dataset.mds import write_mds
from data_prep.dataset.parts import commit_part, committed, register_family
from data_prep.dataset.schema import PAIRS
from data_prep.dataset.snapshot import take_snapshot
from data_prep.dataset.snapshot_reader import read_index
from data_prep.dataset.users import UserIndex, forget_user, ids_of_pairs, read_names
from data_prep.pairs.users import run_users
from model.common.errors import UserError
from tests.helpers import fake_snapshot
from tests.helpers.raw_material import (
    config_of,
    png,
    prepare,
    sample_members,
    write_mds_folder,
    write_parquet,
    write_tar,
)

OWNERS = ["berta", "anna", "anna", "", None, "berta", "anna", "carla"]


def facts(owner):
    """A row's caption, and its owner twice: in a field, and inside another."""
    return {"caption": "x y", "owner": owner, "meta": {"owner": owner, "year": 1999}}


def dataset_of(tmp_path, **users):
    """A folder, a table, tars and MDS, each with the same owners, and one image that cannot be read."""
    images = [png(number) for number in range(4 * len(OWNERS))]
    folder = tmp_path / "f"
    folder.mkdir()
    lines = []
    for number, owner in enumerate(OWNERS):
        (folder / f"{number}.png").write_bytes(images[number])
        lines.append(json.dumps({"file_name": f"{number}.png", **facts(owner)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    rows = [{"image": image, **facts(owner)} for image, owner in zip(images[8:16], OWNERS, strict=True)]
    rows[1]["image"] = b"no image"
    write_parquet(tmp_path / "p/a.parquet", rows, 3)
    members = []
    for number, owner in enumerate(OWNERS):
        members += sample_members(str(number), images[16 + number], facts(owner))
    write_tar(tmp_path / "t", "a.tar", members)
    rows = [
        {"image": image, **facts(owner), "owner": owner or ""}
        for image, owner in zip(images[24:], OWNERS, strict=True)
    ]
    encodings = {"image": "bytes", "caption": "str", "owner": "str", "meta": "json"}
    # In one shard, so that ids have the number of the row, as those of the other sources.
    write_mds_folder(tmp_path / "m", rows, encodings, shard_bytes=1 << 20)
    others = ("parquet", tmp_path / "p"), ("webdataset", tmp_path / "t"), ("mds", tmp_path / "m")
    config = config_of(tmp_path, ("folder", folder), *others)
    config.users = UserColumnConfig(**{"column": "owner", **users})
    return config, prepare(config)


def owners_by_id(dataset):
    """Sample id -> owner, by the row that the id names."""
    ids = np.concatenate([ids_of_pairs(dataset, commit) for commit in committed(dataset, PAIRS).values()])
    return {int(id): OWNERS[int(id) & 0xFFFFFFFF] or None for id in ids}


def with_latents(dataset, path):
    """Commit a family of empty latents for the pairs, and take a snapshot."""
    family = register_family(dataset, fake_snapshot.LATENTS, None)
    for part, commit in committed(dataset, PAIRS).items():
        ids = ids_of_pairs(dataset, commit).tolist()
        write_mds(path, family.columns, [{"id": id, "mean": b"", "std": b""} for id in ids])
        commit_part(dataset, "latents", part, {"shard.00000.mds": path}, ids, {}, family.hash)
    return take_snapshot(dataset)


@pytest.mark.parametrize("column", ["owner", "meta.owner"])
def test_every_source_gives_its_users_and_they_keep_their_numbers(tmp_path, column):
    config, dataset = dataset_of(tmp_path, column=column)
    assert run_users(config, dataset) == {0: 11, 1: 8, 2: 4}  # one of anna's images is damaged
    names = read_names(dataset)
    assert names == ["anna", "berta", "carla"]
    owners = owners_by_id(dataset)
    users = UserIndex.read(dataset).users_of(np.array(list(owners)))
    assert [names[user] if user >= 0 else None for user in users] == list(owners.values())

    # The sources still have anna, who gets a new number: she is to be deleted there too.
    forget_user(dataset, "anna")
    run_users(config, dataset)
    assert read_names(dataset) == [None, "berta", "carla", "anna"]


def test_limits_of_images_per_user(tmp_path):
    config, dataset = dataset_of(tmp_path, min_images=5, max_images=7)
    assert run_users(config, dataset) == {0: 7, 1: 7}
    assert read_names(dataset) == ["anna", "berta"]
    with pytest.raises(UserError, match=r"min_images=12"):
        run_users(replace(config, users=UserColumnConfig("owner", 12)), dataset)


def test_a_snapshot_has_the_number_of_each_row_and_another_id_than_without(tmp_path):
    config, dataset = dataset_of(tmp_path)
    plain = with_latents(dataset, tmp_path / "shard.00000.mds")
    run_users(config, dataset)
    snapshot = take_snapshot(dataset)
    assert snapshot.id != plain.id
    assert "users" not in read_index(dataset, plain, "32x32").column_names
    owners, names = owners_by_id(dataset), read_names(dataset)
    index = read_index(dataset, snapshot, "32x32").to_pylist()
    parts = {part.number: commit for part, commit in committed(dataset, PAIRS).items()}
    for row in index:
        ids = ids_of_pairs(dataset, parts[row["number"]]).tolist()
        assert [names[user] if user >= 0 else None for user in row["users"]] == [owners[id] for id in ids]
    # No object but the list of names has a name: neither the snapshot nor the pairs.
    root = tmp_path / "store"
    named = [path for path in root.rglob("*") if path.is_file() and b"berta" in path.read_bytes()]
    assert [path.name for path in named] == ["names.json"]


def test_the_command_numbers_and_forgets(tmp_path, capsys):
    config, dataset = dataset_of(tmp_path)
    assert dataset.exists("manifest.json")
    sources = "".join(f"  - {{kind: {source.kind}, path: {source.path}}}\n" for source in config.sources)
    path = tmp_path / "ds.yaml"
    path.write_text(
        f"name: ds\nstore: {config.store}\nsources:\n{sources}buckets: {{resolution: 32, max_aspect: 1.0, "
        "step: 16}\npart_rows: 4\nshuffle_window: 8\nworkers: 0\nimage_format: png\nusers: {column: owner}\n"
    )
    main(["users", str(path)])
    assert "3 users of 23 pairs, 4 to 11 each" in capsys.readouterr().out
    main(["users", str(path), "--forget", "berta"])
    assert "user 1: the name and the index entries are deleted" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["users", str(path), "users.column="])
    assert "users.column is empty" in capsys.readouterr().err
