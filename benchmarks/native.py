"""Masks at the camera's resolution: ``python benchmarks/native.py SMALL LARGE --weights FILE [--images N]``.

SMALL is a folder in MVTec layout, to whose ``train/good`` a PatchCore is fitted. LARGE has ``test`` and ``ground_truth`` of
this category in full size (900x900). For every image a line gives three IoUs at full size: of the coarse mask, of the mask
refined at 224x224 and enlarged, and of the mask refined at full size, in windows. Seconds of each solve (compiled before)
and the peak memory of the process follow.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from fitted import peak

import f2pad_jax
from f2pad_jax.backbones import load_backbone
from f2pad_jax.data import read_mask
from f2pad_jax.detectors import PatchCore
from f2pad_jax.images import list_images, read_image, to_unit
from f2pad_jax.images._views import scaled_mask
from f2pad_jax.images.metrics import iou
from f2pad_jax.images.pixels import resized


def main() -> None:
    """Prints a line for every image, then the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("small", type=Path)
    parser.add_argument("large", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--model", type=Path, help="model of these images fitted before")
    parser.add_argument("--images", type=int)
    arguments = parser.parse_args()
    if arguments.model:
        detector = f2pad_jax.load_detector(arguments.model, weights=arguments.weights)
    else:
        backbone = load_backbone("resnet18", layers=("layer1", "layer2", "layer3"), weights=arguments.weights)
        normal = [read_image(path) for path, _ in list_images([arguments.small / "train" / "good"])]
        detector = f2pad_jax.fit(PatchCore, normal, backbone, size=(224, 224))
    rows = []
    for path, relative in list_images([arguments.large / "test"])[: arguments.images]:
        image = np.asarray(to_unit(read_image(path)))
        mask = arguments.large / "ground_truth" / relative.parts[0] / f"{path.stem}_mask.png"
        truth, size = read_mask(mask), image.shape[:2]
        masks, seconds = [], []
        for version in (np.asarray(resized(jnp.asarray(image), detector.size)), image):
            for _ in range(2):  # the first compiles
                began = time.perf_counter()
                result = jax.block_until_ready(f2pad_jax.refine(detector, version, windows=True))
                elapsed = time.perf_counter() - began
            masks.append(np.asarray(scaled_mask(result.mask, size)))
            seconds.append(elapsed)
        ious = [iou(np.asarray(result.coarse_mask), truth), *(iou(mask, truth) for mask in masks)]
        rows.append((*ious, *seconds))
        print(f"  {relative}: {' '.join(f'{v:.3f}' for v in ious)}, {seconds[0]:.1f} and {seconds[1]:.1f} s", flush=True)
    coarse, small, native, fast, slow = np.mean(rows, axis=0)
    print(
        f"{len(rows)} images of {size[0]}x{size[1]}: IoU coarse {coarse:.3f}, refined at"
        f" {detector.size[0]}x{detector.size[1]} and enlarged {small:.3f}, refined at full"
        f" size {native:.3f}; {fast:.1f} and {slow:.1f} s an image;"
        f" peak memory {peak():.1f} GiB"
    )


if __name__ == "__main__":
    main()
