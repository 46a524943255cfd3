"""Gradient of the tapped features with respect to the image: this library against PyTorch, on equal CPU threads.

    pip install torch transformers && pip install --no-deps geffnet
    python benchmarks/backbones.py [NETWORK ...]

PyTorch's networks come from transformers (ResNet) and geffnet (EfficientNet), in eval mode with frozen weights. They are
given contiguous and channels-last ("torch-cl") images; ratios are to the better of both. This library's gradient is called
once ("call"), and ten times in a compiled loop as the solver does ("loop", time of one step). Both libraries compute the
mean square of equal maps, and its gradient. All take turns within one run, and a time is the least of the rounds. MiB per
image are XLA's temporary buffers of the compiled gradient. For PyTorch they are the tensors that autograd keeps for the
backward pass; its workspaces come on top. The weights are random, since speed does not depend on them.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from f2pad_jax._storage import write_safetensors
from f2pad_jax.backbones import BACKBONES, load_backbone
from f2pad_jax.backbones._conversion import parameter_shapes

CASES = ((1, 224), (4, 224), (1, 112), (4, 112))
NETWORKS = ("resnet18", "efficientnet-lite0", "efficientnet-b6", "wide-resnet50-2")

STEPS = 10
"""Number of steps in the loop."""


def jax_gradients(name: str):
    """Returns two functions, the gradient of a batch and ten steps along it in a loop, and their backbone."""
    network = BACKBONES[name]
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(network, network.default_layers[-1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        write_safetensors(path, {key: rng.normal(0, 0.02, s).astype(np.float32) for key, s in shapes.items()}, {})
        backbone = load_backbone(name, weights=path)

    def score(image, backbone):
        return sum(jnp.mean(m**2) for m in backbone(image))

    def gradient(images, backbone):
        if len(images) == 1:  # as the solver calls it
            return jax.grad(score)(images[0], backbone)[None]
        return jax.vmap(jax.grad(score), (0, None))(images, backbone)

    def steps(images, backbone):
        return jax.lax.fori_loop(0, STEPS, lambda _, images: images - 0.01 * gradient(images, backbone), images)

    return (gradient, steps), backbone


def torch_gradient(name: str):
    """Returns the gradient as a function of a batch, and its network."""
    if name.startswith("efficientnet"):
        import geffnet

        network = geffnet.create_model("tf_" + name.replace("-", "_"), pretrained=False)
        network.blocks = network.blocks[:5]

        def maps(x):
            x = network.act1(network.bn1(network.conv_stem(x)))
            found = []
            for stage in network.blocks:
                x = stage(x)
                found.append(x)
            return found[1], found[2], found[4]
    else:
        import functools

        from transformers import ResNetConfig, ResNetModel
        from transformers.models.resnet import modeling_resnet

        layer = modeling_resnet.ResNetBottleNeckLayer
        basic = name in ("resnet18", "resnet34")
        if name.startswith("wide"):
            modeling_resnet.ResNetBottleNeckLayer = functools.partial(layer, reduction=2)
        network = ResNetModel(
            ResNetConfig(
                depths=[2, 2, 2, 2] if name == "resnet18" else [3, 4, 6, 3],
                layer_type="basic" if basic else "bottleneck",
                hidden_sizes=[64, 128, 256, 512] if basic else [256, 512, 1024, 2048],
            )
        )
        modeling_resnet.ResNetBottleNeckLayer = layer
        network.encoder.stages = network.encoder.stages[:3]

        def maps(x):
            x = network.embedder(x)
            found = []
            for stage in network.encoder.stages:
                x = stage(x)
                found.append(x)
            return found

    network.eval().requires_grad_(False)

    def gradient(images):
        images = images.detach().requires_grad_(True)
        return torch.autograd.grad(sum((m**2).mean() for m in maps(images)), images)[0]

    return gradient, network


def kept_bytes(function, images) -> int:
    """Returns the bytes that autograd keeps between forward and backward pass."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(images)
    return sum(storages.values())


def smallest(functions: list, seconds: float) -> list[float]:
    """Returns the least time of each function in ms; all take turns for about the given number of seconds."""
    times = [[] for _ in functions]
    for function in functions:
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            found.append(1e3 * (time.perf_counter() - start))
    return [min(found) for found in times]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds of rounds for each line (%(default)s)")
    arguments = parser.parse_args()
    versions = f"jax {jax.__version__}, torch {torch.__version__}"
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {versions}; ms")
    print(
        "network             batch  side    call    loop   torch  torch-cl  call/torch  loop/torch"
        "  MiB/image  torch  compile s"
    )
    for name in arguments.networks:
        for batch, side in CASES:
            print(line(name, batch, side, arguments.seconds), flush=True)


def line(name: str, batch: int, side: int, seconds: float) -> str:
    """Returns one row of the table."""
    images = np.random.default_rng(0).normal(size=(batch, side, side, 3)).astype(np.float32)
    x, start = jnp.asarray(images), time.perf_counter()
    gradients, backbone = jax_gradients(name)
    compiled = [jax.jit(gradient).lower(x, backbone).compile() for gradient in gradients]
    compile_s = (time.perf_counter() - start) / len(compiled)
    theirs, network = torch_gradient(name)
    contiguous = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    channels_last = contiguous.contiguous(memory_format=torch.channels_last)
    times = smallest(
        [
            *[lambda program=program: jax.block_until_ready(program(x, backbone)) for program in compiled],
            lambda: theirs(contiguous),
            lambda: theirs(channels_last),
        ],
        seconds,
    )
    times[1] /= STEPS
    temporary = compiled[0].memory_analysis().temp_size_in_bytes
    kept = kept_bytes(theirs, contiguous) - sum(parameter.nbytes for parameter in network.parameters())
    return (
        f"{name:18}  {batch:5}  {side:4}  "
        + "".join(f"{ms:6.1f}  " for ms in times)
        + f"  {times[0] / min(times[2:]):10.2f}  {times[1] / min(times[2:]):10.2f}"
        + f"  {temporary / batch / 2**20:9.0f}  {kept / batch / 2**20:5.0f}  {compile_s:9.0f}"
    )


if __name__ == "__main__":
    main()
