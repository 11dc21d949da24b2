"""GenAI-Bench (Li et al. 2024): VQAScore, the probability that a VQA model answers Yes, by skill."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from model.common.errors import UserError
from pipeline.evaluation.common import Answer, Bench, Judges, BenchImage, Plan, Scores, mean, read_json

PROMPTS, SKILLS = "genai_image.json", "genai_skills.json"
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
"""CLIP-FlanT5's default; earlier versions asked: Is the image showing '{}'? Please answer yes or no."""
ANSWER = "Yes"


@dataclass
class GenAIRules:
    """Settings of the formula."""

    untagged: bool = False
    """Count prompts without any skill in `all`; the published program takes the union of the skills' prompts."""


def plan(prompts: Path, images: int, seed: int) -> Plan:
    """One JPEG per prompt and image; the first is `ID.jpeg`, which the benchmark's own program reads.

    Args:
        prompts: folder that holds `genai_image.json` and `genai_skills.json`.
        images: per prompt.
        seed: of the first image.

    Raises:
        UserError: one of the files is missing or is not GenAI-Bench's.
    """
    texts, skills = read_json(prompts / PROMPTS), read_json(prompts / SKILLS)
    try:
        by_prompt: dict[str, list[str]] = {key: [] for key in texts}
        for skill, members in skills.items():
            for member in members:
                by_prompt[f"{int(member):05d}"].append(skill)
        return Plan(
            [
                BenchImage(
                    f"{key}.jpeg" if j == 0 else f"{key}_{j}.jpeg",
                    entry["prompt"],
                    (seed + j,),
                    {"id": key, "skills": by_prompt[key]},
                )
                for key, entry in texts.items()
                for j in range(images)
            ]
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"--prompts {prompts}: not GenAI-Bench's {PROMPTS} and {SKILLS} ({type(error).__name__}: {error})"
        ) from error


def ask(judges: Judges, picture: BenchImage, image: Image.Image) -> Answer:
    """VQAScore of the prompt."""
    return {"vqascore": judges.vqa.likelihood(image, judges.question.replace("{}", picture.prompt), judges.answer)}


def score(pictures: Sequence[BenchImage], answers: Mapping[str, Answer], rules: GenAIRules) -> Scores:
    """Mean over a skill's prompts of their images' mean; `overall` is `all`, the mean over the union of the skills' prompts."""
    images: dict[str, list[float]] = {}
    skills: dict[str, list[str]] = {}
    for picture in pictures:
        images.setdefault(picture.about["id"], []).append(answers[picture.file]["vqascore"])
        skills[picture.about["id"]] = picture.about["skills"]
    values = {key: mean(each) for key, each in images.items()}
    members: dict[str, list[float]] = {}
    for key, value in values.items():
        for skill in skills[key]:
            members.setdefault(skill, []).append(value)
    counted = [value for key, value in values.items() if skills[key] or rules.untagged]
    if not counted:
        raise UserError(f"no prompt of {SKILLS} is in {PROMPTS}: set untagged=true to score without skills")
    return {
        "overall": mean(counted),
        "skills": {skill: mean(each) for skill, each in members.items()},
        "deviation": {skill: _deviation(each) for skill, each in members.items()},
    }


def _deviation(values: Sequence[float]) -> float:
    """Sample standard deviation, as the published program prints it; 0 of one value."""
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / max(len(values) - 1, 1))


def needs(pictures: Sequence[BenchImage]) -> set[str]:
    """A VQA model."""
    return {"vqa"}


BENCH = Bench("genai_bench", 1, plan, needs, ask, score, GenAIRules, settings={"score": "likelihood of the answer's tokens"})
