"""Write the YAML of a dataset from what is stored at a path: `python -m data_prep init`.

Each value that is chosen has a comment with the numbers that it follows from.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from data_prep.config import BucketConfig, SourceConfig
from data_prep.images.buckets import TOO_CROPPED, TOO_SMALL, assign, make_buckets
from data_prep.sources.sample import printable
from data_prep.sources.survey import Survey, count, listed, survey
from data_prep.sources.text_columns import TextColumn
from model.common.errors import UserError
from model.common.settings import load_yaml
from model.common.yaml_writing import Line, as_value, as_yaml, refuse_existing, write_new

RESOLUTIONS = (1024, 512, 256)
TINY = 64
"""Resolution of images that reach none of these."""
MOST = 0.75
"""Share of the images that have to reach a resolution."""
MAX_ENLARGED = 4.0
"""Largest factor by which tiny images are enlarged."""
NEARLY = 1.05
"""Largest aspect ratio of images that count as square."""
SMALL = 20_000
"""Images below which parts are small, so that a small batch still mixes many of them."""
LOSSLESS = ("PNG", "GIF", "BMP")
LETTERS_PER_TOKEN = 2
"""A cautious figure: English has four, other languages fewer."""
MAX_TOKENS = (64, 128, 256)

SHIPPED = Path(__file__).parent / "datasets"
MARKUP = {"qwen": "qwen", "smollm": "smollm2", "llama-3": "llama3", "llama3": "llama3"}
"""Part of an LLM's name -> the shipped LLM with the same chat markup."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `init`."""
    add = parser.add_argument
    add("path", metavar="FOLDER|URI", help="images, tars or tables: a folder, a glob or a file; or s3://...")
    add("--out", type=Path, help="the YAML to write, which must not exist (default <name>.yaml)")
    add("--name", help="name of the dataset (default: that of the folder)")
    add("--store", help="folder or s3://bucket/prefix of the prepared data (default runs/<name>/store)")
    add("--image", default="", help="column or suffix of the images, if it is not found or is another one")
    add(
        "--llm",
        action="append",
        default=[],
        metavar="NAME",
        help="an LLM to encode the captions: smollm2, gemma, llama3, qwen, or a folder, a hub name or a GGUF "
        "file; repeat it for more",
    )
    add("--vae", default="", help="folder or hub name of the VAE; a folder may be trained later")


def init(arguments: argparse.Namespace) -> None:
    """Look at a folder or bucket, and write a dataset's YAML that fits it."""
    name = arguments.name or _default_name(arguments.path)
    out: Path = arguments.out or Path(f"{name}.yaml")
    # Before minutes of reading.
    refuse_existing(out)

    found = survey(arguments.path, arguments.image)
    lines = [
        *_head(name, arguments.store or f"runs/{name}/store", arguments.path, found),
        *_captions(found),
        *_images(found),
        *_families(name, out, arguments.vae, arguments.llm, found),
    ]
    write_new(out, as_yaml(lines))
    print(f"{out}: {found.source.kind}, {found.rows:,} rows read; next: python -m data_prep plan {out}")


def _default_name(path: str) -> str:
    """Return a dataset's name from the last folder in a path that has no wildcard."""
    parts = path if "://" in path else str(Path(path).expanduser().absolute())
    plain = [part for part in parts.rstrip("/").split("/") if part and not re.search(r"[*?\[]", part)]
    name = re.sub(r"[^\w.-]+", "_", re.sub(r"\.(tar|parquet)$", "", plain[-1] if plain else "")).strip("._")
    if not name:
        raise UserError(f"{path}: no name for the dataset follows from it: give --name")
    return name[:100]


def _head(name: str, store: str, path: str, found: Survey) -> Iterator[Line]:
    """Yield the lines before the captions."""
    part = "all of them" if found.complete else "a sample"
    yield "", f"Written by `python -m data_prep init {path}`, from what is there; change what does not fit."
    yield "", f"Files: {found.files:,} ({listed(found.suffixes)})."
    yield (
        "",
        f"Read: {found.rows:,} rows of {found.sampled_units:,} of {count(found.units, found.unit)}, {part}: "
        f"{len(found.sizes):,} usable images"
        + (f", {sum(found.reasons.values()):,} others ({listed(found.reasons)})." if found.reasons else "."),
    )
    yield f"name: {as_value(name)}", "The name of a folder in the store."
    yield f"store: {as_value(store)}", "Where the prepared data goes: a local folder, or s3://bucket/prefix."
    yield "sources:", ""
    yield f"  - kind: {found.source.kind}", f"{count(found.units, found.unit)}, of {found.files:,} files."
    yield f"    path: {as_value(found.source.path)}", ""
    if found.source.image != SourceConfig().image:
        yield f"    image: {as_value(found.source.image)}", "Where the images are in each row."


