"""Cut one row per category out of the demonstration's gallery: ``python benchmarks/readme_picture.py GALLERY OUT``."""

import sys

import PIL.Image

HEAD, ROW, PER_CATEGORY, CATEGORIES = 26, 146, 4, 3


def main(gallery: str, out: str) -> None:
    """Keep the titles and the second row of each category."""
    with PIL.Image.open(gallery) as picture:
        strips = [picture.crop((0, 0, picture.width, HEAD))]
        for category in range(CATEGORIES):
            top = HEAD + (category * PER_CATEGORY + 1) * ROW
            strips.append(picture.crop((0, top, picture.width, top + ROW)))
    canvas = PIL.Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        canvas.paste(strip, (0, top))
        top += strip.height
    canvas.save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
