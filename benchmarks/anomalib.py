"""Detectors trained by anomalib and read by this library: ``python benchmarks/anomalib.py FOLDER --weights FILE``.

    pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
    pip install anomalib FrEIA
    pip install -e .

Torch and torchvision must come from one index. PyPI's torchvision is built for CUDA, and beside a torch for CPUs it stops
with "operator torchvision::nms does not exist".

The benchmark trains a small PaDiM, PatchCore and CFLOW with anomalib's own engine, on a few normal images of FOLDER (MVTec
layout). It reads the saved checkpoints with :func:`f2pad_jax.detectors.load_anomalib`. It prints two figures for each
model, over a few test images. The first is the largest difference of the computed values (distances, patch scores,
log-likelihoods), relative to the largest of anomalib's values. The second is the correlation of the anomaly maps, each
smoothed in its library's own way. A second line gives the mean IoU of refined masks with the ground truth: of the imported
model, and of anomalib's predictions through :func:`f2pad_jax.refine_batches`, with levels of its maps of normal images. The
restored images are then judged by the imported model, or by a PatchCore fitted to the test folder's good images.

FILE holds the weights of ResNet18, in timm's or torchvision's names, with batch norm folded or not; neither library
fetches any. Both libraries are given PNG files of FOLDER, resized here to the models' size.
The exit status is 1 if a difference exceeds 1e-3.
"""

import argparse
import dataclasses
import importlib.metadata
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.pop(0)  # this folder, in which the name anomalib stands for this file

import jax
import jax.numpy as jnp
import numpy as np
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from anomalib.models import Cflow, Padim, Patchcore
from anomalib.models.image.cflow.utils import get_logp, positional_encoding_2d
from anomalib.post_processing import PostProcessor
from lightning.pytorch import seed_everything
from PIL import Image

import f2pad_jax
from f2pad_jax._storage import read_safetensors
from f2pad_jax.backbones._torchfile import read_torch_file
from f2pad_jax.backbones._weight_files import is_safetensors
from f2pad_jax.data.mvtec import read_mask
from f2pad_jax.detectors import AbstractDetector, CFlow, PatchCore, load_anomalib
from f2pad_jax.detectors.base import ORIGIN
from f2pad_jax.detectors.calibration import with_calibration, with_maps
from f2pad_jax.detectors.patchcore import embed, nearest
from f2pad_jax.images.metrics import iou

SIZE = (128, 160)
NUM_TRAIN, NUM_NORMAL, NUM_TEST = 16, 12, 8
TOLERANCE = 1e-3
MODELS = {
    "PaDiM": (Padim, {"layers": ["layer1", "layer2", "layer3"], "n_features": 50}),
    "PatchCore": (Patchcore, {"layers": ["layer2", "layer3"], "coreset_sampling_ratio": 0.05}),
    "CFLOW": (Cflow, {"layers": ["layer2", "layer3"], "coupling_blocks": 2, "condition_vector": 64}),
}
MEASURES = {"PaDiM": "distances", "PatchCore": "patch scores", "CFLOW": "log-likelihoods"}


def copy_images(folder: Path, to: Path) -> list[Path]:
    """Writes a few images at the models' size, in MVTec layout; returns the paths of the test images."""
    defect = min(path.name for path in (folder / "test").iterdir() if path.name != "good")
    written: dict[str, list[Path]] = {}
    for part, count in (("train/good", NUM_TRAIN), ("test/good", NUM_NORMAL), (f"test/{defect}", NUM_TEST)):
        (to / part).mkdir(parents=True)
        for path in sorted((folder / part).glob("*.png"))[:count]:
            Image.open(path).convert("RGB").resize(SIZE[::-1], Image.Resampling.BILINEAR).save(to / part / path.name)
            written.setdefault(part, []).append(to / part / path.name)
            if part == f"test/{defect}":
                truth = read_mask(folder / "ground_truth" / defect / f"{path.stem}_mask.png", size=SIZE)
                (to / "ground_truth").mkdir(exist_ok=True)
                Image.fromarray(truth).save(to / "ground_truth" / path.name)
    return [*written["test/good"][:1], *written[f"test/{defect}"]]


