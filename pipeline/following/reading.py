"""Read the objects of a scene's image without a network: color, shape, size, texture and position.

The ground is gray and objects are not, so an object is a connected region of enough chroma and of one hue.
Each region is compared with every shape and texture at its own position and size. The templates come from the
renderer's own functions. The score of a template is the share of the region's RGB variance that it explains,
with free colors for ground, bright and dark parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_prep.scenes.grammar import (
    COLORS,
    EXTENTS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    TEXTURES,
    Color,
    Shape,
    Size,
    Texture,
)
from data_prep.scenes.rendering import PALETTE, coverage

MIN_CHROMA = 36.0
"""Chroma, in levels, from which a pixel belongs to an object: half of the palest dark mark's."""
MIN_AREA = 0.0035
"""Area of the smallest region that counts, in squared scene units; a third of the smallest object's."""
MAX_REGIONS = 2 * MAX_OBJECTS
"""Only the largest regions are recognized: an image with more shows no scene, and noise has hundreds."""
ONE_HUE = 0.85
"""A region with this share of its pixels in one hue is one object."""
GROUND_QUANTILE = 0.4
"""Share of pixels, those of least chroma, that are taken for ground when the image's tint is measured."""
WINDOW = 1.15
GRID = 18
"""Templates are compared on GRID x GRID points over -WINDOW to WINDOW of the shape's own square."""
MIN_EXPLAINED = 0.5
"""A shape is recognized if its template explains at least this share of the variance; otherwise the shape is
None."""
NOISE = 5.0
"""Levels by which a pixel may differ from a template by chance; nothing rendered has less contrast."""
MAX_MARK_TONE = 0.62
"""Marks brighter than this, relative to the bright part, are no marks: the object is plain."""
MAX_PIXELS_PER_UNIT = 128
"""Images of more pixels per unit are averaged down to about this, which loses nothing of an object."""
BLURS = (0.2, 0.7, 1.1)
"""Standard deviations in pixels, from negligible to mild, of the blur that images may have undergone."""
SEARCH_STEPS = (
    ((0.8, 0.9, 1.0, 1.08), (0.0,), len(SHAPES)),
    ((0.95, 1.0, 1.05), (-0.1, 0.0, 0.1), 3),
    ((0.975, 1.0, 1.025), (-0.05, 0.0, 0.05), 1),
)
"""Coarse to fine: factors of the radius, shifts in radii, and number of best shapes that each step tries."""
_LUMA_CHROMA = np.array([[0.299, 0.587, 0.114], [-0.084, -0.166, 0.25], [0.25, -0.209, -0.041]]).T
"""RGB -> luma and half of each chroma: JPEG stores chroma at half the resolution, so it says less about a
shape."""

_PALETTE_CHROMA = np.array([PALETTE[name] for name in COLORS], float)
_PALETTE_CHROMA -= _PALETTE_CHROMA.mean(1, keepdims=True)
_HUES = (_PALETTE_CHROMA / np.linalg.norm(_PALETTE_CHROMA, axis=1, keepdims=True)).T
"""Unit vectors of the palette's chroma, [3, colors]."""


@dataclass(frozen=True)
class DetectedObject:
    """One object as it is recognized in an image."""

    colour: Color
    shape: Shape | None
    """None if no shape of the grammar fits."""
    size: Size
    texture: Texture
    x: float
    y: float
    """Center, in scene units."""


@dataclass(frozen=True)
class Blob:
    """A region of one color, of which nothing else is known."""

    colour: Color
    x: float
    y: float
    """Center of its pixels, in scene units."""
    side: float
    """Square root of its area, in scene units."""


def read_scene(image: np.ndarray, scale: float = 1.0) -> list[DetectedObject]:
    """Return the objects of an image uint8 [H, W, 3].

    Args:
        image: of a scene.
        scale: size of its objects, as `Scene.scale`.
    """
    pixels, pixels_per_unit, regions = _read_regions(image, scale)
    return [_recognize(pixels, mask, COLORS[hue], pixels_per_unit, scale) for mask, hue in regions]


