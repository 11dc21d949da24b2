"""`python -m data_prep init`: the YAML that it writes fits what is stored, loads, and plans every row."""

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.__main__ import main
from data_prep.config import load_dataset
from data_prep.dataset.parts import read_plan_record
from data_prep.images.buckets import TOO_SMALL, assign, make_buckets
from data_prep.init import MAX_ENLARGED, MOST, choose_buckets, shipped_llms
from data_prep.plan.plan import run_plan
from data_prep.sources.files import SourceFiles
from data_prep.sources.survey import MAX_FILES, MAX_ROWS
from data_prep.sources.text_columns import TextColumns
from data_prep.store.store import open_store
from tests.helpers.raw_material import (
    ALONE,
    encoded,
    png,
    sample_members,
    tar_bytes,
    write_mds_folder,
    write_parquet,
    write_tar,
)


def flat(number, side):
    """Return a PNG of one color, a square that compresses to a few bytes."""
    return encoded(Image.new("RGB", (side, side), (number, 255 - number, 128)))


def write_folder(root, images, column, field):
    """Write images with sidecars, or with a metadata file for columns of their own names."""
    root.mkdir(parents=True)
    for number, image in enumerate(images):
        (root / f"{number}.png").write_bytes(image)
        if column in ("txt", "caption"):
            (root / f"{number}.{column}").write_text(f"text {number}")
    if column not in ("txt", "caption"):
        rows = [{"file_name": f"{number}.png", field: f"text {number}"} for number in range(len(images))]
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_tars(root, images, column, field):
    members = []
    for number, image in enumerate(images):
        record = {field: f"text {number}", "url": f"https://example.com/{number}.png", "key": f"{number:09}"}
        members.append((f"{number:03}.png", image))
        if column in ("txt", "caption"):
            members.append((f"{number:03}.{column}", f"text {number}".encode()))
        else:
            members.append((f"{number:03}.json", json.dumps(record).encode()))
    half = sum(name.startswith("000") for name, _ in members)
    write_tar(root, "0.tar", members[:half])
    write_tar(root, "1.tar", members[half:])


def write_tables(root, images, column, field):
    rows = []
    for number, image in enumerate(images):
        value = {"bytes": image, "path": f"{number}.png"} if column == "struct" else image
        if column == "paths":
            (root / "files").mkdir(parents=True, exist_ok=True)
            (root / f"files/{number}.png").write_bytes(image)
            value = f"files/{number}.png"
        rows.append({"number": number, "picture": value, field: f"text {number}", "url": f"https://{number}"})
    write_parquet(root / "table.parquet", rows)


WRITERS = {
    "folder": (write_folder, ("txt", "caption", "metadata")),
    "webdataset": (write_tars, ("txt", "caption", "json")),
    "parquet": (write_tables, ("bytes", "struct", "paths")),
}
FORMS = [(kind, form) for kind, (_, forms) in WRITERS.items() for form in forms]


def run(out, *arguments):
    main(["init", *map(str, arguments), "--out", str(out)])
    return load_dataset(out, ["workers=0"])


def plan(config):
    """Plan the dataset; return the number of rows that were read and kept, and of those dropped by reason."""
    dataset = open_store(config.store, create=True).sub(config.name)
    manifest = run_plan(config, dataset, ALONE)
    record = read_plan_record(dataset)
    dropped = Counter()
    for file in record["files"]:
        dropped.update(file["dropped"])
    kept = sum(map(sum, manifest.buckets.values()))
    return sum(file["rows"] for file in record["files"]), kept, dropped


@settings(max_examples=10, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    field=st.sampled_from(["caption", "text", "alt_text", "prompt", "longDescription"]),
    sides=st.lists(st.sampled_from([24, 64, 200, 256, 300, 512, 1024]), min_size=2, max_size=6),
)
def test_kind_captions_and_resolution_are_those_of_the_data(form, field, sides):
    kind, column = form
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        images = [flat(number, side) for number, side in enumerate(sides)]
        WRITERS[kind][0](here / "in", images, column, field)
        config = run(here / "in.yaml", here / "in", "--store", here / "store")

        (source,) = config.sources
        assert source.kind == kind
        named = kind == "parquet" or column in ("metadata", "json")
        assert source.captions == {"original": field if named else "caption"}
        assert config.caption_kinds == ["original"]

        reached = [side for side in (1024, 512, 256) if sum(s >= side for s in sides) >= MOST * len(sides)]
        assert config.buckets.resolution == next(iter(reached), 64)

        rows, kept, dropped = plan(config)
        assert rows == len(sides) == kept + sum(dropped.values())
        enlarged = config.buckets.resolution / config.buckets.max_upscale
        assert kept == sum(side >= enlarged for side in sides)


