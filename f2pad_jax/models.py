"""A fitted detector in one file: safetensors with a JSON header, no pickle."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import f2pad_jax
from f2pad_jax.backbones import Backbone, load_backbone
from f2pad_jax.checkpoints import content_checksum, read_safetensors, write_safetensors
from f2pad_jax.detectors import DETECTORS
from f2pad_jax.detectors.base import AbstractDetector, Calibration
from f2pad_jax.detectors.cflow import Coupling, Flow
from f2pad_jax.detectors.padim import Full, LowRank
from f2pad_jax.errors import CheckpointError, ModelError
from f2pad_jax.prior import PixelPrior

FORMAT = "f2pad-model-3"
CLASSES: tuple[type[eqx.Module], ...] = (*DETECTORS.values(), Calibration, PixelPrior, Full, LowRank, Flow, Coupling)
"""What a model file may hold: nothing else is ever made from one."""


def save_detector(path: str | Path, detector: AbstractDetector) -> None:
    """Write a fitted detector, of whatever class, and which backbone weights it belongs to.

    Raises:
        ModelError: a field holds something other than arrays, modules, tuples, text and numbers.
    """
    tensors: dict[str, np.ndarray] = {}
    content = {"version": f2pad_jax.__version__, "detector": _encode("detector", detector, tensors)}
    header = json.dumps(content, sort_keys=True)
    checksum = content_checksum(tensors, header=header)
    write_safetensors(path, tensors, {"format": FORMAT, "header": header, "sha256": checksum})


def load_detector(
    path: str | Path, *, weights: str | Path | None = None, classes: Iterable[type[eqx.Module]] = ()
) -> AbstractDetector:
    """Read a detector written by :func:`save_detector`, with its backbone.

    Args:
        path: the model file.
        weights: the backbone's weights, if not those installed for it.
        classes: those of a detector of one's own, and of the modules in it.

    Raises:
        ModelError: the file is missing, damaged, altered or no model, was fitted with other backbone weights, or is of a
            class that is neither this library's nor given.
        CheckpointError: the backbone's weights are missing.
    """
    try:
        tensors, metadata = read_safetensors(path)
    except CheckpointError as error:
        raise ModelError(f"not a model this program wrote: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ModelError(f"{path}: not a model this program wrote (format {metadata.get('format')!r}, expected {FORMAT!r})")
    if metadata.get("sha256") != content_checksum(tensors, header=metadata.get("header", "")):
        raise ModelError(f"{path}: damaged or altered since it was written; fit the model again")
    known = {cls.__name__: cls for cls in (*CLASSES, *classes)}
    try:
        return _decode(json.loads(metadata["header"])["detector"], tensors, known, weights)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except TypeError as error:  # a class whose fields are others by now
        raise ModelError(f"{path}: saved by another version of its class ({error}); fit the model again") from None


def _encode(name: str, value: Any, tensors: dict[str, np.ndarray]) -> Any:
    """A value as JSON, its arrays put into ``tensors`` under their path in the detector."""
    match value:
        case Backbone():
            checksum = np.asarray(value.checksum).tobytes().hex()
            return {"backbone": value.name, "layers": value.layers, "sha256": checksum}
        case eqx.Module():
            names = [field.name for field in dataclasses.fields(value)]
            fields = {field: _encode(f"{name}.{field}", getattr(value, field), tensors) for field in names}
            return {"class": type(value).__name__, "fields": fields}
        case jax.Array() | np.ndarray():
            tensors[name] = np.asarray(value)
            return {"tensor": name}
        case tuple() | list():
            return [_encode(f"{name}.{i}", item, tensors) for i, item in enumerate(value)]
        case None | bool() | int() | float() | str():
            return value
    raise ModelError(f"{name} is a {type(value).__name__}, which a model file can't hold")


def _decode(value: Any, tensors: dict[str, np.ndarray], known: dict[str, type], weights: str | Path | None) -> Any:
    match value:
        case {"backbone": name, "layers": layers, "sha256": checksum}:
            backbone = load_backbone(name, layers=tuple(layers), weights=weights)
            if bytes.fromhex(checksum) != np.asarray(backbone.checksum).tobytes():
                raise ModelError(f"fitted with other weights of {name} than those given; fit the model again")
            return backbone
        case {"class": name, "fields": fields}:
            if name not in known:
                raise ModelError(f"holds a {name}; pass its class to load_detector as classes=({name},)")
            return known[name](**{key: _decode(item, tensors, known, weights) for key, item in fields.items()})
        case {"tensor": name}:
            return jnp.asarray(tensors[name])
        case list():
            return tuple(_decode(item, tensors, known, weights) for item in value)
    return value
