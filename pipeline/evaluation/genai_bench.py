"""GenAI-Bench (Li et al. 2024): VQAScore, the probability that a VQA model answers Yes, by skill."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from model.common.errors import UserError
from pipeline.evaluation.common import Answer, Bench, BenchImage, Judges, Plan, Scores, mean, read_json

PROMPTS, SKILLS = "genai_image.json", "genai_skills.json"
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
"""CLIP-FlanT5's default; earlier versions asked: Is the image showing '{}'? Please answer yes or no."""
ANSWER = "Yes"


@dataclass
class GenAIRules:
    """Settings of the formula."""

    untagged: bool = False
    """Count prompts without any skill in `all`; as published, it is the union of the skills' prompts."""


def plan(prompts: Path, images_per_prompt: int, seed: int) -> Plan:
    """Plan one JPEG per prompt and image. The first is `ID.jpeg`, which the benchmark's own program reads.

    Args:
        prompts: folder with `genai_image.json` and `genai_skills.json`.
        images_per_prompt: number of images per prompt.
        seed: seed of the first image.

    Raises:
        UserError: if one of the files is missing or is not GenAI-Bench's.
    """
    texts, members_of_skills = read_json(prompts / PROMPTS), read_json(prompts / SKILLS)
    images: list[BenchImage] = []
    try:
        skills: dict[str, list[str]] = {key: [] for key in texts}
        for skill, members in members_of_skills.items():
            for member in members:
                # the skills file has numbers, the prompts file has five digits
                skills[f"{int(member):05d}"].append(skill)

        for key, entry in texts.items():
            about = {"id": key, "skills": skills[key]}
            for number in range(images_per_prompt):
                # the benchmark's own program reads one image per prompt, under this name
                file = f"{key}.jpeg" if number == 0 else f"{key}_{number}.jpeg"
                images.append(BenchImage(file, entry["prompt"], (seed + number,), about))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"--prompts {prompts}: not GenAI-Bench's {PROMPTS} and {SKILLS} ({type(error).__name__}: {error})"
        ) from error

    return Plan(images)


def ask(judges: Judges, entry: BenchImage, image: Image.Image) -> Answer:
    """Return VQAScore of the prompt."""
    # not `format`: a prompt or template may have other braces
    question = judges.question.replace("{}", entry.prompt)
    return {"vqascore": judges.vqa.likelihood(image, question, judges.answer)}


def score(images: Sequence[BenchImage], answers: Mapping[str, Answer], rules: GenAIRules) -> Scores:
    """Return the mean over each skill's prompts of the mean over a prompt's images.

    `overall` is the published `all`, the mean over the union of the skills' prompts.
    """
    values: dict[str, list[float]] = {}
    skills: dict[str, list[str]] = {}
    for image in images:
        values.setdefault(image.about["id"], []).append(answers[image.file]["vqascore"])
        skills[image.about["id"]] = image.about["skills"]
    means = {key: mean(of_images) for key, of_images in values.items()}

    by_skill: dict[str, list[float]] = {}
    for key, value in means.items():
        # a prompt with several skills counts for each of them
        for skill in skills[key]:
            by_skill.setdefault(skill, []).append(value)

    # but only once here, so that `overall` is not the mean over the skills
    counted = [value for key, value in means.items() if skills[key] or rules.untagged]
    if not counted:
        raise UserError(f"no prompt of {SKILLS} is in {PROMPTS}: set untagged=true to score without skills")

    return {
        "overall": mean(counted),
        "skills": {skill: mean(of_prompts) for skill, of_prompts in by_skill.items()},
        "deviation": {skill: _deviation(of_prompts) for skill, of_prompts in by_skill.items()},
    }


def _deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation, as the published program prints it; 0 for one value."""
    center = mean(values)
    return math.sqrt(sum((value - center) ** 2 for value in values) / max(len(values) - 1, 1))


def needs(images: Sequence[BenchImage]) -> set[str]:
    """A VQA model."""
    return {"vqa"}


SETTINGS = {"score": "likelihood of the answer's tokens"}
BENCH = Bench("genai_bench", 1, plan, needs, ask, score, GenAIRules, settings=SETTINGS)
