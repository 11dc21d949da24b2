"""Public benchmarks of a trained run: `python -m pipeline.evaluate RUN --bench geneval --prompts evaluation_metadata.jsonl ...`.

Three stages with files between, in RUN/bench/NAME: images (images/, in the layout of the benchmark's own tools), answers
(answers/*.jsonl, what scorer models said of each picture), score (result.json, the published formula). Each can be run alone by
--stage; started by torchrun, srun or as a Slurm array, processes share the first two, and what is done is not done again.
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

from model.common.errors import UserError, command
from model.common.share import Share
from model.scorers.files import download_data
from pipeline.evaluation import dpg, fid, genai_bench, geneval, t2i_compbench
from pipeline.evaluation.answers import ANSWERS, SCORER, ScorerModels, answer_missing, read_answers
from pipeline.evaluation.common import Bench, BenchImage
from pipeline.evaluation.images import draw_missing, hash_weights, keep_settings, read_plan, write_plan, write_whole
from pipeline.export import load_source
from pipeline.inference.sampler import DTYPES
from pipeline.runtime.console import CONSOLE
from pipeline.runtime.distributed import Distributed
from pipeline.sample import begin, choose_sampling_params

BENCHES: dict[str, Bench] = {
    bench.name: bench for bench in (geneval.BENCH, dpg.BENCH, t2i_compbench.BENCH, genai_bench.BENCH, fid.BENCH)
}
RESULT = "result.json"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    text = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluate", description=text[0].split(":")[0], epilog=text[1])
    add = parser.add_argument
    add("source", type=Path, metavar="RUN|EXPORT", help="folder of a run, or what pipeline.export wrote")
    add("rules", nargs="*", metavar="key=value", help="settings of the formula, such as skip_first_row=false (dpg)")
    add("--bench", choices=sorted(BENCHES), required=True)
    add("--stage", choices=("images", "answers", "score", "all"), default="all")
    add("--out", type=Path, help="default: bench/NAME in RUN")
    add("--task", metavar="I/N", help="the I-th of N shares (from 0); default: this Slurm array task's, else everything")
    images = parser.add_argument_group("images")
    add = images.add_argument
    add("--prompts", metavar="PATH|OWNER/NAME@COMMIT", help="the benchmark's own file or folder, or a dataset on the hub")
    add("--images", type=int, help="per prompt; default: as published")
    add("--seed", type=int, help="of the first image of each prompt; the next have the next seeds")
    add("--steps", type=int)
    add("--guidance", type=float)
    add("--size", metavar="HxW")
    add("--scheduler", default="", help="flow: euler, dpm; ddpm: dpm, ddim")
    add("--negative", default="", help="prompt to steer away from")
    add("--quantised", action="store_true", help="take LLM states through the family's quantisation")
    add("--weights", default="ema", metavar="ema|raw|DECAY", help="ema = the run's first average")
    add("--precision", choices=tuple(DTYPES), help="default: bf16 on a GPU, else fp32")
    add("--batch", type=int, default=8, help="images drawn at once")
    add("--zero3", action="store_true", help="share the weights out over the processes, as in training")
    answers = parser.add_argument_group("answers: folders, or OWNER/NAME@COMMIT on the hub")
    add = answers.add_argument
    add("--vqa", help="dpg, genai_bench, t2i_compbench: BLIP, or an image-text-to-text model of transformers")
    add("--detector", help="geneval, t2i_compbench: Mask2Former or OWL")
    add("--clip", help="geneval, t2i_compbench")
    add("--phrases", default="en_core_web_sm", help="t2i_compbench: a spaCy pipeline")
    add("--inception", help="fid: torch-fidelity's weights, .pth or .safetensors")
    add("--reference", type=Path, metavar="FOLDER", help="fid: pictures to compare with")
    add("--question", default=genai_bench.QUESTION, help="genai_bench: template, {} stands for the prompt")
    add("--answer", default=genai_bench.ANSWER, help="genai_bench: whose probability is the score")
    return parser.parse_intermixed_args(arguments)


def read_rules(bench: Bench, overrides: Sequence[str]) -> Any:
    """The formula's settings.

    Raises:
        UserError: an unknown key, a wrong type, or a value that the formula cannot have.
    """
    try:
        stray = [each for each in overrides if "=" not in each]
        if stray:
            raise UserError(f"{stray[0]}: settings of the formula are changed with key=value")
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(bench.rules), OmegaConf.from_dotlist(list(overrides))))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        known = ", ".join(bench.rules.__dataclass_fields__) or "none"
        raise UserError(f"{' '.join(overrides)}: {str(error).splitlines()[0]} (settings of {bench.name}: {known})") from error


def find_prompts(source: str | None, bench: Bench) -> Path:
    """The benchmark's prompts on this machine, downloaded first if `source` is a dataset on the hub.

    Raises:
        UserError: none is given, or there is nothing.
    """
    if source is None:
        raise UserError(f"--bench {bench.name} needs --prompts: the benchmark's own file or folder; none comes with this project")
    path = Path(source)
    return path if path.exists() else download_data(source, "--prompts")


def draw_images(bench: Bench, arguments: argparse.Namespace, share: Share, out: Path, device: torch.device, shows: bool) -> None:
    """First stage."""
    images = bench.images if arguments.images is None else arguments.images
    if images < 1 or arguments.batch < 1:
        raise UserError(f"--images {images} --batch {arguments.batch}: both have to be at least 1")
    prompts = find_prompts(arguments.prompts, bench)
    bench.plan(prompts, images, 0)  # wrong prompts are found before the network is loaded
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    sampler = load_source(arguments.source, arguments.weights, device, DTYPES[precision], arguments.zero3)
    drawing = choose_sampling_params(sampler.defaults, arguments)
    sampler.check(drawing)
    seed = sampler.defaults.seed if arguments.seed is None else arguments.seed
    plan = bench.plan(prompts, images, seed)
    if not plan.pictures:
        raise UserError(f"--prompts {arguments.prompts}: no prompt in it")
    about = {"source": arguments.source.name, "weights": arguments.weights, "precision": precision}
    settings = {"bench": bench.name, **about, "drawing": asdict(drawing), "images": images, "seed": seed}
    write_plan(out, plan, {**settings, "weights_hash": hash_weights(sampler), "prompts": Path(str(arguments.prompts)).name})
    drawn = draw_missing(sampler, share.owns(plan.pictures), drawing, arguments.batch, out, about, shows)
    if shows:
        print(f"{out / 'images'}: {drawn} pictures drawn by this process, {len(plan.pictures)} in all")


def judged_pictures(bench: Bench, out: Path, reference: Path | None) -> tuple[list[BenchImage], list[BenchImage], dict[str, Any]]:
    """What is to be answered about: the drawn pictures, and FID's reference; and how they were drawn.

    Raises:
        UserError: nothing was drawn, or for another benchmark; FID without a reference.
    """
    pictures, settings = read_plan(out)
    if settings["bench"] != bench.name:
        raise UserError(f"{out} holds pictures of {settings['bench']}: give another --out")
    if bench is fid.BENCH:
        if reference is None:
            raise UserError("--bench fid needs --reference: a folder of pictures to compare with")
        return pictures, fid.reference_pictures(reference), settings
    return pictures, [], settings


def ask_models(bench: Bench, arguments: argparse.Namespace, share: Share, out: Path, device: torch.device, shows: bool) -> None:
    """Second stage."""
    drawn, reference, _ = judged_pictures(bench, out, arguments.reference)
    if "{}" not in arguments.question:
        raise UserError(f"--question {arguments.question!r}: {{}} has to stand in it for the prompt")
    sources = {name: getattr(arguments, name) for name in ("vqa", "detector", "clip", "phrases", "inception")}
    judges = ScorerModels(sources, bench.vqa_side, arguments.question, arguments.answer, device)
    settings: dict[str, Any] = dict(bench.settings)
    if bench is genai_bench.BENCH:
        settings |= {"template": arguments.question, "answer": arguments.answer}
    if bench is fid.BENCH:
        settings["reference"] = str(arguments.reference.resolve())
    keep_settings(out / ANSWERS / SCORER, {**settings, "models": judges.identity(bench.needs(drawn))})
    own = share.owns(drawn) + share.owns(reference)  # of the drawn ones those that this process drew: others may be under way
    answered = answer_missing(bench, judges, own, out, f"{share.index:05d}-of-{share.count:05d}", shows)
    if shows:
        print(f"{out / ANSWERS}: {answered} pictures answered by this process, {len(drawn) + len(reference)} in all")


def score_answers(bench: Bench, rules: Any, out: Path, complete: bool) -> dict[str, Any] | None:
    """Third stage: `result.json`.

    Args:
        bench: whose formula.
        rules: its settings.
        out: the evaluation's folder.
        complete: every answer has to be there; False = without them all there is no result yet.

    Raises:
        UserError: answers are missing.
    """
    try:
        scorer: dict[str, Any] = json.loads((out / ANSWERS / SCORER).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{out}: no answers there: run with --stage answers first") from error
    drawn, reference, how = judged_pictures(bench, out, Path(scorer["reference"]) if "reference" in scorer else None)
    answers = read_answers(out)
    judged = drawn + reference
    missing = sum(picture.file not in answers for picture in judged)
    if missing and complete:
        raise UserError(f"{out}: {missing} of {len(judged)} answers are missing: run --stage answers on every share")
    if missing:
        return None
    result = {
        "bench": bench.name, "scores": bench.score(judged, answers, rules), "rules": asdict(rules),
        "pictures": len(drawn), "prompts": len({picture.prompt for picture in drawn}), "scorer": scorer, "drawn": how,
    }  # fmt: skip
    write_whole(out / RESULT, json.dumps(result, indent=1, ensure_ascii=False).encode() + b"\n")
    return result


def show(result: dict[str, Any]) -> None:
    """Print the scores with what they were made with."""
    table = Table("", "score", title=f"{result['bench']}: {result['prompts']} prompts, {result['pictures']} pictures")
    for name, value in result["scores"].items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.4f}")
        elif isinstance(value, dict):
            for key, each in value.items():
                table.add_row(f"  {name}: {key}", f"{each:.4f}")
        else:
            table.add_row(name, str(value))
    CONSOLE.print(table)
    for name, identity in result["scorer"]["models"].items():
        CONSOLE.print(f"{name}: {identity['name']} at {identity['revision']}")
    defaults = asdict(BENCHES[result["bench"]].rules())
    changed = {key: value for key, value in result["rules"].items() if value != defaults[key]}
    CONSOLE.print(f"formula: {changed or 'as published'}")


def _meet(ranks: Distributed) -> None:
    """Wait until all processes of this start are here."""
    if ranks.world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    if dist.is_initialized():
        dist.barrier()


@command
def main() -> None:
    """Command line."""
    arguments = parse()
    bench = BENCHES[arguments.bench]
    rules = read_rules(bench, arguments.rules)
    ranks = Distributed.from_environment()
    task = Share.parse(arguments.task) if arguments.task else Share.from_environment()
    share = Share(task.index * ranks.world + ranks.rank, task.count * ranks.world)
    device = begin(ranks, arguments.zero3)
    out = arguments.out or arguments.source / "bench" / bench.name
    if arguments.stage in ("images", "all"):
        draw_images(bench, arguments, share, out, device, ranks.rank == 0)
    if arguments.stage in ("answers", "all"):
        ask_models(bench, arguments, share, out, device, ranks.rank == 0)
    if arguments.stage in ("score", "all"):
        _meet(ranks)
        if ranks.rank == 0:
            result = score_answers(bench, rules, out, complete=arguments.stage == "score" or task.count == 1)
            if result is None:
                print(f"{out}: other shares are not done; the last one writes {RESULT}")
            else:
                show(result)
                print(f"{out / RESULT}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
