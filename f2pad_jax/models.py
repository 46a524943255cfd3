"""A fitted detector in one file: safetensors with a JSON header, no pickle."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from f2pad_jax.backbones import load_backbone
from f2pad_jax.checkpoints import content_checksum, read_safetensors, write_safetensors
from f2pad_jax.detectors.patchcore import PatchCore
from f2pad_jax.errors import CheckpointError, ModelError
from f2pad_jax.prior import PixelPrior

FORMAT = "f2pad-model-2"


def save_detector(path: str | Path, detector: PatchCore) -> None:
    """Write a fitted detector: statistics, prior, threshold and exemplars, and which backbone weights they belong to."""
    tensors = {
        "memory_bank": detector.memory_bank,
        "scale": detector.scale,
        "threshold": detector.threshold,
        "faint_threshold": jnp.float32(detector.faint_threshold),
        "prior.means": detector.prior.means,
        "prior.whitening": detector.prior.whitening,
    }
    if detector.normals is not None:
        tensors["normals"] = detector.normals
    tensors = {name: np.asarray(value) for name, value in tensors.items()}
    header = {
        "detector": "patchcore",
        "backbone": detector.backbone.name,
        "layers": detector.backbone.layers,
        "backbone_sha256": np.asarray(detector.backbone.checksum).tobytes().hex(),
        "size": detector.size,
        "num_candidates": detector.num_candidates,
    }
    header = json.dumps(header, sort_keys=True)
    write_safetensors(path, tensors, {"format": FORMAT, "header": header, "sha256": _checksum(header, tensors)})


def load_detector(path: str | Path, *, weights: str | Path | None = None) -> PatchCore:
    """Read a detector written by :func:`save_detector`, with its backbone.

    Args:
        path: the model file.
        weights: the backbone's weights, if not those installed for it.

    Raises:
        ModelError: the file is missing, damaged, altered or no model, or was fitted with other backbone weights.
    """
    try:
        tensors, metadata = read_safetensors(path)
    except CheckpointError as error:
        raise ModelError(f"not a model this program wrote: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ModelError(f"{path}: not a model this program wrote (format {metadata.get('format')!r}, expected {FORMAT!r})")
    if metadata.get("sha256") != _checksum(metadata.get("header", ""), tensors):
        raise ModelError(f"{path}: damaged or altered since it was written; fit the model again")
    header = json.loads(metadata["header"])
    backbone = load_backbone(header["backbone"], layers=tuple(header["layers"]), weights=weights)
    if bytes.fromhex(header["backbone_sha256"]) != np.asarray(backbone.checksum).tobytes():
        raise ModelError(f"{path}: fitted with other weights of {backbone.name} than those given; fit the model again")
    return PatchCore(
        backbone=backbone,
        memory_bank=jnp.asarray(tensors["memory_bank"]),
        scale=jnp.asarray(tensors["scale"]),
        prior=PixelPrior(jnp.asarray(tensors["prior.means"]), jnp.asarray(tensors["prior.whitening"])),
        threshold=jnp.asarray(tensors["threshold"]),
        size=tuple(header["size"]),
        num_candidates=header["num_candidates"],
        faint_threshold=jnp.asarray(tensors["faint_threshold"]),
        normals=jnp.asarray(tensors["normals"]) if "normals" in tensors else None,
    )


def _checksum(header: str, tensors: dict[str, np.ndarray]) -> str:
    return content_checksum({**tensors, "header": np.frombuffer(header.encode(), np.uint8)})
