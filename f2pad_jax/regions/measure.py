"""Measurements of the connected pieces of a mask, by scikit-image."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from skimage import measure

from f2pad_jax.errors import ImageError
from f2pad_jax.method.algorithm import Refined

TOLERANCE = 0.3
"""Largest distance of a simplified outline from the outline of marching squares, pixels."""


class Region(NamedTuple):
    """Connected piece of a mask; pixels are connected at their sides and corners."""

    mask: Bool[np.ndarray, "h w"]
    """Pixels of the piece inside its box."""
    box: tuple[int, int, int, int]
    """Top, left, bottom and right of the piece, pixels; the last row and column are excluded."""
    area: int
    """Number of pixels."""
    centroid: tuple[float, float]
    """Row and column of the centre; the centre of the first pixel is (0.5, 0.5)."""
    length: float
    """Longer side of the rectangle around the piece, pixels. Its sides are along the image's or the piece's main axes."""
    width: float
    """Shorter side of this rectangle, pixels."""
    angle: float
    """Angle from the image's horizontal to the longer side, counter-clockwise, degrees in -90..90."""
    perimeter: float
    """Length of the outlines, pixels."""
    contrast: float
    """Mean of |a| over the piece, all channels together, 0..1."""
    score: float
    """Highest value of the coarse map in the piece."""
    probability: float
    """Mean of the probability over the piece, above 0.5."""
    outlines: tuple[Float[np.ndarray, "_ 2"], ...]
    """Closed polygons (x, y): the outline of the piece, then its holes."""


def find_regions(result: Refined) -> list[Region]:
    """Finds the connected pieces of an image's mask, from top to bottom.

    Args:
        result: result for one image.

    Raises:
        ImageError: the result is of a batch.
    """
    mask, contrast = np.asarray(result.mask), np.asarray(result.anomaly)
    if mask.ndim != 2:
        raise ImageError("regions are found in the result of one image; take the results of a batch one at a time")
    intensity = [np.abs(contrast).mean(axis=-1), np.asarray(result.coarse_map), np.asarray(result.probability)]
    return [
        _measured(piece) for piece in measure.regionprops(measure.label(mask, connectivity=2), np.stack(intensity, axis=-1))
    ]


def _measured(piece) -> Region:
    top, left, bottom, right = piece.bbox
    rectangles = [_rectangle(piece.coords, angle) for angle in (0.0, piece.orientation)]
    length, width, orientation = min(rectangles, key=lambda r: r[0] * r[1])
    outlines = _outlines(piece.image, (left, top))
    return Region(
        mask=piece.image,
        box=(top, left, bottom, right),
        area=int(piece.area),
        centroid=(float(piece.centroid[0]) + 0.5, float(piece.centroid[1]) + 0.5),
        length=length,
        width=width,
        angle=float(np.degrees(orientation) + (90 if orientation <= 0 else -90)),
        perimeter=float(sum(np.hypot(*np.diff(line, axis=0).T).sum() for line in outlines)),
        contrast=float(piece.intensity_mean[0]),
        score=float(piece.intensity_max[1]),
        probability=float(piece.intensity_mean[2]),
        outlines=outlines,
    )


def _rectangle(pixels: Int[np.ndarray, "n 2"], angle: float) -> tuple[float, float, float]:
    """Returns length, width, and the angle between the rows' axis and the length, of a rectangle around pixels.

    One side of the rectangle has the ``angle``.
    """
    along = np.array([np.cos(angle), np.sin(angle)])
    sides = [float(np.ptp(pixels @ axis) + np.abs(axis).sum()) for axis in (along, along[::-1] * [1, -1])]
    turned = angle + (np.pi / 2 if angle <= 0 else -np.pi / 2)
    return (sides[0], sides[1], angle) if sides[0] > sides[1] else (sides[1], sides[0], turned)


def _outlines(mask: Bool[np.ndarray, "h w"], corner: tuple[int, int]) -> tuple[Float[np.ndarray, "_ 2"], ...]:
    """Returns the outline and the holes of one piece, by marching squares; ``corner`` is the piece's (x, y)."""
    lines = measure.find_contours(np.pad(mask, 1).astype(float), 0.5, fully_connected="high")
    polygons = [measure.approximate_polygon(line, TOLERANCE)[:, ::-1] - 0.5 + corner for line in lines]
    return tuple(sorted(polygons, key=lambda polygon: -np.ptp(polygon, axis=0).prod()))


def mask_of(regions: Iterable[Region], size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Returns the mask of some regions of an image of this height and width."""
    mask = np.zeros(size, bool)
    for region in regions:
        top, left, bottom, right = region.box
        mask[top:bottom, left:right] |= region.mask
    return mask


def described(region: Region, size: tuple[int, int], mm_per_pixel: float | None = None) -> dict[str, Any]:
    """Returns a region as JSON: lengths in pixels, and in millimetres if a scale is given.

    Args:
        region: region of an image.
        size: height and width of the image, pixels.
        mm_per_pixel: side of a pixel, mm.
    """
    record = {
        "box": [int(side) for side in region.box],
        "area": region.area,
        **{name: round(getattr(region, name), 2) for name in ("length", "width", "angle", "perimeter")},
        "centroid": [round(place, 2) for place in region.centroid],
        "contrast": round(region.contrast, 4),
        "score": round(region.score, 4),
        "probability": round(region.probability, 4),
        "outlines": [np.round(line, 2).tolist() for line in region.outlines],
        "rle": run_lengths(region.mask, region.box[:2], size),
    }
    if mm_per_pixel is not None:
        record |= {
            f"{name}_mm": round(getattr(region, name) * mm_per_pixel, 4) for name in ("length", "width", "perimeter")
        }
        record["area_mm2"] = round(region.area * mm_per_pixel**2, 4)
    return record


def run_lengths(mask: Bool[np.ndarray, "h w"], corner: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """Returns the lengths of runs of equal pixels, column by column; the first run has pixels outside the mask.

    Args:
        mask: pixels of a piece, at least one of them set.
        corner: row and column of the mask's first pixel in the image.
        size: height and width of the image.
    """
    columns, rows = np.nonzero(mask.T)
    places = (corner[1] + columns) * size[0] + corner[0] + rows
    first = np.flatnonzero(np.diff(places, prepend=-2) > 1)
    ends = places[np.append(first[1:] - 1, -1)] + 1
    bounds = np.concatenate([[0], np.stack([places[first], ends], axis=1).ravel(), [size[0] * size[1]]])
    lengths = np.diff(bounds).tolist()
    return lengths if lengths[-1] else lengths[:-1]
