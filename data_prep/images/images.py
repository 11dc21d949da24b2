"""From the bytes of an image file to upright RGB pixels of a bucket's size.

Every way in which a file can be bad ends in an `ImageError` with a reason from a short list, so that it can be counted.
"""

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError, features

from data_prep.dataset.schema import Bucket

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP"] + (["AVIF"] if features.check("avif") else [])
"""Formats that are read; those with a large attack surface are left out."""
MAX_PIXELS = 1 << 26
"""67 megapixels: a larger image is dropped before it is decoded. 16-bit RGBA of that size needs about 0.8 GB."""
MAX_FILE_BYTES = 256 << 20
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
MAX_PROFILE_BYTES = 4 << 20
ORIENTED_SIDEWAYS = range(5, 9)
"""EXIF orientations that swap height and width."""

EMPTY = "image: empty"
UNKNOWN = "image: not a known format"
TOO_LARGE = "image: too many pixels"
DAMAGED = "image: damaged"


class ImageError(Exception):
    """An image that cannot be used: `reason` is one of a few, `detail` is the decoder's word."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return ImageError, (self.reason, self.detail)


@dataclass(frozen=True)
class Crop:
    """The part of the upright original that is kept, in its pixels: left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width of the upright image, from its header alone.

    Raises:
        ImageError: the header is not that of an image, or promises too many pixels.
    """
    with _faults_as_image_errors(), _opened(data) as image:
        return _upright_size(image)


def decode_image(data: bytes, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decode to an upright sRGB image: embedded profile, CMYK and 16 bits converted, alpha on white, first frame, EXIF
    orientation applied.

    `at_least` (height, width) permits a smaller image of at least this size: JPEG is then decoded at 1/2, 1/4 or 1/8, which
    costs a fraction of the time.

    Raises:
        ImageError: the data is no image, is damaged or is too large.
    """
    with _faults_as_image_errors(), _opened(data) as image:
        if at_least is not None and image.format in ("JPEG", "MPO"):
            height, width = at_least
            if _orientation(image) in ORIENTED_SIDEWAYS:
                height, width = width, height
            # MPO is how Pillow names the JPEGs of phones that hold a second picture
            image.draft(None, (width, height))
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def resize_crop(image: Image.Image, bucket: Bucket, original: tuple[int, int] | None = None) -> tuple[Image.Image, Crop]:
    """Resize (antialiased) so that the image covers the bucket, keep the centre.

    `original` is the (height, width) before a scaled decode; the crop is in those pixels.
    """
    width, height = image.size
    scale = max(bucket.height / height, bucket.width / width)
    kept_height, kept_width = min(bucket.height / scale, height), min(bucket.width / scale, width)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    box = (left, top, left + kept_width, top + kept_height)
    resized = image.resize((bucket.width, bucket.height), Image.Resampling.BICUBIC, box=box)
    rows, columns = (original[0] / height, original[1] / width) if original else (1.0, 1.0)
    return resized, Crop(box[0] * columns, box[1] * rows, box[2] * columns, box[3] * rows)


def fit_bucket(data: bytes, bucket: Bucket) -> tuple[Image.Image, Crop]:
    """Decode at the cheapest sufficient scale, resize and crop to the bucket.

    Raises:
        ImageError: as `decode_image`.
    """
    height, width = image_size(data)
    scale = max(bucket.height / height, bucket.width / width)
    covering = (max(1, min(height, int(height * scale))), max(1, min(width, int(width * scale))))
    return resize_crop(decode_image(data, at_least=covering), bucket, (height, width))


def encode_image(image: Image.Image, image_format: str, quality: int) -> bytes:
    """Encode as `jpeg`, `png` or `webp`; JPEG keeps full colour resolution from quality 90 on."""
    buffer = io.BytesIO()
    if image_format == "jpeg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    elif image_format == "webp":
        image.save(buffer, "WEBP", quality=quality)
    else:
        image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open and check the promised size before a pixel is decoded.

    Raises:
        ImageError: empty, unknown, or too large.
    """
    if not data:
        raise ImageError(EMPTY)
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(TOO_LARGE, f"{len(data)} bytes")
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if not width or not height:
            raise ImageError(DAMAGED, f"{height}x{width} pixels")
        if width * height > MAX_PIXELS:
            raise ImageError(TOO_LARGE, f"{height}x{width}")
        yield image


@contextmanager
def _faults_as_image_errors() -> Iterator[None]:
    """Decoders of foreign bytes raise whatever they please: each becomes an `ImageError` that is counted."""
    try:
        with warnings.catch_warnings():
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


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if _orientation(image) in ORIENTED_SIDEWAYS else (height, width)


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile") or b""
    if image.mode == "RGB" and "transparency" not in image.info and not profile:
        return image
    alpha = None
    if image.mode.startswith("I"):
        # Pillow clips 16 bits at 255 instead of scaling them.
        grey = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colours = image.convert("RGBA")
        alpha = colours.getchannel("A")
        image = colours.getchannel("R") if image.mode in ("L", "LA", "La") else colours.convert("RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    image = _to_srgb(image, profile)
    if alpha is not None:
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=alpha)
        image = white
    image.info = {}  # else an encoder would write the profile that no longer holds
    return image


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert by the embedded profile; one that is broken, or not of the image's mode, is ignored, as browsers do."""
    transform = _transform(profile, image.mode) if 0 < len(profile) <= MAX_PROFILE_BYTES else None
    return transform.apply(image) if transform else image.convert("RGB")


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None if it changes nothing to speak of (most profiles in the wild are sRGB's) or is broken."""
    relative, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.ImageCmsTransform(source, SRGB, mode, "RGB", relative, flags=flags)
    except (OSError, ValueError, ImageCms.PyCMSError):
        return None
    bands = len(Image.new(mode, (1, 1)).getbands())
    if bands > 3:
        return transform
    levels = np.stack(np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * bands), -1).reshape(1, -1, bands)
    probe = Image.fromarray(levels.squeeze(-1) if bands == 1 else levels, mode)
    change = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    return transform if np.abs(change).max() > 2 else None