def test_the_pairs_of_a_written_yaml_are_made(tmp_path, capsys):
    write_folder(tmp_path / "in", [png(number, 70, 90) for number in range(5)], "txt", "")
    run(tmp_path / "a.yaml", tmp_path / "in", "--store", tmp_path / "store")
    main(["plan", str(tmp_path / "a.yaml"), "workers=0"])
    assert "5 rows read, 5 planned" in capsys.readouterr().out
    main(["pairs", str(tmp_path / "a.yaml"), "workers=0"])
    main(["verify", str(tmp_path / "a.yaml"), "--deep"])
    assert "pairs: 1 parts are right" in capsys.readouterr().out


@pytest.mark.parametrize("image", ["image", "jpg"])
def test_an_mds_folder_and_its_columns(tmp_path, image):
    rows = [{image: png(number), "text": f"words {number}", "number": number} for number in range(9)]
    write_mds_folder(tmp_path / "in", rows, {image: "bytes", "text": "str", "number": "int"})
    config = run(tmp_path / "a.yaml", tmp_path / "in", "--store", tmp_path / "store")
    (source,) = config.sources
    assert (source.kind, source.image, source.captions) == ("mds", image, {"original": "text"})
    assert plan(config)[0] == 9


def test_several_captions_are_kinds_of_their_own(tmp_path):
    records = [
        {
            "caption": f"short {number}",
            "cogvlm": f"A long description of image number {number}",
            "license": "Creative Commons Attribution Share Alike 4.0",
            "note": "the same text in all rows",
            "exif": '{"make": "a b c d e f"}',
            "meta": {"blip_caption": f"nested {number}"},
            "sha256": "0123456789abcdef0123",
        }
        for number in range(6)
    ]
    members = [m for n, record in enumerate(records) for m in sample_members(str(n), png(n), record)]
    write_tar(tmp_path / "in", "a.tar", members)
    config = run(tmp_path / "a.yaml", tmp_path / "in")
    expected = {"original": "caption", "meta_blip_caption": "meta.blip_caption", "cogvlm": "cogvlm"}
    assert config.sources[0].captions == expected
    assert config.caption_kinds == list(expected)


def test_tables_that_describe_tars_are_no_second_source(tmp_path):
    """The layout of img2dataset: `00000.tar`, `00000.parquet` and `00000_stats.json`."""
    write_tar(tmp_path / "in", "00000.tar", sample_members("0", png(0), {"caption": "a"}))
    write_parquet(tmp_path / "in/00000.parquet", [{"url": "https://example.com", "caption": "a"}])
    (tmp_path / "in/00000_stats.json").write_text("{}")
    assert run(tmp_path / "a.yaml", tmp_path / "in").sources[0].kind == "webdataset"
    assert run(tmp_path / "b.yaml", tmp_path / "in/00000.tar").sources[0].kind == "webdataset"
    assert run(tmp_path / "c.yaml", f"{tmp_path}/in/*.tar").sources[0].path == f"{tmp_path}/in/*.tar"


def test_a_bucket_is_read_like_a_folder(s3, tmp_path):
    store = open_store(s3)
    for tar in range(2):
        members = sample_members(str(tar), png(tar), {"caption": f"c{tar}"})
        store.put(f"tars/{tar}.tar", tar_bytes(members))
    config = run(tmp_path / "a.yaml", f"{s3}/tars", "--store", tmp_path / "store")
    assert (config.name, config.sources[0].kind, config.sources[0].path) == (
        "tars",
        "webdataset",
        f"{s3}/tars",
    )
    assert plan(config)[:2] == (2, 2)


