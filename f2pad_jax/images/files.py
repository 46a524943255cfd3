"""Image files: reading, listing, writing."""

import contextlib
import io
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Float, Shaped, UInt8

from f2pad_jax._storage import regular, write_atomically
from f2pad_jax.errors import ImageError
from f2pad_jax.images._decoding import check_whole, pixels_of
from f2pad_jax.images.pixels import MIN_SIDE

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAP_SUFFIXES = (".npy", ".npz", ".tif", ".tiff", ".png")
"""Endings of files of maps, the first choice first."""
_TooLarge = PIL.Image.DecompressionBombError
WHITES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)
"""Values of white that files with more than 8 bits have: of floats, and of 8 to 16 bits."""


def read_image(
    path: str | Path, *, white: float | int | None = None, data: bytes | None = None, max_pixels: int | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image file as 8-bit RGB, rotated according to its EXIF data.

    Grey becomes three equal channels, alpha is dropped, a palette is looked up. Pixels with more than 8 bits are scaled by
    the white level: ``white`` if given, else the level that the file states, else 65535 for 16 bits.

    Args:
        path: file, or address in a bucket, such as ``s3://bucket/part.png`` (extra ``bucket``).
        white: value of white in files with more than 8 bits, such as 4095 for a camera of 12 bits. :func:`check_images`
            finds it.
        data: content of the file, if it is in memory already; ``path`` is then only the name of the image in errors.
        max_pixels: largest number of pixels; a larger image is refused before it is decoded. Default: Pillow's limit.

    Raises:
        ImageError: the file is missing, not an image, damaged or too large, or has several pages. Or a side is under 16
            pixels, a pixel is negative or above the white level, or there is no white level.
    """
    values, stated = _decoded(path, data, max_pixels)
    white = white or stated or (65535.0 if values.dtype == np.uint16 else None)
    _check(path, values, white)
    if values.dtype != np.uint8 and white is not None:
        values = (values * (255 / white)).round().astype(np.uint8)
    return np.repeat(values[..., None], 3, axis=-1) if values.ndim == 2 else values


def check_images(
    paths: Iterable[str | Path], *, strict: bool = False
) -> tuple[list[str | Path], list[ImageError], float | None]:
    """Decodes every image; returns the images that can be used, the errors of the others, and the white level.

    The white level is the value of white in files with more than 8 bits, None if there is no such file. It is the level
    that the files state, such as 4095 for 12 bits. If a file states none, it is the least of :data:`WHITES` that no
    pixel exceeds: cameras often keep 10, 12 or 14 bits in files of 16 bits.

    Raises:
        ImageError: an image can't be used, and ``strict`` is set; the message names the first one and counts the rest.
    """
    usable, errors, levels = [], [], []
    for path in paths:
        try:
            values, stated = _decoded(path)
            _check(path, values, float("inf"))
            usable.append(path)
            levels += [stated or float(values.max())] if values.dtype != np.uint8 else []
        except ImageError as error:
            errors.append(error)
    if errors and strict:
        raise ImageError(str(errors[0]) + (f" (and {len(errors) - 1} more bad images)" if len(errors) > 1 else ""))
    return usable, errors, min((white for white in WHITES if white >= max(levels)), default=None) if levels else None


def _check(path: str | Path, values: Shaped[np.ndarray, "h w *c"], white: float | int | None) -> None:
    """Refuses the pixels of a file that are no image.

    Raises:
        ImageError: a side is under 16 pixels, or pixels with more than 8 bits do not lie between 0 and white.
    """
    if min(values.shape[:2]) < MIN_SIDE:
        raise ImageError(f"{path}: {values.shape[1]}x{values.shape[0]} pixels; the smallest side allowed is {MIN_SIDE}")
    if values.dtype != np.uint8 and (white is None or not 0 <= values.min() <= values.max() <= white):
        found = f"{values.dtype} pixels of {values.min():g} to {values.max():g}"
        raise ImageError(f"{path}: {found}; white is {white or 'unknown'}: state another value")


def _decoded(
    path: str | Path, data: bytes | None = None, max_pixels: int | None = None
) -> tuple[Shaped[np.ndarray, "h w *c"], float | None]:
    """Returns the pixels of a file as they are stored, and the value of white that the file states, if any.

    Raises:
        ImageError: the file is missing, not an image, damaged or too large, or has several pages.
    """
    with open_picture(path, data, max_pixels) as (opened, file):
        return pixels_of(opened, file)


@contextlib.contextmanager
def open_picture(
    path: str | Path, data: bytes | None = None, max_pixels: int | None = None
) -> Iterator[tuple[PIL.Image.Image, io.BytesIO]]:
    """Opens a picture of any kind, and turns every error of its decoder into an ImageError.

    Raises:
        ImageError: the file is missing, not an image, damaged or too large, or has several pages.
    """
    try:
        with _read_bytes(path) if data is None else io.BytesIO(data) as file, PIL.Image.open(file) as opened:
            if max_pixels is not None and opened.width * opened.height > max_pixels:
                found = f"{opened.width}x{opened.height} pixels"
                raise ImageError(f"{path}: {found}; at most {max_pixels} pixels are allowed: cut it into smaller images")
            check_whole(opened, file)
            yield opened, file
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except PIL.UnidentifiedImageError:
        raise ImageError(f"{path}: not an image, or in a format Pillow can't read") from None
    except _TooLarge as error:
        raise ImageError(f"{path}: too large ({error}); cut it into smaller images") from None
    except ImageError:
        raise
    except Exception as error:  # decoders raise errors of many kinds
        if isinstance(error, OSError) and error.strerror:
            raise ImageError(f"{path}: can't be opened ({error.strerror})") from None
        raise ImageError(f"{path}: can't be read, perhaps damaged or truncated ({error})") from None


def levels_of(opened: PIL.Image.Image, file: io.BytesIO) -> Shaped[np.ndarray, "h w"] | None:
    """Returns the values of an open grey picture with any number of bits, upright; None if it has colours or a palette."""
    if opened.mode.startswith("I") or opened.mode == "F":
        return pixels_of(opened, file)[0]
    return np.asarray(PIL.ImageOps.exif_transpose(opened)) if opened.mode in ("1", "L") else None


def read_map(path: str | Path) -> Float[np.ndarray, "h w"]:
    """Reads a map of any scale: an array file with one array, or a grey picture with 8, 16 or 32 bits.

    Raises:
        ImageError: the file is missing, damaged or too large, holds no array with two dimensions, or a value that is not
            finite.
    """
    if str(path).endswith((".npy", ".npz")):
        values = _array(path)
    else:
        with open_picture(path) as (opened, file):
            values = levels_of(opened, file)
        if values is not None and values.dtype == bool:
            values = values * np.uint8(255)
    if values is None:
        raise ImageError(f"{path}: expected one array of numbers (h, w), or a grey picture")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ImageError(f"{path}: holds values that are not finite")
    return values


def _array(path: str | Path) -> Shaped[np.ndarray, "h w"] | None:
    """Returns the only array of an .npy or .npz file; None if it is not one array of numbers (h, w).

    Raises:
        ImageError: the file is missing, damaged or too large.
    """
    try:
        with regular(path).open("rb") as file:
            if file.read(2) != b"PK":
                return _npy(file, os.fstat(file.fileno()).st_size)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if len(members) != 1:
                    return None
                with archive.open(members[0]) as member:
                    return _npy(member, members[0].file_size)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except Exception as error:  # NumPy and zipfile raise errors of many kinds
        raise ImageError(f"{path}: no map that can be read ({getattr(error, 'strerror', None) or error})") from None


def _npy(file: Any, size: int) -> Shaped[np.ndarray, "h w"] | None:
    """Returns the array of a file of ``size`` bytes; its header asks for no more memory than the file's data."""
    file.seek(0)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    if len(shape) != 2 or dtype.kind not in "biuf" or min(shape) < 1:
        return None
    if shape[0] * shape[1] > 2 * (PIL.Image.MAX_IMAGE_PIXELS or np.inf):  # Pillow's limit for pictures
        raise ValueError(f"{shape[1]}x{shape[0]} pixels are too large")
    if shape[0] * shape[1] * dtype.itemsize > size:
        raise ValueError("damaged or truncated")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def beside(folder: Path, name: str, suffixes: Sequence[str]) -> Path:
    """Returns the file of a folder that belongs to an image: its name with the first of ``suffixes`` that exists.

    Raises:
        ImageError: there is no such file.
    """
    for suffix in suffixes:
        if (path := folder / f"{name}{suffix}").exists():
            return path
    raise ImageError(f"{folder}: no file {name} with one of the endings {' '.join(suffixes)}")


def is_address(path: str | Path) -> bool:
    """Returns whether a path is an fsspec address, such as ``s3://bucket/...`` or ``gs://...``."""
    return isinstance(path, str) and "://" in path


def _bucket(address: str) -> tuple[Any, str]:
    """Returns the file system of an address, and the path inside this file system."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(address)
    except ImportError as error:  # fsspec or its package for this kind of bucket is missing
        raise ImageError(f"{address}: {error}; run: pip install 'f2pad-jax[bucket]', or the missing package") from None
    except ValueError as error:
        raise ImageError(f"{address}: {error}") from None


@contextlib.contextmanager
def _as_image_errors(address: str) -> Iterator[None]:
    """Turns any error of a bucket's file system into an ImageError."""
    try:
        yield
    except FileNotFoundError:
        raise ImageError(f"{address}: no such file or folder") from None
    except Exception as error:
        raise ImageError(f"{address}: can't be read ({error})") from None


def _read_bytes(path: str | Path) -> io.BytesIO:
    """Reads a file, local or in a bucket, into memory."""
    if not is_address(path):
        return io.BytesIO(regular(path).read_bytes())
    system, inside = _bucket(str(path))
    with _as_image_errors(str(path)):
        return io.BytesIO(system.cat_file(inside))


def state_of(path: str | Path) -> list[int | str]:
    """Returns values that change with the file: size and modification time, or the key that the bucket gives the file."""
    if is_address(path):
        system, inside = _bucket(str(path))
        with _as_image_errors(str(path)):
            return [system.ukey(inside)]
    status = Path(path).stat()
    return [status.st_size, status.st_mtime_ns]


def list_images(sources: Sequence[str | Path]) -> list[tuple[Any, Path]]:
    """Lists the images under each source (file, folder or bucket), sorted, each with its path relative to the source.

    In a folder, hidden files and files without one of :data:`SUFFIXES` are skipped. A link to nothing is listed: an image
    is missing, as its reader says. A source that is a file is always listed. An image in a bucket is listed by its
    address (a string), any other image by its path.

    Raises:
        ImageError: a source is missing, or a folder holds no image.
    """
    images: list[tuple[Any, Path]] = []
    for source in sources:
        exists, inside = _in_bucket(str(source)) if is_address(source) else _in_files(Path(source))
        if not exists:
            raise ImageError(f"{source}: no such file or folder")
        if not inside:
            raise ImageError(f"{source}: no images in this folder (looked for {', '.join(SUFFIXES)})")
        images += sorted(inside)
    return images


def _in_files(source: Path) -> tuple[bool, list[tuple[Path, Path]]]:
    """Returns whether a file or folder exists, and its images, in linked folders as well."""
    if not source.is_dir():
        return source.exists(), [(source, Path(source.name))]
    files, above = [], {source: {source.resolve()}}
    for folder, subfolders, names in os.walk(source, followlinks=True):
        seen = above.pop(Path(folder))
        files += [Path(folder, name) for name in names]
        subfolders[:] = [name for name in subfolders if Path(folder, name).resolve() not in seen]  # no loops
        above |= {Path(folder, name): seen | {Path(folder, name).resolve()} for name in subfolders}
    images = ((path, path.relative_to(source)) for path in files)
    return True, [(path, relative) for path, relative in images if named_as_image(relative)]


def _in_bucket(address: str) -> tuple[bool, list[tuple[str, Path]]]:
    """Returns whether an address exists, and its images."""
    system, root = _bucket(address)
    with _as_image_errors(address):
        files = system.find(root)
    if files == [root]:
        return True, [(address, Path(Path(root).name))]
    addresses = ((system.unstrip_protocol(file), Path(file).relative_to(root)) for file in files)
    return bool(files), [(file, relative) for file, relative in addresses if named_as_image(relative)]


def named_as_image(relative: Path) -> bool:
    """Returns whether a path relative to a folder has one of :data:`SUFFIXES`, and neither file nor folder is hidden."""
    return relative.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in relative.parts)


def write_png(path: Path, image: Shaped[np.ndarray, "..."]) -> None:
    """Writes a PNG file atomically, from uint8 (grey or RGB), uint16 (grey), bool (as 0/255) or float in 0..1."""
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    elif np.issubdtype(image.dtype, np.floating):
        image = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
