"""Does a run follow its prompts, and those said late as well as those said first (paper A.3, figure 3)?

    python -m pipeline.follow write follow/scenes --prompts scenes --count 256
    python -m pipeline.sample runs/NAME --prompts follow/scenes/prompts.txt --images 4 --out follow/scenes/pictures
    python -m pipeline.follow score follow/scenes

`write` leaves `prompts.txt` and `prompts.json` in the folder; pictures are drawn by the ordinary command, on any number of
GPUs; `score` reads them and writes `scores.json` and `positional_bias.png`. Prompts are `scenes`, judged exactly, or
`natural`, judged by BLIP or another VQA model (`score --vqa FOLDER or OWNER/NAME@COMMIT`).
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_prep.scenes.captions import CAPTION_KINDS, HELD_OUT_SEED, ScenePrompt, scene_prompts
from model.common.errors import UserError, command
from model.scorers.files import find_scorer
from model.scorers.image_text import load_vqa
from pipeline.evaluation.common import VQA
from pipeline.evaluation.images import keep_settings
from pipeline.following.natural_prompts import MAX_SEGMENTS, NaturalPrompt, natural_prompts
from pipeline.following.positional_bias import PositionalBias, plot_positional_bias, positional_bias, scene_segment_scores
from pipeline.following.reading import read_scene
from pipeline.following.scoring import chance_level, score_seen

QUESTION = "{segment}?"


def make_prompts(settings: dict[str, Any]) -> list[ScenePrompt] | list[NaturalPrompt]:
    """The prompts that `prompts.json` stands for; 2 to 8 segments in turn unless it says how many."""
    count, seed, segments = settings["count"], settings["seed"], settings["segments"]
    if settings["prompts"] == "natural":
        return natural_prompts(count, seed, segments)
    lengths = range(2, MAX_SEGMENTS + 1) if segments is None else [segments]
    return scene_prompts(count, settings["kind"], settings["aspect"], lengths, seed)


def score_scenes(pictures: Iterable[np.ndarray], prompts: Sequence[ScenePrompt], images: int) -> dict[str, Any]:
    """Tables (share of right claims, number of claims), chance level, scores by segment, and `PositionalBias` of scenes.

    Args:
        pictures: uint8 [H, W, 3], `images` of each prompt one after another.
        prompts: the scenes and captions that were asked for.
        images: pictures a prompt.
    """
    captions = [prompt.caption for prompt in prompts]
    seen = [read_scene(picture) for picture in pictures]
    scores = score_seen(seen, [caption for caption in captions for _ in range(images)])
    segments = scene_segment_scores(scores, images)
    tables = {"attribute": scores.by_attribute(), "position": scores.by_position(), "length": scores.by_length()}
    return {
        "summary": scores.summary(),
        "chance": chance_level(seen[::images], captions),
        **{f"by_{name}": {str(key): list(entry) for key, entry in table.items()} for name, table in tables.items()},
        "segments": segments,
        "positional_bias": positional_bias(segments),
    }


def score_natural(files: Sequence[Path], prompts: Sequence[NaturalPrompt], images: int, vqa: VQA) -> dict[str, Any]:
    """Mean answer by segment, and positional curve; `QUESTION` is what T2I-CompBench's BLIP-VQA asks."""
    scores = []
    for number, prompt in enumerate(prompts):
        questions = [QUESTION.format(segment=segment) for segment in prompt.segments]
        answers = []
        for file in files[number * images : (number + 1) * images]:
            with Image.open(file) as image:
                answers.append(vqa.yes(image.convert("RGB"), questions))
        scores.append(np.mean(answers, axis=0).tolist())
    mean = float(np.mean([score for each in scores for score in each]))
    scorer = {**vqa.identity, "template": QUESTION}
    return {"summary": {"segment": mean}, "vqa": scorer, "segments": scores, "positional_bias": positional_bias(scores)}


