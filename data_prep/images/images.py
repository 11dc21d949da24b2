"""Decode an image file to upright RGB pixels of a bucket's size.

Every fault of a file becomes an `ImageError` with a reason from a short list, so that faults can be counted.
"""

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError, features

from data_prep.dataset.schema import Bucket
from data_prep.images.png import MAX_PROFILE_BYTES, without_foreign_chunks

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP"] + (["AVIF"] if features.check("avif") else [])
"""Formats that are decoded; those with a large attack surface are left out."""
MAX_PIXELS = 1 << 26
"""67 megapixels: a larger image is dropped before it is decoded. 16-bit RGBA of that size takes about 0.8
GB."""
MAX_FILE_BYTES = 256 << 20
MAX_LEVEL_CHANGE = 2
"""Color profiles that change no channel by more levels (of 255) than this are ignored."""
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transpose that makes the image upright."""
ORIENTED_SIDEWAYS = range(5, 9)
"""EXIF orientations that swap height and width."""

EMPTY = "image: empty"
UNKNOWN = "image: not a known format"
TOO_LARGE = "image: too many pixels"
DAMAGED = "image: damaged"


class ImageError(Exception):
    """An image that cannot be used.

    `reason` is one of the constants above; `detail` is the decoder's message.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        # An exception is pickled with its `args`, here the joined message, which is not what __init__ takes.
        return ImageError, (self.reason, self.detail)


@dataclass(frozen=True)
class Crop:
    """The part of the upright original that is used, in its pixels."""

    left: float
    top: float
    right: float
    bottom: float


def image_size(data: bytes) -> tuple[int, int]:
    """Return height and width of the upright image, from its header alone.

    Raises:
        ImageError: if the header is not an image's, or announces too many pixels.
    """
    with faults_as_image_errors(), open_image(data) as image:
        return _upright_size(image)


