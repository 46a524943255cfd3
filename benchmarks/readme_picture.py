"""Picture of the README: hard synthetic defects, with coarse mask, GrabCut and F2PAD side by side.

``f2pad evaluate textures --protocol hard --images 12 --out RUN``, then ``python benchmarks/readme_picture.py RUN
OUT.jpg``. A row is the defect of median IoU (of F2PAD) of one category, so that no row was chosen by hand.
"""

import argparse
from pathlib import Path

import numpy as np
import PIL.Image

from f2pad_jax.evaluation._store import load_images
from f2pad_jax.evaluation.cases import FULL
from f2pad_jax.evaluation.peers import grabcut
from f2pad_jax.images import gallery, overlay
from f2pad_jax.images.metrics import iou


def main(run: str, out: str) -> None:
    """Writes the picture and prints the IoU of every row, and the mean over all defects."""
    rows, labels, all_ious = [], [], []
    for folder in sorted((Path(run) / "runs").glob("hard-*")):
        images = [i for i in load_images(folder) if not i.good]
        masks = [(i.coarse_mask, grabcut(i.image / 255, i.coarse_mask, i.region), i.masks[FULL]) for i in images]
        ious = np.array([[iou(m, i.truth) for m in three] for i, three in zip(images, masks, strict=True)])
        all_ious.append(ious)
        k = int(np.argsort(ious[:, 2])[len(ious) // 2])
        i, (coarse, cut, refined) = images[k], masks[k]
        rows.append([i.image, i.truth, coarse, cut, refined, overlay(i.image, refined), i.normal])
        names = ("coarse", "GrabCut", "F2PAD")
        labels.append("IoU\n" + "\n".join(f"{name} {v:.2f}" for name, v in zip(names, ious[k], strict=True)))
        print(folder.name, i.name, ious[k].round(3))
    titles = ("input", "truth", "coarse", "GrabCut", "F2PAD", "outline", "restored")
    PIL.Image.fromarray(gallery(rows, titles, labels, cell=128)).save(out, quality=88, optimize=True)
    print("mean of all defects: coarse, GrabCut, F2PAD", np.concatenate(all_ious).mean(axis=0).round(3))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="output folder of f2pad evaluate")
    parser.add_argument("out", metavar="OUT", help="picture to write")
    main(**vars(parser.parse_args()))