def read_blobs(image: np.ndarray, scale: float = 1.0) -> list[Blob]:
    """Return the regions of an image, in a fraction of the time of `read_scene`, whose arguments it takes."""
    _, pixels_per_unit, regions = _read_regions(image, scale)
    blobs = []
    for mask, hue in regions:
        rows, columns = np.nonzero(mask)
        y, x, side = rows.mean() + 0.5, columns.mean() + 0.5, np.sqrt(len(rows))
        blobs.append(Blob(COLORS[hue], *(float(value / pixels_per_unit) for value in (x, y, side))))
    return blobs


def _read_regions(image: np.ndarray, scale: float) -> tuple[np.ndarray, float, list[tuple[np.ndarray, int]]]:
    """Return the pixels of an image, pixels per scene unit, and its largest regions with their hue."""
    pixels = _downscale(np.asarray(image, np.float64))
    pixels_per_unit = float(np.sqrt(pixels.shape[0] * pixels.shape[1]))

    chroma = _chroma_without_tint(pixels)
    hues = np.argmax(chroma @ _HUES, axis=2)
    foreground = np.linalg.norm(chroma, axis=2) > MIN_CHROMA

    regions = _find_regions(foreground, hues, MIN_AREA * (scale * pixels_per_unit) ** 2)
    by_size = sorted(range(len(regions)), key=lambda number: -regions[number][0].sum())

    return pixels, pixels_per_unit, [regions[number] for number in sorted(by_size[:MAX_REGIONS])]


def _downscale(pixels: np.ndarray) -> np.ndarray:
    """Average blocks of pixels until an image has about `MAX_PIXELS_PER_UNIT`."""
    height, width, _ = pixels.shape
    factor = max(1, round(np.sqrt(height * width) / MAX_PIXELS_PER_UNIT))
    if factor == 1:
        return pixels
    # Rows and columns at the end that do not fill a block are cut off.
    rows, columns = height // factor, width // factor
    blocks = pixels[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3)
    return blocks.mean((1, 3))


def _chroma_without_tint(pixels: np.ndarray) -> np.ndarray:
    """Return each pixel's chroma [H, W, 3], less the median of the ground's: an image may have a tint."""
    # More than this share of every scene is ground.
    chroma = pixels - pixels.mean(2, keepdims=True)
    strength = np.linalg.norm(chroma, axis=2)
    ground = strength <= np.quantile(strength, GROUND_QUANTILE)
    return chroma - np.median(chroma[ground], axis=0)


def _find_regions(
    foreground: np.ndarray, hues: np.ndarray, min_pixels: float
) -> list[tuple[np.ndarray, int]]:
    """Return connected regions as masks with their hue; a region of several hues is split by hue."""
    regions: list[tuple[np.ndarray, int]] = []
    labels = _components(foreground)
    for number, window in enumerate(ndimage.find_objects(labels), 1):
        region = np.zeros_like(foreground)
        region[window] = labels[window] == number

        votes = np.bincount(hues[region], minlength=len(COLORS))
        if votes.sum() < min_pixels:
            continue
        if votes.max() >= ONE_HUE * votes.sum():
            regions.append((region, int(votes.argmax())))
            continue

        # Objects of two hues touch in a blurred or generated image.
        for hue in np.flatnonzero(votes >= min_pixels).tolist():
            pieces = _components(region & (hues == hue))
            for piece in range(1, pieces.max() + 1):
                mask = pieces == piece
                if mask.sum() >= min_pixels:
                    regions.append((mask, hue))

    return regions


def _components(mask: np.ndarray) -> NDArray[np.int32]:
    """Return the number of each pixel's connected region, from 1; 0 outside the mask."""
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, output=labels)
    return labels


@dataclass(frozen=True)
class _Template:
    """One shape in its own frame, seen through one blur: its possible appearances, by texture."""

    parts: np.ndarray
    """[textures, GRID * GRID, 3]: shares of ground, bright and dark part."""
    bases: np.ndarray
    """[textures * 3, GRID * GRID]: the same, orthonormal; plain has no dark part."""


_POINTS = np.linspace(-WINDOW, WINDOW, GRID)
_STEP = float(_POINTS[1] - _POINTS[0])


