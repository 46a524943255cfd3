"""Fits any model of anomalib and refines its predictions: ``python examples/anomalib_run.py FOLDER --out DIR``.

    pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
    pip install anomalib 'f2pad-jax[demo]'

FOLDER has MVTec's layout, with ``ground_truth``. anomalib downloads the weights of its model. The masks are written into
DIR. The mean IoU of the model's masks and of the refined masks with the ground truth is printed.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import PIL.Image
from anomalib import models
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor

import f2pad_jax
from f2pad_jax.data import open_category
from f2pad_jax.data.mvtec import read_mask
from f2pad_jax.detectors import PatchCore
from f2pad_jax.images import read_image
from f2pad_jax.images.files import write_png
from f2pad_jax.images.metrics import iou


def main() -> None:
    """Fits, predicts and refines."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="Patchcore", help="class in anomalib.models, such as Dinomaly or EfficientAd")
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of the class, as JSON")
    parser.add_argument("--epochs", type=int, default=-1, help="number of epochs of the training; default: the model's")
    arguments = parser.parse_args()

    category = open_category(arguments.folder)
    defects = sorted({sample.path.parent.name for sample in category.test if sample.mask})
    data = Folder(
        name=category.name,
        root=arguments.folder,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{defect}" for defect in defects],
        mask_dir=[f"ground_truth/{defect}" for defect in defects],
        train_batch_size=8,
        eval_batch_size=8,
        num_workers=0,
        val_split_mode="same_as_test",
    )
    whole_maps = PostProcessor(enable_normalization=False)  # by default, maps are cut off at 1
    model = getattr(models, arguments.model)(post_processor=whole_maps, **arguments.options)
    epochs = {} if arguments.epochs < 0 else {"max_epochs": arguments.epochs}
    engine = Engine(default_root_dir=arguments.out / "anomalib", logger=False, **epochs)
    engine.fit(model, datamodule=data)
    predictions = engine.predict(model, datamodule=data)

    # the model says where; features of an ImageNet network judge the restored image
    normals = (read_image(path) for path in category.train)
    detector = f2pad_jax.fit(PatchCore, normals, "efficientnet-lite0", features_only=True)
    truths = {sample.path.resolve(): sample.mask for sample in category.test if sample.mask}
    ious = []
    for batch, (_, results) in zip(predictions, f2pad_jax.refine_batches(detector, predictions), strict=True):
        for path, coarse, result in zip(batch.image_path, batch.pred_mask.numpy(), results, strict=True):
            path = Path(path).resolve()
            write_png(arguments.out / f"{path.parent.name}_{path.stem}.png", result.mask)
            if path in truths:
                truth = read_mask(truths[path])
                before = np.asarray(PIL.Image.fromarray(coarse).resize(truth.shape[::-1], PIL.Image.Resampling.NEAREST))
                ious.append([iou(before, truth), iou(result.mask, truth)])
    model_iou, refined_iou = np.mean(ious, axis=0)
    print(f"{len(ious)} defects, mean IoU: {arguments.model} {model_iou:.3f}, refined {refined_iou:.3f}")


if __name__ == "__main__":
    main()
