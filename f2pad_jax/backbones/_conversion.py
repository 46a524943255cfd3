"""Conversion of a weight file's tensors to our networks' parameters: names, layouts, folded batch norm. NumPy only."""

import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from f2pad_jax.backbones.network import Network, Rules
from f2pad_jax.errors import CheckpointError

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_NORM = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
_SEPARATE = ("q", "k", "v")


def convert(network: Network, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts a weight file's tensors to the network's parameters, float32.

    The file has one of the network's layouts or is already converted. Half precision becomes float32. Batch norm is folded
    in float64: kernel·γ/√(σ²+ε) and (bias - μ)·γ/√(σ²+ε) + β. A file may end early: the result lacks the deeper layers.

    Raises:
        CheckpointError: a tensor is missing or unexpected, or its shape, dtype or values are wrong.
    """
    shapes = parameter_shapes(network)
    canonical_names = _canonical(network, tensors)
    if sum(name in shapes for name in tensors) >= sum(canonical is not None for canonical in canonical_names.values()):
        # the file is already converted
        values = {name: _float32(name, value) for name, value in tensors.items()}
        return _checked(network, values, shapes, {})
    file_names: dict[str, str] = {}
    for name, canonical in canonical_names.items():
        if canonical is None:
            raise CheckpointError(f"unexpected tensor '{name}'")
        if canonical in file_names:
            raise CheckpointError(f"tensors '{file_names[canonical]}' and '{name}' are one tensor under two names")
        file_names[canonical] = name
    values = {name: _float32(original, tensors[original]) for name, original in file_names.items()}
    network.amend(values)
    _merge_attention(values, file_names)
    _fold_norms(values, file_names, network.batch_norm_eps)
    modules: dict[tuple, Any] = dict(nnx.iter_modules(nnx.eval_shape(lambda: network.build(deepest(network)))))
    out, originals = {}, {}
    for name, value in values.items():
        path, _, parameter = name.rpartition(".")
        module = modules.get(tuple(int(part) if part.isdigit() else part for part in path.split(".")))
        if parameter == "weight":
            parameter = "scale" if hasattr(module, "scale") else "kernel"
            from_torch = getattr(module, "from_torch", None)
            value = from_torch(value) if from_torch else value
        ours = f"{path}.{parameter}" if path else name
        if value.ndim == 3 and value.shape[0] == 1 and not path:  # batch axis of a token or of positions
            value = value[0]
        out[ours], originals[ours] = np.ascontiguousarray(value), file_names.get(name, name)
    return _checked(network, out, shapes, originals)


def deepest(network: Network) -> str:
    """Returns the name of the deepest layer that can be tapped."""
    return list(network.strides)[-1]


def parameter_shapes(network: Network, through: str | None = None) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter, by name, for the network up to the layer ``through`` (default: the deepest)."""
    state = nnx.state(nnx.eval_shape(lambda: network.build(through or deepest(network))))
    return {".".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(state)}


def _checked(network: Network, values: dict, shapes: dict, originals: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Checks names and shapes; returns the values in the network's order."""
    for name, value in values.items():
        original = originals.get(name, name)
        if name not in shapes:
            raise CheckpointError(f"unexpected tensor '{original}'")
        if value.shape != shapes[name]:
            raise CheckpointError(
                f"tensor '{original}' has the wrong shape: {list(value.shape)}, expected {list(shapes[name])}"
            )
    expected = shapes
    if values.keys() != shapes.keys():
        for layer in reversed(list(network.strides)):  # find the shallowest network with all of the file's names
            shallower = parameter_shapes(network, layer)
            if not values.keys() <= shallower.keys():
                break
            expected = shallower
    missing = [name for name in expected if name not in values]
    if missing:
        more = f", with {len(missing) - 1} others" if missing[1:] else ""
        raise CheckpointError(f"tensor '{missing[0]}' is missing{more}{network.missing_hint}")
    return {name: values[name] for name in expected}


def _canonical(network: Network, tensors: Mapping[str, np.ndarray]) -> dict[str, str | None]:
    """Maps names in the file to canonical names (None: unknown), by the layout that knows most of the names."""
    candidates = [
        {name: _renamed(name, rules) for name in tensors if not name.endswith((".num_batches_tracked", ".position_ids"))}
        for rules in network.layouts.values()
    ]
    return max(candidates, key=lambda found: sum(name is not None for name in found.values()))


def _renamed(name: str, rules: Rules) -> str | None:
    for pattern, replacement in rules:
        if match := re.match(pattern, name):
            start = replacement(match) if callable(replacement) else match.expand(replacement)
            start = re.sub(r"\{(\d+)\+1\}", lambda number: str(int(number[1]) + 1), start)
            return start + name[match.end() :]
    return None


def _float32(name: str, value: np.ndarray) -> np.ndarray:
    if value.dtype not in _FLOATS:
        raise CheckpointError(f"tensor '{name}' has the wrong dtype: {value.dtype}, expected float32, float16 or bfloat16")
    value = value.astype(np.float32)
    if not np.all(np.isfinite(value)):
        raise CheckpointError(f"tensor '{name}' holds a value that is not finite")
    return value


def _merge_attention(values: dict[str, np.ndarray], file_names: dict[str, str]) -> None:
    """Merges separate queries, keys and values into one tensor, in place."""
    for name in [name for name in values if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in _SEPARATE]
        if absent := [part for part in parts if part not in values]:
            raise CheckpointError(f"tensor '{absent[0]}' is missing beside '{file_names[name]}'")
        if len({values[part].shape for part in parts}) > 1:
            raise CheckpointError(f"tensor '{file_names[name]}' and the tensors of keys and values differ in shape")
        merged = name.replace(".attn.q.", ".attn.qkv.")
        values[merged], file_names[merged] = np.concatenate([values.pop(part) for part in parts]), file_names[name]


def _fold_norms(values: dict[str, np.ndarray], file_names: dict[str, str], eps: float) -> None:
    """Folds each batch norm into the weight and bias of its convolution, in place."""
    layers = {name.rpartition(".norm.")[0]: None for name in values if ".norm." in name}
    for layer in layers:
        needed = [f"{layer}.{part}" for part in ("weight", *_NORM)]
        if absent := [name for name in needed if name not in values]:
            beside = next(name for name in needed if name in values)
            raise CheckpointError(f"tensor '{absent[0]}' is missing beside '{file_names[beside]}'")
        kernel, gamma, beta, mean, variance = (values.pop(name).astype(np.float64) for name in needed)
        bias = values.pop(f"{layer}.bias", np.zeros_like(mean)).astype(np.float64)
        if kernel.ndim < 2:
            raise CheckpointError(
                f"tensor '{file_names[needed[0]]}' has the wrong shape: {list(kernel.shape)}, expected at least 2 axes"
            )
        for name, value in zip((*needed[1:], f"{layer}.bias"), (gamma, beta, mean, variance, bias), strict=True):
            if value.shape != kernel.shape[:1]:
                raise CheckpointError(
                    f"tensor '{file_names.get(name, name)}' has the wrong shape: {list(value.shape)}, expected "
                    f"{list(kernel.shape[:1])} to fit '{file_names[needed[0]]}'"
                )
        if np.any(variance < 0):
            raise CheckpointError(f"tensor '{file_names[needed[4]]}' holds a negative variance")
        scale = gamma / np.sqrt(variance + eps)
        values[f"{layer}.weight"] = (kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1))).astype(np.float32)
        values[f"{layer}.bias"] = ((bias - mean) * scale + beta).astype(np.float32)
        file_names[f"{layer}.bias"] = file_names[needed[2]]
