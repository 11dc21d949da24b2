"""Annotations: each kept row gets the values of its own image, and filters on them drop rows."""

import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from data_prep.__main__ import main
from data_prep.annotators.annotator import ClipAnnotator, LanguageAnnotator
from data_prep.config import load_dataset
from data_prep.dataset.parts import read_plan, read_plan_record
from data_prep.images.images import decode_image
from data_prep.model_settings import AnnotatorConfig
from data_prep.plan.annotations import annotation_folder, annotation_key
from data_prep.plan.manifest import read_manifest
from data_prep.plan.rows import dropped_key
from data_prep.store.store import open_store
from model.scorers.head import EmbeddingHead
from tests.helpers import tiny_scorers
from tests.helpers.raw_material import png, sample_members, write_tar

FUNCTION = "tests.data_prep.annotators.functions:brightness"
CPU = torch.device("cpu")


def save_head(path, width=16, seed=0):
    """Save five linear layers, named like those of LAION's aesthetic predictor."""
    torch.manual_seed(seed)
    sizes, tensors = (width, 12, 8, 8, 4, 1), {}
    for number, (inputs, outputs) in zip((0, 2, 4, 6, 7), itertools.pairwise(sizes), strict=True):
        tensors[f"layers.{number}.weight"] = torch.randn(outputs, inputs)
        tensors[f"layers.{number}.bias"] = torch.randn(outputs)
    save_file(tensors, path)
    return tensors


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Return a folder with two tars, of which some images are too small, a CLIP, a head and a classifier."""
    folder = tmp_path_factory.mktemp("annotations")
    for number in range(2):
        members = []
        for row in range(9):
            side = 40 if row % 4 else 20
            image = png(10 * number + row, side, side)
            members += sample_members(f"{number}{row}", image, {"caption": f"thing {row}", "wide": row})
        write_tar(folder / "in", f"{number}.tar", members)
    (folder / "clip").mkdir()
    tiny_scorers.clip(folder / "clip")
    save_head(folder / "head.safetensors")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        id2label={0: "normal", 1: "nsfw"},
        label2id={"normal": 0, "nsfw": 1},
    )
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    return folder


def write_yaml(raw, folder, filters, name="ds", annotations=None):
    if annotations is None:
        head = {"column": "aesthetic", "weights": str(raw / "head.safetensors")}
        clip = {"name": "clip", "model": str(raw / "clip"), "heads": [head], "embedding": True, "batch": 4}
        vit = {"name": "vit", "kind": "classifier", "model": str(raw / "vit"), "labels": {"nsfw": "punsafe"}}
        columns = {"bright": "number", "many": "text"}
        function = {"name": "own", "kind": "function", "function": FUNCTION, "columns": columns}
        annotations = [clip, vit, function]
    settings = {
        "name": name,
        "store": str(folder / "store"),
        "workers": 0,
        "part_rows": 4,
        "image_format": "png",
        "buckets": {"resolution": 32, "max_aspect": 1, "step": 32},
        "sources": [{"path": str(raw / "in")}],
        "filters": [{"name": "min_side", "value": 30}, *filters],
        "annotations": annotations,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(settings))
    return path


def tables_of(path):
    config = load_dataset(path, [])
    store = open_store(config.store)
    dataset = store.sub(config.name)
    return (
        config,
        dataset,
        [
            pq.read_table(dataset.local_path(annotation_key(config, number))).to_pylist()
            for number in range(2)
        ],
    )


def planned_ids(dataset):
    hashes = read_plan_record(dataset)["manifest"]
    ids = []
    for part in read_plan(dataset).parts:
        ids += read_manifest(dataset, part, hashes)["id"].to_pylist()
    return sorted(ids)


def test_rows_get_the_values_of_their_own_images_and_filters_read_them(raw, tmp_path, capsys):
    path = write_yaml(raw, tmp_path, [])
    main(["plan", str(path)])
    assert "2 of 2 source files are not annotated yet" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["annotate", str(path)])
    assert "add --allow-functions" in capsys.readouterr().err
    # Two tasks, and one of them twice.
    for task in ("1/2", "0/2", "1/2"):
        main(["annotate", str(path), "--task", task, "--allow-functions"])
    config, dataset, tables = tables_of(path)

    clip = ClipAnnotator(config.annotations[0])
    rows = [row for table in tables for row in table]
    assert len(rows) == 2 * 6  # three of nine are too small
    for row in rows:
        number, place = row["id"] >> 32, row["id"] & 0xFFFFFFFF
        image = decode_image(png(10 * number + place, 40, 40))
        alone = clip.annotate([image], [[f"thing {place}"]])
        for name in ("clip_score", "aesthetic"):
            assert row[name] == pytest.approx(alone[name][0], abs=1e-4)
        assert np.allclose(row["clip_embedding"], alone["clip_embedding"][0], atol=1e-3)
        assert (0 < row["punsafe"] < 1, row["many"]) == (True, "1 captions")
    assert len({row["bright"] for row in rows}) > 5

    # The threshold is chosen when the values are known.
    bound = float(np.median([row["aesthetic"] for row in rows]))
    dark = float(np.median([row["bright"] for row in rows]))
    chosen = [
        {"name": "min_value", "column": "aesthetic", "value": bound},
        {"name": "expression", "value": f"bright >= {dark} and height > 10 and many != ''"},
    ]
    path = write_yaml(raw, tmp_path, chosen)
    main(["plan", str(path)])
    expected = [row["id"] for row in rows if row["aesthetic"] >= bound and row["bright"] >= dark]
    assert planned_ids(dataset) == sorted(expected)
    record = read_plan_record(dataset)
    dropped = {}
    for file in record["files"]:
        for reason, count in file["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
    low = sum(row["aesthetic"] < bound for row in rows)
    assert dropped["min_side: below 30"] == 6
    assert dropped[f"min_value: aesthetic below {bound:g}"] == low
    assert sum(dropped.values()) == 18 - len(expected)
    assert {row["reason"] for row in pq.read_table(dataset.local_path(dropped_key(0))).to_pylist()} <= set(
        dropped
    )
    assert not list(dataset.list("scan/finish/"))

    main(["pairs", str(path)])
    main(["report", str(path), "--out", str(tmp_path / "report.html")])
    assert f"aesthetic below {bound:g}" in (tmp_path / "report.html").read_text()
    # From here on the filters are part of the plan.
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["pairs", str(write_yaml(raw, tmp_path, chosen[:1]))])
    assert "was planned with other filters on annotations" in capsys.readouterr().err


def test_a_row_without_a_value_passes_no_bound_and_makes_no_other_row_a_duplicate(raw, tmp_path):
    """The first of two equal images is dropped by an annotation of its caption, so the second one stays."""
    annotations = [{"name": "own", "kind": "function", "function": FUNCTION, "columns": {"many": "text"}}]
    members = sample_members("a", png(1, 40, 40), {"caption": "one"})
    members += sample_members("b", png(1, 40, 40), {"caption": ["one", "two"]})
    write_tar(tmp_path / "in", "0.tar", members)
    settings = json.loads(
        write_yaml(raw, tmp_path, [{"name": "expression", "value": "many == '2 captions'"}]).read_text()
    )
    settings |= {"sources": [{"path": str(tmp_path / "in")}], "annotations": annotations}
    path = tmp_path / "ds.yaml"
    path.write_text(json.dumps(settings))
    main(["plan", str(path)])
    main(["annotate", str(path), "--allow-functions"])
    main(["plan", str(path)])
    dataset = open_store(str(tmp_path / "store")).sub("ds")
    assert planned_ids(dataset) == [1]


def test_values_of_other_images_are_refused(raw, tmp_path, capsys):
    annotations = [{"name": "own", "kind": "function", "function": FUNCTION, "columns": {"bright": "number"}}]
    path = write_yaml(
        raw, tmp_path, [{"name": "min_value", "column": "bright", "value": 0}], "ds", annotations
    )
    main(["plan", str(path)])
    main(["annotate", str(path), "--allow-functions"])
    config, dataset, _ = tables_of(path)
    first, second = (annotation_key(config, number) for number in range(2))
    dataset.put(first, dataset.read(second))
    with pytest.raises(SystemExit):
        main(["plan", str(path)])
    assert "has not the scan's images: delete it" in capsys.readouterr().err
    dataset.delete(first)
    main(["annotate", str(path), "--allow-functions"])
    main(["plan", str(path)])
    assert len(planned_ids(dataset)) == 12

    # Another model's values are in another folder.
    other = write_yaml(raw, tmp_path, [], "ds", [{**annotations[0], "revision": "2"}])
    assert annotation_folder(load_dataset(other, [])) != annotation_folder(config)


@pytest.mark.parametrize(
    ("filters", "annotations", "message"),
    [
        ([{"name": "expression", "value": "bright > 1 and wide > 2"}], None, "write a filter for each"),
        ([], [{"name": "a", "kind": "function", "function": "f:g"}], "`columns` is empty"),
        ([], [{"name": "a", "model": ""}], "`model` is empty"),
        (
            [],
            [{"name": "a", "kind": "function", "function": "f:g", "columns": {"b": "c"}}],
            "set number or text",
        ),
        ([], [{"name": "a", "kind": "language"}, {"name": "a", "kind": "language"}], "is given twice"),
    ],
)
def test_wrong_settings(raw, tmp_path, capsys, filters, annotations, message):
    with pytest.raises(SystemExit):
        main(["plan", str(write_yaml(raw, tmp_path, filters, "ds", annotations))])
    assert message in capsys.readouterr().err


def test_wrong_functions(raw, tmp_path, capsys):
    for function, message in (
        ("tests.data_prep.annotators.functions:too_few", "returned 1 values of `bright` for 6 images"),
        ("tests.data_prep.annotators.functions:nothing", "give module:function"),
        ("no_such_module:f", "give module:function"),
    ):
        own = [{"name": "own", "kind": "function", "function": function, "columns": {"bright": "number"}}]
        name = f"ds{len(message)}{function[-3:].replace(':', '')}"
        path = write_yaml(raw, tmp_path, [], name, own)
        main(["plan", str(path)])
        with pytest.raises(SystemExit):
            main(["annotate", str(path), "--allow-functions"])
        assert message in capsys.readouterr().err


def test_the_head_is_its_layers_one_after_the_other(tmp_path):
    tensors = save_head(tmp_path / "head.safetensors")
    vectors = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    for activation, output in (("none", "none"), ("relu", "sigmoid")):
        layers = []
        for number in (0, 2, 4, 6, 7):
            weight, bias = tensors[f"layers.{number}.weight"], tensors[f"layers.{number}.bias"]
            layer = torch.nn.Linear(*weight.shape[::-1])
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers += [layer, torch.nn.ReLU() if activation == "relu" else torch.nn.Identity()]
        layers[-1] = torch.nn.Sigmoid() if output == "sigmoid" else torch.nn.Identity()
        expected = torch.nn.Sequential(*layers)(vectors)[:, 0]
        head = EmbeddingHead(str(tmp_path / "head.safetensors"), activation, output, CPU)
        assert torch.allclose(head(vectors), expected, atol=1e-6)


def test_the_language_of_the_first_caption_is_named():
    """By the package itself, on sentences that are long enough to be sure of."""
    annotator = LanguageAnnotator(AnnotatorConfig(name="language", kind="language"))
    captions = [
        ["A brown dog runs along the beach in the evening sun.", "Ein Hund"],
        ["Ein brauner Hund läuft in der Abendsonne am Strand entlang."],
        ["Un chien brun court le long de la plage au soleil du soir."],
        ["一只棕色的狗在傍晚的阳光下沿着海滩奔跑。"],
        [],
    ]
    found = annotator.annotate([Image.new("RGB", (1, 1))] * len(captions), captions)
    assert found == {"language": ["en", "de", "fr", "zh", None]}
    assert annotator.identity["name"] == "py3langid"
    assert annotator.identity["revision"]