def failed(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(["init", *map(str, arguments)])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def empty(root):
    pass


def only_texts(root):
    (root / "a.txt").write_text("a")
    (root / "b.tar.gz").write_text("b")


def images_and_tars(root):
    (root / "a.png").write_bytes(png(0))
    write_tar(root, "b.tar", sample_members("0", png(0), {"caption": "a"}))


def no_captions(root):
    (root / "a.png").write_bytes(png(0))


def only_damaged(root):
    (root / "a.png").write_bytes(b"no image")
    (root / "a.txt").write_text("a")


def several_images(root):
    members = [("0.input.png", png(0)), ("0.target.png", png(1)), ("0.txt", b"a")]
    write_tar(root, "a.tar", members)


def addresses(root):
    write_parquet(root / "a.parquet", [{"url": "https://example.com/a.png", "caption": "a"}])


def damaged_table(root):
    (root / "a.parquet").write_bytes(b"no table")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (empty, "there are: no files"),
        (only_texts, "there are: 1 .txt, 1 .tar.gz"),
        (images_and_tars, "1 image and 1 tar"),
        (no_captions, "1 images, but no captions"),
        (only_damaged, "none of the 1 rows that were read has a usable image (1 image: not a known format)"),
        (several_images, "several images (input.png, target.png, txt): choose one with --image"),
        (addresses, "URLs have to be downloaded first"),
        (damaged_table, "a.parquet is no parquet file"),
    ],
)
def test_what_is_no_dataset_is_one_line(tmp_path, capsys, write, message):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    assert message in failed(capsys, tmp_path / "in", "--out", tmp_path / "a.yaml")
    assert not (tmp_path / "a.yaml").exists()


def test_a_missing_path_is_one_line(tmp_path, capsys):
    assert "does not exist" in failed(capsys, tmp_path / "nowhere", "--out", tmp_path / "a.yaml")


def test_the_image_of_several_can_be_chosen(tmp_path):
    (tmp_path / "in").mkdir()
    several_images(tmp_path / "in")
    config = run(tmp_path / "a.yaml", tmp_path / "in", "--image", "target.png", "--store", tmp_path / "store")
    assert config.sources[0].image == "target.png"
    assert plan(config)[:2] == (1, 1)


def test_a_yaml_is_never_overwritten(tmp_path, capsys):
    write_folder(tmp_path / "in", [png(0)], "txt", "")
    out = tmp_path / "a.yaml"
    out.write_text("mine")
    assert "never overwritten" in failed(capsys, tmp_path / "in", "--out", out)
    assert out.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "in"]


def test_foreign_names_stay_inside_their_value_and_comment(tmp_path):
    """Line breaks, references and markup in names of folders, files and columns."""
    root = tmp_path / '${oc.env:HOME} # it\'s: "mine"'
    column = "text\nname: stolen # ${seed}"
    rows = [{"picture": png(number), column: "line\nstore: stolen"} for number in range(3)]
    write_parquet(root / "a.parquet", rows)
    (root / "b.x\ny: z").write_text("")
    config = run(tmp_path / "a.yaml", root, "--store", tmp_path / "store")
    assert config.name == "oc.env_HOME_it_s_mine_"[: len(config.name)]
    assert config.sources[0].path == str(root)
    assert config.sources[0].captions == {"original": column}
    assert config.store == str(tmp_path / "store")


def test_only_a_sample_of_many_images_is_read(tmp_path, monkeypatch):
    image = png(0)
    for number in range(MAX_ROWS + 100):
        folder = tmp_path / "in" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(image)
        (folder / f"{number}.txt").write_text("a")

    read, before = Counter(), SourceFiles.read

    def counting(self, name, *rest):
        read[Path(name).suffix] += 1
        return before(self, name, *rest)

    monkeypatch.setattr(SourceFiles, "read", counting)
    run(tmp_path / "a.yaml", tmp_path / "in")
    # One row more per folder shows that there are more.
    assert read[".png"] <= MAX_ROWS + 3
    text = (tmp_path / "a.yaml").read_text()
    assert f"{MAX_ROWS:,} rows of 3 of 3 folders, a sample" in " ".join(text.replace("#", "").split())


