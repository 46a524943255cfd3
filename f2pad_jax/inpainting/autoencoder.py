"""Inpainting by a masked autoencoder, the paper's choice."""

import functools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from f2pad_jax.backbones import _weight_files as weight_files
from f2pad_jax.backbones._mae import SIDE
from f2pad_jax.backbones.backbone import load_autoencoder
from f2pad_jax.errors import CheckpointError

PREFERRED = ("mae-large", "mae-base", "mae-huge")
"""Masked autoencoders in the order of preference, among the installed ones."""


class MAE(eqx.Module):
    """Inpainter by a masked autoencoder, as in the paper: it decodes the patches that touch the region.

    Images are in normalised intensity. The network runs at 224 x 224 pixels; other sizes are resized before and after. One
    compiled program serves all regions. The weights are leaves of this pytree: pass it as an argument of jitted functions.
    """

    name: str = eqx.field(static=True)
    """Name of the network, such as ``mae-base``, static."""
    graphdef: nnx.GraphDef = eqx.field(static=True)
    """Structure of the network, static."""
    state: nnx.State
    """Weights."""

    @staticmethod
    def load(name: str | None = None, *, weights: str | Path | None = None) -> "MAE":
        """Loads ``mae-base``, ``mae-large`` or ``mae-huge``; default: the first of :data:`PREFERRED` that is installed.

        Raises:
            CheckpointError: the name is unknown, or the weights are missing, damaged, another network's or without decoder.
        """
        name = name or installed_mae()
        return MAE(name, *load_autoencoder(name, weights=weights))

    def __call__(self, image: Float[Array, "h w 3"], region: Bool[Array, "h w"]) -> Float[Array, "h w 3"]:
        """Returns the image with the pixels of the region replaced."""
        autoencoder = nnx.merge(self.graphdef, self.state)
        size = image.shape[:2]
        if size == (SIDE, SIDE):
            return autoencoder(image, region)
        touched = jax.image.resize(region.astype(image.dtype), (SIDE, SIDE), "linear") > 0
        drawn = autoencoder(jax.image.resize(image, (SIDE, SIDE, 3), "linear"), touched)
        return jnp.where(region[..., None], jax.image.resize(drawn, image.shape, "linear"), image)


def installed_mae() -> str:
    """Returns the name of the preferred autoencoder whose weights are installed.

    Raises:
        CheckpointError: none is installed.
    """
    for name in PREFERRED:
        if weight_files.cached_file(name).exists():
            return name
    raise CheckpointError(f"no masked autoencoder is installed; run: f2pad weights fetch {PREFERRED[0]}")


@functools.lru_cache(maxsize=1)
def loaded_mae(name: str) -> MAE:
    """Loads an autoencoder; caches the last autoencoder loaded."""
    return MAE.load(name)
