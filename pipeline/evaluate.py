"""Score a run on a public benchmark: `python -m pipeline.evaluate RUN --bench geneval --prompts PATH ...`.

Three stages with files between them, in RUN/bench/NAME: images (images/, in the layout of the benchmark's own
tools), answers (answers/*.jsonl, by scorer models, about each image), score (result.json, by the published
formula). Run one alone with --stage. Started by torchrun, srun or as a Slurm array, processes share the first
two stages; finished work is not repeated.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from model.common.dtypes import DTYPES
from model.common.errors import UserError, command, first_line
from model.common.files import write_atomic
from model.common.records import read_record
from model.common.share import Share
from model.scorers.files import download_data
from pipeline.evaluation import dpg, fid, genai_bench, geneval, t2i_compbench
from pipeline.evaluation.answers import ANSWERS, SCORER, Scorer, ScorerModels, answer_missing, read_answers
from pipeline.evaluation.common import Bench, BenchImage
from pipeline.evaluation.images import generate_missing, hash_weights, read_plan, write_plan
from pipeline.inference.source import (
    add_sampling_options,
    choose_precision,
    choose_sampling_params,
    join_ranks,
    load_source,
)
from pipeline.runtime.console import CONSOLE
from pipeline.runtime.distributed import Distributed, ensure_process_group
from pipeline.runtime.settings_record import record_settings

BENCHES: dict[str, Bench] = {
    bench.name: bench
    for bench in (geneval.BENCH, dpg.BENCH, t2i_compbench.BENCH, genai_bench.BENCH, fid.BENCH)
}
RESULT = "result.json"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    text = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluate", description=text[0].split(":")[0], epilog=text[1]
    )
    add = parser.add_argument
    add("source", type=Path, metavar="RUN|EXPORT", help="folder of a run or of an export")
    add(
        "rules",
        nargs="*",
        metavar="key=value",
        help="settings of the formula, such as skip_first_row=false (dpg)",
    )
    add("--bench", choices=sorted(BENCHES), required=True)
    add("--stage", choices=("images", "answers", "score", "all"), default="all")
    add("--out", type=Path, help="default: bench/NAME in RUN")
    add(
        "--task",
        metavar="I/N",
        help="the I-th of N shares (from 0); default: the share of this Slurm array task, else everything",
    )

    images = parser.add_argument_group("images")
    add = images.add_argument
    add(
        "--prompts",
        metavar="PATH|OWNER/NAME@COMMIT",
        help="the benchmark's own file or folder, or a dataset on the hub",
    )
    add("--images", type=int, help="images per prompt; default: as published")
    add_sampling_options(images)

    answers = parser.add_argument_group("answers: folders, or OWNER/NAME@COMMIT on the hub")
    add = answers.add_argument
    add("--vqa", help="dpg, genai_bench, t2i_compbench: BLIP, or an image-text-to-text model of transformers")
    add("--detector", help="geneval, t2i_compbench: Mask2Former or OWL")
    add("--clip", help="geneval, t2i_compbench")
    add("--phrases", default="en_core_web_sm", help="t2i_compbench: a spaCy pipeline")
    add("--inception", help="fid: torch-fidelity's weights, .pth or .safetensors")
    add("--reference", type=Path, metavar="FOLDER", help="fid: images to compare with")
    add(
        "--question",
        default=genai_bench.QUESTION,
        help="genai_bench: template of the question; {} is replaced by the prompt",
    )
    add("--answer", default=genai_bench.ANSWER, help="genai_bench: the answer whose probability is the score")

    return parser.parse_intermixed_args(arguments)


def read_rules(bench: Bench, overrides: Sequence[str]) -> Any:
    """Return the formula's settings.

    Raises:
        UserError: if a key is unknown, a type is wrong, or the formula cannot use a value.
    """
    try:
        stray = [word for word in overrides if "=" not in word]
        if stray:
            raise UserError(f"{stray[0]}: settings of the formula are changed with key=value")
        defaults = OmegaConf.structured(bench.rules)
        return OmegaConf.to_object(OmegaConf.merge(defaults, OmegaConf.from_dotlist(list(overrides))))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        known = ", ".join(bench.rules.__dataclass_fields__) or "none"
        raise UserError(
            f"{' '.join(overrides)}: {first_line(error)} (settings of {bench.name}: {known})"
        ) from error


def find_prompts(source: str | None, bench: Bench) -> Path:
    """Return the path of the benchmark's prompts; a dataset on the hub is downloaded first.

    Raises:
        UserError: if no source is given, or it does not exist.
    """
    if source is None:
        raise UserError(
            f"--bench {bench.name} needs --prompts: the benchmark's own file or folder; "
            "this project does not include any"
        )
    path = Path(source)
    return path if path.exists() else download_data(source, "--prompts")


def generate_stage(
    bench: Bench, arguments: argparse.Namespace, share: Share, out: Path, device: torch.device, shows: bool
) -> None:
    """Run the first stage: generate this share's images.

    Args:
        bench: the benchmark.
        arguments: the command line.
        share: this process's share.
        out: folder of the evaluation.
        device: device to sample on.
        shows: print progress and the result.

    Raises:
        UserError: if prompts, source or settings are wrong, or `out` has images of other settings.
    """
    images_per_prompt = bench.images_per_prompt if arguments.images is None else arguments.images
    if images_per_prompt < 1 or arguments.batch < 1:
        raise UserError(f"--images {images_per_prompt} --batch {arguments.batch}: both have to be at least 1")
    prompts = find_prompts(arguments.prompts, bench)
    bench.plan(prompts, images_per_prompt, 0)  # wrong prompts are found before the network is loaded

    precision = choose_precision(arguments.precision, device)
    sampler = load_source(arguments.source, arguments.weights, device, DTYPES[precision], arguments.zero3)
    params = sampler.resolve(choose_sampling_params(sampler.defaults, arguments))
    # wrong settings are found before the LLMs are loaded, which can take minutes
    sampler.check(params)

    seed = sampler.defaults.seed if arguments.seed is None else arguments.seed
    # planned a second time, since the default seed is known only now
    plan = bench.plan(prompts, images_per_prompt, seed)
    if not plan.images:
        raise UserError(f"--prompts {arguments.prompts}: no prompt in it")

    about = {"source": arguments.source.name, "weights": arguments.weights, "precision": precision}
    settings = {
        "bench": bench.name,
        **about,
        "drawing": params.record(),
        "images": images_per_prompt,
        "seed": seed,
        "weights_hash": hash_weights(sampler),
        # the name alone: other tasks may have the same files in another place
        "prompts": Path(str(arguments.prompts)).name,
    }
    # the weights' hash is part of the plan: images of two checkpoints are never mixed
    write_plan(out, plan, settings)
    generated = generate_missing(sampler, share.owns(plan.images), params, arguments.batch, out, about, shows)
    if shows:
        print(f"{out / 'images'}: {generated} images generated by this process, {len(plan.images)} in all")


def read_images(
    bench: Bench, out: Path, reference: Path | None
) -> tuple[list[BenchImage], list[BenchImage], dict[str, Any]]:
    """Return the generated images, FID's reference images, and the settings of the generated ones.

    Raises:
        UserError: if there are no images, they belong to another benchmark, or FID has no reference.
    """
    images, settings = read_plan(out)
    if settings["bench"] != bench.name:
        raise UserError(f"{out} has the images of {settings['bench']}: give another --out")
    if bench is not fid.BENCH:
        return images, [], settings
    if reference is None:
        raise UserError("--bench fid needs --reference: a folder of images to compare with")
    return images, fid.reference_images(reference), settings


def answer_stage(
    bench: Bench, arguments: argparse.Namespace, share: Share, out: Path, device: torch.device, shows: bool
) -> None:
    """Run the second stage: let the scorer models answer about this share's images; see `generate_stage`."""
    images, reference, _ = read_images(bench, out, arguments.reference)
    if "{}" not in arguments.question:
        raise UserError(f"--question {arguments.question!r}: write {{}} in it, where the prompt goes")
    sources = {name: getattr(arguments, name) for name in ("vqa", "detector", "clip", "phrases", "inception")}
    judges = ScorerModels(sources, bench.vqa_side, arguments.question, arguments.answer, device)

    settings: dict[str, Any] = dict(bench.settings)
    if bench is genai_bench.BENCH:
        settings |= {"template": arguments.question, "answer": arguments.answer}
    # the score stage reads the same reference again
    if bench is fid.BENCH:
        settings["reference"] = str(arguments.reference.resolve())
    # a mean over answers of different models or questions would mean nothing
    record_settings(out / ANSWERS / SCORER, {**settings, "models": judges.identity(bench.needs(images))})

    # the share of the generated images is the one that this process generated: others may not exist yet
    own = share.owns(images) + share.owns(reference)
    part = f"{share.index:05d}-of-{share.count:05d}"
    answered = answer_missing(bench, judges, own, out, part, shows)
    if shows:
        total = len(images) + len(reference)
        print(f"{out / ANSWERS}: {answered} images answered by this process, {total} in all")


