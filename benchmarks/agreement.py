"""Agreement of masks between runs: ``python benchmarks/agreement.py ROOT --out FOLDER --label NAME --weights FILE``.

Each run refines some defects of a data set in MVTec layout, keeps the masks in FOLDER under NAME, and prints the mean IoU
of its masks with the masks of each run before, and the share of images whose IoU is below 0.9. Runs may differ in the
seed of the fit (``--seed``), in windows or whole images (``--whole``), or in threads (``NPROC=1``, ``NPROC=2``).
"""

from pathlib import Path

import jax
import numpy as np
from fitted import categories_command_line, kept_detector

import f2pad_jax
from f2pad_jax.data import open_categories
from f2pad_jax.data.mvtec import half_of, spread
from f2pad_jax.images import read_image
from f2pad_jax.images.metrics import iou


def main() -> None:
    """Refines, keeps the masks, and prints a line for each run before."""
    parser = categories_command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--label", required=True)
    parser.add_argument("--seed", type=int, default=0, help="seed of the fit")
    parser.add_argument("--whole", action="store_true", help="solve whole images, not windows")
    parser.add_argument("--images", type=int, default=5, help="number of defects of each category")
    arguments = parser.parse_args()
    masks = {}
    for category in open_categories(arguments.root, names=arguments.categories):
        _, detector = kept_detector(category, arguments, arguments.out / "models", seed=arguments.seed)
        defects = [sample for sample in half_of(category.test, arguments.half) if sample.mask]
        for sample in spread(defects, arguments.images):
            (found,) = f2pad_jax.refine_many(detector, [read_image(sample.path)], windows=not arguments.whole)
            masks[f"{category.name}/{sample.name}"] = np.asarray(found.mask)
        jax.clear_caches()
    for file in sorted(arguments.out.glob("*.npz")):
        if file.stem != arguments.label:
            with np.load(file) as other:
                ious = [iou(mask, other[name]) for name, mask in masks.items() if name in other]
            shares = f"{np.mean(ious):.4f}, below 0.9: {np.mean(np.array(ious) < 0.9):.2f} of {len(ious)}"
            print(f"{arguments.label} with {file.stem}: mean IoU {shares}", flush=True)
    np.savez_compressed(arguments.out / f"{arguments.label}.npz", **masks)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
