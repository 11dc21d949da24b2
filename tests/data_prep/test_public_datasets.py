"""The shipped datasets load, their commands are those of the tools, and the paper's filter is the paper's."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.config import load_dataset
from data_prep.dataset.parts import read_plan_record
from data_prep.store.store import open_store
from tests.data_prep.annotators.test_annotations import save_head
from tests.helpers import tiny_scorers
from tests.helpers.raw_material import png, sample_members, write_tar

FOLDER = Path(__file__).parents[2] / "data_prep" / "datasets"
PUBLIC = ("cc12m", "coyo_700m", "pd12m")
OPTIONS = {
    *("--url_list", "--input_format", "--url_col", "--caption_col", "--output_format", "--output_folder"),
    *("--processes_count", "--thread_count", "--image_size", "--resize_mode", "--resize_only_if_bigger"),
    *("--skip_reencode", "--save_additional_columns"),
}
"""Options of img2dataset 1.47."""


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_dataset_has_its_command_its_license_and_the_columns_that_it_filters(name):
    config = load_dataset(FOLDER / f"{name}.yaml", [])
    text = (FOLDER / f"{name}.yaml").read_text()
    assert re.search(r"^#   license ", text, re.MULTILINE)
    assert re.search(r"^#   pairs ", text, re.MULTILINE)
    assert re.search(r"github\.com|huggingface\.co|dataset_examples", text)
    (command,) = [line[1:].strip() for line in text.splitlines() if line.startswith("#   img2dataset ")]
    words = shlex.split(command)
    assert {word for word in words if word.startswith("--")} <= OPTIONS
    assert words[words.index("--output_format") + 1] == "webdataset"

    fetched = {"caption", "txt"}
    if "--save_additional_columns" in words:
        fetched |= set(json.loads(words[words.index("--save_additional_columns") + 1]))
    assert set(config.sources[0].captions.values()) <= fetched
    for settings in config.filters:
        if settings.column:
            assert settings.column in fetched
        if settings.name == "expression":
            assert set(re.findall(r"[a-z_0-9]*_score\w*", str(settings.value))) <= fetched


def test_the_papers_filter_leaves_out_what_is_below_and_counts_it(tmp_path, capsys):
    """The shipped file with a small CLIP and small images: everything else is as it is."""
    folder = tmp_path / "clip"
    folder.mkdir()
    tiny_scorers.clip(folder)
    save_head(tmp_path / "head.safetensors", seed=3)
    members = []
    for number in range(24):
        members += sample_members(str(number), png(number, 40, 40), {"caption": f"thing {number}"})
    write_tar(tmp_path / "in", "a.tar", members)
    settings = [
        f"store={tmp_path / 'store'}",
        f"sources.0.path={tmp_path / 'in'}",
        f"annotations.0.model={folder}",
        f"annotations.0.heads.0.weights={tmp_path / 'head.safetensors'}",
        "filters.0.value=32",
        "buckets={resolution: 32, max_aspect: 1, step: 32}",
        "workers=0",
    ]
    path = str(FOLDER / "paper.yaml")
    config = load_dataset(Path(path), settings)
    (bound,) = [each.value for each in config.filters if each.column == "aesthetic"]
    assert bound == 4.7
    main(["plan", path, *settings])
    main(["annotate", path, *settings])
    dataset = open_store(config.store).sub(config.name)
    (key,) = [key for key in dataset.list("annotations/") if key.endswith(".parquet")]
    import pyarrow.parquet as pq

    scores = pq.read_table(dataset.local_path(key))["aesthetic"].to_pylist()
    low = sum(score < bound for score in scores)
    if low in (0, len(scores)):
        # The head's weights are random, so its scores are put around the paper's bound.
        bound = sorted(scores)[len(scores) // 2]
        settings.append(f"filters.1.value={bound}")
        low = sum(score < bound for score in scores)
    main(["plan", path, *settings])
    dropped = Counter()
    for file in read_plan_record(dataset)["files"]:
        dropped.update(file["dropped"])
    assert 0 < low < len(scores) == 24
    assert dropped[f"min_value: aesthetic below {bound:g}"] == low
    main(["report", path, *settings, "--out", str(tmp_path / "report.html")])
    assert f"aesthetic below {bound:g}" in (tmp_path / "report.html").read_text()
    capsys.readouterr()
