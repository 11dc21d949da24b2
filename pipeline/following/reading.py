"""Reading a picture of a scene without a network: its objects with colour, shape, size, texture and place.

The ground has no colour and the objects do, so objects are the connected regions of enough chroma and of one hue. Each is
compared with every shape and texture at its own place and size: the templates are the drawing's own functions, and what counts
is how much of the region's RGB values a template's tones explain, with free colours for ground, bright and dark parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_prep.scenes.drawing import PALETTE, coverage
from data_prep.scenes.grammar import COLOURS, EXTENTS, MAX_OBJECTS, SHAPES, SIZES, TEXTURES, Colour, Shape, Size, Texture

CHROMA = 36.0
"""Levels of chroma from which a pixel belongs to an object: half of what the palest dark mark has."""
MIN_AREA = 0.0035
"""Area of the smallest region that is looked at, in squared scene units; a third of the smallest object's."""
MAX_REGIONS = 2 * MAX_OBJECTS
"""The largest ones that are looked at: a picture with more shows no scene, and noise has hundreds."""
ONE_HUE = 0.85
"""Share of a region's pixels of one hue from which it is one object, whatever the rest."""
WINDOW = 1.15
GRID = 18
"""Templates are compared on GRID x GRID points over -WINDOW to WINDOW of the shape's own square."""
FIT = 0.5
"""A shape is recognised where its template explains at least this share of the variance; else it is no shape."""
NOISE = 5.0
"""Levels by which a pixel may differ from a template for no reason: nothing is made of less contrast."""
FLAT = 0.62
"""An object is plain where the marks that fit it best have more than this share of the bright part's tone."""
COARSE = 128
"""Pictures of more pixels per unit are averaged down to about this: nothing of an object is lost."""
BLURS = (0.2, 0.7, 1.1)
"""Standard deviations of the blur, in pixels, that pictures are compared at: from none to speak of to mild."""
_LUMA = np.array([[0.299, 0.587, 0.114], [-0.084, -0.166, 0.25], [0.25, -0.209, -0.041]]).T
"""RGB -> luma and half of each chroma: JPEG keeps chroma at half the resolution, so it says less about a shape."""

_CHROMA_OF = np.array([PALETTE[name] for name in COLOURS], float)
_CHROMA_OF -= _CHROMA_OF.mean(1, keepdims=True)


@dataclass(frozen=True)
class SeenObject:
    """One object as it is recognised in a picture; None where an attribute is none of the grammar's."""

    colour: Colour
    shape: Shape | None
    size: Size
    texture: Texture | None
    x: float
    y: float
    """Centre, in scene units."""