def score_stage(bench: Bench, rules: Any, out: Path, complete: bool) -> dict[str, Any] | None:
    """Run the third stage: write `result.json`.

    Args:
        bench: the benchmark.
        rules: settings of its formula.
        out: folder of the evaluation.
        complete: False = return None while answers are missing, instead of an error.

    Raises:
        UserError: if answers are missing.
    """
    try:
        scorer = read_record(out / ANSWERS / SCORER, Scorer, "remove it and score again")
    except FileNotFoundError as error:
        raise UserError(f"{out}: no answers there: run with --stage answers first") from error
    # the recorded folder, not --reference: the answers are about its images
    reference_folder = Path(scorer["reference"]) if "reference" in scorer else None
    images, reference, settings = read_images(bench, out, reference_folder)

    answers = read_answers(out)
    judged = images + reference
    missing = sum(image.file not in answers for image in judged)
    # a score over part of the prompts could not be compared with published ones
    if missing and complete:
        raise UserError(
            f"{out}: {missing} of {len(judged)} answers are missing: run --stage answers on every share"
        )
    if missing:
        return None

    result = {
        "bench": bench.name,
        "scores": bench.score(judged, answers, rules),
        "rules": asdict(rules),
        "pictures": len(images),
        "prompts": len({image.prompt for image in images}),
        "scorer": scorer,
        "drawn": settings,
    }
    write_atomic(out / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")

    return result


def show(result: dict[str, Any]) -> None:
    """Print the scores, the scorer models and the changed rules."""
    title = f"{result['bench']}: {result['prompts']} prompts, {result['pictures']} images"
    table = Table("", "score", title=title)
    for name, value in result["scores"].items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.4f}")
        elif isinstance(value, dict):
            for key, number in value.items():
                table.add_row(f"  {name}: {key}", f"{number:.4f}")
        else:
            table.add_row(name, str(value))
    CONSOLE.print(table)

    for name, identity in result["scorer"]["models"].items():
        CONSOLE.print(f"{name}: {identity['name']} at {identity['revision']}")
    defaults = asdict(BENCHES[result["bench"]].rules())
    # readers compare with published numbers, so only what differs from them is of interest
    changed = {key: value for key, value in result["rules"].items() if value != defaults[key]}
    CONSOLE.print(f"formula: {changed or 'as published'}")


