"""Images as files: PNG with the prompt and settings in it, and a grid with captions."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

MARGIN = 12
MIN_SHOWN = 128
"""Side in pixels below which images are enlarged in a grid, so that a caption fits below."""


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Return pixels [B, 3, H, W] in [-1, 1] as images, or [B, 3, 1, H, W] of a network of clips."""
    if pixels.ndim == 5:
        pixels = pixels.squeeze(2)
    values = (
        ((pixels.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    )
    return [Image.fromarray(value) for value in values]


def save_png(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG with its settings in it: `prompt` as text, all of `settings` as JSON under `li-dit`."""
    texts = PngImagePlugin.PngInfo()
    # iTXt is UTF-8; PNG's plain text chunk allows Latin-1 only.
    texts.add_itxt("prompt", str(settings.get("prompt", "")))
    texts.add_itxt("li-dit", json.dumps(settings, ensure_ascii=False, sort_keys=True))
    image.save(path, pnginfo=texts)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings that `save_png` wrote into an image."""
    with Image.open(path) as image:
        return json.loads(image.info["li-dit"])


def _font(size: float) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which has accents, Greek and Cyrillic; Pillow's own font lacks them."""
    import matplotlib  # comes with the font, and takes a second that a run without a grid need not wait for

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def make_grid(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None
) -> Image.Image:
    """Lay out images in rows on white, each with its caption below.

    Args:
        images: of any sizes.
        captions: one per image.
        columns: images per row; None = as square a grid as possible.
    """
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    # A whole number, the same for all images, so that they keep their relative sizes.
    factor = max(1, math.ceil(MIN_SHOWN / max(max(image.size) for image in images)))
    width = max(image.width for image in images) * factor
    height = max(image.height for image in images) * factor

    font = _font(max(11.0, width / 20))
    lines = [_wrap(caption, font, width, most=3) for caption in captions]
    line_height = math.ceil(font.getbbox("Ag")[3] * 1.25)
    # The longest caption decides for all, so that the rows line up.
    below = max(len(caption) for caption in lines) * line_height + MARGIN

    rows = math.ceil(len(images) / columns)
    size = columns * (width + MARGIN) + MARGIN, rows * (height + below + MARGIN) + MARGIN
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for index, (image, caption_lines) in enumerate(zip(images, lines, strict=True)):
        left = MARGIN + index % columns * (width + MARGIN)
        top = MARGIN + index // columns * (height + below + MARGIN)
        shown = image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
        grid.paste(shown, (left + (width - shown.width) // 2, top + (height - shown.height) // 2))
        for number, line in enumerate(caption_lines):
            place = (left + width / 2, top + height + 4 + number * line_height)
            draw.text(place, line, fill="#333333", font=font, anchor="ma")
    return grid


def _wrap(caption: str, font: Any, width: int, most: int) -> list[str]:
    """Break a caption into at most `most` lines of `width` pixels; the last one ends with an ellipsis if that
    is too little."""
    lines: list[str] = []
    # A word wider than the line gets a line of its own, which `_shorten` cuts.
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} …"]
    return [_shorten(line, font, width) for line in lines]


def _shorten(line: str, font: Any, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    start = line.rstrip(" …")
    while start and font.getlength(f"{start}…") > width:
        start = start[:-1]
    return f"{start}…"