def _captions(found: Survey) -> Iterator[Line]:
    """Yield the captions of the source.

    Raises:
        UserError: if there are none.
    """
    columns = found.texts.captions()
    if not columns:
        fields = ", ".join(printable(name) for name in list(found.texts.columns)[:20]) or "no text"
        raise UserError(
            f"{found.source.path}: {len(found.sizes):,} images, but no captions among their fields "
            f"({fields}): put a text file next to each image (1.png, 1.txt), or a field `caption`"
        )

    names = _kind_names(columns)
    covered = found.texts.covered(columns)
    seen = "; ".join(
        f"{name}: in {len(column.values):,} rows, such as {column.example[:60]!r}"
        for name, column in columns.items()
    )
    yield (
        f"    captions: {as_value(dict(zip(names, columns, strict=True)))}",
        f"{covered:,} of {found.texts.rows:,} rows have one. {seen}",
    )
    yield f"caption_kinds: {as_value(names)}", "All are stored; a stage sets their weights."


def _kind_names(columns: dict[str, TextColumn]) -> list[str]:
    """Return a name for the kind of each caption: `original` for the likeliest, else its field's."""
    names = ["original"]
    for column in list(columns)[1:]:
        name = re.sub(r"\W+", "_", column).strip("_") or "caption"
        while name in names:
            name += "_"
        names.append(name)
    return names


def choose_buckets(sizes: Sequence[tuple[int, int]]) -> BucketConfig:
    """Return the buckets for images of these sizes, each height and width."""
    square = sum(max(size) <= NEARLY * min(size) for size in sizes) >= 0.95 * len(sizes)
    aspect = 1.0 if square else 2.0
    for resolution in RESOLUTIONS:
        buckets = BucketConfig(resolution, aspect, 32)
        if _reasons(buckets, sizes)[TOO_SMALL] <= (1 - MOST) * len(sizes):
            return buckets

    # Tiny images are enlarged a little rather than dropped.
    tiny = BucketConfig(TINY, aspect, 16)
    while _reasons(tiny, sizes)[TOO_SMALL] > (1 - MOST) * len(sizes) and tiny.max_upscale < MAX_ENLARGED:
        tiny.max_upscale += 0.5

    return tiny


def _reasons(settings: BucketConfig, sizes: Sequence[tuple[int, int]]) -> Counter[str]:
    """Count the images that have no bucket, by reason."""
    buckets = make_buckets(settings)
    assigned = [assign(buckets, *size, settings.max_upscale, settings.max_crop) for size in sizes]
    return Counter(reason for reason in assigned if isinstance(reason, str))


