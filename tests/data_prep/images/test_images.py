import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from data_prep.dataset.schema import Bucket
from data_prep.images.images import (
    DAMAGED,
    EMPTY,
    MAX_PIXELS,
    MAX_PROFILE_BYTES,
    TOO_LARGE,
    UNKNOWN,
    ImageError,
    decode_image,
    encode_image,
    fit_bucket,
    image_size,
    resize_crop,
)
from tests.helpers.raw_material import bomb, encoded, smooth_image

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP"] + (["AVIF"] if features.check("avif") else [])


def mean_color(image):
    return np.asarray(image.convert("RGB"), np.float64).mean((0, 1))


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_keeps_its_colors(image_format):
    image = Image.new("RGB", (40, 24), (200, 40, 90))
    decoded = decode_image(encoded(image, image_format))
    assert decoded.mode == "RGB"
    assert decoded.size == (40, 24)
    assert np.abs(mean_color(decoded) - (200, 40, 90)).max() < 6


def test_cmyk():
    cmyk = Image.new("RGB", (32, 32), (255, 0, 0)).convert("CMYK")
    assert np.abs(mean_color(decode_image(encoded(cmyk, "JPEG", quality=95))) - (255, 0, 0)).max() < 6


def icc(space, tags, connection=b"XYZ "):
    """A profile of version 2 for displays."""
    body, table = b"", struct.pack(">I", len(tags))
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    white = struct.pack(">iii", 63190, 65536, 54061)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(
        ">I4sI4s4s4s12x4s", start + len(body), b"", 0x02100000, kind, space, connection, b"acsp"
    )
    return (header + bytes(68 - len(header)) + white).ljust(128, b"\0") + table + body


def xyz(*values):
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *[round(value * 65536) for value in values])


def gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


TEXTS = {
    b"desc": b"desc\0\0\0\0\0\0\0\1\0".ljust(92, b"\0"),
    b"cprt": b"text\0\0\0\0\0",
    b"wtpt": xyz(0.9642, 1, 0.8249),
}
SRGB_PRIMARIES = [(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]


def rgb_profile(primaries, power):
    red, green, blue = (xyz(*values) for values in primaries)
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(power))
    return icc(b"RGB ", {**TEXTS, b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, **curves})


def cmyk_profile():
    """A profile unlike Pillow's own conversion: the first ink alone is a middle gray, all other combinations
    are black."""
    lab = bytearray(bytes([0, 128, 128]) * 16)
    lab[0:3], lab[24:27] = bytes([255, 128, 128]), bytes([136, 128, 128])
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", *[65536 * (n % 4 == 0) for n in range(9)])
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + bytes(lab) + ramp * 3
    return icc(b"CMYK", {**TEXTS, b"A2B0": table, b"A2B1": table}, b"Lab ")


SWAPPED = rgb_profile(SRGB_PRIMARIES[::-1], 2.2)
"""Red and blue are swapped."""


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_embedded_profiles_are_converted_to_srgb(image_format):
    image = Image.new("RGB", (32, 32), (230, 30, 60))
    decoded = decode_image(encoded(image, image_format, icc_profile=SWAPPED))
    assert np.abs(mean_color(decoded) - (60, 30, 230)).max() < 9
    assert "icc_profile" not in Image.open(io.BytesIO(encode_image(decoded, "png", 95))).info
    bright = decode_image(
        encoded(image.convert("L"), image_format, icc_profile=icc(b"GRAY", {**TEXTS, b"kTRC": gamma(1.0)}))
    )
    if image_format != "WEBP":  # WebP has no gray images, so the profile does not fit
        assert mean_color(bright).min() > mean_color(image.convert("L")).max() + 30


def test_profiles_of_cmyk_and_under_alpha():
    ink = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    assert np.abs(mean_color(decode_image(encoded(ink, "JPEG", icc_profile=cmyk_profile()))) - 127).max() < 12
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 8, 4))
    pixels = np.asarray(decode_image(encoded(half, "PNG", icc_profile=SWAPPED))).astype(int)
    assert np.abs(pixels[:4] - 255).max() == 0
    assert np.abs(pixels[4:] - (0, 0, 255)).max() < 4


def test_profiles_that_are_srgb_or_broken_change_nothing():
    image = smooth_image(3)
    plain = np.asarray(decode_image(encoded(image)))
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other_space = icc(b"GRAY", {**TEXTS, b"kTRC": gamma(1.0)})
    for profile in (own, b"no profile", SWAPPED[:200], SWAPPED[:-40], other_space):
        assert (np.asarray(decode_image(encoded(image, "PNG", icc_profile=profile))) == plain).all()
    huge = decode_image(encoded(image, "JPEG", quality=95, icc_profile=SWAPPED + bytes(MAX_PROFILE_BYTES)))
    assert (np.asarray(huge) == np.asarray(decode_image(encoded(image, "JPEG", quality=95)))).all()