def write_prompts(out: Path, settings: dict[str, Any]) -> None:
    """`prompts.txt`, one a line, and `prompts.json`, from which they can be made again with their truth.

    Raises:
        UserError: a number is out of range, or the folder is of other prompts.
    """
    if settings["count"] < 1 or not 2 <= (settings["segments"] or 2) <= MAX_SEGMENTS:
        raise UserError(f"--count {settings['count']} --segments {settings['segments']}: at least 1, and 2 to {MAX_SEGMENTS}")
    prompts = make_prompts(settings)
    keep_settings(out / "prompts.json", settings)
    texts = [prompt.caption.text if isinstance(prompt, ScenePrompt) else prompt.text for prompt in prompts]
    (out / "prompts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


def find_pictures(folder: Path, prompts: int) -> tuple[list[Path], int]:
    """The pictures that `pipeline.sample` wrote, in the order of prompts, and how many there are of each.

    Raises:
        UserError: there is not the same number of each prompt.
    """
    files = sorted(folder.glob("[0-9]*_[0-9]*.png"))
    images = len(files) // prompts
    if not files or [file.name for file in files] != [f"{n:05d}_{i:02d}.png" for n in range(prompts) for i in range(images)]:
        raise UserError(
            f"{folder}: {len(files)} pictures for {prompts} prompts: draw all of them, pipeline.sample --out {folder}"
        )
    return files, images


def score_folder(out: Path, vqa: VQA | None) -> dict[str, Any]:
    """Judge the pictures of a folder that `write_prompts` began, and write `scores.json` and `positional_bias.png`.

    Raises:
        UserError: prompts or pictures are missing, or natural prompts come without a VQA model.
    """
    try:
        settings = json.loads((out / "prompts.json").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{out}: no prompts.json there: begin with `python -m pipeline.follow write {out}`") from error
    prompts = make_prompts(settings)
    files, images = find_pictures(out / "pictures", len(prompts))
    natural = [prompt for prompt in prompts if isinstance(prompt, NaturalPrompt)]
    if not natural:
        pictures = (np.asarray(Image.open(file).convert("RGB")) for file in files)
        result = score_scenes(pictures, [prompt for prompt in prompts if isinstance(prompt, ScenePrompt)], images)
    elif vqa is None:
        raise UserError("natural prompts are judged by a VQA model: give --vqa FOLDER or OWNER/NAME@COMMIT")
    else:
        result = score_natural(files, natural, images, vqa)
    plot_positional_bias({out.name: result["positional_bias"]}, out / "positional_bias.png", "score of a segment")
    result = {"settings": settings, "images": images, **result}
    (out / "scores.json").write_text(json.dumps(result, indent=1, default=PositionalBias.to_json))
    return result


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.follow", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="write prompts")
    write.add_argument("out", type=Path, metavar="FOLDER")
    write.add_argument("--prompts", choices=("scenes", "natural"), default="scenes")
    write.add_argument("--count", type=int, default=256)
    write.add_argument("--segments", type=int, help="in every prompt; default: 2 to 8 in turn")
    write.add_argument("--kind", choices=CAPTION_KINDS, default="list", help="style of the scenes' captions")
    write.add_argument("--aspect", type=float, default=1.0, help="width / height of the scenes' pictures")
    write.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    score = commands.add_parser("score", help="judge the pictures in FOLDER/pictures")
    score.add_argument("out", type=Path, metavar="FOLDER")
    score.add_argument("--vqa", help="for natural prompts: BLIP or another VQA model, a folder or OWNER/NAME@COMMIT")
    return parser.parse_args(arguments)


@command
def main() -> None:
    """Command line."""
    arguments = parse()
    if arguments.command == "write":
        names = ("prompts", "count", "segments", "kind", "aspect", "seed")
        write_prompts(arguments.out, {name: getattr(arguments, name) for name in names})
        out = arguments.out
        print(f"{out}/prompts.txt: draw it with pipeline.sample RUN --prompts {out}/prompts.txt --out {out}/pictures")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vqa = load_vqa(find_scorer(arguments.vqa, "--vqa"), device, None) if arguments.vqa else None
    result = score_folder(arguments.out, vqa)
    chance = result.get("chance", {})
    for name, share in result["summary"].items():
        print(f"{name:9}{share:7.1%}" + (f"  chance {chance[name]:.1%}" if name in chance else ""))
    print(result["positional_bias"])
    print(arguments.out / "scores.json")


if __name__ == "__main__":
    main()
