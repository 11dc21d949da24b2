"""Do users get what they like? Tastes on scenes, exact by construction.

    python -m benchmarks.tastes --out runs/tastes [--base-samples 300000] [--samples 90000] [--results FILE]

First a network is trained on scenes of one object, or of two, on a ground, whose captions state color, shape,
size and ground each three times in four: the base. Each of 32 users likes a ground, an outline, a palette or
a size. The users' images are scenes with it, under captions that never state what the user likes, so only the
user's embedding can say it. A stage learns the users beside the frozen base.

Then each user's images of held-out prompts are read by the exact scorer: `preference` is the share of images
with what the user likes, on all of their objects, `following` the share of right claims. Rows: all parts, no
dispersion, only the shared shift, only those of blocks. New users have tastes that nobody was trained on, and
are fitted to 8 images. What a run has finished is not done again.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks.reporting import at_least, at_most, conditions, print_goals
from data_prep.scenes.captions import SceneCaption, capitalize, with_article
from data_prep.scenes.grammar import (
    COLORS,
    SHAPES,
    SIZES,
    TONES,
    Color,
    Ground,
    Scene,
    SceneStyle,
    Segment,
    Shape,
    Size,
    Tone,
    sample_scene,
)
from data_prep.scenes.rendering import render_scene
from model.common.files import write_atomic
from model.functional import has_bf16
from pipeline.demonstration.commands import run as run_command
from pipeline.fit_user import encode_images
from pipeline.following.reading import DetectedObject, read_scene
from pipeline.following.scoring import score_objects
from pipeline.inference.fit import FitSettings, fit_user
from pipeline.inference.generate import generate_images
from pipeline.inference.images import make_grid
from pipeline.inference.sampler import Sampler, SamplingParams
from pipeline.inference.source import load_source
from pipeline.inference.users import save_user
from pipeline.runtime.finished import is_finished
from pipeline.runtime.launch import start_ranks, wait_for
from pipeline.stage.config import StageConfig, dump_stage, load_run, load_stage
from pipeline.stage.sampling import SamplingConfig

USERS, NEW_USERS = 32, 4
BASE_SEED, TRAIN_SEED, TEST_SEED = 22_000, 23_000, 24_000
BASE_STAGE = "demo_scenes"
BASE_DATASET = Path(__file__).parents[1] / "data_prep" / "datasets" / "demo_scenes.yaml"
"""Stage and dataset whose network, text and latents the base has."""
SCALE = 1.8
"""Size of the objects: 10 and 14 of 32 pixels."""
QUARTERS = ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75))
"""Centers of objects: those of the quarters of an image, which a small network learns soonest."""
PALETTES: tuple[tuple[Color, ...], ...] = (
    ("red", "orange"), ("green", "cyan"), ("blue", "purple"), ("pink", "yellow"),
    ("red", "pink"), ("cyan", "blue"), ("orange", "yellow"), ("green", "yellow"),
)  # fmt: skip
OUTLINES: tuple[tuple[Shape, ...], ...] = (
    ("circle", "heart"), ("square", "diamond"), ("triangle", "star"), ("cross", "star"),
    ("circle", "square"), ("heart", "triangle"), ("diamond", "cross"), ("circle", "diamond"),
)  # fmt: skip
NEW_PALETTE: tuple[Color, ...] = ("purple", "pink")
NEW_OUTLINE: tuple[Shape, ...] = ("square", "triangle")
TWO = 0.25
"""Share of the images with two objects. With half, which object is meant was what the base read worst."""
STATED = 0.75
"""Share of the captions that state an attribute; with half, the base reads captions much worse."""
EIGHT_PROMPTS = ("An object.", "An object and an object.", "A star and a circle.")
"""Prompts of the grid of images, which say little: the rest is what the user likes."""
WHITE, DARK, BLACK = TONES
TONE_LEVELS = {BLACK: 24.0, DARK: 80.0}
"""Levels of gray up to which a ground has a tone; above the last it is white."""
ROWS: dict[str, dict[str, Any]] = {
    "all": {},
    "no dispersion": {"dispersion": 0.0},
    "shared only": {"distinct": False, "pooled": False},
    "blocks only": {"shared": False, "pooled": False},
}
"""Name -> settings of `users`."""


@dataclass(frozen=True)
class Taste:
    """Preference of a user; what is empty may be anything."""

    ground: Tone | None = None
    outline: tuple[Shape, ...] = ()
    palette: tuple[Color, ...] = ()
    size: Size | None = None

    def __str__(self) -> str:
        return self.ground or "/".join(self.outline) or "/".join(self.palette) or self.size or "anything"

    @property
    def fixes(self) -> str:
        """The attribute that captions of the user's images do not state; empty = none."""
        kinds = {"ground": self.ground, "shape": self.outline, "colour": self.palette, "size": self.size}
        return next((name for name, value in kinds.items() if value), "")


