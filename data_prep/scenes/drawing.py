"""Drawing a scene at any resolution: shapes and textures as functions of the plane, averaged over each pixel's area."""

import io
import math

import numpy as np
from PIL import Image

from data_prep.scenes.grammar import EXTENTS, Colour, Ground, Scene, SceneObject, Shape, Texture, Tone

PALETTE: dict[Colour, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "orange": (250, 130, 20),
    "yellow": (250, 220, 30),
    "green": (20, 170, 60),
    "cyan": (30, 205, 215),
    "blue": (40, 80, 235),
    "purple": (140, 40, 200),
    "pink": (255, 90, 180),
}
"""Colours whose hues stay apart when chroma is stored at half resolution, as JPEG does."""
DARK = 0.48
"""Marks of a texture are this much of the object's colour: the hue of an object is the same everywhere."""
GREY: dict[Tone, int] = {"white": 245, "dark grey": 50, "black": 15}
"""Between the luma of the colours, so that shapes stay sharp where chroma is blurred."""
PATTERN_CONTRAST = 12
"""Levels of grey by which a ground's pattern goes up and down."""

_STAR = [
    (math.sin(k * math.pi / 5) * radius, 0.08 - math.cos(k * math.pi / 5) * radius)
    for k in range(10)
    for radius in [1.08 if k % 2 == 0 else 0.46]
]
"""Corners of a five-pointed star."""


def inside(shape: Shape, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points lie within the shape; u to the right, v downwards, both -1 to 1 over the shape's square."""
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
            x, y = 1.14 * u, 0.115 - 1.115 * v
            return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3
        case "star":
            return _in_polygon(_STAR, u, v)


def _in_polygon(corners: list[tuple[float, float]], u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Even-odd rule."""
    within = np.zeros(np.broadcast(u, v).shape, bool)
    for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if v0 != v1:
            within ^= ((v0 > v) != (v1 > v)) & (u < (u1 - u0) * (v - v0) / (v1 - v0) + u0)
    return within


def marked(texture: Texture, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points lie on a texture's dark marks."""
    match texture:
        case "plain":
            return np.zeros(np.broadcast(u, v).shape, bool)
        case "striped":  # five horizontal bands, the second and the fourth dark
            return (np.floor((v + 1) / 0.4) % 2 == 1) & (u == u)
        case "dotted":  # three by three
            return ((u + 1) % (2 / 3) - 1 / 3) ** 2 + ((v + 1) % (2 / 3) - 1 / 3) ** 2 <= 0.23**2
        case "checkered":  # four by four
            return (np.floor((u + 1) / 0.5) + np.floor((v + 1) / 0.5)) % 2 == 1


def coverage(shape: Shape, texture: Texture, u: np.ndarray, v: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares of each pixel that the shape's bright and dark parts cover, fp64 [len(v), len(u)] each.

    `u` and `v` are the evenly spaced centres of the columns and the rows; each pixel is sampled `samples` x `samples` times.
    """
    steps = (np.arange(samples) + 0.5) / samples - 0.5
    fine_u = (u[:, None] + (u[1] - u[0]) * steps).reshape(1, -1)
    fine_v = (v[:, None] + (v[1] - v[0]) * steps).reshape(-1, 1)
    within = inside(shape, fine_u, fine_v)
    dark = within & marked(texture, fine_u, fine_v)
    blocks = (len(v), samples, len(u), samples)
    shape_share, dark_share = (part.reshape(blocks).mean((1, 3)) for part in (within, dark))
    return shape_share - dark_share, dark_share


def draw_scene(scene: Scene, height: int, width: int) -> np.ndarray:
    """The picture, uint8 [height, width, 3]; the scene's plane is stretched where its aspect is not width / height."""
    picture = np.repeat(_ground(scene.ground, scene.seed, height, width)[:, :, None], 3, axis=2)
    for item in scene.objects:
        _draw_object(picture, scene, item)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _draw_object(picture: np.ndarray, scene: Scene, item: SceneObject) -> None:
    height, width, _ = picture.shape
    pixels = [width / scene.sides[0], height / scene.sides[1]]  # per unit, along x and y
    half = EXTENTS[item.size] / 2
    first, last, axes = [0, 0], [0, 0], []
    for axis, centre in enumerate((item.x, item.y)):
        first[axis] = max(0, math.floor((centre - half * 1.1) * pixels[axis]))
        last[axis] = min((width, height)[axis], math.ceil((centre + half * 1.1) * pixels[axis]))
        axes.append(((np.arange(first[axis], last[axis]) + 0.5) / pixels[axis] - centre) / half)
    samples = 8 if pixels[0] < 200 else 4
    bright, dark = coverage(item.shape, item.texture, axes[0], axes[1], samples)
    colour = np.array(PALETTE[item.colour], float)
    window = picture[first[1] : last[1], first[0] : last[0]]
    window *= (1 - bright - dark)[:, :, None]
    window += (bright + DARK * dark)[:, :, None] * colour


def _ground(ground: Ground, seed: int, height: int, width: int) -> np.ndarray:
    """Levels of grey fp64 [height, width]; patterns have some 24 periods over the picture, whatever its resolution."""
    pixels = math.sqrt(height * width)
    y, x = np.mgrid[:height, :width] / pixels
    match ground.pattern:
        case "plain":
            wave = np.zeros((height, width))
        case "lined":
            wave = np.sin(2 * math.pi * 12 * (x + y))
        case "checked":
            wave = np.where((np.floor(16 * x) + np.floor(16 * y)) % 2 == 1, 1.0, -1.0)
        case "speckled":
            grains = np.random.default_rng(seed).uniform(-1, 1, (64, 64))
            wave = grains[(y * 32).astype(int) % 64, (x * 32).astype(int) % 64]
    return GREY[ground.tone] + PATTERN_CONTRAST * wave


def encode_png(picture: np.ndarray) -> bytes:
    """A picture uint8 [H, W, 3] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()
