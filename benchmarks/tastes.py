"""Do users get what they like? Tastes on scenes, exact by construction.

    python -m benchmarks.tastes --out runs/tastes [--base-samples 200000] [--samples 60000] [--results FILE]

First a network is trained on scenes whose tones of the ground, textures and sizes vary, and whose captions
state each of these half of the time: the base, which can draw what it is asked for. Each of 32 users likes
one, two or three of them. The users' images are scenes with these, under captions that say colors and shapes
alone, so only the user's embedding can say the rest. A stage learns the users beside the frozen base.

Then each user's images of held-out prompts are read by the exact scorer: `preference` is the share of images
with all that the user likes (objects: all of them), `following` prompt following. Rows: all parts, no
dispersion, only the shared shift, only those of blocks. New users have tastes that nobody was trained on, and
are fitted to 8 images. What a run has finished is not done again.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks.reporting import at_least, at_most, conditions, print_goals
from data_prep.scenes.captions import SceneCaption, caption_scene
from data_prep.scenes.grammar import SIZES, TONES, Ground, Scene, SceneStyle, Segment, Texture, sample_scene
from data_prep.scenes.rendering import render_scene
from model.common.files import write_atomic
from model.functional import has_bf16
from pipeline.demonstration.commands import run as run_command
from pipeline.fit_user import encode_images
from pipeline.following.reading import read_scene
from pipeline.following.scoring import prompt_following, score_objects
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
TEXTURES: tuple[Texture, ...] = ("plain", "striped", "checkered")
"""Those of which users like one: dots are read least surely in images of 32 pixels."""
PROCESSES = 2
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
    """Preferences of a user; None = anything."""

    tone: str | None = None
    texture: str | None = None
    size: str | None = None


def tastes() -> list[Taste]:
    """Return different tastes: of each kind, of every two, then of all three; the first are the users', the
    next the new users'."""
    one = [Taste(tone=tone) for tone in TONES]
    one += [Taste(texture=texture) for texture in TEXTURES] + [Taste(size=size) for size in SIZES]
    two = [Taste(tone, texture, None) for tone, texture in product(TONES, TEXTURES)]
    two += [Taste(tone, None, size) for tone, size in product(TONES, SIZES)]
    two += [Taste(None, texture, size) for texture, size in product(TEXTURES, SIZES)]
    three = [Taste(*values) for values in product(TONES, TEXTURES, SIZES)]
    order = np.random.default_rng(0).permutation(len(three))
    return [*one, *two, *(three[number] for number in order)]


def scene_of(
    taste: Taste, seed: int, index: int, scale: float = 1.0, stated: bool = False
) -> tuple[Scene, SceneCaption]:
    """Return a scene of one or two objects that a user likes, and a caption of its colors and shapes.

    Args:
        taste: of the user.
        seed: of the set of scenes.
        index: of the scene within the set.
        scale: size of the objects.
        stated: True if the caption also states textures, sizes and the ground, each half of the time.
    """
    random = np.random.default_rng([seed, index, 1])
    # Objects of plain scenes differ in color and shape, by which a caption distinguishes them.
    style = SceneStyle(scale, plain=True)
    sampled = sample_scene(seed, index, segments=int(random.integers(1, 3)), style=style)
    with_texture, with_size, with_ground = random.random(3) < (0.5 if stated else 0.0)
    tone = taste.tone or TONES[random.integers(len(TONES))]
    objects, segments = [], []
    for item in sampled.objects:
        liked: Any = {
            "texture": taste.texture or TEXTURES[random.integers(len(TEXTURES))],
            "size": taste.size or SIZES[random.integers(len(SIZES))],
        }
        objects.append(replace(item, **liked))
        said = {"texture": with_texture, "size": with_size}
        segments.append(Segment(item.colour, item.shape, **{key: liked[key] for key in said if said[key]}))
    ground: Any = Ground(tone, "plain")  # type: ignore[arg-type]
    scene = replace(sampled, ground=ground, segments=tuple(segments), objects=tuple(objects))
    return scene, caption_scene(scene, "sentence" if with_ground else "list", seed, index)


