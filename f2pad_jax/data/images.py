"""Image files in and out."""

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Shaped, UInt8

from f2pad_jax.checkpoints import write_atomically
from f2pad_jax.errors import ImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MIN_SIDE = 16
"""Smallest side of an image worth looking at, pixels."""


def read_image(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    """Any common image file as 8-bit RGB, turned the way its EXIF says.

    Grey is repeated, alpha dropped, a palette looked up; 16 bits are scaled to 8 (full scale 65535).

    Args:
        path: of a file, or the address of one in a bucket, such as ``s3://bucket/part.png`` (extra ``bucket``).

    Raises:
        ImageError: the file is missing, no image, damaged, too large to be one, or has a side under :data:`MIN_SIDE`.
    """
    try:
        with _opened(path) as file, PIL.Image.open(file) as opened:
            image = PIL.ImageOps.exif_transpose(opened)
            if image.mode.startswith("I") or image.mode == "F":
                values = np.asarray(image, np.float64)
                if values.min() < 0 or values.max() > 65535 or image.mode == "F":
                    raise ImageError(
                        f"{path}: {image.mode} pixels reaching {values.max():g}; expected 8 or 16 bits a channel"
                    )
                array = np.repeat((values / 257).round().astype(np.uint8)[..., None], 3, axis=-1)
            else:
                opaque = image.convert("RGBA") if "transparency" in image.info else image
                array = np.asarray(opaque.convert("RGB"))
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise ImageError(f"{path}: can't be opened ({error.strerror})") from None
    except PIL.UnidentifiedImageError:
        raise ImageError(f"{path}: not an image, or of a kind Pillow can't read") from None
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, PIL.Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: damaged or truncated image ({error})") from None
    if min(array.shape[:2]) < MIN_SIDE:
        raise ImageError(f"{path}: {array.shape[1]}x{array.shape[0]} pixels; the smallest side allowed is {MIN_SIDE}")
    return array


def is_address(path: str | Path) -> bool:
    """Whether this is in a bucket: ``s3://bucket/...``, ``gs://...`` or whatever else fsspec knows."""
    return isinstance(path, str) and "://" in path


def _bucket(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(address)
    except ImportError as error:  # of fsspec itself, or of what it needs for this kind of bucket
        raise ImageError(f"{address}: {error}; run: pip install 'f2pad-jax[bucket]', or what it names") from None
    except ValueError as error:
        raise ImageError(f"{address}: {error}") from None


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
    """Tells of whatever goes wrong with a bucket, each kind of which has errors of its own, in a line."""
    try:
        yield
    except FileNotFoundError:
        raise ImageError(f"{address}: no such file or folder") from None
    except Exception as error:
        raise ImageError(f"{address}: can't be read ({error})") from None


def _opened(path: str | Path) -> io.BytesIO:
    """The bytes of a file or of one in a bucket."""
    if not is_address(path):
        return io.BytesIO(Path(path).read_bytes())
    system, inside = _bucket(str(path))
    with _told(str(path)):
        return io.BytesIO(system.cat_file(inside))


def state_of(path: str | Path) -> list[int | str]:
    """What changes when a file does."""
    if is_address(path):
        system, inside = _bucket(str(path))
        with _told(str(path)):
            return [system.ukey(inside)]
    status = Path(path).stat()
    return [status.st_size, status.st_mtime_ns]


def list_images(sources: Sequence[str | Path]) -> list[tuple[Any, Path]]:
    """The images under files, folders and buckets, sorted, each with its path relative to the source it was found under.

    In folders, what is hidden and what doesn't end in one of :data:`SUFFIXES` is passed over; a file named outright is
    taken as it is. An image in a bucket is given by its address, a string, any other by its path.

    Raises:
        ImageError: a source is missing, or a folder holds no image.
    """
    found: list[tuple[Any, Path]] = []
    for source in sources:
        there, inside = _in_bucket(str(source)) if is_address(source) else _in_files(Path(source))
        if not there:
            raise ImageError(f"{source}: no such file or folder")
        if not inside:
            raise ImageError(f"{source}: no images in this folder (looked for {', '.join(SUFFIXES)})")
        found += sorted(inside)
    return found


def _in_files(source: Path) -> tuple[bool, list[tuple[Path, Path]]]:
    """Whether there is such a file or folder, and the images in it."""
    if not source.is_dir():
        return source.exists(), [(source, Path(source.name))]
    found = ((path, path.relative_to(source)) for path in source.rglob("*"))
    return True, [(path, relative) for path, relative in found if _named_as_image(relative) and path.is_file()]


def _in_bucket(address: str) -> tuple[bool, list[tuple[str, Path]]]:
    """The same of an address."""
    system, root = _bucket(address)
    with _told(address):
        files = system.find(root)
    if files == [root]:
        return True, [(address, Path(Path(root).name))]
    found = ((system.unstrip_protocol(file), Path(file).relative_to(root)) for file in files)
    return bool(files), [(file, relative) for file, relative in found if _named_as_image(relative)]


def _named_as_image(relative: Path) -> bool:
    return relative.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in relative.parts)


def check_images(paths: Iterable[Path]) -> None:
    """Decode every image once, so that a bad one is reported before any work is done or file written.

    Raises:
        ImageError: the first bad image, and how many more there are.
    """
    errors = []
    for path in paths:
        try:
            read_image(path)
        except ImageError as error:
            errors.append(str(error))
    if errors:
        raise ImageError(errors[0] + (f" (and {len(errors) - 1} more bad images)" if len(errors) > 1 else ""))


def write_png(path: Path, image: Shaped[np.ndarray, "..."]) -> None:
    """Write uint8 grey or RGB, bool (as 0/255), or float in 0..1 as PNG, atomically."""
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    elif np.issubdtype(image.dtype, np.floating):
        image = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
