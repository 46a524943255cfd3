"""Saving of fitted detectors, each in one file: safetensors with a JSON header, no pickle."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from f2pad_jax._storage import content_checksum, read_safetensors, write_safetensors
from f2pad_jax._version import __version__
from f2pad_jax.backbones.backbone import Backbone, load_backbone
from f2pad_jax.detectors._flow import Coupling, Flow
from f2pad_jax.detectors.base import AbstractDetector, Added, Calibration, Factors
from f2pad_jax.detectors.composed import Composed
from f2pad_jax.detectors.normality import Normality
from f2pad_jax.detectors.padim import Full, LowRank
from f2pad_jax.detectors.prior import PixelPrior
from f2pad_jax.detectors.registry import DETECTORS
from f2pad_jax.errors import CheckpointError, ModelError

FORMAT = "f2pad-model-7"
"""Name of the file format, with its version."""
CLASSES: tuple[type[eqx.Module], ...] = (
    *DETECTORS.values(),
    Composed,
    Calibration,
    Added,
    Factors,
    Normality,
    PixelPrior,
    Full,
    LowRank,
    Flow,
    Coupling,
)
"""Classes that a model file may hold. Loading makes objects of no other class."""


def save_detector(path: str | Path, detector: AbstractDetector) -> None:
    """Writes a fitted detector of any class, with the name and the weights' checksum of its backbone.

    Raises:
        ModelError: a field holds a value other than an array, module, tuple, text or number.
    """
    tensors: dict[str, np.ndarray] = {}
    content = {"version": __version__, "detector": _encode("detector", detector, tensors)}
    header = json.dumps(content, sort_keys=True)
    checksum = content_checksum(tensors, header=header)
    write_safetensors(path, tensors, {"format": FORMAT, "header": header, "sha256": checksum})


def load_detector(
    path: str | Path, *, weights: str | Path | Sequence[str | Path] | None = None, classes: Iterable[type[eqx.Module]] = ()
) -> AbstractDetector:
    """Reads a detector written by :func:`save_detector`, and loads its backbone.

    Args:
        path: model file.
        weights: weight file of the backbone; default: the installed one. A composed detector with two backbones takes a
            file for each, in any order.
        classes: classes of your own detector, and of the modules in it.

    Raises:
        ModelError: the file is missing, damaged, altered or no model; it was fitted with other weights; or it holds
            a class that is neither in this library nor in ``classes``.
        CheckpointError: the backbone's weights are missing.
    """
    try:
        tensors, metadata = read_safetensors(path)
    except CheckpointError as error:
        raise ModelError(f"not a model of this program: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ModelError(f"{path}: not a model of this version (format {metadata.get('format')!r}, expected {FORMAT!r})")
    if metadata.get("sha256") != content_checksum(tensors, header=metadata.get("header", "")):
        raise ModelError(f"{path}: damaged or altered since it was written; fit the model again")
    by_name = {cls.__name__: cls for cls in (*CLASSES, *classes)}
    files = (weights,) if weights is None or isinstance(weights, (str, Path)) else tuple(weights)
    try:
        detector = _decode(json.loads(metadata["header"])["detector"], tensors, by_name, files)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:  # of another version
        raise ModelError(f"{path}: saved by another version of its class ({error}); fit the model again") from None
    if not isinstance(detector, AbstractDetector):
        raise ModelError(f"{path}: holds no detector; fit the model again")
    return detector


def _encode(name: str, value: Any, tensors: dict[str, np.ndarray]) -> Any:
    """Returns a value as JSON, and puts its arrays into ``tensors`` under their path in the detector."""
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


def _decode(
    value: Any, tensors: dict[str, np.ndarray], classes: dict[str, type], files: Sequence[str | Path | None]
) -> Any:
    """Returns the value that :func:`_encode` turned into JSON."""
    match value:
        case {"backbone": name, "layers": layers, "sha256": checksum}:
            return _backbone(name, tuple(layers), bytes.fromhex(checksum), files)
        case {"class": name, "fields": fields}:
            if name not in classes:
                raise ModelError(f"holds a {name}; pass its class to load_detector as classes=({name},)")
            values = {key: _decode(item, tensors, classes, files) for key, item in fields.items()}
            for field in dataclasses.fields(classes[name]) if classes[name] in CLASSES else ():
                if field.name in values and not _suits(values[field.name], field.type):
                    raise ModelError(f"holds no {field.name} of a {name}; fit the model again")
            return classes[name](**values)
        case {"tensor": name}:
            return jax.device_put(tensors[name])
        case list():
            return tuple(_decode(item, tensors, classes, files) for item in value)
    return value


def _backbone(name: str, layers: tuple[str, ...], checksum: bytes, files: Sequence[str | Path | None]) -> Backbone:
    """Returns the backbone from the file whose weights have the checksum; raises the error of the last file if none has."""
    for file, last in zip(files, [*[False] * (len(files) - 1), True], strict=True):
        try:
            backbone = load_backbone(name, layers=layers, weights=file)
        except CheckpointError:
            if last:
                raise
            continue
        if checksum == np.asarray(backbone.checksum).tobytes():
            return backbone
    raise ModelError(f"fitted with other weights of {name}; give these weights, or fit the model again")


_LARGEST = float(np.finfo(np.float32).max)
"""Largest number that 32 bits hold."""


def _suits(value: Any, kind: Any) -> bool:
    """Returns whether a value has the type of a field."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_suits(value, part) for part in parts)
    if origin is tuple and isinstance(value, tuple):
        parts = [parts[0]] * len(value) if parts[-1] is ... else parts
        return len(value) == len(parts) and all(map(_suits, value, parts))
    if kind in (int, float):
        return not isinstance(value, bool) and isinstance(value, (int, kind)) and abs(value) <= _LARGEST
    if array := getattr(kind, "array_type", None):  # of jaxtyping
        axes = kind.dim_str.split()
        return isinstance(value, array) and (len(axes) == value.ndim or "*" in kind.dim_str or "..." in axes)
    kind = origin or kind
    return not isinstance(kind, type) or isinstance(value, kind)
