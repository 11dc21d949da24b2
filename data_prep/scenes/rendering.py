"""Render a scene at any resolution: shapes and textures are functions of the plane, averaged over pixels."""

import io
import math
from typing import Protocol

import numpy as np
from PIL import Image

from data_prep.scenes.grammar import EXTENTS, Color, Ground, Scene, Shape, Texture, Tone

PALETTE: dict[Color, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "orange": (250, 130, 20),
    "yellow": (250, 220, 30),
    "green": (20, 170, 60),
    "cyan": (30, 205, 215),
    "blue": (40, 80, 235),
    "purple": (140, 40, 200),
    "pink": (255, 90, 180),
}
"""RGB of each color. The hues stay apart when chroma is stored at half resolution, as JPEG does."""
DARK = 0.48
"""Brightness of a texture's marks relative to the object's color. The hue of an object is uniform."""
GRAY_LEVELS: dict[Tone, int] = {"white": 245, "dark grey": 50, "black": 15}
"""Level of each ground. Colors have a luma in between, so shapes stay sharp where chroma is blurred."""
PATTERN_CONTRAST = 12
"""Gray levels by which a ground's pattern varies in both directions."""
LOW_RESOLUTION = 200
"""Pixels per unit below which a pixel is sampled 8 x 8 times instead of 4 x 4."""
MARGIN = 1.1
"""Size of the window that is rendered for an object, relative to its extent: stars reach beyond theirs."""

_STAR = [
    (math.sin(k * math.pi / 5) * radius, 0.08 - math.cos(k * math.pi / 5) * radius)
    for k, radius in enumerate([1.08, 0.46] * 5)
]
"""Corners of a five-pointed star."""