def likes(taste: Taste, image: np.ndarray, scale: float = 1.0) -> bool:
    """Return True if an image uint8 [H, W, 3] has all that a user likes, as the exact reader sees it."""
    objects = read_scene(image, scale)
    if not objects:
        return False
    if taste.tone is not None and tone_of(image) != taste.tone:
        return False
    return all(_is_liked(taste, item) for item in objects)


def _is_liked(taste: Taste, item: Any) -> bool:
    return taste.texture in (None, item.texture) and taste.size in (None, item.size)


def tone_of(image: np.ndarray) -> str:
    """Return the tone of an image's ground: by the median level of its least colored pixels."""
    pixels = image.reshape(-1, 3).astype(float)
    chroma = pixels.max(1) - pixels.min(1)
    level = np.median(pixels[chroma <= np.quantile(chroma, 0.4)].mean(1))
    return next((tone for tone, most in TONE_LEVELS.items() if level <= most), WHITE)


def write_images(
    folder: Path, chosen: Sequence[Taste], images: int, side: int, scale: float, seed: int, named: bool
) -> None:
    """Write images of each taste as a folder with metadata: `file_name`, `caption`, and `user` if `named`;
    captions of images without a user state more than colors and shapes."""
    folder.mkdir(parents=True)
    lines = []
    for user, taste in enumerate(chosen):
        for number in range(images):
            scene, caption = scene_of(taste, seed + user, number, scale, stated=not named)
            name = f"{user:02d}_{number:05d}.png"
            Image.fromarray(render_scene(scene, side, side)).save(folder / name)
            line = {"file_name": name, "caption": caption.text}
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
    write_images(folder, chosen, images, sample.height, sample.scenes_scale, seed, named)
    write_dataset(path, folder, sample.height, named)
    for step in ("plan", "pairs", *(["users"] if named else []), "latents", "text", "snapshot"):
        run_command("data_prep", step, str(path))


def base_stage(out: Path, samples: int) -> StageConfig:
    """Return the stage of the base."""
    words = [f"runs={out / 'runs'}", f"data.store={out / 'store'}", "data.dataset=base", f"samples={samples}"]
    words += ["name=base", "sample.scenes_scale=1.6", f"checkpoint.every_samples={samples}"]
    return load_stage(BASE_STAGE, words)


