"""Regions: the connected pieces of a mask, their measurements, and the files that other programs read."""

from f2pad_jax.regions.formats import FORMATS
from f2pad_jax.regions.measure import Region, find_regions

__all__ = ["FORMATS", "Region", "find_regions"]
