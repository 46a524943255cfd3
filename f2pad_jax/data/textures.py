"""Data of the demonstration: photographs of brick, grass and gravel from scikit-image, with defects pasted on them."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from f2pad_jax.data.cutpaste import Defective, irregular_shape, paste_flat
from f2pad_jax.errors import ImageError
from f2pad_jax.images.files import read_image, write_png

NAMES = ("brick", "grass", "gravel")
"""Names of the photographs."""
TEXTURES = "textures"
"""Name that stands for the photographs, in place of a data set's folder."""


class Texture(NamedTuple):
    """Crops of one photograph."""

    name: str
    """One of :data:`NAMES`."""
    train: list[UInt8[np.ndarray, "h w 3"]]
    """Crops of the left half, for training."""
    test: list[Defective]
    """Crops of the right half with defects, for testing."""


def load_texture(name: str, *, size: int = 224, num_train: int = 12, num_test: int = 4, seed: int = 0) -> Texture:
    """Crops one of :data:`NAMES` at native scale; no pixel is in both a training and a test crop.

    Each test crop has one defect of a flat colour, Eq. (16), and is rounded to 8 bits like a camera's image.

    Args:
        name: name of the photograph.
        size: side of the crops, pixels.
        num_train: number of training crops.
        num_test: number of test crops.
        seed: seed of crops and defects.

    Raises:
        ImageError: scikit-image is not installed, or ``size`` is larger than half the photograph.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ImageError("the demonstration's photographs come with scikit-image; run: pip install 'f2pad-jax[demo]'")
    photo = read_image(Path(spec.submodule_search_locations[0]) / "data" / f"{name}.png")
    height, width = photo.shape[:2]
    if size > min(height, width // 2):
        raise ImageError(f"crops of {size} pixels don't fit into half of {name}'s {width}x{height}")
    rng = np.random.default_rng([seed, NAMES.index(name)])

    def crops(left: int, right: int, count: int) -> list[UInt8[np.ndarray, "h w 3"]]:
        tops = np.linspace(0, height - size, count).round().astype(int)
        lefts = rng.integers(left, right - size, count, endpoint=True)
        return [photo[y : y + size, x : x + size] for y, x in zip(tops, lefts, strict=True)]

    def defective(crop: UInt8[np.ndarray, "h w 3"]) -> Defective:
        image, mask = paste_flat(rng, crop.astype(np.float32) / 255, irregular_shape(rng, (size, size)))
        return Defective((image * 255).round().astype(np.uint8), mask)

    train = crops(0, width // 2, num_train)
    return Texture(name, train, [defective(crop) for crop in crops(width // 2, width, num_test)])


def write_textures(folder: str | Path, *, num_train: int = 40, num_test: int = 16, seed: int = 0) -> Path:
    """Writes all of :data:`NAMES` as a data set in MVTec layout; existing files are replaced.

    Args:
        folder: folder of the data set.
        num_train: number of training images of each category.
        num_test: number of test images of each category.
        seed: seed of crops and defects.

    Returns:
        The folder.

    Raises:
        ImageError: scikit-image is not installed.
    """
    folder = Path(folder)
    for name in NAMES:
        texture = load_texture(name, num_train=num_train, num_test=num_test, seed=seed)
        for k, crop in enumerate(texture.train):
            write_png(folder / name / "train" / "good" / f"{k:03}.png", crop)
        for k, test in enumerate(texture.test):
            write_png(folder / name / "test" / "colour" / f"{k:03}.png", np.asarray(test.image))
            write_png(folder / name / "ground_truth" / "colour" / f"{k:03}_mask.png", test.mask)
    return folder
