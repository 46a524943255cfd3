"""Folders in MVTec layout: ``CATEGORY/{train/good, test/KIND, ground_truth/KIND/STEM_mask.png}``."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Bool

from f2pad_jax.data.images import list_images
from f2pad_jax.errors import ImageError

GOOD = "good"
RESIZING = "images bilinear and antialiased; ground truth by nearest neighbour, anomalous above half of full scale"
"""How images and masks are brought to the size they are compared at; said with every table."""


class Sample(NamedTuple):
    """A test image."""

    path: Path
    kind: str
    """Of defect, or :data:`GOOD`."""
    mask: Path | None
    """Its ground truth; None: there is no defect."""

    @property
    def name(self) -> str:
        """Unique in its category: ``KIND/STEM``."""
        return f"{self.kind}/{self.path.stem}"

    def truth(self, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
        """The ground truth at ``size`` (height, width)."""
        return np.zeros(size, bool) if self.mask is None else read_mask(self.mask, size)


class Category(NamedTuple):
    """The files of one category, sorted."""

    name: str
    train: list[Path]
    """Normal images."""
    test: list[Sample]
    masks: list[Path]
    """All ground truths, whether their images are there or not."""


def open_categories(root: str | Path, names: list[str] | None = None, *, testing: bool = True) -> list[Category]:
    """Categories of a data set: those named, or every folder of ``root`` that holds ``train/good``.

    Raises:
        ImageError: there is none, or see :func:`open_category`.
    """
    root = Path(root)
    if not root.is_dir():
        raise ImageError(f"{root}: no such folder")
    if names is None:
        names = sorted(folder.name for folder in root.iterdir() if (folder / "train" / GOOD).is_dir())
        if not names:
            raise ImageError(f"{root}: no category in it, a folder that holds train/{GOOD} (MVTec layout)")
    return [open_category(root / name, testing=testing) for name in names]


def open_category(folder: str | Path, *, testing: bool = True) -> Category:
    """The files of one category's folder.

    Args:
        folder: in MVTec layout.
        testing: whether test images must be there.

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


def read_mask(path: str | Path, size: tuple[int, int] | None = None) -> Bool[np.ndarray, "h w"]:
    """A ground truth's picture at ``size`` (height, width), by nearest neighbour; None: its own.

    Raises:
        ImageError: the file is missing, or no image.
    """
    try:
        with PIL.Image.open(path) as picture:
            mask = picture.convert("L")
            if size is not None:
                mask = mask.resize((size[1], size[0]), PIL.Image.Resampling.NEAREST)
            return np.asarray(mask) > 127
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path}: no image that can be read ({error})") from None


def spread(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """At most ``count`` of the samples, spread evenly, so over all kinds of defects; None: all."""
    if count is None or count >= len(samples):
        return list(samples)
    return [samples[i] for i in np.linspace(0, len(samples) - 1, count).astype(int)]
