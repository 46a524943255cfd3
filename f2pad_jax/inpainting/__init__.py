"""Inpainting of the suspect region from its surroundings, for the first guess n0 of the normal image."""

from f2pad_jax.inpainting._choice import INPAINTERS
from f2pad_jax.inpainting.autoencoder import MAE
from f2pad_jax.inpainting.base import Inpainter
from f2pad_jax.inpainting.laplace import harmonic
from f2pad_jax.inpainting.patches import Exemplar, exemplar

__all__ = ["INPAINTERS", "MAE", "Exemplar", "Inpainter", "exemplar", "harmonic"]