@cache
def _moments(shape: Shape) -> tuple[float, float, float]:
    """Return area and centroid (x, y) of a shape in its own frame."""
    points = np.linspace(-WINDOW, WINDOW, 64)
    share = coverage(shape, "plain", points, points, 4)[0]
    total = float(share.sum())
    area = total * float(points[1] - points[0]) ** 2
    return area, float(share.sum(0) @ points) / total, float(share.sum(1) @ points) / total


@cache
def _template(shape: Shape, blur: float) -> _Template:
    """Build the template of a shape; `blur` is a standard deviation in the shape's frame."""
    # Blur on a finer grid, with a margin beyond the window.
    fine, margin = 4, 6
    points = (np.arange(-margin, GRID * fine + margin) - (fine - 1) / 2) / fine * _STEP - WINDOW
    inner = slice(margin, -margin)

    by_texture = []
    for texture in TEXTURES:
        shares = []
        for part in coverage(shape, texture, points, points, 2):
            blurred = ndimage.gaussian_filter(part, blur / _STEP * fine)
            shares.append(blurred[inner, inner].reshape(GRID, fine, GRID, fine).mean((1, 3)).ravel())
        bright, dark = shares
        by_texture.append(np.stack([1 - bright - dark, bright, dark], axis=1))

    parts = np.stack(by_texture)
    # The variance that free colors explain is the length of the projection on an orthonormal basis.
    bases = np.linalg.qr(parts)[0]
    # Plain has no dark part: for its column of zeros, QR returns an arbitrary vector.
    bases[0, :, :2], bases[0, :, 2] = np.linalg.qr(parts[0, :, :2])[0], 0.0

    return _Template(parts, np.ascontiguousarray(bases.swapaxes(1, 2)).reshape(-1, GRID * GRID))


@dataclass(frozen=True)
class _Fit:
    """A pose of one shape and how well it fits."""

    shape: Shape
    residuals: np.ndarray
    """Share of the variance that each texture leaves unexplained, [textures]."""
    radius: float
    """Half side of the shape's square, in pixels."""
    x: float
    y: float
    """Center, in pixels of the window."""
    template: _Template
    patch: np.ndarray
    """The window at the template's points, [GRID * GRID, 3]."""

    @property
    def residual(self) -> float:
        """Residual of the best texture."""
        return float(self.residuals.min())


def _recognize(
    pixels: np.ndarray, region: np.ndarray, color: Color, pixels_per_unit: float, scale: float
) -> DetectedObject:
    """Find the shape, pose and texture that explain a region best, from coarse to fine."""
    rows, columns = np.nonzero(region)
    row_window, column_window = _window(rows), _window(columns)
    window = pixels[row_window, column_window] @ _LUMA_CHROMA

    # Start each shape at the region's area and centroid.
    side = np.sqrt(len(rows))
    y, x = rows.mean() - row_window.start, columns.mean() - column_window.start
    poses: list[tuple[Shape, float, float, float]] = []
    for shape in SHAPES:
        area, right, down = _moments(shape)
        radius = float(side / np.sqrt(area))
        poses.append((shape, radius, float(x - right * radius), float(y - down * radius)))

    fits: list[_Fit] = []
    for factors, shifts, candidates in SEARCH_STEPS:
        fits = [_fit(window, *pose, factors, shifts) for pose in poses[:candidates]]
        fits.sort(key=lambda fit: fit.residual)
        poses = [(fit.shape, fit.radius, fit.x, fit.y) for fit in fits]
    best = fits[0]

    # between the two sizes, on a log scale
    threshold = scale * np.sqrt(EXTENTS["small"] * EXTENTS["large"]) / 2

    return DetectedObject(
        color,
        best.shape if best.residual <= 1 - MIN_EXPLAINED else None,
        SIZES[int(best.radius / pixels_per_unit > threshold)],
        _texture(best),
        # Indices count from the center of a pixel, scene units from the edge of the image: hence the half.
        (best.x + column_window.start + 0.5) / pixels_per_unit,
        (best.y + row_window.start + 0.5) / pixels_per_unit,
    )


def _window(indices: np.ndarray) -> slice:
    """Return the range of a region's rows or columns, with a margin on both sides."""
    margin = 0.3 * (np.ptp(indices) + 4)
    return slice(max(0, int(indices.min() - margin)), int(indices.max() + margin) + 1)