def tastes() -> list[Taste]:
    """Return the tastes of the users, eight of each kind in turn, then those of the new users.

    There are three grounds and two sizes, so some users have one taste.
    """
    known: list[Taste] = []
    for number in range(USERS // 4):
        known += [
            Taste(ground=TONES[number % len(TONES)]),
            Taste(outline=OUTLINES[number]),
            Taste(palette=PALETTES[number]),
            Taste(size=SIZES[number % len(SIZES)]),
        ]
    new = [Taste(ground=DARK), Taste(outline=NEW_OUTLINE), Taste(palette=NEW_PALETTE), Taste(size="small")]
    return [*known, *new]


@dataclass(frozen=True)
class Picture:
    """A scene, and a caption that states a part of it."""

    scene: Scene
    text: str
    claims: tuple[Segment, ...]
    """Stated attributes of each object; objects without any are left out."""


def picture_of(taste: Taste, seed: int, index: int) -> Picture:
    """Return a scene that a user likes; its caption states each attribute three times in four, the liked one
    never."""
    random = np.random.default_rng([seed, index, 1])
    # Objects of plain scenes differ in color and shape, by which a caption distinguishes them.
    sampled = sample_scene(
        seed, index, segments=1 + int(random.random() < TWO), style=SceneStyle(SCALE, plain=True)
    )
    colors = random.permutation(np.array(taste.palette or COLORS)).tolist()
    shapes = random.permutation(np.array(taste.outline or SHAPES)).tolist()
    objects = []
    quarters = random.permutation(np.array(QUARTERS)).tolist()
    for number, item in enumerate(sampled.objects):
        size = taste.size or SIZES[random.integers(len(SIZES))]
        x, y = quarters[number]
        objects.append(replace(item, colour=colors[number], shape=shapes[number], size=size, x=x, y=y))
    tone: Tone = taste.ground or TONES[random.integers(len(TONES))]

    said = dict(zip(("colour", "shape", "size", "ground"), random.random(4) < STATED, strict=True))
    said |= {taste.fixes: False}
    stated = [
        {name: getattr(item, name) for name in ("colour", "shape", "size") if said[name]} for item in objects
    ]
    words = [" ".join(each.get(name, "") for name in ("size", "colour")) for each in stated]
    nouns = [each.get("shape", "object") for each in stated]
    named = [with_article(f"{word} {noun}".strip()) for word, noun in zip(words, nouns, strict=True)]
    text = " and ".join(" ".join(phrase.split()) for phrase in named)
    text = f"{capitalize(text)}{f' on a {tone} ground' if said['ground'] else ''}."

    nothing: dict[str, Any] = {"colour": None, "shape": None}
    scene = replace(
        sampled, ground=Ground(tone, "plain"), objects=tuple(objects),
        segments=tuple(Segment(item.colour, item.shape, item.size) for item in objects),
    )  # fmt: skip
    return Picture(scene, text, tuple(Segment(**{**nothing, **each}) for each in stated if each))


def likes(taste: Taste, image: np.ndarray) -> bool:
    """Return True if an image uint8 [H, W, 3] has what a user likes, as the exact reader sees it."""
    objects = read_scene(image, SCALE)
    if not objects:
        return False
    return taste.ground in (None, tone_of(image)) and all(_is_liked(taste, item) for item in objects)


def _is_liked(taste: Taste, item: DetectedObject) -> bool:
    outline = not taste.outline or item.shape in taste.outline
    return outline and (not taste.palette or item.colour in taste.palette) and taste.size in (None, item.size)


def follows(pictures: Sequence[Picture], images: Sequence[np.ndarray]) -> float:
    """Return the share of right claims about colors, shapes and sizes."""
    chosen = [(picture, image) for picture, image in zip(pictures, images, strict=True) if picture.claims]
    captions = [SceneCaption("list", picture.text, picture.claims) for picture, _ in chosen]
    scores = score_objects([read_scene(image, SCALE) for _, image in chosen], captions)
    return float(np.mean([claim.correct for claim in scores.claims]))


def tone_of(image: np.ndarray) -> str:
    """Return the tone of an image's ground: by the median level of its least colored pixels."""
    pixels = image.reshape(-1, 3).astype(float)
    chroma = pixels.max(1) - pixels.min(1)
    level = np.median(pixels[chroma <= np.quantile(chroma, 0.4)].mean(1))
    return next((tone for tone, most in TONE_LEVELS.items() if level <= most), WHITE)


def write_images(
    folder: Path, chosen: Sequence[Taste], images: int, side: int, seed: int, named: bool
) -> None:
    """Write images of each taste as a folder with metadata: `file_name`, `caption`, and `user` if `named`."""
    folder.mkdir(parents=True)
    lines = []
    for user, taste in enumerate(chosen):
        for number in range(images):
            picture = picture_of(taste, seed + user, number)
            name = f"{user:02d}_{number:05d}.png"
            Image.fromarray(render_scene(picture.scene, side, side)).save(folder / name)
            line = {"file_name": name, "caption": picture.text}
            lines.append(json.dumps(line | ({"user": f"user {user:02d}"} if named else {})))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_dataset(path: Path, folder: Path, side: int, named: bool) -> None:
    """Write the dataset of a folder of images, encoded as those of `BASE_DATASET`."""
    given = yaml.safe_load(BASE_DATASET.read_text())
    record = {
        "name": path.stem,
        "store": str(path.parent / "store"),
        "sources": [{"kind": "folder", "path": str(folder)}],
        "dedupe": {"exact": False},
        "buckets": {"resolution": side, "max_aspect": 1.0, "step": side},
        "part_rows": 128,
        "image_format": "png",
        **({"users": {"column": "user"}} if named else {}),
        "latents": given["latents"],
        "text": given["text"],
    }
    path.write_text(yaml.safe_dump(record, sort_keys=False))


def prepare(path: Path, chosen: Sequence[Taste], images: int, sample: SamplingConfig, named: bool) -> None:
    """Render and prepare the dataset of the users, if `named`, or of the base, unless it has a snapshot."""
    if any((path.parent / "store" / path.stem / "snapshots").glob("*")):
        return
    folder = path.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    seed = TRAIN_SEED if named else BASE_SEED
    write_images(folder, chosen, images, sample.height, seed, named)
    write_dataset(path, folder, sample.height, named)
    for step in ("plan", "pairs", *(["users"] if named else []), "latents", "text", "snapshot"):
        run_command("data_prep", step, str(path))


def base_stage(out: Path, samples: int) -> StageConfig:
    """Return the stage of the base."""
    words = [f"runs={out / 'runs'}", f"data.store={out / 'store'}", "data.dataset=base", f"samples={samples}"]
    # What the ground is like is decided at times above 0.99, which a logit of std 1 hardly ever gives.
    words += ["objective.logit_std=1.3"]
    words += ["name=base", f"sample.scenes_scale={SCALE}", f"checkpoint.every_samples={samples}"]
    return load_stage(BASE_STAGE, words)


def train(stage: StageConfig, path: Path, processes: int) -> None:
    """Write a stage and train it on some ranks, unless that is done.

    Raises:
        SystemExit: with the trainer's exit code; the trainer has printed the reason.
    """
    if is_finished(stage.run, stage.samples):
        return
    path.write_text(dump_stage(stage))
    if code := wait_for(start_ranks(processes, str(path)), 0):
        sys.exit(code)


def users_stage(out: Path, base: Path, row: str, samples: int, count: int) -> StageConfig:
    """Return the stage that learns the users beside the network of a run."""
    stage = load_run(base)
    stage.name, stage.runs, stage.start_from = row.replace(" ", "_"), str(out / "runs"), str(base)
    stage.freeze, stage.samples, stage.ema = "base", samples, [0.99]
    stage.global_batch = 32
    stage.users = replace(
        stage.users, count=count, tokens=8, width=128, heads=4, blocks=2, rank=64, **ROWS[row]
    )
    stage.data = replace(
        stage.data,
        store=str(out / "store"),
        dataset="users",
        snapshot="latest",
        datasets={},
        validation_parts=0,
        caption_weights={},
    )
    stage.optim = replace(stage.optim, name="adamw", lr=1e-3, warmup_samples=samples // 20)
    stage.log, stage.sample.every_samples = replace(stage.log, validate_every_samples=0), 0
    stage.checkpoint.every_samples = samples
    return stage


def generate(sampler: Sampler, captions: Iterable[str], params: SamplingParams) -> list[np.ndarray]:
    """Return an image uint8 of each caption."""
    batch = [(caption, seed) for seed, caption in enumerate(captions)]
    (images,) = generate_images(sampler, [batch], params, shows=False)
    return [np.asarray(image.convert("RGB")) for image in images]


def measure(sampler: Sampler, users: dict[str, Taste], prompts: int) -> dict[str, float]:
    """Return preference and following, %, over the users' images of held-out prompts, which state nothing
    that the user likes.

    Args:
        sampler: of the trained users, or of the frozen network.
        users: what sampling calls a user -> the taste; a name that begins with `-` = nobody.
        prompts: of each user.
    """
    liked, followed = [], []
    for number, (user, taste) in enumerate(users.items()):
        asked = "" if user.startswith("-") else user
        pictures = [picture_of(taste, TEST_SEED + number, index) for index in range(prompts)]
        images = generate(sampler, [picture.text for picture in pictures], params_of(sampler, asked))
        liked.append(np.mean([likes(taste, image) for image in images]))
        followed.append(follows(pictures, images))
    return {"preference": 100 * float(np.mean(liked)), "following": 100 * float(np.mean(followed))}


def params_of(sampler: Sampler, user: str) -> SamplingParams:
    """Return the stage's sampling parameters with a user."""
    defaults = sampler.defaults
    return SamplingParams(
        defaults.steps, defaults.guidance, defaults.height, defaults.width, user=user, together=True
    )


def fit_new(sampler: Sampler, taste: Taste, seed: int, by: Any, out: Path) -> float:
    """Fit a new user to 8 images, and write the file; returns the seconds of the fit."""
    side = sampler.defaults.height
    pictures = [picture_of(taste, TRAIN_SEED + seed, number) for number in range(8)]
    images = [Image.fromarray(render_scene(picture.scene, side, side)) for picture in pictures]
    latents = encode_images(sampler, images)
    start = time.perf_counter()
    fitted = fit_user(sampler, latents, [picture.text for picture in pictures], FitSettings(by))
    seconds = time.perf_counter() - start
    save_user(out, fitted.tokens, by=by)
    return seconds


def draw_eight(sampler: Sampler, chosen: Sequence[Taste], out: Path) -> None:
    """Write images of the same prompts for eight users, two of each kind, with their tastes below."""
    grid, captions = [], []
    for text in EIGHT_PROMPTS:
        for user in range(8):
            grid.append(Image.fromarray(generate(sampler, [text], params_of(sampler, str(user)))[0]))
            captions.append(f"{text} ({chosen[user]})")
    make_grid(grid, captions, columns=8).save(out)


def run_rows(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Prepare, train and measure; returns the table by row."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    known = tastes()
    chosen, others = known[:USERS], known[USERS : USERS + NEW_USERS]
    base = base_stage(out, arguments.base_samples)
    prepare(out / "base.yaml", [Taste()], arguments.base_images, base.sample, named=False)
    train(base, out / "base_stage.yaml", arguments.processes)
    prepare(out / "users.yaml", chosen, arguments.images, base.sample, named=True)

    device = torch.device("cpu")
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    nobody = {f"-{number}": taste for number, taste in enumerate(chosen)}
    table = {"base": measure(load_source(base.run, "ema", device, dtype), nobody, arguments.prompts)}
    for row in arguments.rows:
        stage = users_stage(out, base.run, row, arguments.samples, USERS)
        train(stage, out / f"{stage.name}_stage.yaml", arguments.processes)
        sampler = load_source(stage.run, "ema", device, dtype)
        users = {str(number): taste for number, taste in enumerate(chosen)}
        table[row] = measure(sampler, users, arguments.prompts)
        if row == "all":
            draw_eight(sampler, chosen, out / "eight_users.png")
            for by in ("coefficients", "row"):
                files, seconds = {}, []
                for number, taste in enumerate(others):
                    file = out / f"{by}_{number}.safetensors"
                    files[str(file)] = taste
                    seconds.append(fit_new(sampler, taste, USERS + number, by, file))
                print(f"a user is fitted by {by} in {np.mean(seconds):.0f} s", flush=True)
                table[f"new users, 8 images, by {by}"] = measure(sampler, files, arguments.prompts)
    return table


def show(table: dict[str, dict[str, float]]) -> str:
    """Return the table as markdown."""
    lines = ["| row | images that the user likes, % | prompt following, % |", "|---|---|---|"]
    for row, values in table.items():
        lines.append(f"| {row} | {values['preference']:.1f} | {values['following']:.1f} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tastes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=120, help="of each user")
    parser.add_argument("--prompts", type=int, default=16, help="of each user, held out")
    parser.add_argument("--base-images", type=int, default=16_000)
    parser.add_argument("--base-samples", type=int, default=300_000)
    parser.add_argument("--samples", type=int, default=90_000, help="of each row's stage")
    parser.add_argument("--processes", type=int, default=2, help="ranks of each training (default 2)")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--results", type=Path, help="markdown file for the table")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the benchmark."""
    arguments = parse()
    table = run_rows(arguments)
    text = show(table)
    print(text)
    if arguments.results:
        write_atomic(arguments.results, f"# Tastes of users\n\n{text}\n\n{conditions()}\n")
    goals = {}
    if "all" in table:
        lost = table["base"]["following"] - table["all"]["following"]
        goals = {"preference": at_least(table["all"]["preference"], 90.0), "lost": at_most(lost, 3.0)}
    print_goals("tastes", goals, table=table)


if __name__ == "__main__":
    main()