def train(stage: StageConfig, path: Path) -> None:
    """Write a stage and train it on `PROCESSES` ranks.

    Raises:
        SystemExit: with the trainer's exit code; the trainer has printed the reason.
    """
    if is_finished(stage.run, stage.samples):
        return
    path.write_text(dump_stage(stage))
    if code := wait_for(start_ranks(PROCESSES, str(path)), 0):
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
    stage.optim = replace(stage.optim, lr=3e-3, warmup_samples=samples // 20)
    stage.log, stage.sample.every_samples = replace(stage.log, validate_every_samples=0), 0
    stage.checkpoint.every_samples = samples
    return stage


def generate(sampler: Sampler, captions: Iterable[str], params: SamplingParams) -> list[np.ndarray]:
    """Return an image uint8 of each caption."""
    batch = [(caption, seed) for seed, caption in enumerate(captions)]
    (images,) = generate_images(sampler, [batch], params, shows=False)
    return [np.asarray(image.convert("RGB")) for image in images]


def measure(sampler: Sampler, users: dict[str, Taste], prompts: int) -> dict[str, float]:
    """Return preference and following, %, over the users' images of held-out prompts.

    Args:
        sampler: of the trained users, or of the frozen network.
        users: what sampling calls a user -> the taste; a name that begins with `-` = nobody.
        prompts: of each user, the same for all.
    """
    defaults = sampler.defaults
    scale = defaults.scenes_scale
    liked, objects, captions = [], [], []
    texts = [scene_of(Taste(), TEST_SEED, number, scale)[1] for number in range(prompts)]
    for user, taste in users.items():
        asked = "" if user.startswith("-") else user
        params = SamplingParams(
            defaults.steps, defaults.guidance, defaults.height, defaults.width, user=asked
        )
        images = generate(sampler, [text.text for text in texts], params)
        for image, caption in zip(images, texts, strict=True):
            liked.append(likes(taste, image, scale))
            objects.append(read_scene(image, scale))
            captions.append(caption)
    following = prompt_following(score_objects(objects, captions).summary())
    return {"preference": 100 * float(np.mean(liked)), "following": 100 * following}


def fit_new(sampler: Sampler, taste: Taste, seed: int, by: Any, out: Path) -> None:
    """Fit a new user to 8 images, and write the file."""
    side = sampler.defaults.height
    scale = sampler.defaults.scenes_scale
    pairs = [scene_of(taste, TRAIN_SEED + seed, number, scale) for number in range(8)]
    images = [Image.fromarray(render_scene(scene, side, side)) for scene, _ in pairs]
    latents = encode_images(sampler, images)
    fitted = fit_user(sampler, latents, [caption.text for _, caption in pairs], FitSettings(by))
    save_user(out, fitted.tokens, by=by)


def draw_eight(sampler: Sampler, chosen: Sequence[Taste], out: Path) -> None:
    """Write images of the same prompts for eight users, each with the user's taste below."""
    defaults, grid, captions = sampler.defaults, [], []
    texts = [scene_of(Taste(), TEST_SEED, number, defaults.scenes_scale)[1].text for number in range(2)]
    for text in texts:
        # Every fourth, so that the kinds of tastes are mixed.
        for user in range(0, USERS, USERS // 8):
            params = SamplingParams(
                defaults.steps, defaults.guidance, defaults.height, defaults.width, user=str(user)
            )
            grid.append(Image.fromarray(generate(sampler, [text], params)[0]))
            liked = ", ".join(value for value in vars(chosen[user]).values() if value)
            captions.append(f"{text} ({liked})")
    make_grid(grid, captions, columns=8).save(out)


def run_rows(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Prepare, train and measure; returns the table by row."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    known = tastes()
    chosen, others = known[:USERS], known[USERS : USERS + NEW_USERS]
    base = base_stage(out, arguments.base_samples)
    prepare(out / "base.yaml", [Taste()], arguments.base_images, base.sample, named=False)
    train(base, out / "base_stage.yaml")
    prepare(out / "users.yaml", chosen, arguments.images, base.sample, named=True)

    device = torch.device("cpu")
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    nobody = {f"-{number}": taste for number, taste in enumerate(chosen)}
    table = {"base": measure(load_source(base.run, "ema", device, dtype), nobody, arguments.prompts)}
    for row in arguments.rows:
        stage = users_stage(out, base.run, row, arguments.samples, USERS)
        train(stage, out / f"{stage.name}_stage.yaml")
        sampler = load_source(stage.run, "ema", device, dtype)
        users = {str(number): taste for number, taste in enumerate(chosen)}
        table[row] = measure(sampler, users, arguments.prompts)
        if row == "all":
            draw_eight(sampler, chosen, out / "eight_users.png")
            for by in ("coefficients", "row"):
                files = {}
                for number, taste in enumerate(others):
                    files[f"{out}/{by}_{number}.safetensors"] = taste
                    fit_new(sampler, taste, USERS + number, by, out / f"{by}_{number}.safetensors")
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
    parser.add_argument("--images", type=int, default=40, help="of each user")
    parser.add_argument("--prompts", type=int, default=8, help="of each user, held out")
    parser.add_argument("--base-images", type=int, default=12_000)
    parser.add_argument("--base-samples", type=int, default=200_000)
    parser.add_argument("--samples", type=int, default=60_000, help="of each row's stage")
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
