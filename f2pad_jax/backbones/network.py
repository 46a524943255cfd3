"""What the registry knows of a network, whatever its family."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import nnx

Rules = tuple[tuple[str, str | Callable], ...]
"""``(pattern, replacement)``: the start of a weight file's key, and of the canonical key it stands for.

A canonical key is the path of a layer of our module, then ``weight`` or ``bias``, or ``norm.weight``, ``norm.bias``, … for
the batch norm folded into it. A replacement is a template of :meth:`re.Match.expand`, in which ``{N+1}`` counts up, or a
function of the match.
"""


class Network(NamedTuple):
    """A network that can be built as deep as the deepest layer asked for, and filled from a weight file."""

    build: Callable[[str], nnx.Module]
    """The module through a layer of the given name: layers beyond it are not built, and need no weights."""
    strides: Mapping[str, int]
    """Pixels per position of each layer that can be tapped, shallow to deep."""
    default_layers: tuple[str, ...]
    layouts: Mapping[str, Rules]
    """How known weight files name the tensors."""
    deep_layers: tuple[str, ...] = ()
    """The layers CFLOW-AD taps."""
    batch_norm_eps: float = 0.0
    local: bool = True
    """Whether a position's features depend on its surroundings alone, and so are the same in a window of the image."""
    missing_hint: str = ""
    """What to add to the message when a tensor is missing."""
