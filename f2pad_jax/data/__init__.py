"""Data sets in MVTec layout, synthetic defects, and the photographs of the demonstration."""

from f2pad_jax.data.cutpaste import Defective
from f2pad_jax.data.dataset import make_dataset, rebuild_dataset
from f2pad_jax.data.mvtec import Category, Sample, open_categories, open_category, read_mask
from f2pad_jax.data.protocols import PROTOCOLS
from f2pad_jax.data.textures import Texture, load_texture, write_textures

__all__ = [
    "PROTOCOLS", "Category", "Defective", "Sample", "Texture", "load_texture", "make_dataset", "open_categories",
    "open_category", "read_mask", "rebuild_dataset", "write_textures",
]  # fmt: skip
