"""``f2pad warmup``: compiles the programs of a model ahead, for example while an image for deployment is built."""

import argparse
import time

from rich.filesize import decimal

from f2pad_jax._cache import folder_size, programs_folder
from f2pad_jax.commands._console import shown_progress
from f2pad_jax.commands._refine_options import add_method, add_model, method_options
from f2pad_jax.detectors.saving import load_detector
from f2pad_jax.images.files import list_images, read_image
from f2pad_jax.warmup import warm_up


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_model(parser)
    text = "images or folders; one image of each size that occurs is enough, and its content does not matter"
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_DIR", help=text)
    add_method(parser)


def run(arguments: argparse.Namespace) -> None:
    """Compiles the programs, and prints how many windows they serve."""
    began, options = time.monotonic(), method_options(arguments)
    options = {name: options[name] for name in ("settings", "inpaint", "lanes")}
    detector = load_detector(arguments.model, weights=arguments.weights)
    images = (read_image(path, white=detector.calibrated.white) for path, _ in list_images(arguments.images))
    sizes, count = {image.shape: image for image in images}, 0
    for image in sizes.values():
        with shown_progress() as progress:
            count += warm_up(detector, image, progress=progress, **options)
    seconds, kept = time.monotonic() - began, folder_size(programs_folder())
    print(f"{count} windows of {len(sizes)} image sizes, in {seconds:.0f} s; {decimal(kept)} are kept")