def inside_shape(shape: Shape, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return a boolean mask of the points inside a shape.

    Args:
        shape: the shape.
        u: coordinates to the right, -1 to 1 over the shape's square; broadcast with `v`.
        v: coordinates downwards, likewise.
    """
    match shape:
        case "circle":
            return u**2 + v**2 <= 1
        case "square":
            return np.maximum(abs(u), abs(v)) <= 0.92
        case "triangle":
            return (v <= 0.85) & (abs(u) <= (v + 1) / 1.85)
        case "diamond":
            return abs(u) / 0.85 + abs(v) <= 1
        case "cross":
            return (np.minimum(abs(u), abs(v)) <= 0.37) & (np.maximum(abs(u), abs(v)) <= 1)
        case "heart":
            # The curve (x^2 + y^2 - 1)^3 = x^2 y^3, scaled and moved to fill the shape's square.
            x, y = 1.14 * u, 0.115 - 1.115 * v
            return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3
        case "star":
            return _inside_polygon(_STAR, u, v)


def _inside_polygon(corners: list[tuple[float, float]], u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return a boolean mask of the points inside a polygon, by the even-odd rule."""
    inside = np.zeros(np.broadcast(u, v).shape, bool)
    for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
        # A horizontal edge crosses no ray to the right, and its slope would divide by 0.
        if v0 != v1:
            inside ^= ((v0 > v) != (v1 > v)) & (u < (u1 - u0) * (v - v0) / (v1 - v0) + u0)
    return inside


def on_texture_mark(texture: Texture, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return a boolean mask of the points on a texture's dark marks; coordinates as in `inside_shape`."""
    match texture:
        case "plain":
            return np.zeros(np.broadcast(u, v).shape, bool)
        case "striped":  # five horizontal bands, the second and the fourth dark
            return np.broadcast_to(np.floor((v + 1) / 0.4) % 2 == 1, np.broadcast(u, v).shape)
        case "dotted":  # three by three
            return ((u + 1) % (2 / 3) - 1 / 3) ** 2 + ((v + 1) % (2 / 3) - 1 / 3) ** 2 <= 0.23**2
        case "checkered":  # four by four
            return (np.floor((u + 1) / 0.5) + np.floor((v + 1) / 0.5)) % 2 == 1


def coverage(
    shape: Shape, texture: Texture, u: np.ndarray, v: np.ndarray, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of each pixel that a shape's bright and dark parts cover.

    Args:
        shape: the shape.
        texture: its texture, which decides what is dark.
        u: evenly spaced centers of the columns, in the shape's frame.
        v: evenly spaced centers of the rows.
        samples: each pixel is sampled `samples` x `samples` times.

    Returns:
        Bright and dark shares, fp64 [len(v), len(u)] each.
    """
    # Sample each pixel at the centers of samples x samples cells.
    steps = (np.arange(samples) + 0.5) / samples - 0.5
    fine_u = (u[:, None] + (u[1] - u[0]) * steps).reshape(1, -1)
    fine_v = (v[:, None] + (v[1] - v[0]) * steps).reshape(-1, 1)

    inside = inside_shape(shape, fine_u, fine_v)
    dark = inside & on_texture_mark(texture, fine_u, fine_v)

    blocks = (len(v), samples, len(u), samples)
    shape_share, dark_share = (mask.reshape(blocks).mean((1, 3)) for mask in (inside, dark))
    return shape_share - dark_share, dark_share


def render_scene(scene: Scene, height: int, width: int) -> np.ndarray:
    """Render a scene; its plane is stretched if its aspect is not width / height.

    Returns:
        The image, uint8 [height, width, 3].
    """
    # Objects do not overlap, so their order does not matter.
    image = render_ground(scene.ground, scene.seed, height, width)
    for item in scene.objects:
        blend_object(image, scene.sides, item, item.x, item.y, scene.scale * EXTENTS[item.size])
    return to_levels(image)


def to_levels(image: np.ndarray) -> np.ndarray:
    """Round an image fp64 [H, W, 3] to uint8."""
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


class Looks(Protocol):
    """The attributes of an object that do not depend on where it is."""

    @property
    def colour(self) -> Color:
        """Name of its color."""
        ...

    @property
    def shape(self) -> Shape:
        """Name of its shape."""
        ...

    @property
    def texture(self) -> Texture:
        """Name of its texture."""
        ...


def blend_object(
    image: np.ndarray, sides: tuple[float, float], item: Looks, x: float, y: float, extent: float
) -> None:
    """Blend one object into an image.

    Args:
        image: fp64 [H, W, 3].
        sides: width and height of the plane, in scene units.
        item: its color, shape and texture.
        x: its center, in scene units.
        y: its center, in scene units.
        extent: side of its square, in scene units.
    """
    height, width, _ = image.shape
    height, width, _ = image.shape
    half = extent / 2
    pixels_per_unit = width / sides[0], height / sides[1]

    # Only the pixels around the object are rendered.
    columns, u = _pixel_window(x, half, pixels_per_unit[0], width)
    rows, v = _pixel_window(y, half, pixels_per_unit[1], height)
    samples = 8 if pixels_per_unit[0] < LOW_RESOLUTION else 4
    bright, dark = coverage(item.shape, item.texture, u, v, samples)

    # What the object does not cover of a pixel keeps its value.
    color = np.array(PALETTE[item.colour], float)
    window = image[rows, columns]
    window *= (1 - bright - dark)[:, :, None]
    window += (bright + DARK * dark)[:, :, None] * color


def _pixel_window(center: float, half: float, pixels_per_unit: float, side: int) -> tuple[slice, np.ndarray]:
    """Return the pixels that an object can touch along one axis, and their centers in the object's frame."""
    first = max(0, math.floor((center - half * MARGIN) * pixels_per_unit))
    last = min(side, math.ceil((center + half * MARGIN) * pixels_per_unit))
    return slice(first, last), ((np.arange(first, last) + 0.5) / pixels_per_unit - center) / half


def render_ground(ground: Ground, seed: int, height: int, width: int) -> np.ndarray:
    """Return a gray image, fp64 [height, width, 3]. A pattern has the same periods at any resolution."""
    # The unit is the same along both axes, so patterns are not stretched.
    unit = math.sqrt(height * width)
    y, x = np.mgrid[:height, :width] / unit

    match ground.pattern:
        case "plain":
            wave = np.zeros((height, width))
        case "lined":
            wave = np.sin(2 * math.pi * 12 * (x + y))
        case "checked":
            wave = np.where((np.floor(16 * x) + np.floor(16 * y)) % 2 == 1, 1.0, -1.0)
        case "speckled":  # a table of grains, so that all resolutions have the same ones
            grains = np.random.default_rng(seed).uniform(-1, 1, (64, 64))
            wave = grains[(y * 32).astype(int) % 64, (x * 32).astype(int) % 64]
    levels = GRAY_LEVELS[ground.tone] + PATTERN_CONTRAST * wave
    return np.repeat(levels[:, :, None], 3, axis=2)


def encode_png(image: np.ndarray) -> bytes:
    """Encode an image uint8 [H, W, 3] as a PNG file."""
    file = io.BytesIO()
    # The level must stay: the plan hashes these bytes, and `pairs` encodes them again.
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()
