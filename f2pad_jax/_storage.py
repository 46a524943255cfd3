"""Files: atomic writes, checksums and safetensors."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from f2pad_jax.errors import CheckpointError


def regular(path: str | Path) -> Path:
    """Returns the path of a file, and refuses a pipe or a device, whose reading may never end.

    Raises:
        OSError: the path is a pipe, a device or a socket.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(path))
    return path


def content_checksum(tensors: Mapping[str, np.ndarray], **texts: str) -> str:
    """Returns the SHA-256 over names, dtypes, shapes and values, which does not depend on the file format.

    Each of ``texts`` counts as a tensor of its bytes.
    """
    digest = hashlib.sha256()
    tensors = {**tensors, **{name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}}
    for name in sorted(tensors):
        value = np.asarray(tensors[name])
        digest.update(f"{name} {value.dtype.str} {list(value.shape)}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, sha256: str, remedy: str = "install it again") -> None:
    """Checks that a file's SHA-256 begins with ``sha256``.

    Raises:
        CheckpointError: the file is damaged or another file; the message ends with ``remedy``.
    """
    found = file_sha256(path)
    if not found.startswith(sha256):
        raise CheckpointError(f"{path}: damaged or tampered with (sha256 {found[:12]}…, expected {sha256[:12]}…); {remedy}")


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads tensors and metadata of a safetensors file.

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
        raise CheckpointError(f"{path}: damaged, or not a safetensors file ({error})") from None


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically."""
    data = safetensors.numpy.save({name: np.asarray(value, order="C") for name, value in tensors.items()}, dict(metadata))
    write_atomically(Path(path), data)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary file beside ``path``, then renames the file.

    Raises:
        OSError: the file can't be written, for example on a full disk; the error names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
