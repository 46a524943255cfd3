"""Every network against independent PyTorch code, with random weights: ``python benchmarks/parity.py [NAME ...]``.

    pip install torch transformers && pip install --no-deps geffnet
    pip install -e '.[test]'

The functions come from ``tests/test_parity.py``, which CI runs for a few of the networks. For each network a line gives two
errors. The first is the largest error of any map, relative to the map's peak, in float32. The second is the error of the
gradient, with respect to the image, of a random linear functional of all maps. Where the activation is ReLU or ReLU6, the
float64 gradient decides: in float32 some unit crosses a kink, in PyTorch as well as here. Images have 224x224 and 96x160
pixels (84x154 for DINOv2's patches of 14); of the masked autoencoders' images three quarters of the patches are removed. By
default all networks are compared, one after another. The exit status is 1 if an error exceeds the tolerance of the tests.
"""

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from fitted import peak

from f2pad_jax.backbones.backbone import NETWORKS, canonical_name
from f2pad_jax.inpainting import MAE

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import test_parity as parity


def backbone_errors(name: str, folder: Path) -> dict[str, float]:
    """Returns the largest errors of the maps, and of the gradient in float32 and, with kinks, in float64."""
    made = parity.reference(name)
    path = parity.save(made.module, folder / f"{name}.safetensors")
    dtypes = (np.float32, np.float64) if parity.kinked(name) else (np.float32,)
    expected = [parity.expect(made, parity.random_image(size, dtype)) for size in parity.sizes(name) for dtype in dtypes]
    del made  # the next network needs its memory
    gc.collect()
    loaded = parity.load(name, path, tuple(NETWORKS[name].strides))
    worst = {"maps": 0.0}
    for one in expected:
        found = parity.errors(loaded, one)
        key = f"gradient {one.image.dtype}"
        worst[key] = max(worst.get(key, 0.0), found.pop("gradient"))
        if one.image.dtype == np.float32:
            worst["maps"] = max(worst["maps"], *found.values())
    return worst


def autoencoder_errors(name: str, folder: Path) -> dict[str, float]:
    """Returns the largest errors of tokens and decoded patches ("maps"), and of the gradient."""
    module = parity.autoencoder(name)
    path = parity.save(module, folder / f"{name}.safetensors")
    noise = parity.random_noise(parity.MAES[name][-1])
    expected = parity.expect_inpainted(module, noise, len(noise) // 4)
    del module
    gc.collect()
    found = parity.autoencoder_errors(MAE.load(name, weights=path), expected)
    return {"maps": max(found["tokens"], found["decoded"]), "gradient float32": found["gradient"]}


def main(names: list[str]) -> int:
    """Prints a line for each network; returns the exit status."""
    import torch

    print(f"JAX {jax.__version__} on {jax.default_backend()}, PyTorch {torch.__version__}")
    print(f"{'network':<22}{'parameters':>12}{'maps':>10}{'gradient':>10}{'float64':>10}{'seconds':>9}")
    failed = []
    for name in names:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = (autoencoder_errors if name.startswith("mae") else backbone_errors)(name, Path(folder))
        jax.clear_caches()
        gc.collect()
        double = found.get("gradient float64")
        gradient, rtol = (found["gradient float32"], parity.RTOL) if double is None else (double, parity.RTOL_FLOAT64)
        if not (found["maps"] <= parity.RTOL and gradient <= rtol):
            failed.append(name)
        count = sum(int(np.prod(shape)) for shape in parity.parameter_shapes(NETWORKS[name]).values())
        print(
            f"{name:<22}{f'{count / 1e6:.1f} M':>12}{found['maps']:>10.0e}{found['gradient float32']:>10.0e}"
            + (f"{'':>10}" if double is None else f"{double:>10.0e}")
            + f"{time.perf_counter() - start:>9.0f}",
            flush=True,
        )
    print(f"peak memory {peak():.1f} GiB; {'failed: ' + ', '.join(failed) if failed else 'all agree'}")
    return bool(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", type=canonical_name, default=list(NETWORKS), metavar="NAME")
    sys.exit(main(parser.parse_args().names))
