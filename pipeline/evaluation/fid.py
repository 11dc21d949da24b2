"""FID (Heusel et al. 2017): distance of two Gaussians fitted to Inception features of drawn and of reference pictures."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.common.errors import UserError
from pipeline.evaluation.common import Answer, Bench, Judges, BenchImage, Plan, Scores, read_text

Array = np.ndarray[Any, np.dtype[np.float64]]
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass
class FIDRules:
    """FID has no settings."""


def plan(prompts: Path, images: int, seed: int) -> Plan:
    """Pictures of a file with one prompt a line; the i-th picture has seed + i, so that no two share their noise.

    Raises:
        UserError: the file is missing or empty.
    """
    lines = [line.strip() for line in read_text(prompts).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"--prompts {prompts}: no prompt in it: write one a line")
    drawn = [(line, number * images + j) for number, line in enumerate(lines) for j in range(images)]
    return Plan([BenchImage(f"{i:06d}.png", line, (seed + i,)) for line, i in drawn])


def reference_pictures(folder: Path) -> list[BenchImage]:
    """The pictures of a folder and its subfolders, to be described like drawn ones; their files are whole paths.

    Raises:
        UserError: there are fewer than two.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < 2:
        raise UserError(f"--reference {folder}: no pictures there: give a folder of {', '.join(sorted(SUFFIXES))}")
    return [BenchImage(str(path.resolve()), "", (), {"reference": True}) for path in paths]


def ask(judges: Judges, picture: BenchImage, image: Image.Image) -> Answer:
    """The picture's features, fp32 in base64."""
    features = np.asarray(judges.inception.features([image])[0].cpu(), dtype="<f4")
    return {"features": base64.b64encode(features.tobytes()).decode()}


def frechet_distance(a: Array, b: Array) -> float:
    """Squared Frechet distance of Gaussians fitted to features [n, C] and [m, C]: |mean difference|^2 + tr(A + B - 2 sqrt(AB)).

    In fp64; the trace of the root is the sum of the roots of the eigenvalues of sqrt(A) B sqrt(A), which is symmetric.
    """
    first, second = (np.atleast_2d(np.cov(each, rowvar=False)) for each in (a, b))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def score(pictures: Sequence[BenchImage], answers: Mapping[str, Answer], rules: FIDRules) -> Scores:
    """FID; it grows as either set shrinks, so the numbers of pictures belong to it."""
    sets: dict[bool, list[Array]] = {True: [], False: []}
    for picture in pictures:
        features = np.frombuffer(base64.b64decode(answers[picture.file]["features"]), "<f4").astype(np.float64)
        sets[bool(picture.about.get("reference"))].append(features)
    if min(map(len, sets.values())) < 2:
        raise UserError("FID needs at least two drawn and two reference pictures")
    drawn, reference = np.stack(sets[False]), np.stack(sets[True])
    return {"overall": frechet_distance(drawn, reference), "drawn": len(drawn), "reference": len(reference)}


def needs(pictures: Sequence[BenchImage]) -> set[str]:
    """Inception."""
    return {"inception"}


BENCH = Bench("fid", 1, plan, needs, ask, score, FIDRules)