def read_pixels(path: Path) -> np.ndarray:
    """Returns the RGB values of an image file, uint8."""
    return np.asarray(Image.open(path).convert("RGB"))


def give_weights(model: torch.nn.Module, path: Path) -> None:
    """Puts a file's weights into the model's ResNet18, without the layers that timm has left out of it."""
    tensors = read_safetensors(path)[0] if is_safetensors(path) else read_torch_file(path)
    network = (model.feature_extractor if hasattr(model, "feature_extractor") else model.encoder).feature_extractor
    missing = network.load_state_dict(
        {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}, strict=False
    ).missing_keys
    used = ("conv1", "bn1", "layer1", "layer2", "layer3")
    if absent := [name for name in missing if name.startswith(used) and not name.endswith("num_batches_tracked")]:
        sys.exit(f"{path}: holds no '{absent[0]}'")


def train(name: str, data: Path, weights: Path, folder: Path) -> tuple[torch.nn.Module, Engine]:
    """Trains a model with anomalib; returns it and its engine."""
    seed_everything(0, verbose=False)
    cls, options = MODELS[name]
    processors = {
        "pre_processor": cls.configure_pre_processor(SIZE),
        "post_processor": PostProcessor(enable_normalization=False),  # else maps are cut off at 1
    }
    model = cls(backbone="resnet18", pre_trained=False, **processors, **options)
    give_weights(model.model, weights)
    defect = min(path.name for path in (data / "test").iterdir() if path.name != "good")
    images = Folder(
        name="images",
        root=data,
        normal_dir="train/good",
        abnormal_dir=f"test/{defect}",
        normal_test_dir="test/good",
        train_batch_size=4,
        eval_batch_size=4,
        num_workers=0,
        val_split_mode="same_as_test",
    )
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    epochs = {"max_epochs": 1} if name == "CFLOW" else {}
    engine = Engine(accelerator="cpu", devices=1, default_root_dir=folder / name, **silent, **epochs)
    engine.fit(model, datamodule=images)
    return model.eval(), engine


def anomalib_values(model: torch.nn.Module, image: torch.Tensor) -> Iterator[np.ndarray]:
    """Yields the values that a trained model computes for an image at each position, one map per scored layer."""
    core = model.model
    if hasattr(core, "decoders"):
        for k, m in enumerate(core.encoder(image).values()):
            c, h, w = m.shape[1:]
            position = positional_encoding_2d(core.condition_vector, h, w).flatten(1).T
            z, log_determinant = core.decoders[k].eval()(m[0].flatten(1).T, [position])
            yield (get_logp(c, z, log_determinant) / c).reshape(h, w).numpy()
        return
    maps = core.feature_extractor(image)
    if hasattr(core, "feature_pooler"):
        embedding = core.generate_embedding({layer: core.feature_pooler(m) for layer, m in maps.items()})
        yield core.nearest_neighbors(core.reshape_embedding(embedding), 1)[0].reshape(embedding.shape[2:]).numpy()
    else:
        embedding, statistics = core.generate_embedding(maps), [core.gaussian.mean, core.gaussian.inv_covariance]
        yield core.anomaly_map_generator.compute_distance(embedding, statistics)[0, 0].numpy()