def test_only_some_tars_are_opened(tmp_path, monkeypatch):
    for number in range(2 * MAX_FILES):
        write_tar(tmp_path / "in", f"{number:03}.tar", sample_members("0", png(number), {"caption": "a"}))
    opened, before = set(), SourceFiles.open

    def counting(self, name):
        opened.add(name)
        return before(self, name)

    monkeypatch.setattr(SourceFiles, "open", counting)
    run(tmp_path / "a.yaml", tmp_path / "in")
    assert len(opened) == MAX_FILES
    # Evenly over all of them.
    assert {int(name[:3]) // MAX_FILES for name in opened} == {0, 1}


def test_families_are_chosen_or_left_as_comments(tmp_path, capsys):
    write_folder(tmp_path / "in", [png(0)], "txt", "")
    bare = run(tmp_path / "a.yaml", tmp_path / "in")
    assert (bare.latents, bare.text) == ([], [])
    comments = [line for line in (tmp_path / "a.yaml").read_text().splitlines() if line.startswith("#")]
    start = comments.index("# latents:")
    kept = [line for line in comments[start:] if line.startswith(("# latents:", "# text:", "#   "))]
    (tmp_path / "b.yaml").write_text(
        (tmp_path / "a.yaml").read_text() + "\n".join(line.removeprefix("# ") for line in kept) + "\n"
    )
    filled = load_dataset(tmp_path / "b.yaml", [])
    assert filled.latents[0].vae == "runs/in/vae"
    assert filled.text[0].llm == shipped_llms()["smollm2"]["llm"]

    llms = [*shipped_llms(), "Qwen/Qwen3-4B", "/models/other.gguf"]
    options = [word for llm in llms for word in ("--llm", llm)]
    chosen = run(tmp_path / "c.yaml", tmp_path / "in", "--vae", "org/vae", *options)
    assert chosen.latents[0].vae == "org/vae"
    assert [text.name for text in chosen.text] == [*shipped_llms(), "qwen3_4b", "other"]
    for text in chosen.text[: len(shipped_llms())]:
        assert (text.prefix, text.suffix) == (
            shipped_llms()[text.name]["prefix"],
            shipped_llms()[text.name]["suffix"],
        )
    assert chosen.text[-2].suffix == shipped_llms()["qwen"]["suffix"]
    assert "was named before" in failed(
        capsys, tmp_path / "in", "--llm", "qwen", "--llm", "qwen", "--out", tmp_path / "d.yaml"
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(8, 4000), st.integers(8, 4000)), min_size=1, max_size=40))
def test_most_images_reach_the_resolution_that_is_chosen(sizes):
    chosen = choose_buckets(sizes)
    buckets = make_buckets(chosen)
    small = sum(assign(buckets, *size, chosen.max_upscale, chosen.max_crop) == TOO_SMALL for size in sizes)
    assert small <= (1 - MOST) * len(sizes) or chosen.max_upscale == MAX_ENLARGED
    assert chosen.max_upscale == 1 or chosen.resolution == 64


def chosen_of(records):
    columns = TextColumns()
    for record in records:
        columns.add(record)
    return list(columns.captions())


@pytest.mark.parametrize(
    ("record", "captions"),
    [
        ({"caption": "a", "txt": "a"}, ["caption"]),
        ({"txt": "b", "caption": "a"}, ["caption", "txt"]),
        ({"caption": ["a", "b"], "tags": ["c"]}, ["caption"]),
        ({"title": "a cat", "url": "https://example.com"}, ["title"]),
        ({"title": "a cat", "prompt": "a red cat"}, ["prompt"]),
        ({"label": "cat", "file_name": "a.png"}, ["label"]),
        ({"label": "3", "name": "a/b.png"}, []),
        ({"caption_url": "https://example.com/a b c d e"}, []),
        ({"caption": "", "text": None, "number": 3}, []),
        ({"whatever": "a sentence of many words"}, ["whatever"]),
        ({"a": {"text": "x", "b": {"text": "y"}}}, ["a.text"]),
    ],
)
def test_which_fields_are_captions(record, captions):
    assert chosen_of([record]) == captions


def test_the_help_names_the_shipped_llms(capsys):
    with pytest.raises(SystemExit):
        main(["init", "--help"])
    assert ", ".join(shipped_llms()) in " ".join(capsys.readouterr().out.split())


def test_a_mistyped_option_of_init_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["init", str(tmp_path), "--lm", "qwen", "name=x"])
    assert exit.value.code == 2
    assert "not understood" in capsys.readouterr().err
