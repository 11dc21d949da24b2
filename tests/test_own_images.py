"""The page `docs/own_images.md`, carried out by its very commands on images that nobody has prepared."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import emoji
import pytest
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from data_prep.config import load_dataset
from data_prep.dataset.parts import read_plan
from data_prep.store.store import open_store
from pipeline.stage.config import load_stage
from tests.helpers.pages import ROOT, read_blocks

FOLDER = "/data/flowers"
"""The folder of the page."""
COLORS = {"red": (200, 30, 30), "green": (20, 140, 40), "blue": (30, 60, 200), "orange": (230, 130, 0)}
EMOJI = "manimgx-fonts==2026.9.26.post1"
"""Package with the font Noto Emoji, an emoji set whose images are not OpenMoji's."""
COUNT = 48
SHORTER = {
    "pipeline.train_vae": ["--steps", "5"],
    "pipeline.train": ["samples=24", "checkpoint.every_samples=24"],
    "pipeline.sample": ["--steps", "2"],
}
"""Options that save minutes and change no step of the tour."""
SERVERS = ("pipeline.web",)
"""Commands that do not end by themselves."""


def write_emoji(folder):
    """Write emoji of the font as PNG, each with its name in a text file."""
    wheels = folder.parent / "wheels"
    download = ("download", "--quiet", "--no-deps", "--dest", str(wheels), EMOJI)
    subprocess.run([sys.executable, "-m", "pip", *download], check=True)
    with ZipFile(next(wheels.glob("*.whl"))) as wheel:
        (path,) = (name for name in wheel.namelist() if "NotoEmoji" in name)
        file = wheel.extract(path, wheels)
    font, drawable = ImageFont.truetype(file, 72), FT2Font(file).get_charmap()
    symbols = [text for text in emoji.EMOJI_DATA if len(text) == 1 and ord(text) in drawable]

    folder.mkdir()
    for number, symbol in enumerate(symbols[:COUNT]):
        color = list(COLORS)[number % len(COLORS)]
        image = Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(image).text((48, 48), symbol, font=font, fill=COLORS[color], anchor="mm")
        image.save(folder / f"{number:04}.png")
        name = emoji.demojize(symbol).strip(":").replace("_", " ")
        (folder / f"{number:04}.txt").write_text(f"{color} {name}\n")


def tour():
    """Yield the page's commands up to the second section, in order, as words without `python -m`."""
    page = (ROOT / "docs" / "own_images.md").read_text()
    start = page.index("## A folder")
    for block in read_blocks(page[start : page.index("\n### ", start)]):
        for line in block.text.splitlines() if block.language == "sh" else ():
            words = shlex.split(line, comments=True)
            assert words[:2] == ["python", "-m"], line
            yield words[2:]


def test_the_tour_has_all_steps():
    steps = [(words[0], words[1]) if words[0] == "data_prep" else (words[0],) for words in tour()]
    prepared = ("init", "plan", "pairs", "latents", "text", "snapshot")
    positions = [steps.index(("data_prep", step)) for step in prepared]
    assert positions == sorted(positions)
    assert (
        steps.index(("pipeline.init",)) < steps.index(("pipeline.train",)) < steps.index(("pipeline.sample",))
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_commands_of_the_page_on_another_emoji_set(tmp_path):
    folder = tmp_path / Path(FOLDER).name
    write_emoji(folder)
    for words in tour():
        words = [word.replace(FOLDER, str(folder)) for word in words]
        if words[0] in SERVERS:
            continue
        if "--dry-run" not in words:
            words += SHORTER.get(words[0], [])
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

    config = load_dataset(tmp_path / "flowers.yaml", [])
    assert (config.sources[0].kind, config.buckets.resolution, config.image_format) == ("folder", 64, "png")
    dataset = open_store(str(tmp_path / config.store)).sub(config.name)
    assert sum(map(sum, read_plan(dataset).buckets.values())) == COUNT
    stage = load_stage(str(tmp_path / "flowers_stage.yaml"))
    assert stage.fusion.families == ["smollm2", "gemma"]
    assert list((tmp_path / "runs/flowers").rglob("*.png"))
