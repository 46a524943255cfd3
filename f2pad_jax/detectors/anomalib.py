"""Detectors trained with anomalib 2.x, read from its checkpoints without anomalib, PyTorch or unpickling."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from f2pad_jax.backbones._torchfile import read_training_checkpoint
from f2pad_jax.backbones.backbone import BACKBONES, canonical_name, load_backbone
from f2pad_jax.detectors._flow import CLAMP, Coupling, Flow
from f2pad_jax.detectors.base import AbstractDetector, NormalImages
from f2pad_jax.detectors.calibration import calibrate
from f2pad_jax.detectors.cflow import CFlow
from f2pad_jax.detectors.padim import Full, PaDiM, by_layer
from f2pad_jax.detectors.patchcore import PatchCore
from f2pad_jax.errors import CheckpointError, ImageError
from f2pad_jax.progress import Progress, silent

_MALFORMED = (TypeError, ValueError, LookupError, AttributeError, np.linalg.LinAlgError)
"""Errors that malformed content of a checkpoint causes."""
LARGEST_SIDE = 2**14
"""Largest side that the size of a checkpoint may have, pixels; a larger one is damage."""
DEFAULT_SIZE = (256, 256)
"""Input size of anomalib, for a checkpoint that states no size (before 2.7, without the user's own pre-processor)."""


def load_anomalib(
    path: str | Path,
    images: Iterable[Shaped[np.ndarray | Array, "..."]],
    *,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> AbstractDetector:
    """Loads a PaDiM, PatchCore or CFLOW detector trained with anomalib 2.x and calibrates it.

    The network's weights, the statistics and the size come from the file. The scale of the scores, the threshold, the
    pixel prior and CFLOW's maximum likelihood are measured on normal images. Images outside the training set serve best;
    training images make the scale a little low. anomalib's thresholds are not used, since they depend on its smoothing
    and, for CFLOW, on its batches.

    Args:
        path: ``.ckpt`` file. A saved detector needs this file again when it is loaded, as ``weights=path``.
        images: normal images, each as :func:`~f2pad_jax.images.to_unit` takes it.
        size: height and width that images are resized to; default: the size of anomalib's pre-processor. The size is
            required if the pre-processor crops: crop the images likewise and give the crop's size.
        seed: seed of the synthetic defects and the pixel prior.
        progress: function that receives stage, number done and total.

    Raises:
        CheckpointError: the file is damaged, is no checkpoint of these detectors, or has an unsupported pre-processor.
        ImageError: there are no images, an image can't be used, or the size does not suit the network.
    """
    tensors, rest = read_training_checkpoint(path)
    parameters = rest.get("hyper_parameters")
    if not isinstance(parameters, dict) or not {"backbone", "layers"} <= parameters.keys():
        raise CheckpointError(
            f"{path}: no checkpoint of anomalib's PaDiM, PatchCore or CFLOW: it does not name a backbone and its layers"
        )
    name, wanted = canonical_name(str(parameters["backbone"]).partition(".")[0]), parameters["layers"]
    if name not in BACKBONES:
        raise CheckpointError(f"{path}: its network {name} is unknown; known: {', '.join(BACKBONES)}")
    known = list(BACKBONES[name].strides)
    if not isinstance(wanted, (list, tuple)) or not wanted or any(wanted.count(w) > 1 or w not in known for w in wanted):
        raise CheckpointError(f"{path}: taps {wanted} of {name}; expected some of {', '.join(known)}, each once")
    layers = tuple(sorted(wanted, key=known.index))  # anomalib orders the features as the network does
    backbone = load_backbone(name, layers=layers, weights=path)
    try:
        size = size or _input_size(parameters, rest)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except _MALFORMED as error:
        raise CheckpointError(f"{path}: its pre-processor can't be read ({error}); give the size of its output") from None
    if any(side % backbone.stride or side <= 0 for side in size):
        raise ImageError(f"{path}: size {size} is not a multiple of the stride {backbone.stride}; give another size")
    normals = NormalImages(images, size)
    if not len(normals):
        raise ImageError(f"{path}: the calibration needs at least one normal image; got none")
    try:
        if "model.memory_bank" in tensors:
            bank = tensors["model.memory_bank"].astype(np.float32)
            if bank.ndim != 2 or not len(bank) or bank.shape[1] != sum(backbone.channels):
                raise CheckpointError(f"its memory bank has shape {bank.shape}; expected (n, {sum(backbone.channels)})")
            detector: AbstractDetector = PatchCore(backbone=backbone, size=size, memory_bank=jnp.asarray(bank))
        elif "model.gaussian.mean" in tensors:
            detector = _padim(tensors, backbone, size)
        elif any(name.startswith("model.decoders.") for name in tensors):
            detector = _cflow(tensors, parameters, backbone, size)
        else:
            raise CheckpointError("its model is none of anomalib's PaDiM, PatchCore and CFLOW")
    except KeyError as error:
        raise CheckpointError(f"{path}: tensor {error} is missing") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except _MALFORMED as error:
        raise CheckpointError(f"{path}: its tensors don't fit together ({error})") from None
    if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(detector)):
        raise CheckpointError(f"{path}: its statistics hold values that are not finite")
    if isinstance(detector, CFlow):
        detector = detector.with_peaks(normals)
    return calibrate(detector, normals, seed=seed, progress=progress)


def _input_size(parameters: dict, rest: dict) -> tuple[int, int]:
    """Returns the height and width to which the pre-processor of a checkpoint resizes images."""
    config, processor = rest.get("anomalib_pre_processor_config"), parameters.get("pre_processor")
    steps: list[tuple[str, dict[str, Any]]] = []
    if isinstance(config, dict) and isinstance(config.get("transform"), dict):  # since 2.7
        transforms = config["transform"].get("init_args", {}).get("transforms", [config["transform"]])
        steps = [(t["class_path"].rpartition(".")[2], t["init_args"]) for t in transforms]
    elif isinstance(processor, dict):
        transform = processor.get("_modules", {}).get("transform")
        steps = [(type(t).__name__, t) for t in transform.get("transforms", [transform])] if transform else []
    size = DEFAULT_SIZE
    for step, arguments in steps:
        if step == "Resize" and np.shape(arguments["size"]) == (2,):
            size = (int(arguments["size"][0]), int(arguments["size"][1]))
            if list(size) != list(arguments["size"]) or not 0 < min(size) <= max(size) <= LARGEST_SIDE:
                raise CheckpointError(f"its pre-processor resizes to {arguments['size']}, which is no size of images")
        elif step == "Normalize":
            if not np.allclose([*arguments["mean"], *arguments["std"]], [0.485, 0.456, 0.406, 0.229, 0.224, 0.225]):
                raise CheckpointError("its pre-processor normalises by other values than ImageNet's mean and deviation")
        else:
            raise CheckpointError(
                f"its pre-processor has a {step} step, which this library can't reproduce; apply it to the images "
                "first, and give the size of its output"
            )
    return size


def _padim(tensors: dict[str, np.ndarray], backbone, size: tuple[int, int]) -> PaDiM:
    mean, precision = tensors["model.gaussian.mean"], tensors["model.gaussian.inv_covariance"]
    stride = min(backbone.strides)
    h, w = size[0] // stride, size[1] // stride
    if mean.shape[1] != h * w:
        raise CheckpointError(
            f"holds statistics of {mean.shape[1]} positions, not the {h}x{w} of size {size[0]}x{size[1]}; give another size"
        )
    order = np.argsort(tensors["model.idx"])
    if not 0 <= tensors["model.idx"].min() <= tensors["model.idx"].max() < sum(backbone.channels):
        raise CheckpointError("keeps channels that its layers do not have")
    precision = precision[:, order][:, :, order].reshape(h, w, len(order), len(order))
    return PaDiM(
        backbone=backbone,
        size=size,
        channels=by_layer(tensors["model.idx"][order], backbone),
        mean=jnp.asarray(mean[order].T.reshape(h, w, -1)),
        precision=Full(jnp.asarray((precision + np.swapaxes(precision, 2, 3)) / 2, jnp.float32)),
    )


def _cflow(tensors: dict[str, np.ndarray], parameters: dict, backbone, size: tuple[int, int]) -> CFlow:
    if not math.isclose(float(parameters.get("clamp_alpha", CLAMP)), CLAMP):
        raise CheckpointError(f"its flows clamp at {parameters['clamp_alpha']}; this library's flows clamp at {CLAMP}")
    if f"model.decoders.{len(backbone.layers)}.module_list.0.global_scale" in tensors:
        raise CheckpointError(f"has more flows than the {len(backbone.layers)} layers it taps")
    flows = []
    for k in range(len(backbone.layers)):
        prefix, blocks = f"model.decoders.{k}.module_list", []
        while f"{prefix}.{len(blocks)}.global_scale" in tensors:
            block = f"{prefix}.{len(blocks)}"
            blocks.append(
                Coupling(
                    weight1=jnp.asarray(tensors[f"{block}.subnet.0.weight"].T),
                    bias1=jnp.asarray(tensors[f"{block}.subnet.0.bias"]),
                    weight2=jnp.asarray(tensors[f"{block}.subnet.2.weight"].T),
                    bias2=jnp.asarray(tensors[f"{block}.subnet.2.bias"]),
                    global_scale=jnp.asarray(tensors[f"{block}.global_scale"][0]),
                    global_offset=jnp.asarray(tensors[f"{block}.global_offset"][0]),
                    rotation=jnp.asarray(tensors[f"{block}.w_perm"]),
                )
            )
        if not blocks:
            raise CheckpointError(f"tensor '{prefix}.0.global_scale' is missing")
        flows.append(Flow(tuple(blocks)))
    unset = jnp.zeros(len(flows))
    return CFlow(backbone=backbone, size=size, flows=tuple(flows), peaks=unset, losses=jnp.zeros((0, len(flows))))