def _images(found: Survey) -> Iterator[Line]:
    """Yield the settings of buckets, parts and image files."""
    sizes = found.sizes
    buckets = choose_buckets(sizes)
    reasons = _reasons(buckets, sizes)
    sides = sorted(min(size) for size in sizes)
    aspects = sorted(max(size) / min(size) for size in sizes)
    reached = len(sizes) - reasons[TOO_SMALL]

    yield (
        "dedupe: {exact: true}",
        "Of equal files the first is kept; `near: 3` finds resized copies too.",
    )
    yield (
        "buckets:",
        f"Short sides of the {len(sizes):,} images that were read: {sides[0]:,} to {sides[-1]:,} pixels, "
        f"half of them at most {sides[(len(sides) - 1) // 2]:,}.",
    )
    yield (
        f"  resolution: {buckets.resolution}",
        f"{reached:,} of {len(sizes):,} images are large enough, {reasons[TOO_SMALL]:,} would be dropped "
        f"as too small; the largest of 256, 512 and 1024 that {MOST:.0%} reach, otherwise {TINY}.",
    )
    yield (
        f"  max_aspect: {buckets.max_aspect:g}",
        f"Long side / short side: half at most {aspects[(len(aspects) - 1) // 2]:.2f}, the largest "
        f"{aspects[-1]:.2f}; {reasons[TOO_CROPPED]:,} images would be dropped, since the crop would take too "
        "much of them.",
    )
    yield f"  step: {buckets.step}", "A multiple of the VAE's 8 x patches of 2."
    yield (
        f"  max_upscale: {buckets.max_upscale:g}",
        "Images that would have to grow by a larger factor are dropped.",
    )

    small = found.complete and found.rows < SMALL
    why = f"{found.rows:,} rows" + ("" if found.complete else " were read, and there are more")
    yield f"part_rows: {256 if small else 1024}", f"Rows per part: {why}."
    lossless = sum(found.formats[name] for name in LOSSLESS)
    png = 2 * lossless >= len(sizes) and buckets.resolution <= 256
    yield (
        f"image_format: {'png' if png else 'jpeg'}",
        f"{listed(found.formats)}. "
        + ("Small and without loss already." if png else "JPEG of quality 95 takes less space than PNG."),
    )


@cache
def shipped_llms() -> dict[str, dict[str, Any]]:
    """Return the LLMs of the datasets that are shipped, by their names."""
    paths = (SHIPPED / f"{name}.yaml" for name in ("demo", "example"))
    return {entry["name"]: dict(entry) for path in paths for entry in load_yaml(path)["text"]}


def _families(name: str, out: Path, vae: str, llms: Sequence[str], found: Survey) -> Iterator[Line]:
    """Yield the families that are asked for; those that are not, as comments."""
    own = f"runs/{name}/vae"
    entry = f"  - {{name: latents, vae: {as_value(vae or own)}}}"
    why = (
        f"A folder or hub name of a VAE; `python -m pipeline.train_vae {out} --out {vae or own}` trains a "
        "small one."
    )
    if vae:
        yield "latents:", why
        yield entry, ""
    else:
        yield "# latents:", f"No --vae was given. {why}"
        yield f"# {entry}", ""

    longest = max(column.longest for column in found.texts.captions().values())
    if llms:
        yield "text:", "The LLMs that read the captions, each with the markup of a prompt around them."
    else:
        yield "# text:", "No --llm was given. For example:"
    names: list[str] = []
    for llm in llms or ["smollm2"]:
        family, note = _llm(llm, longest)
        if family["name"] in names:
            raise UserError(f"--llm {llm}: a family {family['name']} was named before: give each LLM once")
        names.append(family["name"])
        for line in _entry(family):
            yield (f"  {line}", note) if llms else (f"#   {line}", "")
            note = ""


def _entry(family: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of an item of a list."""
    for place, (key, content) in enumerate(family.items()):
        yield f"{'  ' if place else '- '}{key}: {as_value(content)}"


def _llm(llm: str, longest: int) -> tuple[dict[str, Any], str]:
    """Return the text family of an LLM, and a comment on it.

    Args:
        llm: a shipped one, or a folder, hub name or GGUF file.
        longest: letters of the longest caption that was read.
    """
    tokens = next((limit for limit in MAX_TOKENS if LETTERS_PER_TOKEN * limit >= longest), MAX_TOKENS[-1])
    note = f"The longest caption that was read has {longest:,} letters."
    shipped = shipped_llms()
    if llm in shipped:
        return {**shipped[llm], "max_tokens": tokens}, note

    base = re.sub(r"\.gguf$", "", llm.rstrip("/").rpartition("/")[2])
    family: dict[str, Any] = {"name": re.sub(r"\W+", "_", base.lower()).strip("_") or "llm", "llm": llm}
    alike = next((name for part, name in MARKUP.items() if part in base.lower()), "")
    if alike:
        family |= {key: shipped[alike][key] for key in ("prefix", "suffix")}
        note += f" The markup is that of {shipped[alike]['llm']}: compare it with the LLM's chat template."
    else:
        family |= {"prefix": "{instruction} ", "suffix": "\n"}
        note += " No markup of this LLM is known: put that of its chat template into prefix and suffix."

    return {**family, "max_tokens": tokens}, note
