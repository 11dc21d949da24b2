"""Cost of a plan, printed before the work is done: parts, bytes and GPU-hours, by formula."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import read_plan_record
from data_prep.dataset.schema import Bucket, CaptionCounts, Manifest, PlanRecord
from data_prep.sources.sample import printable
from data_prep.store.store import Store
from model.common.errors import UserError, first_line
from model.common.records import parse_json, read_bounded
from model.config import TextConfig
from model.encoders.gguf import GGUFFile, find_gguf
from model.encoders.token_size import bytes_per_token

CHARACTERS_PER_TOKEN = 4.0
"""For English text and the usual vocabularies; an estimate until the captions are encoded."""
SCALE_BYTES = 4
"""An fp32 scale per quantized token."""
MANY_ROWS = 100_000_000
"""Pairs beyond which the requests for each part take longer than what larger parts cost."""
LARGE_PARTS = 4096
"""Rows per part for more than `MANY_ROWS` pairs."""


CONFIG_NAMES = (
    ("hidden_size", "num_hidden_layers", "intermediate_size"),
    ("d_model", "num_layers", "d_ff"),  # T5
)
"""Names of width, depth and feed-forward width in a model's `config.json`."""


class Size(NamedTuple):
    """Sizes of an LLM that the formula needs."""

    width: int
    depth: int
    block_parameters: int
    """Parameters of all blocks together; embeddings and head cost no multiplications here."""


def print_budget(config: DatasetConfig, dataset: Store, manifest: Manifest, tflops: float) -> None:
    """Print what the plan contains, and what its text families will take.

    A token costs `width` values and a scale; encoding costs 2 FLOPs per block parameter and token. Captions
    are counted at `CHARACTERS_PER_TOKEN`.

    Args:
        config: the dataset's settings.
        dataset: the dataset's store, which has a plan.
        manifest: the plan.
        tflops: TFLOP/s that one GPU sustains.

    Raises:
        UserError: if a package or file that a text family names does not exist.
    """
    record = read_plan_record(dataset)
    rows = sum(sum(parts) for parts in manifest.buckets.values())
    rows_read = sum(file["rows"] for file in record["files"])
    captions = sum(record["captions"]["kept"].values())
    characters = sum(record["captions"]["letters"].values()) / max(1, captions)
    tokens = characters / CHARACTERS_PER_TOKEN

    parts = f"{len(manifest.parts):,} parts of {len(manifest.buckets)} buckets"
    print(f"plan: {rows_read:,} rows read, {rows:,} planned in {parts}")
    print(
        f"      {captions:,} captions of {characters:.0f} characters, about {tokens:.0f} tokens, on average"
    )
    if config.clips is not None:
        # Also those without any: a length that no video reaches would go unnoticed.
        lengths = Counter({1: 0, **dict.fromkeys(config.clips.frames, 0)})
        for name, counts in manifest.buckets.items():
            lengths[Bucket.parse(name).frames] += sum(counts)

        listed = ", ".join(f"{count:,} of {frames}" for frames, count in sorted(lengths.items()))
        print(f"      by number of frames: {listed}")
    reasons = _rows_by_reason(record)
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        print(f"      {count:,} left out: {reason}")
    _print_ignored(config, record)
    _print_decontamination(record)
    if rows > MANY_ROWS and config.part_rows < LARGE_PARTS:
        print(
            f"advice: for {rows:,} pairs, `part_rows: {LARGE_PARTS}` takes fewer requests and records than "
            f"{config.part_rows:,}: set it and plan under another `name` before you run `pairs`"
        )
    _print_examples(record["captions"], captions)

    for text in config.text:
        size = model_size(text)
        if size is None:
            print(f"text family {text.name}: {text.llm} is not here, or does not say its sizes: no estimate")
        else:
            print(f"text family {text.name}: {_text_estimate(text, size, captions, tokens, tflops)}")


def _print_ignored(config: DatasetConfig, record: PlanRecord) -> None:
    """Print the files that no row comes from, by source."""
    for number, counts in enumerate(record.get("sources", [])):
        kinds = sorted(counts["ignored"].items(), key=lambda item: (-item[1], item[0]))
        if kinds:
            listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
            where = f"{config.sources[number].path} ({counts['files']:,} files)"
            print(f"      files ignored in {where}: {listed}")


