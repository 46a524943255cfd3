"""Quality of each inpainter where a mask hides part of a defect-free image.

    python benchmarks/inpainting.py FOLDER [FOLDER ...]

Folders hold defect-free images, resized to 224x224. Each image gets two irregular masks (1 to 6 % of it, seeded), dilated
by 8 pixels like the solver's region. Every inpainter restores it. ``exemplar`` may borrow from 16 other images of the
folder, ``exemplar alone`` from none. The table gives the peak signal-to-noise ratio within the mask. It also gives the
distance between the features (EfficientNet-Lite0, stages 2, 3, 5) of the restored and the original image. This distance is
relative to the distance of the mask filled with the mean colour of the rest: 0 is perfect, 1 no better. ``mae`` takes part
where its weights are installed.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from f2pad_jax.backbones import load_backbone
from f2pad_jax.data.cutpaste import irregular_shape
from f2pad_jax.errors import CheckpointError
from f2pad_jax.images import denormalise, list_images, normalise, read_image, to_unit
from f2pad_jax.images._morphology import dilate
from f2pad_jax.images.pixels import resized
from f2pad_jax.inpainting import INPAINTERS
from f2pad_jax.inpainting._choice import choose

SIZE = (224, 224)


def is_installed(name: str) -> bool:
    """Returns whether an inpainter can be used: ``mae`` needs weights."""
    try:
        return bool(choose(name))
    except CheckpointError:
        return False


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--images", type=int, default=20, help="most images of each folder (%(default)s)")
    arguments = parser.parse_args()
    backbone = load_backbone("efficientnet-lite0")
    names = ["exemplar alone", *filter(is_installed, INPAINTERS)]

    @jax.jit
    def features(backbone, image):
        maps = backbone(backbone.normalise(denormalise(image)))
        return jnp.concatenate([m.ravel() / jnp.sqrt(m.size) for m in maps])

    fill = eqx.filter_jit(lambda inpaint, image, region: inpaint(image, region))
    print(f"{'folder':40}  {'inpainter':14}  PSNR dB  feature distance")
    for folder in arguments.folders:
        found = {name: ([], []) for name in names}
        rng = np.random.default_rng(0)
        units = [resized(to_unit(read_image(path)), SIZE) for path, _ in list_images([folder])]
        normals = jnp.asarray(np.rint(255 * np.stack(units[arguments.images :][:16])), jnp.uint8)
        for image in map(normalise, units[: arguments.images]):
            for _ in range(2):
                region = dilate(jnp.asarray(irregular_shape(rng, SIZE, area=(0.01, 0.06))), 8)
                mean = jnp.sum(image * ~region[..., None], (0, 1)) / jnp.sum(~region)
                truth = features(backbone, image)
                worst = jnp.linalg.norm(features(backbone, jnp.where(region[..., None], mean, image)) - truth)
                for name in names:
                    inpaint = choose(name.removesuffix(" alone"), None if name.endswith("alone") else normals)
                    filled = fill(inpaint, image, region)
                    error = jnp.sum((denormalise(filled) - denormalise(image)) ** 2) / (3 * jnp.sum(region))
                    found[name][0].append(float(-10 * jnp.log10(error)))
                    found[name][1].append(float(jnp.linalg.norm(features(backbone, filled) - truth) / worst))
        for name, (psnr, distance) in found.items():
            print(f"{str(folder)[-40:]:40}  {name:14}  {np.mean(psnr):7.2f}  {np.mean(distance):16.3f}", flush=True)


if __name__ == "__main__":
    main()