def test_transparency_of_a_palette_becomes_white():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(0, (0, 0, 8, 4))
    pixels = np.asarray(decode_image(encoded(image, "PNG", transparency=0)))
    assert (pixels[:4] == 255).all()
    assert (pixels[4:] == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [("RGBA", (0, 0, 0, 0), 255), ("RGBA", (0, 0, 0, 128), 127), ("LA", (0, 0), 255)],
)
def test_alpha_becomes_white(mode, color, expected):
    pixels = np.asarray(decode_image(encoded(Image.new(mode, (8, 8), color))))
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(1, 64).repeat(8, 0)
    pixels = np.asarray(decode_image(encoded(Image.fromarray(ramp))))
    assert np.abs(pixels[0, :, 0].astype(int) - np.linspace(0, 255, 64)).max() <= 1


TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation -> transpose that stores an upright image in it."""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = Image.new("RGB", (64, 32), (255, 255, 255))
    upright.paste((255, 0, 0), (0, 0, 16, 16))
    stored = upright.transpose(TRANSPOSES[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "JPEG", quality=95, exif=exif)
    assert image_size(data) == (32, 64)
    for decoded in (
        decode_image(data),
        decode_image(data, at_least=(16, 32)),
        fit_bucket(data, Bucket(16, 32))[0],
    ):
        pixels = np.asarray(decoded.resize((64, 32)))
        assert np.abs(pixels[4:12, 4:12].astype(int) - (255, 0, 0)).max() < 16
        assert np.abs(pixels[20:, 20:].astype(int) - 255).max() < 16


def test_animations_yield_their_first_frame():
    frames = [Image.new("RGB", (16, 16), color) for color in ((255, 0, 0), (0, 255, 0))]
    for image_format in ("GIF", "WEBP"):
        data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
        assert np.abs(mean_color(decode_image(data)) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", EMPTY),
        (b"no image at all", UNKNOWN),
        (bomb(), TOO_LARGE),
        (bomb(1, MAX_PIXELS + 1), TOO_LARGE),
        (encoded(smooth_image(0), "TIFF"), UNKNOWN),
        (encoded(smooth_image(0))[:-60], DAMAGED),
        (encoded(smooth_image(0), "JPEG")[:-200], DAMAGED),
    ],
)
def test_bad_images_have_a_reason(data, reason):
    with pytest.raises(ImageError) as error:
        decode_image(data)
    assert error.value.reason == reason


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_damage_never_raises_anything_else(image_format, data):
    good = bytearray(encoded(smooth_image(1, 24, 24), image_format))
    for place in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=4)):
        good[place] ^= 1 << data.draw(st.integers(0, 7))
    cut = bytes(good[: data.draw(st.integers(0, len(good)))])
    reason = ""
    try:
        assert decode_image(cut).mode == "RGB"
    except ImageError as error:
        reason = error.reason
    assert reason in ("", EMPTY, UNKNOWN, TOO_LARGE, DAMAGED)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(8, 200),
    st.integers(8, 200),
    st.sampled_from([Bucket(32, 32), Bucket(16, 48), Bucket(48, 16)]),
)
def test_crop_is_centered_and_has_the_buckets_aspect(height, width, bucket):
    image, crop = resize_crop(Image.new("RGB", (width, height)), bucket)
    assert image.size == (bucket.width, bucket.height)
    assert 0 <= crop.left < crop.right <= width
    assert 0 <= crop.top < crop.bottom <= height
    assert crop.left == pytest.approx(width - crop.right)
    assert crop.top == pytest.approx(height - crop.bottom)
    assert (crop.right - crop.left) / (crop.bottom - crop.top) == pytest.approx(bucket.width / bucket.height)


@pytest.mark.parametrize("side", [512, 700, 1024, 1500])
def test_scaled_decode_gives_nearly_the_same_image(side):
    noise = np.random.default_rng(0).normal(0, 1, (side // 4, side // 4, 3))
    image = Image.fromarray((128 + 40 * noise).clip(0, 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.LANCZOS
    )
    data = encoded(image, "JPEG", quality=95)
    quick, crop = fit_bucket(data, Bucket(256, 256))
    plain, expected = resize_crop(decode_image(data), Bucket(256, 256))
    error = np.asarray(quick, np.float64) - np.asarray(plain, np.float64)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 30  # for noise, the worst case
    assert (crop.right, crop.bottom) == pytest.approx((expected.right, expected.bottom))


@pytest.mark.parametrize("image_format", ["jpeg", "png", "webp"])
def test_encoding_round_trip(image_format):
    data = encode_image(smooth_image(3), image_format, 95)
    assert Image.open(io.BytesIO(data)).format == image_format.upper()
    difference = np.asarray(decode_image(data), float) - np.asarray(smooth_image(3), float)
    assert np.abs(difference).mean() < (0.01 if image_format == "png" else 4)


def chunk(kind, content, checksum=None):
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_with(extra, before=b"IDAT"):
    data = encoded(smooth_image(3))
    at = data.index(before) - 4
    return data[:at] + extra + data[at:]


BIG = b"workflow" * 700_000
FOREIGN = {
    "compressed text": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(BIG)),
    "international text": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(BIG)),
    "plain text": chunk(b"tEXt", b"workflow\0" + BIG),
    "orientation text that is a bomb": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(BIG)),
    "large profile": chunk(b"iCCP", b"icc\0\0" + zlib.compress(SWAPPED + bytes(MAX_PROFILE_BYTES))),
    "profile of an unknown compression": chunk(b"iCCP", b"icc\0\7" + zlib.compress(SWAPPED)),
    "empty profile": chunk(b"iCCP", b""),
    "wrong checksum of a text": chunk(b"tEXt", b"Comment\0hi", 1),
    "wrong checksum of a profile": chunk(b"iCCP", b"icc\0\0" + zlib.compress(SWAPPED), 1),
    "resolution that is cut": chunk(b"pHYs", b"\0"),
    "EXIF that is none": chunk(b"eXIf", b"garbage"),
    "unknown private chunk": chunk(b"zzZz", b"x" * 1000),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_a_chunk_that_is_not_needed_never_costs_an_image(name, before):
    data = png_with(FOREIGN[name], before)
    assert image_size(data) == (48, 48)
    assert (np.asarray(decode_image(data)) == np.asarray(smooth_image(3))).all()


def test_profiles_between_pillows_limit_and_ours_are_used():
    padded = SWAPPED + bytes(2 << 20)
    data = png_with(chunk(b"iCCP", b"icc\0\0" + zlib.compress(padded)))
    plain = png_with(chunk(b"iCCP", b"icc\0\0" + zlib.compress(SWAPPED)))
    assert (np.asarray(decode_image(data)) == np.asarray(decode_image(plain))).all()
    assert (np.asarray(decode_image(data)) != np.asarray(smooth_image(3))).any()


def test_orientation_in_the_texts_of_a_png():
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    wide = encoded(smooth_image(3, 24, 48))
    at = wide.index(b"IDAT") - 4
    turned = wide[:at] + chunk(b"iTXt", xmp) + wide[at:]
    assert image_size(turned) == (48, 24)
    assert decode_image(turned).size == (24, 48)


def jpeg_with_exif(entries, extra=b""):
    """Return a JPEG of 24 x 48 pixels with an EXIF block of (tag, type, count, value) entries."""
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, kind, count, value in entries:
        block += struct.pack("<HHII", tag, kind, count, value)
    block += struct.pack("<I", 0) + extra
    data = encoded(smooth_image(3, 24, 48), "JPEG", quality=95)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


odd_entries = st.tuples(
    st.sampled_from([0x10F, 0x111, 0x11A, 0x128, 0x131, 0x132, 0x201, 0x213, 0x2BC, 0x8769, 0x8825, 0x927C]),
    st.sampled_from([*range(14), 16, 129, 65535]),
    st.sampled_from([0, 1, 2, 4, 100, 2**31, 2**32 - 1]),
    st.sampled_from([0, 1, 8, 26, 38, 200, 60000, 2**32 - 1]),
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([1, 6, 8]), st.lists(odd_entries, max_size=4), st.binary(max_size=40))
def test_the_orientation_counts_whatever_else_the_exif_contains(orientation, entries, extra):
    data = jpeg_with_exif([(0x112, 3, 1, orientation), *entries], extra)
    sideways = orientation > 1
    assert image_size(data) == ((48, 24) if sideways else (24, 48))
    assert decode_image(data).size == ((24, 48) if sideways else (48, 24))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_exif_of_any_bytes_never_costs_an_image(block):
    data = encoded(smooth_image(3), "JPEG", quality=95)
    block = b"Exif\0\0" + block
    odd = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    assert decode_image(odd).mode == "RGB"


def test_the_transparent_level_of_sixteen_bits_becomes_white():
    levels = np.full((8, 8), 30000, np.uint16)
    levels[:4] = 100
    data = encoded(Image.fromarray(levels))
    at = data.index(b"IDAT") - 4
    pixels = np.asarray(decode_image(data[:at] + chunk(b"tRNS", struct.pack(">H", 30000)) + data[at:]))
    assert (pixels[4:] == 255).all()
    assert (pixels[:4] == 0).all()


@pytest.mark.parametrize("alpha", [0, 1])
def test_an_alpha_of_zeros_in_a_bmp_is_no_transparency(alpha):
    image = Image.new("RGBA", (8, 8), (200, 30, 60, 0))
    image.putpixel((0, 0), (200, 30, 60, alpha * 255))
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 8, -8, 1, 32, 3, 256, 0, 0, 0, 0) + masks + bytes(52)
    pixels = np.asarray(image)[..., [2, 1, 0, 3]].tobytes()
    data = b"BM" + struct.pack("<IHHI", 14 + 108 + 256, 0, 0, 14 + 108) + header + pixels
    expected = (255, 255, 255) if alpha else (200, 30, 60)
    assert tuple(np.asarray(decode_image(data))[7, 7]) == expected