def _barrier(ranks: Distributed) -> None:
    """Wait for all processes of this start."""
    ensure_process_group(ranks)
    if dist.is_initialized():
        dist.barrier()


@command
def main() -> None:
    """Run the command line."""
    arguments = parse()
    bench = BENCHES[arguments.bench]
    # the formula's settings are checked now, not after hours of generating
    rules = read_rules(bench, arguments.rules)

    # tasks of an array and ranks of a task share the work alike
    ranks = Distributed.from_environment()
    task = Share.parse(arguments.task) if arguments.task else Share.from_environment()
    share = Share(task.index * ranks.world + ranks.rank, task.count * ranks.world)

    device = join_ranks(ranks, arguments.zero3)
    out = arguments.out or arguments.source / "bench" / bench.name
    shows = ranks.rank == 0

    # the stages pass files and not variables, so that each can run alone, later or on another machine
    if arguments.stage in ("images", "all"):
        generate_stage(bench, arguments, share, out, device, shows)
    if arguments.stage in ("answers", "all"):
        answer_stage(bench, arguments, share, out, device, shows)
    if arguments.stage in ("score", "all"):
        # the score needs the answers of all ranks
        _barrier(ranks)
        if ranks.rank == 0:
            result = score_stage(bench, rules, out, complete=arguments.stage == "score" or task.count == 1)
            if result is None:
                print(f"{out}: other shares are not done; the last one writes {RESULT}")
            else:
                show(result)
                print(f"{out / RESULT}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
