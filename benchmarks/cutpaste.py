"""The paper's cut-paste defects (Eq. 16) on real photographs, shared by the other benchmarks."""

from pathlib import Path

import numpy as np
import scipy.ndimage

from f2pad_jax.data import Defective, open_category, read_mask
from f2pad_jax.data.cutpaste import paste_flat
from f2pad_jax.images import read_image, to_unit
from f2pad_jax.images.pixels import resized

SIZE = (224, 224)


def cut_paste(folder: Path, count: int, seed: int = 0) -> tuple[list[np.ndarray], list[Defective]]:
    """Returns training images and ``count`` defective images, both from the normal images of a folder in MVTec layout.

    Defects have the shapes of ``ground_truth``, resized at random (0.5 to 1.2) about their centre until they cover 0.3 to
    8 % of the image. Their colours are random, and far from the colours that they cover. Defective images have 224x224
    pixels and 256 levels.
    """
    rng = np.random.default_rng(seed)
    category = open_category(folder)
    normal, shapes = [read_image(path) for path in category.train], category.masks
    order = rng.permutation(len(normal))
    defects = []
    for i in order[:count]:
        while True:
            mask = _resized(rng, shapes[rng.integers(len(shapes))])
            if 0.003 < mask.mean() < 0.08:
                break
        image, _ = paste_flat(rng, np.asarray(resized(to_unit(normal[i]), SIZE)), mask)
        defects.append(Defective(np.round(image * 255) / 255, mask))
    return [normal[i] for i in order[count:]], defects


def _resized(rng: np.random.Generator, path: Path) -> np.ndarray:
    """Returns a mask resized about its centre by a random factor, 0.5 to 1.2."""
    mask = read_mask(path, size=SIZE)
    centre, scale = np.array(scipy.ndimage.center_of_mass(mask)), rng.uniform(0.5, 1.2)
    return scipy.ndimage.affine_transform(mask.astype(np.uint8), np.eye(2) / scale, centre - centre / scale, order=0) > 0