def _print_decontamination(record: PlanRecord) -> None:
    """Print what the rows were compared with besides one another, and what of it had no effect."""
    for counts in record.get("against", []):
        kinds = sorted(counts["ignored"].items(), key=lambda item: (-item[1], item[0]))
        ignored = "".join(f", {count:,} {kind} ignored" for kind, count in kinds)
        print(
            f"      evaluation set {counts['name']}: {counts['images']:,} images, "
            f"{counts['unreadable']:,} of them unreadable{ignored}"
        )
        if counts["unreadable"] == counts["images"]:
            print(
                f"warning: no image of {counts['name']} can be read, so no pair was compared with it: "
                "correct `kind`, `path` or `image` of `dedupe.against`, under another `name`"
            )

    drop = record.get("drop")
    if drop is not None:
        print(f"      dedupe.drop: {drop['ids']:,} ids, {drop['unmatched']:,} of them match no row")


def _print_examples(counts: CaptionCounts, captions: int) -> None:
    """Print some captions, and a warning if most of them are not what a person would write."""
    for text in counts.get("examples", []):
        print(f"      for example: {printable(text)}")
    bracketed = counts.get("bracketed", 0)
    if bracketed > captions / 2:
        print(
            f"warning: {bracketed:,} of {captions:,} captions begin with a bracket: if they are lists or "
            "records as text, name the caption's field in `sources.captions`, or write it as plain text"
        )


def _text_estimate(text: TextConfig, size: Size, captions: int, tokens: float, tflops: float) -> str:
    """Describe the size and the encoding time of one text family, for `tokens` per caption on average."""
    count = min(tokens + len(text.suffix) / CHARACTERS_PER_TOKEN, text.max_tokens)
    # bf16 is stored as it is; all other formats have a scale per token.
    scale = 0 if text.quantisation == "bf16" else SCALE_BYTES
    per_caption = count * (bytes_per_token(text.quantisation, size.width) + scale)
    terabytes = captions * per_caption / 1e12
    # Attention between tokens is left out: captions are short, so the blocks' matrices dominate.
    hours = 2 * captions * count * size.block_parameters / (tflops * 1e12) / 3600
    return (
        f"{per_caption / 1e3:,.1f} kB per caption ({count:.0f} tokens x {size.width}, {text.quantisation}), "
        f"{terabytes:.3g} TB in all, {hours:.3g} GPU-hours at {tflops:g} TFLOP/s"
    )


def _rows_by_reason(record: PlanRecord) -> Counter[str]:
    """Count the rows that the plan left out, over all source files."""
    reasons: Counter[str] = Counter()
    for file in record["files"]:
        reasons.update(file["dropped"])
    return reasons


def model_size(text: TextConfig) -> Size | None:
    """Read an LLM's sizes from a GGUF file's header, or from the `config.json` of a local folder.

    Returns:
        The sizes; None if they are not found.

    Raises:
        UserError: if a package or file that is named does not exist.
    """
    file = find_gguf(text.llm)
    if file is not None:
        # Keys start with the architecture: `llama.block_count`.
        metadata = {name.partition(".")[2]: value for name, value in GGUFFile(file).metadata.items()}
        return _size(metadata["embedding_length"], metadata["block_count"], metadata["feed_forward_length"])

    settings = Path(text.llm) / "config.json"
    if not settings.is_file():
        return None
    try:
        config = parse_json(read_bounded(settings))
        config = config.get("text_config", config)  # of a multimodal model
        for names in CONFIG_NAMES:
            if all(name in config for name in names):
                return _size(*(int(config[name]) for name in names))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{settings}: not a model's settings: {first_line(error)}: get it again") from error
    return None


def _size(width: int, depth: int, feed_forward: int) -> Size:
    """Count 4 w^2 for attention (an upper bound if keys are shared) and 3 w f for a gated feed-forward."""
    return Size(width, depth, depth * (4 * width * width + 3 * width * feed_forward))