def decode_image(data: bytes, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decode to an upright sRGB image.

    Embedded profiles, CMYK and 16 bits are converted, alpha is composited on white, animations yield their
    first frame, and the EXIF orientation is applied.

    Args:
        data: the file.
        at_least: (height, width) of which a smaller image suffices. JPEG is then decoded at 1/2, 1/4 or 1/8,
            which takes a fraction of the time.

    Raises:
        ImageError: if the data is no image, is damaged or is too large.
    """
    with faults_as_image_errors(), open_image(data) as image:
        # MPO is Pillow's name for the JPEGs of phones that contain a second image.
        if at_least is not None and image.format in ("JPEG", "MPO"):
            # `draft` counts in the file's own orientation, `at_least` in that of the upright image.
            height, width = at_least
            if _orientation(image) in ORIENTED_SIDEWAYS:
                height, width = width, height
            image.draft(None, (width, height))

        image.load()
        # Not by `ImageOps.exif_transpose`: it also writes the EXIF again, which fails for many odd tags.
        turn = TURNS.get(_orientation(image))
        upright = image.copy() if turn is None else image.transpose(turn)
        return to_rgb(upright, image.format)


def resize_crop(
    image: Image.Image, bucket: Bucket, original: tuple[int, int] | None = None
) -> tuple[Image.Image, Crop]:
    """Resize (antialiased) so that the image covers the bucket, and crop to the center.

    Args:
        image: the decoded image.
        bucket: the size to reach.
        original: (height, width) before a scaled decode; None = that of `image`.

    Returns:
        The image, and the crop in pixels of the original.
    """
    width, height = image.size
    scale = max(bucket.height / height, bucket.width / width)
    # Rounding must not put the box outside the image: Pillow refuses such a box.
    crop_height, crop_width = min(bucket.height / scale, height), min(bucket.width / scale, width)

    # Resizing from the box saves a copy of the cropped image.
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    box = (left, top, left + crop_width, top + crop_height)
    resized = image.resize((bucket.width, bucket.height), Image.Resampling.BICUBIC, box=box)

    # A scaled decode rounds both sides up, so the two factors can differ.
    rows, columns = (original[0] / height, original[1] / width) if original else (1.0, 1.0)
    return resized, Crop(box[0] * columns, box[1] * rows, box[2] * columns, box[3] * rows)


def fit_bucket(data: bytes, bucket: Bucket) -> tuple[Image.Image, Crop]:
    """Decode at the cheapest sufficient scale, then resize and crop to the bucket.

    Raises:
        ImageError: if the data is no image, is damaged or is too large.
    """
    # The smallest size that covers the bucket is enough.
    height, width = image_size(data)
    scale = max(bucket.height / height, bucket.width / width)
    covering = (max(1, min(height, int(height * scale))), max(1, min(width, int(width * scale))))
    return resize_crop(decode_image(data, at_least=covering), bucket, (height, width))


def encode_image(image: Image.Image, image_format: str, quality: int) -> bytes:
    """Encode as `jpeg`, `png` or `webp`; JPEG keeps full chroma resolution from quality 90 on."""
    buffer = io.BytesIO()
    if image_format == "jpeg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    elif image_format == "webp":
        image.save(buffer, "WEBP", quality=quality)
    else:
        image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """Open an image, and check the announced size before a pixel is decoded.

    Raises:
        ImageError: if the data is empty or too large.
    """
    if not data:
        raise ImageError(EMPTY)
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(TOO_LARGE, f"{len(data)} bytes")

    # Opening reads the header alone.
    with Image.open(io.BytesIO(without_foreign_chunks(data)), formats=FORMATS) as image:
        width, height = image.size
        if not width or not height:
            raise ImageError(DAMAGED, f"{height}x{width} pixels")
        if width * height > MAX_PIXELS:
            raise ImageError(TOO_LARGE, f"{height}x{width}")
        yield image


@contextmanager
def faults_as_image_errors() -> Iterator[None]:
    """Turn every exception into an `ImageError`: decoders of foreign bytes raise all kinds."""
    try:
        with warnings.catch_warnings():
            # Pillow warns about odd metadata, which would fill the log of a large dataset.
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(UNKNOWN) from error
    except Image.DecompressionBombError as error:
        raise ImageError(TOO_LARGE, str(error)) from error
    except Exception as error:
        raise ImageError(DAMAGED, f"{type(error).__name__}: {error}"[:200]) from error


def _orientation(image: Image.Image) -> Any:
    """Return the EXIF orientation; 1 (upright) if there is none, or the EXIF cannot be read.

    A foreign file's value may be of any type.
    """
    # The EXIF of a PNG may come after its pixels. Faults in those are the image's, so they are raised here.
    if image.format == "PNG" and "exif" not in image.info:
        image.load()
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Pillow raises all kinds for damaged EXIF, and none of them says anything about the pixels.
        return 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if _orientation(image) in ORIENTED_SIDEWAYS else (height, width)


def to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """Convert an image to sRGB on white; `file_format` is Pillow's name of its file's format."""
    profile = image.info.get("icc_profile") or b""
    if image.mode == "RGB" and "transparency" not in image.info and not profile:
        return image

    alpha = None
    if image.mode.startswith("I"):
        # Pillow clips 16 bits at 255 instead of scaling them.
        levels = np.asarray(image)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            alpha = Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8))
        gray = levels.astype(np.float32) / 257
        image = Image.fromarray(gray.round().clip(0, 255).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        # Many programs write the fourth byte of a BMP's pixels as 0 and do not mean transparency.
        if file_format == "BMP" and alpha.getextrema() == (0, 0):
            alpha = None
        # The profile of a gray image applies to one channel.
        image = rgba.getchannel("R") if image.mode in ("L", "LA", "La") else rgba.convert("RGB")
    elif image.mode == "P":
        image = image.convert("RGB")

    image = _to_srgb(image, profile)
    if alpha is not None:
        # After the conversion: the profile describes the stored colors, not those mixed with white.
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=alpha)
        image = white

    # An encoder would write the profile again, which no longer applies.
    image.info = {}
    return image


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert by the embedded profile. A broken profile, or one for another mode, is ignored, as browsers
    do."""
    transform = _transform(profile, image.mode) if 0 < len(profile) <= MAX_PROFILE_BYTES else None
    return transform.apply(image) if transform else image.convert("RGB")


# Building a transform is slow, and most files share a few profiles.
@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB; None if the profile is broken or has no visible effect.

    Most profiles in the wild are sRGB's own, which have none.
    """
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.ImageCmsTransform(source, SRGB, mode, "RGB", intent, flags=flags)
    except (OSError, ValueError, ImageCms.PyCMSError):
        return None

    # CMYK is always converted: Pillow's own conversion is only an approximation.
    bands = len(Image.new(mode, (1, 1)).getbands())
    if bands > 3:
        return transform

    # Apply it to a regular grid of colors.
    levels = [np.arange(0, 256, 17, dtype=np.uint8)] * bands
    grid = np.stack(np.meshgrid(*levels), -1).reshape(1, -1, bands)
    probe = Image.fromarray(grid.squeeze(-1) if bands == 1 else grid, mode)
    change = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    return transform if np.abs(change).max() > MAX_LEVEL_CHANGE else None
