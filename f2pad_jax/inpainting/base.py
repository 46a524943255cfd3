"""Type of inpainters."""

from collections.abc import Callable

from jaxtyping import Array, Bool, Float

Inpainter = Callable[[Float[Array, "h w 3"], Bool[Array, "h w"]], Float[Array, "h w 3"]]
"""Function ``(image, region) -> image``, in normalised intensity, that replaces the pixels of the region."""
