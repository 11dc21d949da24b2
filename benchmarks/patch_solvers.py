"""Solvers that follow the difficulty of patches against Euler's method, at equal evaluations of the network.

    python -m pipeline.ablate scenes_ablation --rows pipeline/ablation/patch_times.yaml --segments 3
    python -m benchmarks.patch_solvers runs/scenes_ablation_ablation --segments 3

Each run of the ablation generates the same held-out scenes by every solver that fits it, with as many steps
as the evaluations allow, both branches of guidance counted. The score is prompt following, judged exactly;
intervals are over seeds, and differences are taken seed by seed. Scores are kept in `solvers.json` of each
run, so a stopped benchmark goes on.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.reporting import conditions, print_goals
from data_prep.scenes.captions import ScenePrompt
from model.common.files import write_atomic
from pipeline.ablate import held_out_prompts
from pipeline.ablation.rows import SeedMean
from pipeline.following.reading import read_scene
from pipeline.following.scoring import prompt_following, score_objects
from pipeline.inference.generate import generate_images
from pipeline.inference.sampler import Sampler, SamplingParams
from pipeline.stage.config import load_run
from pipeline.stage.sampling import AdaptiveConfig

EULER = "euler"
SOLVERS = (EULER, "dual_loop", "look_ahead")
EVALUATIONS = (8, 16, 32)
# Always guided, so that look-ahead has exactly as many evaluations as the others.
ADAPTIVE = AdaptiveConfig(unguided=2.0)
MAX_STEPS, BATCH = 64, 16

Scores = dict[str, dict[str, dict[int, float]]]
"""Row -> solver and evaluations -> seed -> prompt following."""


def most_steps(sampler: Sampler, params: SamplingParams, evaluations: int) -> int:
    """Return the largest number of steps that takes no more than a number of evaluations."""
    fits = [
        steps
        for steps in range(1, MAX_STEPS + 1)
        if sampler.evaluations(replace(params, steps=steps)) <= evaluations
    ]
    return max(fits)


def score(
    sampler: Sampler, params: SamplingParams, prompts: Sequence[ScenePrompt], scale: float = 1.0
) -> float:
    """Return the prompt following of one image per prompt; the scenes' objects have a scale."""
    requests = [(prompt.caption.text, params_seed) for params_seed, prompt in enumerate(prompts)]
    batches = [requests[first : first + BATCH] for first in range(0, len(requests), BATCH)]
    objects = []
    for images in generate_images(sampler, batches, params, shows=False):
        objects += [read_scene(np.asarray(image.convert("RGB")), scale) for image in images]
    return prompt_following(score_objects(objects, [prompt.caption for prompt in prompts]).summary())


def measure(run: Path, count: int, segments: int, say: Callable[[str], None]) -> dict[str, float]:
    """Return the scores of a run by solver and evaluations."""
    file, found = run / "solvers.json", {}
    if file.exists():
        found = json.loads(file.read_text())
    stage = load_run(run)
    prompts = held_out_prompts(stage, count, segments)
    sampler = Sampler.from_run(run, "ema", torch.device("cpu"), torch.float32)
    defaults = sampler.defaults

    for solver in (name for name in SOLVERS if name in sampler.schedulers):
        params = SamplingParams(
            1, defaults.guidance, defaults.height, defaults.width, solver, adaptive=ADAPTIVE
        )
        for evaluations in EVALUATIONS:
            name = f"{solver} {evaluations}"
            if name not in found:
                steps = most_steps(sampler, params, evaluations)
                scale = stage.sample.scenes_scale
                found[name] = score(sampler, replace(params, steps=steps), prompts, scale)
                write_atomic(file, json.dumps(found))
            say(f"{run.parent.name} {run.name}: {name}: {found[name]:.1%}")
    return found


def table(scores: Scores) -> str:
    """Return the scores, and what each solver gains over Euler's method, as a Markdown table."""
    lines = [
        "| row | solver | " + " | ".join(f"{count} evaluations" for count in EVALUATIONS) + " |",
        "|---|---|" + "---|" * len(EVALUATIONS),
    ]
    for row, by_name in scores.items():
        for solver in SOLVERS:
            cells = []
            for count in EVALUATIONS:
                seeds = by_name.get(f"{solver} {count}", {})
                cell = str(SeedMean.of(seeds.values())) if seeds else ""
                gain = SeedMean.between(seeds, by_name[f"{EULER} {count}"]) if solver != EULER else None
                cells.append(f"{cell} ({gain.mean:+.1%} ± {gain.half:.1%})" if gain else cell)
            if any(cells):
                lines.append(f"| {row} | {solver} | {' | '.join(cells)} |")
    return "\n".join(lines)


def against(scores: Scores, row: str, other: str) -> list[str]:
    """Return the differences of two rows by Euler's method, one line per number of evaluations."""
    lines = []
    for count in EVALUATIONS:
        name = f"{EULER} {count}"
        difference = SeedMean.between(scores[row][name], scores[other][name])
        if difference is not None:
            verdict = "undecided" if abs(difference.mean) <= difference.half else "beyond noise"
            lines.append(f"- {row} - {other}, {count} evaluations: {difference}, {verdict}")
    return lines


def main() -> None:
    """Measure all runs of the folder and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the ablation: ROW/seed_N")
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--segments", type=int, default=3)
    options = parser.parse_args()

    scores: Scores = {}
    for path in sorted(options.folder.glob("*/seed_*")):
        if not (path / "score.json").exists():
            continue
        seed = int(path.name.removeprefix("seed_"))
        measured = measure(path, options.scored, options.segments, print)
        for name, value in measured.items():
            scores.setdefault(path.parent.name, {}).setdefault(name, {})[seed] = value

    print(f"\n{conditions()}\n\n{table(scores)}\n")
    rows = [row for row in scores if row != "shared_noisier"]
    for row in rows if "shared_noisier" in scores else []:
        print("\n".join(against(scores, row, "shared_noisier")))
    means = {
        f"{row}, {name}": round(SeedMean.of(seeds.values()).mean, 4)
        for row, by_name in scores.items()
        for name, seeds in by_name.items()
    }
    print_goals("patch_solvers", {}, prompt_following=means)


if __name__ == "__main__":
    main()
