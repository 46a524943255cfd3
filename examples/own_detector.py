"""Your own detector: nearest neighbours among the patch tokens of a vision transformer.

``python examples/own_detector.py`` fits it to photographs of brick, refines pasted defects, and saves the model as
``own.model``. The script needs the weights of a ViT (``f2pad weights fetch vit-tiny``).

``python examples/own_detector.py efficientnet-lite0 stage3`` needs no download: the weights come with a package. The
arguments are the network, the layer and, as an option, a weight file.
"""

import sys

import equinox as eqx
import jax.numpy as jnp
import numpy as np

import f2pad_jax
from f2pad_jax.backbones import Backbone, load_backbone
from f2pad_jax.data import load_texture
from f2pad_jax.detectors import AbstractDetector, Calibration
from f2pad_jax.images.metrics import iou

SIDE = 128
"""Height and width of the images, pixels: small, so that the example takes less than a minute."""


class TokenNeighbours(AbstractDetector):
    """Detector whose score is the squared distance of a token to the nearest kept normal token.

    All tokens have unit length.
    """

    backbone: Backbone
    size: tuple[int, int] = eqx.field(static=True)
    bank: jnp.ndarray
    calibration: Calibration | None = None

    @classmethod
    def fit(cls, images, backbone, *, seed=0, progress=lambda *_: None, share=0.5):
        """Returns a detector that keeps a random share of all tokens of the normal images."""
        empty = cls(backbone=backbone, size=images.size, bank=jnp.zeros((0, 0)))
        tokens = np.concatenate([np.asarray(empty.tokens(images[i])) for i in range(len(images))])
        kept = np.random.default_rng(seed).permutation(len(tokens))[: int(np.ceil(share * len(tokens)))]
        return eqx.tree_at(lambda d: d.bank, empty, jnp.asarray(tokens[kept]))

    def tokens(self, image):
        """Returns the tokens of the first tapped layer, (positions, channels)."""
        features = self.features(image)[0]
        flat = features.reshape(-1, features.shape[-1])
        return flat / jnp.linalg.norm(flat, axis=1, keepdims=True)

    def raw_scores(self, image, context):
        """Returns the map of squared distances to the nearest kept tokens. It is differentiable in ``image``."""
        similarity = jnp.max(self.tokens(image) @ self.bank.T, axis=1)
        stride = self.backbone.stride
        return ((2 - 2 * similarity).reshape(image.shape[0] // stride, image.shape[1] // stride),)


def main(name: str = "vit-tiny", layer: str = "block8", weights: str | None = None) -> None:
    """Fits the detector, refines four images, and saves and loads the model."""
    brick = load_texture("brick", size=SIDE, num_train=6, num_test=4)
    backbone = load_backbone(name, layers=(layer,), weights=weights)
    detector = f2pad_jax.fit(TokenNeighbours, brick.train, backbone, size=(SIDE, SIDE))
    settings = f2pad_jax.Settings(false_alarms=0.2)  # six normal images tell little about rare scores
    result = f2pad_jax.refine(detector, np.stack([test.image for test in brick.test]), settings=settings)
    for test, before, after in zip(brick.test, np.asarray(result.coarse_mask), np.asarray(result.mask), strict=True):
        print(f"IoU {iou(before, test.mask):.3f} -> {iou(after, test.mask):.3f}")
    f2pad_jax.save_detector("own.model", detector)
    loaded = f2pad_jax.load_detector("own.model", weights=weights, classes=(TokenNeighbours,))
    print(type(loaded).__name__, "saved and loaded")


if __name__ == "__main__":
    main(*sys.argv[1:])
