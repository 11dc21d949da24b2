"""What a plan will cost, printed before the work is done: parts, bytes and GPU-hours, by formula."""

import json
from pathlib import Path
from typing import NamedTuple

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import read_plan_record
from data_prep.dataset.schema import Manifest
from data_prep.store.store import Store
from model.config import TextConfig
from model.encoders.gguf import GGUFFile, find_gguf
from model.encoders.quantize import bytes_per_token

LETTERS_PER_TOKEN = 4.0
"""Of English text under the usual vocabularies; an estimate until the captions are encoded."""
SCALE_BYTES = 4


class Size(NamedTuple):
    """What the formula needs to know of an LLM."""

    width: int
    depth: int
    block_parameters: int
    """Of all blocks together; embeddings and head cost no multiplications here."""


def print_budget(config: DatasetConfig, dataset: Store, manifest: Manifest, tflops: float) -> None:
    """Print what the plan holds and what its families will take.

    A token costs `width` values and a scale; encoding costs 2 FLOPs a block parameter and token. Captions are counted at
    `LETTERS_PER_TOKEN`; `tflops` is the rate that one GPU sustains.
    """
    record = read_plan_record(dataset)
    rows = sum(sum(parts) for parts in manifest.buckets.values())
    read = sum(file["rows"] for file in record["files"])
    captions, letters = sum(record["captions"]["kept"].values()), sum(record["captions"]["letters"].values())
    tokens = letters / max(1, captions) / LETTERS_PER_TOKEN
    print(f"plan: {read:,} rows read, {rows:,} planned in {len(manifest.parts):,} parts of {len(manifest.buckets)} buckets")
    print(f"      {captions:,} captions of {letters / max(1, captions):.0f} letters, about {tokens:.0f} tokens, on average")
    for reason, count in sorted(_reasons(record).items(), key=lambda item: -item[1]):
        print(f"      {count:,} left out: {reason}")
    for text in config.text:
        size = model_size(text)
        if size is None:
            print(f"text family {text.name}: {text.llm} is not here, or does not say its sizes: no estimate")
            continue
        count = min(tokens + len(text.suffix) / LETTERS_PER_TOKEN, text.max_tokens)
        per_caption = count * (
            bytes_per_token(text.quantisation, size.width) + (0 if text.quantisation == "bf16" else SCALE_BYTES)
        )
        flops = 2 * captions * count * size.block_parameters
        print(
            f"text family {text.name}: {per_caption / 1e3:,.1f} kB a caption "
            f"({count:.0f} tokens x {size.width}, {text.quantisation}), "
            f"{captions * per_caption / 1e12:.3g} TB in all, {flops / (tflops * 1e12) / 3600:.3g} GPU-hours at {tflops:g} TFLOP/s"
        )


def _reasons(record: dict) -> dict[str, int]:  # type: ignore[type-arg]
    found: dict[str, int] = {}
    for file in record["files"]:
        for reason, count in file["dropped"].items():
            found[reason] = found.get(reason, 0) + count
    return found


def model_size(text: TextConfig) -> Size | None:
    """Sizes from a GGUF's header or a local folder's `config.json`; None where they are not found.

    Raises:
        UserError: a package or file that is named does not exist.
    """
    file = find_gguf(text.llm)
    if file is not None:
        metadata = GGUFFile(file).metadata
        named = {name.partition(".")[2]: value for name, value in metadata.items()}
        return _size(named["embedding_length"], named["block_count"], named["feed_forward_length"])
    settings = Path(text.llm) / "config.json"
    if not settings.is_file():
        return None
    config = json.loads(settings.read_text())
    config = config.get("text_config", config)
    for names in (("hidden_size", "num_hidden_layers", "intermediate_size"), ("d_model", "num_layers", "d_ff")):  # the second: T5
        if all(name in config for name in names):
            return _size(*(config[name] for name in names))
    return None


def _size(width: int, depth: int, feed_forward: int) -> Size:
    """Attention at 4 w^2 (an upper bound where keys and values are shared) and a gated feed-forward at 3 w f."""
    return Size(width, depth, depth * (4 * width * width + 3 * width * feed_forward))