def read_scene(picture: np.ndarray) -> list[SeenObject]:
    """The objects of a picture uint8 [H, W, 3]."""
    pixels = np.asarray(picture, np.float64)
    shrink = max(1, round(np.sqrt(pixels.shape[0] * pixels.shape[1]) / COARSE))
    if shrink > 1:
        height, width = (side // shrink * shrink for side in pixels.shape[:2])
        pixels = pixels[:height, :width].reshape(height // shrink, shrink, width // shrink, shrink, 3).mean((1, 3))
    scale = float(np.sqrt(pixels.shape[0] * pixels.shape[1]))  # pixels per unit
    chroma = pixels - pixels.mean(2, keepdims=True)
    strength = np.linalg.norm(chroma, axis=2)
    ground = strength <= np.quantile(strength, 0.4)
    chroma -= np.median(chroma[ground], axis=0)  # a picture may have a tint
    strength = np.linalg.norm(chroma, axis=2)
    hues = np.argmax(chroma @ (_CHROMA_OF / np.linalg.norm(_CHROMA_OF, axis=1, keepdims=True)).T, axis=2)
    regions = _regions(strength > CHROMA, hues, MIN_AREA * scale**2)
    largest = sorted(range(len(regions)), key=lambda number: -regions[number][0].sum())[:MAX_REGIONS]
    return [_recognize(pixels, regions[number][0], COLOURS[regions[number][1]], scale) for number in sorted(largest)]


def _regions(foreground: np.ndarray, hues: np.ndarray, least: float) -> list[tuple[np.ndarray, int]]:
    """Connected regions as masks with their hue; a region of several hues falls apart into them."""
    found = []
    labels = _components(foreground)
    for number, window in enumerate(ndimage.find_objects(labels), 1):
        whole = np.zeros_like(foreground)
        whole[window] = labels[window] == number
        votes = np.bincount(hues[whole], minlength=len(COLOURS))
        if votes.sum() < least:
            continue
        if votes.max() >= ONE_HUE * votes.sum():
            found.append((whole, int(votes.argmax())))
            continue
        for hue in np.flatnonzero(votes >= least).tolist():
            parts = _components(whole & (hues == hue))
            found += [(parts == part, hue) for part in range(1, parts.max() + 1) if (parts == part).sum() >= least]
    return found


def _components(mask: np.ndarray) -> NDArray[np.int32]:
    """Number of each pixel's connected region, from 1; 0 outside."""
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, output=labels)
    return labels


@dataclass(frozen=True)
class _Template:
    """One shape in its own frame, seen through one blur: for each texture, what it can look like."""

    parts: np.ndarray
    """[textures, GRID * GRID, 3]: shares of ground, bright and dark part."""
    bases: np.ndarray
    """[textures * 3, GRID * GRID]: the same made orthonormal; plain has no dark part."""


_POINTS = np.linspace(-WINDOW, WINDOW, GRID)
_STEP = float(_POINTS[1] - _POINTS[0])


@cache
def _moments(shape: Shape) -> tuple[float, float, float]:
    """Area and centroid of a shape in its own frame."""
    points = np.linspace(-WINDOW, WINDOW, 64)
    share = coverage(shape, "plain", points, points, 4)[0]
    total = float(share.sum())
    return total * float(points[1] - points[0]) ** 2, float(share.sum(0) @ points) / total, float(share.sum(1) @ points) / total


@cache
def _template(shape: Shape, blur: float) -> _Template:
    """`blur` is a standard deviation in the shape's frame."""
    fine, beyond = 4, 6  # finer points, and some beyond the window for the blur
    points = (np.arange(-beyond, GRID * fine + beyond) - (fine - 1) / 2) / fine * _STEP - WINDOW
    columns = []
    for texture in TEXTURES:
        shares = [ndimage.gaussian_filter(part, blur / _STEP * fine) for part in coverage(shape, texture, points, points, 2)]
        inner = slice(beyond, -beyond)
        bright, dark = (part[inner, inner].reshape(GRID, fine, GRID, fine).mean((1, 3)).ravel() for part in shares)
        columns.append(np.stack([1 - bright - dark, bright, dark], axis=1))
    parts = np.stack(columns)
    bases = np.linalg.qr(parts)[0]
    bases[0, :, :2], bases[0, :, 2] = np.linalg.qr(parts[0, :, :2])[0], 0.0
    return _Template(parts, np.ascontiguousarray(bases.swapaxes(1, 2)).reshape(-1, GRID * GRID))


@dataclass(frozen=True)
class _Fit:
    """The best pose of one shape: share of variance left over by each texture, and what was compared."""

    shape: Shape
    left: np.ndarray
    radius: float
    x: float
    y: float
    template: _Template
    patch: np.ndarray

    @property
    def least(self) -> float:
        return float(self.left.min())


def _recognize(pixels: np.ndarray, region: np.ndarray, colour: Colour, scale: float) -> SeenObject:
    rows, columns = np.nonzero(region)
    first = [max(0, int(each.min() - 0.3 * (np.ptp(each) + 4))) for each in (rows, columns)]
    last = [int(each.max() + 0.3 * (np.ptp(each) + 4)) + 1 for each in (rows, columns)]
    window = pixels[first[0] : last[0], first[1] : last[1]] @ _LUMA
    size, y, x = np.sqrt(len(rows)), rows.mean() - first[0], columns.mean() - first[1]

    def start(shape: Shape) -> tuple[float, float, float]:
        area, right, down = _moments(shape)
        radius = float(size / np.sqrt(area))
        return radius, float(x - right * radius), float(y - down * radius)

    fits = [_fit(window, shape, *start(shape), (0.8, 0.9, 1.0, 1.08), (0.0,)) for shape in SHAPES]
    fits.sort(key=lambda fit: fit.least)
    near = (-0.1, 0.0, 0.1)
    fits = [_fit(window, fit.shape, fit.radius, fit.x, fit.y, (0.95, 1.0, 1.05), near) for fit in fits[:3]]
    best = min(fits, key=lambda fit: fit.least)
    best = _fit(window, best.shape, best.radius, best.x, best.y, (0.975, 1.0, 1.025), (-0.05, 0.0, 0.05))
    middle = np.sqrt(EXTENTS["small"] * EXTENTS["large"]) / 2
    return SeenObject(
        colour,
        best.shape if best.least <= 1 - FIT else None,
        SIZES[int(best.radius / scale > middle)],
        _texture(best),
        (best.x + first[1] + 0.5) / scale,
        (best.y + first[0] + 0.5) / scale,
    )


def _fit(
    window: np.ndarray, shape: Shape, radius: float, x: float, y: float, scales: Sequence[float], shifts: Sequence[float]
) -> _Fit:
    """Compare a shape at all poses: radius times `scales`, moved by `shifts` of it in both directions."""
    height, width, _ = window.shape
    best: _Fit | None = None
    for scale in scales:
        r = radius * scale
        spread = max(1.0, _STEP * r)
        steps = (np.asarray(shifts)[:, None] + _POINTS).ravel() * r  # every shift's points after one another
        down, right = _interpolation(y + steps, height, spread), _interpolation(x + steps, width, spread)
        patches = right @ (down @ window.reshape(height, -1)).reshape(-1, width, 3)  # [shifts * GRID, shifts * GRID, 3]
        patches = patches.reshape(len(shifts), GRID, len(shifts), GRID, 3).swapaxes(1, 2).reshape(-1, GRID * GRID, 3)
        squares = (patches**2).sum((1, 2))
        noise = NOISE**2 * GRID**2
        total = ((patches - patches.mean(1, keepdims=True)) ** 2).sum((1, 2)) + noise
        for blur in BLURS:
            template = _template(shape, round(float(np.sqrt(1 / 12 + spread**2 / 6 + blur**2) / r), 2))
            explained = ((template.bases @ patches) ** 2).reshape(len(patches), len(TEXTURES), -1).sum(2)
            left = (squares[:, None] - explained + noise) / total[:, None]
            number = int(left.min(1).argmin())
            if best is None or left[number].min() < best.least:
                shift_y, shift_x = (shifts[index] for index in divmod(number, len(shifts)))
                best = _Fit(shape, left[number], r, x + shift_x * r, y + shift_y * r, template, patches[number])
    assert best is not None, "there is at least one pose"
    return best


def _interpolation(places: np.ndarray, length: int, spread: float) -> NDArray[np.float64]:
    """Weights [len(places), length] that read a line of pixels at `places`, linearly over `spread` pixels; its ends go on."""
    inside = np.clip(places, 0, length - 1)
    weights = np.maximum(0.0, 1 - abs(inside[:, None] - np.arange(length)) / spread)
    return weights / weights.sum(1, keepdims=True)


def _texture(fit: _Fit) -> Texture:
    """Plain where no marks are darker than the rest; else the texture that leaves least."""
    best = 1 + int(np.argmin(fit.left[1:]))
    _, bright, dark = np.linalg.lstsq(fit.template.parts[best], fit.patch, rcond=None)[0][:, 0]  # lumas
    return "plain" if dark > FLAT * bright else TEXTURES[best]
