"""Feature extractors in Flax NNX with converted weights, pretrained on ImageNet or without labels."""

from f2pad_jax.backbones.backbone import BACKBONES, Backbone, find_network, load_backbone
from f2pad_jax.backbones.network import Network

__all__ = ["BACKBONES", "Backbone", "Network", "find_network", "load_backbone"]
