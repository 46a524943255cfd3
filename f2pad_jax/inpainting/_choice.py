"""Choice of an inpainter by name."""

from jaxtyping import Array, UInt8

from f2pad_jax.errors import CheckpointError
from f2pad_jax.inpainting.autoencoder import installed_mae, loaded_mae
from f2pad_jax.inpainting.base import Inpainter
from f2pad_jax.inpainting.laplace import harmonic
from f2pad_jax.inpainting.patches import Exemplar, exemplar

INPAINTERS = ("exemplar", "mae", "harmonic")
"""Names of inpainters, the default first."""


def full_name(inpaint: str) -> str:
    """Returns an inpainter's name; for ``mae``, the name of the installed autoencoder.

    Raises:
        CheckpointError: ``mae`` has no weights installed.
    """
    return installed_mae() if inpaint == "mae" else inpaint


def choose(inpaint: Inpainter | str, normals: UInt8[Array, "k h w 3"] | None = None) -> Inpainter:
    """Returns the inpainter of a name; a callable is returned unchanged.

    Args:
        inpaint: one of :data:`INPAINTERS`, the name of an autoencoder such as ``mae-base``, or an inpainter.
        normals: normal images of the detector, as further sources for ``exemplar``.

    Raises:
        CheckpointError: the name is unknown, or ``mae`` has no weights installed.
    """
    if not isinstance(inpaint, str):
        return inpaint
    match full_name(inpaint):
        case "exemplar":
            return exemplar if normals is None else Exemplar(normals)
        case "harmonic":
            return harmonic
        case name if name.startswith("mae-"):
            return loaded_mae(name)
    raise CheckpointError(f"unknown inpainter '{inpaint}'; known: {', '.join(INPAINTERS)}, or any callable")
