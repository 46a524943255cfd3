"""Pixels of image files as they are stored: RGB with 8 bits, and grey or RGB with more."""

import io
import math

import numpy as np
import PIL.Image
import PIL.ImageOps
import tifffile
from jaxtyping import Shaped

_KIND, _BITS, _PHOTOMETRIC, _ORIENTATION, _WHITE, _PLANAR = 254, 258, 262, 274, 281, 284
"""Tags of a TIFF file."""
_COPY = 1 | 4
"""Bits of a page's kind: a reduced copy of another page, or its transparency mask."""


def check_whole(opened: PIL.Image.Image, file: io.BytesIO) -> None:
    """Refuses a file with several pages, a TIFF without some of its strips, and an altered PNG.

    Pillow leaves missing strips black, and decodes the pixels of a PNG without its checksums.

    Raises:
        ValueError: there are several pages, or strips are missing.
        OSError: a checksum differs, or the end is missing.
        SyntaxError: a part of the file is no part of a PNG.
    """
    if (pages := _num_pages(opened)) > 1:
        raise ValueError(f"{pages} pages; write each page to a file of its own")
    if opened.format == "TIFF":
        boxes = [tile[1] for tile in getattr(opened, "tile", []) if tile[0] == "raw"]
        planes = len(opened.getbands()) if getattr(opened, "tag_v2", {}).get(_PLANAR) == 2 else 1
        covered = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
        if boxes and covered < planes * opened.width * opened.height:
            raise ValueError("strips or tiles are missing")
    if opened.format == "PNG":
        with PIL.Image.open(io.BytesIO(file.getbuffer())) as copy:
            copy.verify()


def pixels_of(opened: PIL.Image.Image, file: io.BytesIO) -> tuple[Shaped[np.ndarray, "h w *c"], float | None]:
    """Returns the pixels of an open image, and the value of white that its file states, if any.

    The pixels are RGB with 8 bits, or grey or RGB with more. Grey with 8 bits becomes three equal channels. Alpha is
    dropped, a palette is looked up, and the rotation of the EXIF data is done.

    Raises:
        ValueError: the pixels are not finite, or the file is of a kind that can't be read.
    """
    tags = getattr(opened, "tag_v2", {})
    bits = max(np.atleast_1d(tags.get(_BITS, 8)))
    stated = float(np.max(tags[_WHITE])) if _WHITE in tags else 2.0**bits - 1 if 8 < bits < 16 else None
    tiles = getattr(opened, "tile", [])
    layout = str(tiles[0].args) if tiles else ""
    deep_png = opened.format == "PNG" and layout in ("RGB;16B", "RGBA;16B")
    if opened.mode.startswith("I") or opened.mode == "F":
        values = np.asarray(PIL.ImageOps.exif_transpose(opened))
        if tags.get(_PHOTOMETRIC) == 0:  # 0 is white
            values = np.asarray(stated or 65535, values.dtype) - values
        if not np.isfinite(values).all():
            raise ValueError("pixels that are not finite")
        return values, stated
    if deep_png or bits > 8:  # Pillow keeps the upper half of each value
        if opened.getexif().get(_ORIENTATION, 1) != 1:
            raise ValueError("colours with more than 8 bits, and rotated; write it upright")
        return _deep_png(file) if deep_png else _deep_tiff(file), stated
    image = PIL.ImageOps.exif_transpose(opened)
    opaque = image.convert("RGBA") if "transparency" in image.info else image
    return np.asarray(opaque.convert("RGB")), None


def _num_pages(opened: PIL.Image.Image) -> int:
    """Returns the number of pages or frames, without the copies and masks that a TIFF may hold."""
    count = getattr(opened, "n_frames", 1)
    if count == 1 or opened.format != "TIFF":
        return count
    kinds = []
    for page in range(count):
        opened.seek(page)
        kinds.append(opened.tag_v2.get(_KIND, 0))  # pyright: ignore[reportAttributeAccessIssue]
    opened.seek(0)
    return 1 + sum(not kind & _COPY for kind in kinds[1:])


def _deep_png(file: io.BytesIO) -> Shaped[np.ndarray, "h w 3"]:
    """Returns the pixels of a colour PNG with 16 bits. Pillow reads the upper half of each value, then the lower."""
    halves = []
    for order in "BL":  # big-endian values, as they are, or mistaken for little-endian ones
        file.seek(0)
        with PIL.Image.open(file) as png:
            png.tile = [tile._replace(args=f"{str(tile.args)[:-1]}{order}") for tile in png.tile]
            halves.append(np.asarray(png)[..., :3].astype(np.uint16))
    return halves[0] << 8 | halves[1]


def _deep_tiff(file: io.BytesIO) -> Shaped[np.ndarray, "h w 3"]:
    """Returns the pixels of a colour TIFF with more than 8 bits, without alpha."""
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        if len(page.dataoffsets) != math.prod(page.chunked):  # tifffile would leave a missing strip black
            raise ValueError(f"{len(page.dataoffsets)} of {math.prod(page.chunked)} strips")
        values = page.asarray()
        values = np.moveaxis(values, 0, -1) if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else values
    if values.ndim != 3 or values.shape[-1] not in (3, 4):
        raise ValueError(f"an array of shape {values.shape}; expected colours")
    return values[..., :3]
