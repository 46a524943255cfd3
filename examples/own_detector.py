"""A detector of one's own: nearest neighbours on a vision transformer's patch tokens.

``python examples/own_detector.py`` fits it to photographs of brick, refines pasted defects, and saves the model. It needs
the weights of a ViT (``f2pad weights fetch vit-tiny``); ``python examples/own_detector.py efficientnet-lite0 stage3`` runs
on what the package index has, and a third argument names a weight file.
"""

import sys

import equinox as eqx
import jax.numpy as jnp
import numpy as np

import f2pad_jax
from f2pad_jax.data.textures import load_texture
from f2pad_jax.evaluation.metrics import iou


class TokenNeighbours(f2pad_jax.AbstractDetector):
    """Squared distance of each token to the nearest of a random share of normal tokens, all of unit length."""

    backbone: f2pad_jax.Backbone
    size: tuple[int, int] = eqx.field(static=True)
    bank: jnp.ndarray
    calibration: f2pad_jax.Calibration | None = None

    @classmethod
    def fit(cls, images, backbone, *, seed=0, progress=lambda *_: None, share=0.5):
        """Keep a share of all tokens of the normal images."""
        empty = cls(backbone=backbone, size=images.size, bank=jnp.zeros((0, 0)))
        tokens = np.concatenate([np.asarray(empty.tokens(images[i])) for i in range(len(images))])
        kept = np.random.default_rng(seed).permutation(len(tokens))[: int(np.ceil(share * len(tokens)))]
        return eqx.tree_at(lambda d: d.bank, empty, jnp.asarray(tokens[kept]))

    def tokens(self, image):
        """Tokens of the first layer tapped, (positions, channels)."""
        features = self.features(image)[0]
        flat = features.reshape(-1, features.shape[-1])
        return flat / jnp.linalg.norm(flat, axis=1, keepdims=True)

    def raw_scores(self, image, where):
        """Squared distance to the nearest token kept; the gradient goes to that one."""
        similarity = jnp.max(self.tokens(image) @ self.bank.T, axis=1)
        stride = self.backbone.stride
        return ((2 - 2 * similarity).reshape(image.shape[0] // stride, image.shape[1] // stride),)


if __name__ == "__main__":
    name, layer, weights = (sys.argv[1:] + ["vit-tiny", "block8", None][len(sys.argv) - 1 :])[:3]
    brick = load_texture("brick")
    backbone = f2pad_jax.load_backbone(name, layers=(layer,), weights=weights)
    detector = f2pad_jax.fit(TokenNeighbours, brick.train, backbone)
    result = f2pad_jax.refine(detector, np.stack([test.image for test in brick.test]))
    for test, before, after in zip(brick.test, np.asarray(result.coarse_mask), np.asarray(result.mask), strict=True):
        print(f"IoU {iou(before, test.mask):.3f} -> {iou(after, test.mask):.3f}")
    f2pad_jax.save_detector("own.model", detector)
    print(
        type(f2pad_jax.load_detector("own.model", weights=weights, classes=(TokenNeighbours,))).__name__, "saved and loaded"
    )
