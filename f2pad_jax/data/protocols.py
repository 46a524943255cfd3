"""Protocols of synthetic defects: the paper's cut-paste, and a harder one."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float

from f2pad_jax.data.cutpaste import Defective, blend, irregular_shape, paste_flat
from f2pad_jax.data.mvtec import read_mask
from f2pad_jax.errors import ImageError
from f2pad_jax.images.pixels import STD

Image = Float[np.ndarray, "h w 3"]
Mask = Bool[np.ndarray, "h w"]

AREA = (0.002, 0.13)
"""Lowest and highest share of the image that a defect covers; 0.13 is the paper's largest."""
TRIES = 200
"""Number of draws after which a defect that does not fit is an error."""


class Sources(NamedTuple):
    """Sources of one category's defects. Images are named by keys, such as paths, and loaded when needed."""

    category: str
    """Name of the category."""
    image: Callable[[Any], Image]
    """Function that loads the image of a key at the data set's size, in 0..1."""
    bases: Sequence[Any]
    """Normal images held out of training, to paste on."""
    normal: Sequence[Any]
    """Normal images of the category to cut parts from."""
    foreign: Sequence[Any]
    """Normal images of the other categories."""
    shapes: list[Path]
    """Ground truths that give the shapes; without any, shapes are irregular blobs."""
    is_object: bool = False
    """Whether the images show an object on a plain background."""


class Defect(NamedTuple):
    """A synthetic defect and its origin."""

    kind: str
    """Kind of defect."""
    example: Defective
    """Image and mask."""
    origins: list
    """Keys of the ground truths and images used, besides the base."""


def shows_objects(images: Iterable[Image]) -> bool:
    """Returns whether most of the images show an object on a plain background."""
    votes = [foreground(image) is not None for image in images]
    return sum(votes) > len(votes) / 2


