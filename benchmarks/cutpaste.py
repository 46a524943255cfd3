"""The paper's cut-paste defects (Eq. 16) on real photographs, for the studies beside this file."""

from pathlib import Path

import numpy as np
import scipy.ndimage

from f2pad_jax.data.cutpaste import Defective, paste_flat
from f2pad_jax.data.images import read_image
from f2pad_jax.data.mvtec import open_category, read_mask
from f2pad_jax.units import resized, to_unit

SIZE = (224, 224)


def cut_paste(folder: Path, count: int, seed: int = 0) -> tuple[list[np.ndarray], list[Defective]]:
    """Training images and ``count`` defective ones, made of held-out normal images of a folder in MVTec layout.

    Shapes are those of ``ground_truth``, resized at random (0.5 to 1.2) about their centre until they cover 0.3 to 8 % of
    the image; colours are random, far from what they cover. Images are 224x224 and of 8 bits.
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
    mask = read_mask(path, SIZE)
    centre, scale = np.array(scipy.ndimage.center_of_mass(mask)), rng.uniform(0.5, 1.2)
    return scipy.ndimage.affine_transform(mask.astype(np.uint8), np.eye(2) / scale, centre - centre / scale, order=0) > 0
