import os
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from f2pad_jax import fit
from f2pad_jax.backbones import Backbone, load_backbone
from f2pad_jax.data import load_texture
from f2pad_jax.detectors import AbstractDetector, Calibration, PatchCore, PixelPrior
from f2pad_jax.images import MEAN, STD
from f2pad_jax.method import _tiling as tiling
from f2pad_jax.streaming import _programs as programs


@pytest.fixture(scope="module", autouse=True)
def room():
    """Drops the programs of earlier files before they take most of the process's memory maps, without which XLA ends it."""
    programs.make_room()


@pytest.fixture(scope="session")
def shared():
    """The folder of evaluation data beside the project."""
    folder = Path(os.environ.get("F2PAD_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("needs the evaluation data: set F2PAD_SHARED to the folder that holds data/ and weights/")
    return folder


@pytest.fixture(scope="session")
def backbone():
    return load_backbone("efficientnet-lite0")


SIZE = 96
"""Side of the small photographs that whole images are refined on."""
tiling.WINDOWS = (64, *tiling.WINDOWS)  # the small photographs have windows too


@pytest.fixture(scope="module")
def texture():
    return load_texture("brick", size=SIZE, num_train=6, num_test=3)


@pytest.fixture(scope="session")
def shallow_backbone():
    """The stages of strides 4 and 8: smaller programs."""
    return load_backbone("efficientnet-lite0", layers=("stage2", "stage3"))


@pytest.fixture(scope="module")
def detector(texture, shallow_backbone):
    return fit(PatchCore, texture.train, shallow_backbone, size=(SIZE, SIZE))


def smooth_image(seed, size=64):
    """Something with structure at every scale, in 0..1."""
    noise = np.random.default_rng(seed).standard_normal((size, size, 3))
    layers = [s * scipy.ndimage.gaussian_filter(noise, (s, s, 0)) for s in (1, 4, 12)]
    return np.clip(0.5 + 0.15 * sum(layers), 0, 1).astype(np.float32)


@jax.jit
def maps_of(backbone, image):
    """The network's maps of an image in normalised intensity."""
    return backbone(backbone.normalise(image * STD + MEAN))


def calibration(scale=1.0, *, ordinary=1.0, threshold=2.0, prior=None):
    """With a single Gaussian of pixel values, where no prior is given."""
    prior = prior or PixelPrior(jnp.zeros((1, 3)), jnp.eye(3)[None])
    return Calibration(jnp.asarray(scale), jnp.asarray(ordinary), jnp.asarray(threshold), prior)


def check_map_of_batches(detector, alone, image, others):
    """The image's map is the one it has ``alone``, to 1e-6 of its peak, wherever it stands among ``others``."""
    batched = jax.jit(jax.vmap(type(detector).anomaly_map, in_axes=(None, 0)))
    first = batched(detector, jnp.stack([image, others[0], others[1]]))
    last = batched(detector, jnp.stack([others[2], others[0], image]))
    for found in (first[0], last[2]):
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6 * alone.max())
    assert not np.allclose(first[1], alone, rtol=0.01)


class MeanColour(AbstractDetector):
    """A user's own detector: 4x4 block means against one colour."""

    colour: jax.Array
    calibration: Calibration | None = None
    backbone: Backbone | None = None
    size: tuple[int, int] = eqx.field(static=True, default=(24, 24))

    @classmethod
    def fit(cls, images, backbone, *, seed, progress):
        return cls(jnp.mean(jnp.stack([*images]), axis=(0, 1, 2)))

    @property
    def stride(self):
        return 4

    @property
    def local(self):
        return True

    def anomaly_map(self, image):
        return jnp.repeat(jnp.repeat(self.scores(image, None)[0], 4, 0), 4, 1)

    def raw_scores(self, image, context):
        h, w, _ = image.shape
        blocks = image.reshape(h // 4, 4, w // 4, 4, 3).mean(axis=(1, 3))
        return (jnp.sum((blocks - self.colour) ** 2, axis=-1),)


def bright_blocks():
    """Twelve images that :class:`MeanColour` finds a bright block in."""
    rng = np.random.default_rng(0)
    images = np.full((12, 24, 24, 3), 0.45, np.float32) + rng.normal(0, 0.02, (12, 24, 24, 3)).astype(np.float32)
    for k in range(12):
        images[k, k : k + 6, 8:16] = 0.9
    return images
