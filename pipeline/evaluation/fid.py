"""FID (Heusel et al. 2017): distance between Inception features of generated and reference images."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.common.errors import UserError
from pipeline.evaluation.common import Answer, Bench, BenchImage, Judges, Plan, Scores, read_text

Array = np.ndarray[Any, np.dtype[np.float64]]
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass
class FIDRules:
    """FID has no settings."""


def plan(prompts: Path, images_per_prompt: int, seed: int) -> Plan:
    """Plan the images of a file with one prompt per line.

    The i-th image has seed + i, so that no two images share their noise.

    Raises:
        UserError: if the file is missing or empty.
    """
    lines = [line.strip() for line in read_text(prompts).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"--prompts {prompts}: no prompt in it: write one per line")

    images: list[BenchImage] = []
    for number in range(len(lines) * images_per_prompt):
        prompt = lines[number // images_per_prompt]
        images.append(BenchImage(f"{number:06d}.png", prompt, (seed + number,)))

    return Plan(images)


def reference_images(folder: Path) -> list[BenchImage]:
    """Return the images of a folder and its subfolders, to be described like generated ones.

    Their `file` is an absolute path.

    Raises:
        UserError: if there are fewer than two.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < 2:
        raise UserError(
            f"--reference {folder}: no images there: give a folder of {', '.join(sorted(SUFFIXES))}"
        )
    # an absolute path is kept as it is when it is joined to the folder of images
    return [BenchImage(str(path.resolve()), "", (), {"reference": True}) for path in paths]


def ask(judges: Judges, entry: BenchImage, image: Image.Image) -> Answer:
    """Return the image's features, fp32 in base64."""
    # little-endian, so that answers can be read on any machine
    features = np.asarray(judges.inception.features([image])[0].cpu(), dtype="<f4")
    # binary, since 2048 decimal numbers per image would take several times the space
    return {"features": base64.b64encode(features.tobytes()).decode()}


def frechet_distance(a: Array, b: Array) -> float:
    """Return the squared Frechet distance of Gaussians fitted to features, computed in fp64.

    It is |mean difference|^2 + tr(A + B - 2 sqrt(AB)).

    Args:
        a: features [n, C]; A is their covariance.
        b: features [m, C]; B is their covariance.
    """
    first, second = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b))

    # tr sqrt(AB) is the sum of the roots of the eigenvalues of sqrt(A) B sqrt(A), which is symmetric
    # `clip`: rounding makes eigenvalues that should be zero slightly negative
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def score(images: Sequence[BenchImage], answers: Mapping[str, Answer], rules: FIDRules) -> Scores:
    """Return FID, with the numbers of images: it grows as either set shrinks, so they belong to it."""
    sets: dict[bool, list[Array]] = {True: [], False: []}
    for image in images:
        # fp64, since the traces nearly cancel for similar sets
        features = np.frombuffer(base64.b64decode(answers[image.file]["features"]), "<f4").astype(np.float64)
        sets[bool(image.about.get("reference"))].append(features)

    if min(map(len, sets.values())) < 2:
        raise UserError("FID needs at least two generated and two reference images")
    generated, reference = np.stack(sets[False]), np.stack(sets[True])

    return {
        "overall": frechet_distance(generated, reference),
        "drawn": len(generated),
        "reference": len(reference),
    }


def needs(images: Sequence[BenchImage]) -> set[str]:
    """Inception."""
    return {"inception"}


BENCH = Bench("fid", 1, plan, needs, ask, score, FIDRules)
