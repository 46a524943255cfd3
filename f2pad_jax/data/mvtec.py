"""Data sets in MVTec layout: ``CATEGORY/{train/good, test/KIND, ground_truth/KIND/STEM_mask.png}``."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Bool

from f2pad_jax.errors import ImageError
from f2pad_jax.images.files import levels_of, list_images, open_picture

GOOD = "good"
"""Name of the kind that has no defect."""
RESIZING = "images bilinear and antialiased; ground truth by nearest neighbour, anomalous above half of full scale"
"""Description of how images and masks are resized, for every table."""


class Sample(NamedTuple):
    """A test image."""

    path: Path
    """Image file."""
    kind: str
    """Kind of defect, or :data:`GOOD`."""
    mask: Path | None
    """File of the ground truth; None: no defect."""

    @property
    def name(self) -> str:
        """Name that is unique in the category: ``KIND/STEM``."""
        return f"{self.kind}/{self.path.stem}"

    def truth(self, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
        """Returns the ground truth at ``size`` (height, width).

        Raises:
            ImageError: the file of a defect is missing or no image, or has no anomalous pixel, or none at this size.
        """
        if self.mask is None:
            return np.zeros(size, bool)
        truth = read_mask(self.mask, size=size)
        if not truth.any():
            raise ImageError(f"{self.mask}: no anomalous pixel at {size[0]}x{size[1]} pixels")
        return truth


class Category(NamedTuple):
    """Files of one category, sorted."""

    name: str
    """Name of the folder."""
    train: list[Path]
    """Normal images."""
    test: list[Sample]
    """Test images."""
    masks: list[Path]
    """All ground truths, with or without a test image."""


def open_categories(root: str | Path, *, names: list[str] | None = None, testing: bool = True) -> list[Category]:
    """Returns the named categories of a data set; default: every folder of ``root`` that holds ``train/good``.

    Raises:
        ImageError: there is no category, or :func:`open_category` refuses a category.
    """
    root = Path(root)
    if not root.is_dir():
        raise ImageError(f"{root}: no such folder")
    if names is None:
        names = sorted(folder.name for folder in root.iterdir() if (folder / "train" / GOOD).is_dir())
        if not names:
            raise ImageError(f"{root}: no category in it; a category is a folder that holds train/{GOOD} (MVTec layout)")
    return [open_category(root / name, testing=testing) for name in names]


def open_category(folder: str | Path, *, testing: bool = True) -> Category:
    """Returns the files of a category.

    Args:
        folder: folder of the category, in MVTec layout.
        testing: whether test images are needed.

    Raises:
        ImageError: the folder or a part of it is missing, or a defect has no ground truth.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder")
    train = [path for path, _ in list_images([folder / "train" / GOOD])]
    truths, samples = folder / "ground_truth", []
    if testing or (folder / "test").is_dir():
        for path, relative in list_images([folder / "test"]):
            if len(relative.parts) < 2:
                raise ImageError(f"{path}: lies in no folder that names its kind of defect (MVTec layout)")
            kind = "/".join(relative.parts[:-1])
            mask = None if kind == GOOD else truths / kind / f"{path.stem}_mask.png"
            if mask is not None and not mask.is_file():
                raise ImageError(f"{path}: its ground truth {mask} is missing")
            samples.append(Sample(path, kind, mask))
    masks = [path for path, _ in list_images([truths])] if truths.is_dir() else []
    return Category(folder.name, train, samples, masks)


def read_mask(path: str | Path, *, size: tuple[int, int] | None = None) -> Bool[np.ndarray, "h w"]:
    """Reads a mask at ``size`` (height, width), by nearest neighbour; None: the size of the file.

    A pixel belongs to the mask if one of its colours exceeds half of full scale. In a palette, and in a file without a
    value above half of full scale, every value but 0 counts: such files hold labels, or 0 and 1. If alpha varies, it is
    the mask. The mask is rotated according to the file's EXIF data, as an image is.

    Raises:
        ImageError: the file is missing, no image, damaged or too large, or has several pages.
    """
    with open_picture(path) as (opened, file):
        labels, has_alpha = opened.mode == "P", "transparency" in opened.info or "A" in opened.getbands()
        values = None if has_alpha else levels_of(opened, file)
        if values is None:
            picture = PIL.ImageOps.exif_transpose(opened)
            if has_alpha:
                alpha = picture.convert("RGBA").getchannel("A")
                picture = alpha if len({*alpha.getextrema()}) == 2 else picture
            values = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
    values = values.max(axis=2) if values.ndim == 3 else values
    half = {np.dtype(np.uint8): 127, np.dtype(np.uint16): 32767}.get(values.dtype, 0)
    mask = values > (0 if labels or values.max() <= half else half)
    if size is None:
        return mask
    resized = PIL.Image.fromarray(mask).resize((size[1], size[0]), PIL.Image.Resampling.NEAREST)
    return np.asarray(resized)


HALVES = ("development", "report")
"""Halves of a test folder: one to choose constants on, one for the figures of a report."""


def half_of(samples: Sequence[Sample], half: str) -> list[Sample]:
    """Returns a half of the samples, one of :data:`HALVES`: every second sample of each kind, sorted by file name."""
    kinds = sorted({sample.kind for sample in samples})
    of_kind = [sorted((s for s in samples if s.kind == kind), key=lambda s: s.path.name) for kind in kinds]
    return [sample for ordered in of_kind for sample in ordered[HALVES.index(half) :: 2]]


def spread(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """Chooses at most ``count`` samples, spread evenly over all kinds of defects; None: all."""
    if count is None or count >= len(samples):
        return list(samples)
    return [samples[i] for i in np.linspace(0, len(samples) - 1, count).astype(int)]
