"""Compare the amount of code of each feature of the first wave with that of another checkout, before the
sub-packages, and count what was built since: `python -m benchmarks.house_areas BEFORE [AFTER]`.

BEFORE is a checkout of b394b20, whose files were flat in three folders. A file that no list names is counted
as built since.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from benchmarks.house import PACKAGES, Counts, count_file, source_files


class Area(NamedTuple):
    """A feature, by its files in both checkouts."""

    before: str
    """Paths without `.py`, as patterns of `Path.glob`, separated by spaces."""
    after: str


FIRST_WAVE = {
    "network: DiT, fusion, refiners, layers, FLOPs, settings": Area(
        "model/collaborative_refiner model/config model/dit model/flops model/functional model/fusion "
        "model/layers model/presets model/token_refiner",
        "model/block model/blocks model/collaborative_refiner model/condition model/config "
        "model/costs model/dit model/dit_block model/flops model/functional model/fusion model/layers "
        "model/presets model/region model/token_refiner pipeline/engine/network",
    ),
    "frozen LLMs: GGUF, packing, quantization": Area(
        "model/gguf model/gguf_tokenizer model/language_model model/packed_attention model/quantise "
        "model/text_encoder",
        "model/encoders/encoder_kinds model/encoders/gguf model/encoders/gguf_model "
        "model/encoders/gguf_tokenizer model/encoders/language_model model/encoders/packed_attention "
        "model/encoders/quantize model/encoders/text_encoder model/encoders/token_size",
    ),
    "VAE and its training": Area(
        "model/vae pipeline/train_vae",
        "model/encoders/vae model/encoders/latent_spaces pipeline/train_vae",
    ),
    "scorers and public benchmarks": Area(
        "model/blip_vqa model/clip_scorer model/detectors model/image_text model/inception "
        "model/noun_phrases model/scorers pipeline/bench_answers pipeline/bench_images "
        "pipeline/benches/* pipeline/evaluate",
        "model/scorers/* pipeline/evaluation/* pipeline/evaluate",
    ),
    "helpers: errors, settings, files, hub, progress, shares": Area(
        "model/errors model/settings data_prep/progress pipeline/console",
        "model/common/* pipeline/runtime/console",
    ),
    "data_prep: commands, settings, workers, report": Area(
        "data_prep/__main__ data_prep/config data_prep/report data_prep/workers",
        "data_prep/__main__ data_prep/config data_prep/model_settings data_prep/report data_prep/workers",
    ),
    "store: local, S3, faults": Area(
        "data_prep/store data_prep/store_local data_prep/store_s3 data_prep/faults",
        "data_prep/store/store data_prep/store/entry data_prep/store/local data_prep/store/s3 "
        "data_prep/store/s3_answers data_prep/store/faults",
    ),
    "dataset: schema, parts, MDS, snapshots": Area(
        "data_prep/schema data_prep/parts data_prep/mds data_prep/snapshot data_prep/snapshot_reader",
        "data_prep/dataset/schema data_prep/dataset/records data_prep/dataset/parts "
        "data_prep/dataset/mds data_prep/dataset/snapshot* data_prep/dataset/garbage "
        "data_prep/dataset/verify",
    ),
    "sources": Area(
        "data_prep/sources data_prep/sample data_prep/source_* data_prep/openmoji",
        "data_prep/sources/files data_prep/sources/folder data_prep/sources/mds "
        "data_prep/sources/openmoji data_prep/sources/parquet data_prep/sources/sample "
        "data_prep/sources/scenes data_prep/sources/source data_prep/sources/webdataset "
        "data_prep/sources/text_columns",
    ),
    "plan: scan, filters, duplicates, manifest": Area(
        "data_prep/plan data_prep/scan data_prep/manifest data_prep/filters data_prep/expressions "
        "data_prep/dedupe data_prep/captions data_prep/accounts data_prep/budget",
        "data_prep/plan/budget data_prep/plan/captions data_prep/plan/counts data_prep/plan/dedupe "
        "data_prep/plan/duplicates data_prep/plan/expressions data_prep/plan/filters "
        "data_prep/plan/finish data_prep/plan/listing data_prep/plan/manifest data_prep/plan/packs "
        "data_prep/plan/plan data_prep/plan/rows data_prep/plan/scan* data_prep/plan/units "
        "data_prep/plan/verdicts data_prep/plan/windows data_prep/dataset/accounts",
    ),
    "images, pairs, latents, text families": Area(
        "data_prep/images data_prep/buckets data_prep/pairs data_prep/make_images data_prep/encode "
        "data_prep/latents data_prep/text data_prep/text_report",
        "data_prep/images/* data_prep/pairs/pairs data_prep/pairs/make_images "
        "data_prep/families/encode data_prep/families/latents data_prep/families/text "
        "data_prep/families/text_report",
    ),
    "scenes and prompt following": Area(
        "data_prep/scenes data_prep/scene_captions data_prep/scene_drawing pipeline/scene_reading "
        "pipeline/scene_scorer pipeline/positional_bias pipeline/natural_prompts pipeline/follow",
        "data_prep/scenes/grammar data_prep/scenes/captions data_prep/scenes/rendering "
        "pipeline/following/reading pipeline/following/scoring "
        "pipeline/following/positional_bias pipeline/following/natural_prompts pipeline/follow",
    ),
    "stage: settings and datasets": Area(
        "pipeline/config pipeline/sources pipeline/assembly",
        "pipeline/stage/config pipeline/stage/sampling pipeline/stage/corpus pipeline/stage/objective "
        "pipeline/text/families",
    ),
    "batches and text input": Area(
        "pipeline/batches pipeline/mixture pipeline/position pipeline/packing pipeline/dataset "
        "pipeline/loader pipeline/shard_cache pipeline/threads pipeline/streaming_snapshot "
        "pipeline/joined_reader pipeline/texts pipeline/online pipeline/prompts",
        "pipeline/data/* pipeline/text/online pipeline/text/prompts pipeline/text/texts",
    ),
    "diffusion: objective and solvers": Area(
        "pipeline/objective pipeline/sampling",
        "pipeline/diffusion/__init__ pipeline/diffusion/ddpm pipeline/diffusion/flow "
        "pipeline/diffusion/guidance pipeline/diffusion/objective pipeline/diffusion/solvers",
    ),
    "engine, optimizers, checkpoints": Area(
        "pipeline/engine pipeline/zero pipeline/masters pipeline/reshard pipeline/optim pipeline/muon "
        "pipeline/ema pipeline/compiled pipeline/checkpoint pipeline/weights pipeline/shard_files",
        "pipeline/engine/__init__ pipeline/engine/a* pipeline/engine/compile pipeline/engine/e* "
        "pipeline/engine/flat_step pipeline/engine/inference pipeline/engine/la* "
        "pipeline/engine/master_weights pipeline/engine/muon pipeline/engine/optim pipeline/engine/p* "
        "pipeline/engine/s* pipeline/engine/world pipeline/checkpoint/checkpoints "
        "pipeline/checkpoint/files pipeline/checkpoint/manifest pipeline/checkpoint/room "
        "pipeline/checkpoint/weights",
    ),
    "training loop": Area(
        "pipeline/train pipeline/trainer pipeline/metrics pipeline/gates pipeline/grid "
        "pipeline/evaluation pipeline/learned",
        "pipeline/train pipeline/learned pipeline/training/callbacks pipeline/training/gates "
        "pipeline/training/inputs pipeline/training/metrics pipeline/training/mfu "
        "pipeline/training/micro_batches pipeline/training/passes pipeline/training/previews "
        "pipeline/training/preview_kinds pipeline/training/resume pipeline/training/start "
        "pipeline/training/state pipeline/training/trainer pipeline/training/validation",
    ),
    "sampling, export, web page": Area(
        "pipeline/sampler pipeline/pictures pipeline/attention_maps pipeline/studio pipeline/sample "
        "pipeline/export pipeline/web pipeline/diffusers_pipeline",
        "pipeline/inference/attention_maps pipeline/inference/call pipeline/inference/encoding "
        "pipeline/inference/generate pipeline/inference/images pipeline/inference/parts "
        "pipeline/inference/sampler pipeline/inference/source pipeline/inference/studio "
        "pipeline/sample pipeline/export pipeline/web pipeline/diffusers_pipeline",
    ),
    "ranks, cluster jobs, estimate, status": Area(
        "pipeline/distributed pipeline/watchdog pipeline/stopping pipeline/local_ranks "
        "pipeline/attempts pipeline/first_error pipeline/preflight pipeline/node_check pipeline/plan "
        "pipeline/status",
        "pipeline/runtime/attempt pipeline/runtime/distributed pipeline/runtime/finished "
        "pipeline/runtime/json_lines pipeline/runtime/launch pipeline/runtime/run_lo* "
        "pipeline/runtime/settings_record pipeline/runtime/stopping pipeline/runtime/watchdog "
        "pipeline/operations/attempts pipeline/operations/first_error pipeline/operations/node_check "
        "pipeline/operations/planning pipeline/operations/preflight pipeline/estimate pipeline/status",
    ),
    "ablation, reports, demo": Area(
        "pipeline/ablate pipeline/ablation pipeline/ablation_report pipeline/report "
        "pipeline/report_curves pipeline/report_data pipeline/demo",
        "pipeline/ablate pipeline/ablation/* pipeline/report pipeline/reporting/* pipeline/demo "
        "pipeline/demonstration/commands pipeline/demonstration/emoji pipeline/demonstration/ending "
        "pipeline/demonstration/plan",
    ),
}

SINCE = {
    "video and clips": (
        "data_prep/clips/* data_prep/sources/moving_scenes data_prep/scenes/moving "
        "model/encoders/pixel_clips model/encoders/video_* model/video_position model/rotary "
        "pipeline/vae/* pipeline/diffusers_video_pipeline pipeline/diffusion/first_frame "
        "pipeline/inference/clips pipeline/following/motion pipeline/following/moving_scores "
        "pipeline/demonstration/moving"
    ),
    "users, adapters, LoRA": (
        "model/adapter model/adapters/* data_prep/dataset/users data_prep/pairs/users "
        "pipeline/stage/adapters pipeline/fit_user pipeline/forget_user pipeline/checkpoint/base "
        "pipeline/checkpoint/forget pipeline/inference/adapter_files pipeline/inference/fit "
        "pipeline/inference/pipeline_adapters pipeline/inference/users pipeline/training/users"
    ),
    "elastic networks and sparse attention": (
        "model/elastic/* model/sub_network model/sparse_attention model/attention_config "
        "pipeline/inference/elastic pipeline/training/elastic* "
        "pipeline/operations/elastic_planning"
    ),
    "engines, captions, annotators, semantic and evaluation sets": (
        "data_prep/engines data_prep/annotators/* data_prep/captioners/* model/captioners/* "
        "data_prep/families/captions* data_prep/families/generated data_prep/families/complete "
        "data_prep/plan/semantic data_prep/plan/annotations data_prep/plan/against "
        "data_prep/plan/copies data_prep/plan/drop_list"
    ),
    "patch times and difficulty": (
        "model/difficulty model/conditions pipeline/diffusion/adaptive pipeline/diffusion/difficulty "
        "pipeline/diffusion/patch_times pipeline/inference/difficulty_maps "
        "pipeline/training/patch_validation"
    ),
    "first run (init), hub datasets, fast reads, rollups, pixel spaces": (
        "data_prep/init data_prep/sources/survey pipeline/init data_prep/store/hub "
        "data_prep/store/fast_reads data_prep/dataset/rollups model/encoders/pixels "
        "model/encoders/wavelet"
    ),
    "speedrun, scene demo, judged images": (
        "pipeline/speedrun pipeline/speedruns/* pipeline/demonstration/scenes "
        "pipeline/following/binding pipeline/following/judged_images"
    ),
}
"""Systems that were filed after the first wave, by paths of AFTER."""


def count(root: Path, patterns: str) -> tuple[set[Path], Counts]:
    """Return the files of some patterns, and their counts."""
    files: set[Path] = set()
    for pattern in patterns.split():
        files |= set(root.glob(f"{pattern}.py"))
    return files, sum(map(count_file, sorted(files)), Counts())


def compare(before: Path, after: Path) -> list[dict[str, int | str]]:
    """Return a row per feature of the first wave, and one for all."""
    rows: list[dict[str, int | str]] = []
    for name, area in FIRST_WAVE.items():
        (_, one), (_, other) = count(before, area.before), count(after, area.after)
        rows.append(row(name, one, other))
    patterns = (" ".join(area[side] for area in FIRST_WAVE.values()) for side in (0, 1))
    (_, one), (_, other) = (count(root, names) for root, names in zip((before, after), patterns, strict=True))
    return [*rows, row("all", one, other)]


def row(name: str, before: Counts, after: Counts) -> dict[str, int | str]:
    """Return a row of the comparison."""
    return {
        "feature": name,
        "files before": before.files,
        "files after": after.files,
        "lines before": before.lines,
        "lines after": after.lines,
        "nodes before": before.nodes,
        "nodes after": after.nodes,
        "change": f"{100 * (after.nodes / max(before.nodes, 1) - 1):+.0f} %",
    }


def built_since(after: Path) -> list[dict[str, int | str]]:
    """Return a row per system that was built since, and one for the files that no list names."""
    named: set[Path] = set()
    for area in FIRST_WAVE.values():
        named |= count(after, area.after)[0]

    rows: list[dict[str, int | str]] = []
    for name, patterns in SINCE.items():
        files, counts = count(after, patterns)
        named |= files
        rows.append({"system": name, "files": counts.files, "lines": counts.lines, "nodes": counts.nodes})

    others = [path for package in PACKAGES for path in source_files(after, package) if path not in named]
    counts = sum(map(count_file, others), Counts())
    return [*rows, {"system": "others", "files": counts.files, "lines": counts.lines, "nodes": counts.nodes}]


def table(rows: list[dict[str, int | str]]) -> str:
    """Return rows as Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for each in rows:
        cells = (f"{value:,}" if isinstance(value, int) else value for value in each.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables, and last one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, nargs="?", default=Path(__file__).resolve().parent.parent)
    arguments = parser.parse_args()

    first, since = compare(arguments.before, arguments.after), built_since(arguments.after)
    print(f"{table(first)}\n\n{table(since)}")
    print(json.dumps({"benchmark": "house_areas", "first_wave": first, "since": since}))


if __name__ == "__main__":
    main()
