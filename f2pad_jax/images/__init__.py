"""Pixels: units, files, resizing, morphology, metrics and pictures."""

from f2pad_jax.images import metrics
from f2pad_jax.images.files import check_images, list_images, read_image, write_png
from f2pad_jax.images.pictures import contact_sheet, gallery, overlay
from f2pad_jax.images.pixels import HIGHEST, LOWEST, MEAN, STD, Scalar, denormalise, normalise, to_unit

__all__ = [
    "HIGHEST", "LOWEST", "MEAN", "STD", "Scalar", "check_images", "contact_sheet", "denormalise", "gallery", "list_images",
    "metrics", "normalise", "overlay", "read_image", "to_unit", "write_png",
]  # fmt: skip
