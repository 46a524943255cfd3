"""Verdicts and masks on changed test images: other light, another batch, a worse camera, a part that lies otherwise.

``python benchmarks/robustness.py ROOT --weights FILE`` fits a detector to each category of a data set in MVTec layout. The
normal images stay as they are; the test images of one half are changed. Each line has a change: marked good images, marked
defects, images that are unlike the normal images as a whole, mean IoU of the defects' masks, and the largest share of an
image that a mask has.
"""

import io

import jax
import numpy as np
import PIL.Image
import scipy.ndimage
from fitted import categories_command_line

from f2pad_jax import Settings, fit, refine_many
from f2pad_jax.backbones import find_network
from f2pad_jax.data import open_categories
from f2pad_jax.data.mvtec import half_of, spread
from f2pad_jax.detectors import DETECTORS
from f2pad_jax.evaluation._models import load_to_depth
from f2pad_jax.images.files import read_image
from f2pad_jax.images.metrics import iou
from f2pad_jax.images.pixels import resized, to_unit


def jpeg(image, quality):
    """Returns an image in 0..1 as a JPEG file holds it."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.rint(255 * image).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(PIL.Image.open(file), np.float32) / 255


def gradient(image):
    """Adds light that grows from -0.1 on the left to 0.1 on the right."""
    return image + np.linspace(-0.1, 0.1, image.shape[1], dtype=np.float32)[None, :, None]


def blurred(image, sigma):
    """Blurs an image by a Gaussian."""
    return scipy.ndimage.gaussian_filter(image, (sigma, sigma, 0))


CHANGES = {
    "none": lambda x: x,
    "gain 0.8": lambda x: 0.8 * x,
    "gain 1.2": lambda x: 1.2 * x,
    "gradient of light": gradient,
    "blur 1 px": lambda x: blurred(x, 1),
    "blur 1.5 px": lambda x: blurred(x, 1.5),
    "JPEG 70": lambda x: jpeg(x, 70),
    "JPEG 40": lambda x: jpeg(x, 40),
    "rotation 3 degrees": lambda x: scipy.ndimage.rotate(x, 3, reshape=False, order=1, mode="nearest"),
    "shift 8 px": lambda x: np.roll(np.pad(x, ((8, 8), (8, 8), (0, 0))[: x.ndim], mode="edge"), 8, axis=1)[8:-8, 8:-8],
}
"""Function of each change, for images in 0..1 at the detector's size."""
MOVES = ("rotation 3 degrees", "shift 8 px")
"""Changes that move the ground truth too."""


def main() -> None:
    """Prints the table for the arguments of the command line."""
    parser = categories_command_line(__doc__)
    parser.add_argument("--images", type=int, default=10, help="largest number of good images, and of defects")
    arguments = parser.parse_args()
    method = DETECTORS[arguments.method]
    print(
        f"JAX {jax.__version__}, {jax.default_backend()}; {arguments.method}, {arguments.backbone}, half: {arguments.half}"
    )
    print("category        change               good marked  defects marked  unlike    IoU  largest mask")
    for category in open_categories(arguments.root, names=arguments.categories):
        layers = method.default_layers(find_network(arguments.backbone), len(category.train))
        backbone = load_to_depth(arguments.backbone, layers, arguments.weights)
        detector = fit(method, (read_image(path) for path in category.train), backbone)
        half = half_of(category.test, arguments.half)
        samples = [
            s for wanted in (True, False) for s in spread([s for s in half if bool(s.mask) == wanted], arguments.images)
        ]
        images = [np.asarray(resized(to_unit(read_image(s.path)), detector.size)) for s in samples]
        for name, change in CHANGES.items():
            changed = [np.clip(change(image), 0, 1).astype(np.float32) for image in images]
            found = list(refine_many(detector, changed, settings=Settings(restore_steps=0)))
            truths = [s.truth(detector.size) for s in samples]
            if name in MOVES:
                truths = [change(truth[..., None].astype(np.float32))[..., 0] > 0.5 for truth in truths]
            good = [bool(r.defective) for r, s in zip(found, samples, strict=True) if not s.mask]
            marked = [bool(r.defective) for r, s in zip(found, samples, strict=True) if s.mask]
            ious = [iou(np.asarray(r.mask), t) for r, t, s in zip(found, truths, samples, strict=True) if s.mask]
            unlike, largest = sum(bool(r.unlike) for r in found), max(float(r.mask.mean()) for r in found)
            print(
                f"{category.name:15} {name:20} {sum(good):5} of {len(good):2} {sum(marked):9} of {len(marked):2}"
                f" {unlike:4} of {len(found):2} {100 * np.mean(ious):6.1f} {largest:13.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
