"""Image files in and out."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

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

    Raises:
        ImageError: the file is missing, no image, damaged, too large to be one, or has a side under :data:`MIN_SIDE`.
    """
    path = Path(path)
    try:
        with PIL.Image.open(path) as opened:
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


def list_images(sources: Sequence[str | Path]) -> list[tuple[Path, Path]]:
    """The images under files and folders, sorted, each with its path relative to the source it was found under.

    In folders, what is hidden and what doesn't end in one of :data:`SUFFIXES` is passed over; a file named outright is
    taken as it is.

    Raises:
        ImageError: a source is missing, or a folder holds no image.
    """
    found: list[tuple[Path, Path]] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = sorted(
                path
                for path in source.rglob("*")
                if path.suffix.lower() in SUFFIXES
                and path.is_file()
                and not any(part.startswith(".") for part in path.relative_to(source).parts)
            )
            if not inside:
                raise ImageError(f"{source}: no images in this folder (looked for {', '.join(SUFFIXES)})")
            found += [(p, p.relative_to(source)) for p in inside]
        elif source.exists():
            found.append((source, Path(source.name)))
        else:
            raise ImageError(f"{source}: no such file or folder")
    return found


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
