"""Pictures of results: overlays and galleries."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.ImageOps
import scipy.ndimage
from jaxtyping import Bool, Shaped, UInt8

from f2pad_jax.errors import OptionError

OUTLINE = (255, 40, 40)


def to_uint8(image: Shaped[np.ndarray, "..."]) -> UInt8[np.ndarray, "h w 3"]:
    """Converts a mask, or a grey or RGB image (0..1 or 8 bits), to 8-bit RGB."""
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    elif image.dtype != np.uint8:
        image = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image


def overlay(image: Shaped[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Tints and outlines the mask on the image; the line's width is 1/300 of the mask's shorter side."""
    picture = to_uint8(image).copy()
    width = max(1, round(min(mask.shape) / 300))
    picture[mask] = (0.65 * picture[mask] + 0.35 * np.array(OUTLINE)).astype(np.uint8)
    picture[scipy.ndimage.binary_dilation(mask, iterations=width) & ~mask] = OUTLINE
    return picture


def gallery(
    rows: Sequence[Sequence[Shaped[np.ndarray, "..."]]], titles: Sequence[str], labels: Sequence[str], *, cell: int = 168
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws a grid of images, one row per example.

    Args:
        rows: images of any size, in a format of :func:`to_uint8`.
        titles: title of each column.
        labels: label of each row, lines separated by newlines.
        cell: side of a cell, pixels.
    """
    gap, head, side = 6, 26, 124
    width = side + len(titles) * (cell + gap) + gap
    canvas = PIL.Image.new("RGB", (width, head + len(rows) * (cell + gap) + gap), "white")
    draw = PIL.ImageDraw.Draw(canvas)
    font, bold = PIL.ImageFont.load_default(13), PIL.ImageFont.load_default(14)
    for c, title in enumerate(titles):
        draw.text((side + c * (cell + gap) + cell / 2, head / 2), title, "black", bold, anchor="mm")
    for r, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = head + r * (cell + gap)
        draw.multiline_text((gap, top + cell / 2), label, "black", font, anchor="lm", spacing=5)
        for c, image in enumerate(row):
            binary = image.dtype == bool
            resample = PIL.Image.Resampling.NEAREST if binary else PIL.Image.Resampling.LANCZOS
            tile = PIL.Image.fromarray(to_uint8(image)).resize((cell, cell), resample)
            canvas.paste(tile, (side + c * (cell + gap), top))
    return np.asarray(canvas)


def contact_sheet(
    pictures: Iterable[Shaped[np.ndarray, "..."]], captions: Sequence[tuple[str, str]], *, columns: int = 6, cell: int = 220
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws pictures in rows, each with its caption below.

    Args:
        pictures: images of any size, in a format of :func:`to_uint8`; one at a time is in memory.
        captions: text of each picture and the text's colour. A text that is too long loses its beginning.
        columns: largest number of pictures in a row.
        cell: side of the square that holds a picture, pixels.
    """
    gap, line = 8, 20
    across = max(1, min(columns, len(captions)))
    down = -(-len(captions) // across)
    sheet = PIL.Image.new("RGB", (across * (cell + gap) + gap, down * (cell + line + gap) + gap), "white")
    draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(13)
    for number, (picture, (text, colour)) in enumerate(zip(pictures, captions, strict=True)):
        left, top = gap + number % across * (cell + gap), gap + number // across * (cell + line + gap)
        tile = PIL.ImageOps.pad(PIL.Image.fromarray(to_uint8(picture)), (cell, cell), color="#eee")
        sheet.paste(tile, (left, top))
        while len(text) > 1 and draw.textlength(text, font) > cell:
            text = f"…{text[2:]}"
        draw.text((left, top + cell + 2), text, colour, font)
    return np.asarray(sheet)


def figures() -> Any:
    """Returns the class ``Figure`` of Matplotlib.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError("figures need matplotlib; run: pip install 'f2pad-jax[plots]'") from None
    return Figure