def _fit(
    window: np.ndarray,
    shape: Shape,
    radius: float,
    x: float,
    y: float,
    factors: Sequence[float],
    shifts: Sequence[float],
) -> _Fit:
    """Return the best of all poses of a shape: radius times `factors`, moved by `shifts` of it in both
    directions.

    Args:
        window: pixels around the region, in luma and chroma, [H, W, 3].
        shape: the shape.
        radius: half side of the shape's square, in pixels.
        x: its center in the window, in pixels.
        y: its center in the window, in pixels.
        factors: factors of the radius to try.
        shifts: shifts to try along each axis, in radii.
    """
    # Noise in numerator and denominator: a flat patch counts as unexplained, instead of 0 / 0.
    noise = NOISE**2 * GRID**2
    best: _Fit | None = None
    for factor in factors:
        scaled = radius * factor
        point_width = max(1.0, _STEP * scaled)
        patches = _sample_patches(window, scaled, x, y, shifts, point_width)
        squares = (patches**2).sum((1, 2))
        # A template can always explain a constant, so only the variance about the mean counts as explained.
        total = ((patches - patches.mean(1, keepdims=True)) ** 2).sum((1, 2)) + noise

        for blur in BLURS:
            # pixel area, interpolation and the image's own blur add up; rounded, so that the cache finds
            # templates again
            std = np.sqrt(1 / 12 + point_width**2 / 6 + blur**2) / scaled
            template = _template(shape, round(float(std), 2))
            explained = ((template.bases @ patches) ** 2).reshape(len(patches), len(TEXTURES), -1).sum(2)
            residuals = (squares[:, None] - explained + noise) / total[:, None]

            number = int(residuals.min(1).argmin())
            if best is None or residuals[number].min() < best.residual:
                # Patches are numbered by the vertical shift, then by the horizontal one.
                shift_y, shift_x = (shifts[index] for index in divmod(number, len(shifts)))
                center = x + shift_x * scaled, y + shift_y * scaled
                best = _Fit(shape, residuals[number], scaled, *center, template, patches[number])
    assert best is not None, "there is at least one pose"

    return best


def _sample_patches(
    window: np.ndarray, radius: float, x: float, y: float, shifts: Sequence[float], point_width: float
) -> np.ndarray:
    """Read the window at the template's points, shifted by each pair of `shifts`: [shifts**2, GRID * GRID,
    3]."""
    height, width, _ = window.shape
    # Interpolation is separable, and the points of all shifts are read in one row: two matrix products give
    # all patches.
    offsets = (np.asarray(shifts)[:, None] + _POINTS).ravel() * radius
    down = _interpolation(y + offsets, height, point_width)
    right = _interpolation(x + offsets, width, point_width)

    patches = right @ (down @ window.reshape(height, -1)).reshape(
        -1, width, 3
    )  # [shifts * GRID, shifts * GRID, 3]
    patches = patches.reshape(len(shifts), GRID, len(shifts), GRID, 3)

    return patches.swapaxes(1, 2).reshape(-1, GRID * GRID, 3)


def _interpolation(positions: np.ndarray, length: int, width: float) -> NDArray[np.float64]:
    """Return weights [len(positions), length] that read a line of pixels at `positions`.

    Interpolation is linear over `width` pixels. Positions outside the line read its ends.
    """
    inside = np.clip(positions, 0, length - 1)
    weights = np.maximum(0.0, 1 - abs(inside[:, None] - np.arange(length)) / width)
    return weights / weights.sum(1, keepdims=True)


def _texture(fit: _Fit) -> Texture:
    """Return plain if no marks are darker than the rest, else the texture with the smallest residual."""
    # Plain is a special case of every texture, whose marks are then as bright as the rest.
    best = 1 + int(np.argmin(fit.residuals[1:]))
    lumas = np.linalg.lstsq(fit.template.parts[best], fit.patch, rcond=None)[0][:, 0]
    _, bright, dark = lumas
    return "plain" if dark > MAX_MARK_TONE * bright else TEXTURES[best]
