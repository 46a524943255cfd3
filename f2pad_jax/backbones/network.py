"""Entry of the registry of networks."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

Rules = tuple[tuple[str, str | Callable], ...]
"""Pairs ``(pattern, replacement)``: pattern of the start of a weight file's key, and start of the canonical key.

A canonical key is the path of a layer in our module, then ``weight`` or ``bias``; for a folded batch norm, ``norm.weight``,
``norm.bias``, … A replacement is a function of the match, or a template of :meth:`re.Match.expand`: ``{2+1}`` becomes 3.
"""


class Network(NamedTuple):
    """Network that can be built up to any of its layers and filled from a weight file."""

    build: Callable[[str], nnx.Module]
    """Function from a layer's name to the module up to this layer, without deeper layers."""
    strides: Mapping[str, int]
    """Stride of each layer that can be tapped, pixels, shallow to deep."""
    default_layers: tuple[str, ...]
    """Layers tapped by default."""
    layouts: Mapping[str, Rules]
    """Renaming rules for each known kind of weight file."""
    deep_layers: tuple[str, ...] = ()
    """Layers tapped by CFLOW-AD."""
    batch_norm_eps: float = 0.0
    """Constant ε of the folded batch norms."""
    local: bool = True
    """Whether receptive fields are bounded, so that a window of an image has the image's features."""
    amend: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None
    """Function that brings a file's tensors, under their canonical names, to one form, in place."""
    missing_hint: str = ""
    """Advice appended to the message about a missing tensor."""