def foreground(image: Image) -> Mask | None:
    """Returns the mask of the object on a plain background, or None where the image is all texture.

    In an image of an object, the border has one colour, and much of the inside is far from this colour.
    """
    smooth = scipy.ndimage.gaussian_filter(image, (1, 1, 0))
    frame = np.ones(image.shape[:2], bool)
    width = max(2, min(frame.shape) // 25)
    frame[width:-width, width:-width] = False
    distance = np.linalg.norm(smooth - np.median(smooth[frame], axis=0), axis=-1)
    outside, inside = (max(float(np.percentile(distance[part], 90)), 1e-3) for part in (frame, ~frame))
    if inside < 3 * outside:
        return None
    labels = np.empty(frame.shape, np.int32)
    scipy.ndimage.label(distance > np.sqrt(outside * inside), output=labels)
    largest = 1 + np.argmax(np.bincount(labels.ravel())[1:])
    solid = scipy.ndimage.binary_fill_holes(labels == largest)
    return np.asarray(scipy.ndimage.binary_erosion(solid, border_value=1), bool)  # without the halo of the blur


def _draw_mask(rng: np.random.Generator, sources: Sources, base: Image) -> tuple[Mask, list[Path]]:
    """Draws a mask: the shape of a ground truth at a random size and place, on the object if there is one.

    Returns:
        The mask, and a list with the file of the ground truth, empty for an irregular blob.
    """
    h, w = base.shape[:2]
    allowed = foreground(base) if sources.is_object else None
    allowed = np.ones((h, w), bool) if allowed is None else allowed
    for _ in range(TRIES):
        path = sources.shapes[rng.integers(len(sources.shapes))] if sources.shapes else None
        shape = irregular_shape(rng, (h, w)) if path is None else read_mask(path)
        target = rng.uniform(*AREA) * h * w
        if not shape.any():
            continue
        rows, columns = (np.flatnonzero(shape.any(axis=axis)) for axis in (1, 0))
        shape = shape[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        shape = scipy.ndimage.zoom(np.pad(shape, 1).astype(np.float32), np.sqrt(target / shape.sum()), order=1) > 0.5
        if shape.shape[0] > h or shape.shape[1] > w:
            continue
        top, left = (rng.integers(0, room, endpoint=True) for room in (h - shape.shape[0], w - shape.shape[1]))
        mask = np.zeros((h, w), bool)
        mask[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
        if np.sum(mask & allowed) >= 0.9 * np.sum(mask) and AREA[0] <= np.mean(mask & allowed) <= AREA[1]:
            return mask & allowed, [path] if path else []
    raise ImageError(f"{sources.category}: no ground truth's shape fits on the object in {TRIES} tries")


def cut_paste(rng: np.random.Generator, sources: Sources, base: Any, k: int) -> Defect:
    """Makes a defect of the paper's protocol, Eq. (16): a flat colour far from the pixels that it covers.

    Every second defect of the capsule is structural (paper, footnote 1): a part of another normal image, pasted half an
    image's width away from its place.

    Args:
        rng: source of randomness.
        sources: sources of the category.
        base: key of the normal image to paste on.
        k: number of the defect.

    Raises:
        ImageError: no shape fits on the object.
    """
    image = sources.image(base)
    mask, origins = _draw_mask(rng, sources, image)
    if sources.category == "capsule" and k % 2:
        other = sources.normal[int(rng.integers(len(sources.normal)))]
        swapped = np.roll(sources.image(other), image.shape[1] // 2, axis=1)
        return Defect("misplaced", Defective(np.where(mask[..., None], swapped, image), mask), [*origins, other])
    return Defect("colour", paste_flat(rng, image, mask), origins)


def hard(rng: np.random.Generator, sources: Sources, base: Any, k: int) -> Defect:
    """Makes a hard defect with soft edges: in turn foreign texture, a misplaced part, a faint tint and a scratch.

    Images of texture have no misplaced parts.

    Args:
        rng: source of randomness.
        sources: sources of the category.
        base: key of the normal image to paste on.
        k: number of the defect.

    Raises:
        ImageError: no draw gives a visible defect, or no shape fits on the object.
    """
    image = sources.image(base)
    kinds = ["texture"] * bool(sources.foreign) + ["part"] * sources.is_object + ["tint", "scratch"]
    kind = kinds[k % len(kinds)]
    for _ in range(TRIES):
        if kind == "scratch":
            mask, origins = scratch(rng, foreground(image) if sources.is_object else None, image.shape[:2]), []
        else:
            mask, origins = _draw_mask(rng, sources, image)
        if kind in ("texture", "part"):
            files = sources.foreign if kind == "texture" else sources.normal
            other = files[int(rng.integers(len(files)))]
            source = np.rot90(sources.image(other), int(rng.integers(4)))[:: rng.choice([-1, 1])]
            if source.shape != image.shape:
                continue
            shift, other_mask = rng.integers(image.shape[:2]), foreground(source)
            if other_mask is not None and np.mean(np.roll(other_mask, shift, axis=(0, 1))[mask]) < 0.8:
                continue  # the plain background is a flat colour, not a texture
            changed, origins = np.roll(source, shift, axis=(0, 1)), [*origins, other]
        else:
            direction = rng.standard_normal(3)
            length = rng.uniform(0.35, 0.8) if kind == "tint" else rng.uniform(0.7, 1.6)
            changed = image + (length * direction / np.linalg.norm(direction) * STD).astype(np.float32)
        example = blend(image, changed, mask, rng.uniform(0.4, 0.6) if kind == "scratch" else rng.uniform(0.5, 1.5))
        # a change that is not visible, or out of range, is no defect
        difference = np.linalg.norm((np.rint(example.image * 255) / 255 - image) / STD, axis=-1)
        if example.mask.any() and np.mean(difference[example.mask] > 0.2) > 0.8:
            return Defect(kind, example, origins)
    raise ImageError(f"{base}: no visible {kind} in {TRIES} tries")


def scratch(rng: np.random.Generator, allowed: Mask | None, size: tuple[int, int]) -> Mask:
    """Draws a bent line, 2 or 3 pixels wide, a twentieth to a third of the image long, on the object if there is one."""
    h, w = size
    allowed = np.ones(size, bool) if allowed is None else allowed
    starts = np.argwhere(scipy.ndimage.binary_erosion(allowed, iterations=min(size) // 20))
    starts = starts if len(starts) else np.argwhere(allowed)
    place, angle = starts[rng.integers(len(starts))].astype(float), rng.uniform(0, 2 * np.pi)
    bend, width = rng.normal(0, 0.03), rng.integers(2, 3, endpoint=True)
    mask = np.zeros(size, bool)
    for _ in range(int(rng.uniform(0.05, 0.33) * min(size))):
        y, x = np.floor(place).astype(int)
        if not (0 <= y <= h - width and 0 <= x <= w - width):
            break
        mask[y : y + width, x : x + width] = True
        angle += bend + rng.normal(0, 0.05)
        place = place + np.array([np.sin(angle), np.cos(angle)])
    return mask & allowed


PROTOCOLS: dict[str, Callable[[np.random.Generator, Sources, Any, int], Defect]] = {"cut-paste": cut_paste, "hard": hard}
"""Function of each protocol, by name."""