@jax.jit
def own_values(detector: AbstractDetector, image: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the values that a detector read from the checkpoint computes, one map per scored layer."""
    match detector:
        case CFlow():
            return detector.log_likelihoods(image, detector.locate(image, ORIGIN))
        case PatchCore():
            rows = embed(detector.backbone, image)
            distances, _ = nearest(rows.reshape(-1, rows.shape[-1]), detector.memory_bank, 1)
            return (jnp.sqrt(distances).reshape(rows.shape[:2]),)
    return tuple(jnp.sqrt(s) for s in detector.raw_scores(image, detector.locate(image, ORIGIN)))


def compare(name: str, data: Path, test: list[Path], weights: Path, folder: Path) -> float:
    """Trains a model, reads it and prints both figures; returns the relative difference."""
    model, engine = train(name, data, weights, folder)
    checkpoint = Path(engine.trainer.checkpoint_callback.best_model_path)
    detector = load_anomalib(checkpoint, map(read_pixels, sorted((data / "test/good").glob("*.png"))))
    anomaly_map = jax.jit(lambda detector, image: detector.anomaly_map(image))
    pairs, found, expected = [], [], []
    with torch.no_grad():
        for file in test:
            raw = torch.from_numpy(np.array(read_pixels(file).transpose(2, 0, 1)))[None] / 255
            image = model.pre_processor.transform(raw)
            channels_last = jnp.asarray(image[0].permute(1, 2, 0).numpy())
            pairs += list(zip(anomalib_values(model, image), own_values(detector, channels_last), strict=True))
            expected.append(np.ravel(model.model(image).anomaly_map.numpy()))
            found.append(np.ravel(anomaly_map(detector, channels_last)))
    difference = max(float(np.abs(a - np.asarray(b)).max()) for a, b in pairs)
    worst = difference / max(float(np.abs(a).max()) for a, _ in pairs)
    correlation = np.corrcoef(np.concatenate(found), np.concatenate(expected))[0, 1]
    print(
        f"{name:10} {MEASURES[name]:16} differ by {worst:.1e} of their peak; maps correlate by {correlation:.4f}",
        flush=True,
    )
    print(f"{'':10} refined masks, mean IoU: " + "; ".join(refined_ious(detector, model, engine, data, test)), flush=True)
    return worst


def refined_ious(
    detector: AbstractDetector, model: torch.nn.Module, engine: Engine, data: Path, test: list[Path]
) -> list[str]:
    """Refines the defects by the imported detector, and by the model's predictions; returns the mean IoU of both."""
    defects = [path for path in test if path.parent.name != "good"]
    truths = [read_mask(path.parents[2] / "ground_truth" / path.name) for path in defects]

    def predicted(folder: Path) -> list:
        return engine.predict(model, dataset=PredictDataset(folder))

    normal = predicted(data / "test/good")
    images, maps = (
        [read_pixels(Path(path)) for batch in normal for path in batch.image_path],
        np.concatenate([batch.anomaly_map.numpy().reshape(-1, *SIZE) for batch in normal]),
    )
    calibration = with_maps(detector, maps, maps[:0]).calibrated
    judges = {
        "its predictions": with_calibration(detector, dataclasses.replace(calibration, maps="given")),
        "its predictions, PatchCore as judge": f2pad_jax.fit(
            PatchCore, images, detector.backbone, size=SIZE, coarse_maps=maps
        ),
    }
    predictions = predicted(defects[0].parent)
    found = {"imported model": list(f2pad_jax.refine_many(detector, defects))}
    for name, judge in judges.items():
        found[name] = [result for _, results in f2pad_jax.refine_batches(judge, predictions) for result in results]
    return [
        f"{name} {np.mean([iou(result.mask, truth) for result, truth in zip(results, truths, strict=True)]):.3f}"
        for name, results in found.items()
    ]


def main() -> int:
    """Compares all models; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    versions = (
        f"{package} {importlib.metadata.version(package)}" for package in ("anomalib", "torch", "timm", "FrEIA", "jax")
    )
    print(", ".join(versions), f"; images of {SIZE[0]}x{SIZE[1]}", sep="", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        test = copy_images(arguments.folder, data)
        worst = [compare(name, data, test, arguments.weights, Path(temporary)) for name in MODELS]
    return int(max(worst) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
