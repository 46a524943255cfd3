import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from flax import nnx
from golden.make_lite0_features import FILE, LAYERS, WINDOWS, picture, reference, score

from f2pad_jax import _storage as storage
from f2pad_jax.backbones import Backbone, load_backbone
from f2pad_jax.backbones import _weight_files as weight_files
from f2pad_jax.backbones._conversion import parameter_shapes
from f2pad_jax.backbones._layers import Conv, Depthwise, Pointwise, max_pool, winograd_kernel
from f2pad_jax.backbones._vit import resized_positions
from f2pad_jax.backbones.backbone import NETWORKS, canonical_name, load_autoencoder
from f2pad_jax.errors import CheckpointError, DepthError

NAME = "efficientnet-lite0"
RTOL = 1e-4  # of a map's largest magnitude


# Parity with PyTorch


@pytest.fixture(scope="module")
def taps():
    return load_backbone(NAME, layers=(*LAYERS, "logits"))


@jax.jit
def feature_maps(backbone, image):
    return dict(zip(backbone.layers, backbone(backbone.normalise(image)), strict=True))


@jax.jit
def score_gradient(backbone, image):
    return jax.grad(lambda x: score(backbone(x)[: len(LAYERS)]))(backbone.normalise(image))


@pytest.fixture(scope="module", params=WINDOWS)
def window(request):
    return request.param


@pytest.fixture(scope="module")
def found(taps, window):
    """Maps, gradient and logits of the window, by this library."""
    image = picture(*WINDOWS[window])
    maps = feature_maps(taps, image / 255)
    logits = maps.pop("logits")[0, 0]
    with jax.enable_x64(True):  # where no rounding decides the gradient; see WINDOWS
        doubled = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, taps)
        gradient = np.asarray(score_gradient(doubled, image.astype(np.float64) / 255))
    return {**{name: np.asarray(m) for name, m in maps.items()}, "logits": np.asarray(logits), "gradient": gradient}


@pytest.fixture(scope="module")
def record():
    with np.load(FILE) as file:
        return dict(file)


@pytest.mark.parametrize("name", [*LAYERS, "gradient", "logits"])
def test_lite0_gives_the_recorded_values_of_pytorch(found, record, window, name):
    where, values, shape, peak = (record[f"{window}.{name}.{key}"] for key in ("where", "values", "shape", "peak"))
    assert found[name].shape == tuple(shape)
    assert np.abs(found[name]).max() == pytest.approx(float(peak), rel=RTOL)
    np.testing.assert_allclose(found[name].ravel()[where], values, rtol=0, atol=RTOL * peak)


def test_lite0_gives_the_values_of_pytorch(found, record, window):
    pytest.importorskip("torch")
    pytest.importorskip("efficientnet_lite_pytorch")
    expected = reference((picture(*WINDOWS[window]) - 127) / 128)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        peak = np.abs(values).max()
        np.testing.assert_allclose(found[name], values, rtol=0, atol=RTOL * peak, err_msg=name)
        where = record[f"{window}.{name}.where"]
        np.testing.assert_allclose(
            record[f"{window}.{name}.values"], values.ravel()[where], rtol=0, atol=1e-6 * peak, err_msg=name
        )


@pytest.mark.parametrize(
    ("image", "label"),
    [
        (skimage.data.chelsea()[20:244, 227:451], 285),  # Egyptian cat
        (skimage.data.coffee()[88:312, 188:412], 967),  # espresso
    ],
    ids=["chelsea", "coffee"],
)
def test_pictures_are_recognised(taps, image, label):
    assert np.argmax(feature_maps(taps, image.astype(np.float32) / 255)["logits"]) == label


# Names, layers, weights


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("efficientnet_lite0", "efficientnet-lite0"),
        ("tf_efficientnet_lite0", "efficientnet-lite0"),
        ("tf-efficientnet-b6", "efficientnet-b6"),
        ("wide_resnet50_2", "wide-resnet50-2"),
        ("resnet18", "resnet18"),
        ("vit_tiny", "vit-tiny"),
        ("dinov2_small_registers", "dinov2-small-registers"),
        ("mae_large", "mae-large"),
    ],
)
def test_hyphens_underscores_and_timms_prefix_name_the_same_network(name, ours):
    assert canonical_name(name) == ours
    assert ours in NETWORKS


def test_the_name_of_a_backbone_is_ours():
    assert load_backbone("tf_efficientnet_lite0", layers=("stage1",)).name == NAME


def test_an_autoencoder_is_no_backbone():
    with pytest.raises(CheckpointError, match=r"unknown backbone 'mae-base'; known: resnet18, .*vit-base, .*dinov3-large$"):
        load_backbone("mae_base")
    with pytest.raises(CheckpointError, match=r"unknown masked autoencoder 'vit-base'; known: mae-base"):
        load_autoencoder("vit_base")


def without_weights(name, layers=None):
    """The backbone with shapes in place of weights."""
    network = NETWORKS[name]
    layers = layers or network.default_layers
    deepest = max(layers, key=list(network.strides).index)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: network.build(deepest)))
    return Backbone(name, layers, (0.0,) * 3, (1.0,) * 3, graphdef, shapes, np.zeros(32, np.uint8))


def shapes_of_maps(backbone, size):
    maps = jax.eval_shape(lambda backbone, x: backbone(x), backbone, jax.ShapeDtypeStruct((*size, 3), jnp.float32))
    assert all(m.dtype == jnp.float32 for m in maps)
    return [m.shape for m in maps]


STAGES = {f"stage{i + 1}": stride for i, stride in enumerate((2, 4, 8, 16, 16, 32, 32))}
RESNET = {f"layer{i + 1}": stride for i, stride in enumerate((4, 8, 16, 32))}


@pytest.mark.parametrize(
    ("name", "strides", "channels"),
    [
        ("resnet18", RESNET, (64, 128, 256, 512)),
        ("wide-resnet50-2", RESNET, (256, 512, 1024, 2048)),
        ("efficientnet-b0", STAGES, (16, 24, 40, 80, 112, 192, 320)),
        ("efficientnet-b6", STAGES, (32, 40, 72, 144, 200, 344, 576)),
        ("efficientnet-lite4", STAGES, (24, 32, 56, 112, 160, 272, 448)),
        ("vit-tiny", {f"block{i + 1}": 16 for i in range(12)}, (192,) * 12),
    ],
)
def test_every_layer_can_be_tapped_in_the_order_asked_for(name, strides, channels):
    layers = tuple(reversed(strides))
    backbone = without_weights(name, ("logits", *layers))
    assert backbone.strides == (max(strides.values()), *reversed(strides.values()))
    assert backbone.stride == max(strides.values())
    assert set(layers) <= set(NETWORKS[name].strides)
    size = (96, 160)
    expected = [(size[0] // s, size[1] // s, c) for s, c in zip(strides.values(), channels, strict=True)]
    assert shapes_of_maps(backbone, size) == [(1, 1, 1000), *reversed(expected)]
    if name.startswith("efficientnet"):
        projections = tuple(f"{layer}.project" for layer in strides)
        assert shapes_of_maps(without_weights(name, projections), size) == expected


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (80, 16), (112, 176), (224, 224), (512, 64)])
@pytest.mark.parametrize(
    ("name", "strides", "channels"),
    [
        ("efficientnet-lite0", (4, 8, 16), (24, 40, 112)),
        ("resnet18", (4, 8, 16), (64, 128, 256)),
        ("vit-tiny", (16, 16, 16), (192, 192, 192)),
    ],
)
def test_maps_have_one_position_per_stride(name, strides, channels, size):
    backbone = without_weights(name)
    assert backbone.strides == strides and backbone.stride == 16
    assert shapes_of_maps(backbone, size) == [
        (size[0] // s, size[1] // s, c) for s, c in zip(strides, channels, strict=True)
    ]


@pytest.mark.parametrize(("name", "patch"), [("dinov2-small", 14), ("dinov2-base-registers", 14), ("dinov3-large", 16)])
def test_every_block_of_dino_gives_a_map_of_patches(name, patch):
    depth, width = {"small": (12, 384), "base": (12, 768), "large": (24, 1024)}[name.split("-")[1]]
    layers = tuple(f"block{i + 1}" for i in range(depth))
    assert tuple(NETWORKS[name].strides) == layers
    backbone = without_weights(name)
    assert backbone.layers == (layers[depth // 3 - 1], layers[2 * depth // 3 - 1], layers[-1])
    assert backbone.stride == patch and not backbone.local
    backbone = without_weights(name, layers)
    assert shapes_of_maps(backbone, (3 * patch, 5 * patch)) == [(3, 5, width)] * depth


@pytest.mark.parametrize("size", [(100, 96), (96, 100), (8, 16)])
@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-b0", "resnet18", "vit-tiny"])
def test_sides_that_are_no_multiples_of_the_stride_are_refused(name, size):
    with pytest.raises(ValueError, match=rf"{name} takes sides that are multiples of 16, not \({size[0]}, {size[1]}\)"):
        shapes_of_maps(without_weights(name), size)


@pytest.mark.parametrize(
    ("name", "layer", "absent"),
    [
        ("resnet18", "layer2", ("layer3.", "layer4.", "fc.")),
        ("efficientnet-b0", "stage3.project", ("stages.3.", "head.", "classifier.")),
        ("efficientnet-lite0", "stage7", ("head.", "classifier.")),
        ("vit-tiny", "block4", ("blocks.4.", "blocks.11.", "norm.", "head.")),
        ("dinov3-large", "block8", ("blocks.8.", "blocks.23.")),
    ],
)
def test_a_network_is_built_as_deep_as_its_deepest_layer(name, layer, absent):
    network = NETWORKS[name]
    whole, part = parameter_shapes(network), parameter_shapes(network, layer)
    assert part.items() < whole.items()
    assert {path for path in whole if path.startswith(absent)} <= whole.keys() - part.keys()
    assert not any(path.startswith(absent) for path in part)
    for start in absent:
        assert any(path.startswith(start) for path in whole)
    maps = list(NETWORKS[name].strides)
    assert (
        len(shapes_of_maps(without_weights(name, tuple(maps[: maps.index(layer) + 1])), (64, 64))) == maps.index(layer) + 1
    )


def random_weights(name, path, through=None, seed=0, without=()):
    """A file of converted weights of the layers through one."""
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(NETWORKS[name], through)
    tensors = {
        key: rng.normal(0, 0.1, shape).astype(np.float32) for key, shape in shapes.items() if not key.startswith(without)
    }
    storage.write_safetensors(path, tensors, {})
    return path


def test_weights_that_end_early_load_as_deep_as_they_go(tmp_path):
    path = random_weights("resnet18", tmp_path / "weights.safetensors", "layer3")
    assert load_backbone("resnet18", weights=path).layers == ("layer1", "layer2", "layer3")
    for layer in ("layer4", "logits"):
        with pytest.raises(DepthError, match=rf"weights of resnet18 end before layer '{layer}'"):
            load_backbone("resnet18", layers=("layer1", layer), weights=path)


def test_the_checksum_is_that_of_the_layers_tapped(tmp_path):
    path = random_weights("resnet18", tmp_path / "weights.safetensors", "layer3")
    tensors = storage.read_safetensors(path)[0]
    tensors["layer2.0.conv1.bias"] = tensors["layer2.0.conv1.bias"] + 1
    storage.write_safetensors(tmp_path / "other.safetensors", tensors, {})
    for layers, same in ((("layer1",), True), (("layer2",), False), (("layer2", "layer1"), False), (("layer3",), False)):
        one, other = (load_backbone("resnet18", layers=layers, weights=p) for p in (path, tmp_path / "other.safetensors"))
        assert np.array_equal(one.checksum, other.checksum) == same


@pytest.mark.parametrize("gap", ["layer2.", "layer3.1.conv2.kernel"])
def test_weights_with_a_gap_are_refused(tmp_path, gap):
    path = random_weights("resnet18", tmp_path / "weights.safetensors", "layer4", without=(gap,))
    with pytest.raises(CheckpointError, match=rf"tensor '{gap}.*' is missing"):
        load_backbone("resnet18", layers=("layer1",), weights=path)


# Traces, units


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("efficientnet-lite0", "stage1"),
        ("efficientnet-b0", "stage1"),
        ("resnet18", "layer1"),
        ("wide-resnet50-2", "layer1"),
        ("vit-tiny", "block1"),
    ],
)
def test_another_set_of_weights_is_no_new_trace(tmp_path, name, layer):
    one, other = (
        load_backbone(name, layers=(layer,), weights=random_weights(name, tmp_path / f"{seed}.safetensors", layer, seed))
        for seed in (0, 1)
    )
    traces = []

    @jax.jit
    def first_layer(backbone, image):
        traces.append(image.shape)
        return backbone(image)[0]

    image = one.normalise(picture(0, 0, 32, 32) / 255)
    assert not np.allclose(first_layer(other, image), first_layer(one, image))
    assert traces == [(32, 32, 3)]
    first_layer(one, image[:16])
    assert len(traces) == 2
    assert not np.array_equal(one.checksum, other.checksum)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("efficientnet-lite0", "stage1"),
        ("efficientnet-b0", "stage1"),
        ("resnet18", "layer1"),
        ("resnet18", "logits"),
        ("vit-tiny", "block1"),
    ],
)
def test_where_features_are_local_what_is_far_away_does_not_matter(tmp_path, name, layer):
    backbone = load_backbone(name, layers=(layer,), weights=random_weights(name, tmp_path / "weights.safetensors", layer))
    image = backbone.normalise(picture(0, 0, 128, 128) / 255)
    features = jax.jit(lambda backbone, image: backbone(image)[0][0, 0])
    near, far = (features(backbone, image.at[i:, i:].add(1.0)) for i in (2, 96))
    assert not np.array_equal(near, features(backbone, image))
    assert np.array_equal(far, features(backbone, image)) == backbone.local


def test_weights_shift_what_they_should(tmp_path):
    one = load_backbone(NAME, layers=("stage1",))
    tensors = storage.read_safetensors(weight_files.cached_file(NAME))[0]
    tensors["stages.0.0.project.bias"] = tensors["stages.0.0.project.bias"] + 1
    storage.write_safetensors(tmp_path / "weights.safetensors", tensors, {})
    other = load_backbone(NAME, layers=("stage1",), weights=tmp_path / "weights.safetensors")
    image = picture(0, 0, 32, 32) / 255
    found, expected = feature_maps(other, image)["stage1"], feature_maps(one, image)["stage1"] + 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_weights_are_arguments_of_the_program(backbone):
    program = jax.make_jaxpr(lambda backbone, image: backbone(image))(backbone, jnp.zeros((16, 16, 3)))
    assert sum(np.size(constant) for constant in program.consts) < 100
    assert len(program.in_avals) == len(jax.tree.leaves(backbone)) + 1 > 60


def test_network_units_are_those_lite0_was_trained_in(backbone):
    np.testing.assert_allclose(
        backbone.normalise(jnp.array([[0, 0.5, 1]])), [[-127 / 128, 0.5 / 128, 1]], rtol=0, atol=1e-7
    )


def test_denormalise_undoes_normalise(backbone):
    unit = jnp.asarray(np.random.default_rng(0).uniform(size=(5, 4, 3)), jnp.float32)
    np.testing.assert_allclose(backbone.denormalise(backbone.normalise(unit)), unit, rtol=0, atol=1e-6)
    np.testing.assert_allclose(backbone.normalise(backbone.denormalise(unit)), unit, rtol=0, atol=1e-6)


def test_bytes_and_floats_normalise_alike(backbone):
    image = skimage.data.chelsea()[:8, :8]
    assert image.dtype == np.uint8
    found = backbone.normalise(image)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, (image.astype(np.float64) - 127) / 128, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found, backbone.normalise(image.astype(np.float32) / 255), rtol=0, atol=1e-5)


# Layers against XLA's convolution and windowed maximum


SIZES = (((), (7, 10)), ((2,), (2, 1)))
"""Leading axes; height and width."""


def convolution(x, kernel, bias, stride, padding, groups=1):
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x[None], kernel, (stride, stride), padding, dimension_numbers=dimensions, feature_group_count=groups
    )
    return y[0] + bias


def assert_same_function_and_gradients(layer, state, oracle, sizes):
    """``layer`` and ``oracle`` take parameters shaped like ``state`` and an image; beyond the first size in a batch."""
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), state)
    image, *batches = (jnp.asarray(rng.normal(size=(*lead, *size, 4)), jnp.float32) for lead, size in sizes)

    def value_and_gradients(function, x):
        y, back = jax.vjp(function, state, x)
        weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return (y, *back(weight))

    @jax.jit
    def everything(image, batches):
        single = functools.partial(value_and_gradients, layer), functools.partial(value_and_gradients, oracle)
        return [[one(image), *(jax.vmap(one)(batch) for batch in batches)] for one in single]

    found, expected = everything(image, batches)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=5e-5), found, expected)


def pure(module):
    """The module as a function of its state, and that state."""
    graphdef, state = nnx.split(module)
    return (lambda state, x: nnx.merge(graphdef, state)(x)), state


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kernel_size", "padding"), [(2, None), (3, None), (5, None), (1, 0), (3, 1), (7, 3), (4, 0), (6, 1), (3, 0)]
)
def test_convolution_and_its_gradients_equal_xlas(kernel_size, padding, stride):
    theirs = "SAME" if padding is None else [(padding, padding)] * 2
    assert_same_function_and_gradients(
        *pure(Conv(4, 6, kernel_size, stride, padding)),
        lambda state, x: convolution(x, state["kernel"][...], state["bias"][...], stride, theirs),
        SIZES if padding in (None, kernel_size // 2) else (((), (7, 10)), ((2,), (9, 6))),
    )


@pytest.mark.parametrize("padding", [None, 1])
def test_winograd_convolution_and_its_gradients_equal_xlas(padding):
    layer = Conv(4, 6, 3, 1, padding)
    layer.prepare()
    assert [matrix.shape for matrix in layer.kernel] == [(4, 6)] * 16
    prepared, _ = pure(layer)
    _, state = pure(Conv(4, 6, 3, 1, padding))

    def transformed(state, x):
        matrices = {i: nnx.Param(matrix) for i, matrix in enumerate(winograd_kernel(state["kernel"][...]))}
        return prepared(nnx.State({"kernel": matrices, "bias": state["bias"]}), x)

    oracle = lambda state, x: convolution(x, state["kernel"][...], state["bias"][...], 1, "SAME")  # noqa: E731
    assert_same_function_and_gradients(transformed, state, oracle, SIZES)


def test_only_unstrided_three_by_three_kernels_are_transformed():
    for other in (Conv(3, 4, 3, 2), Conv(3, 4, 5), Conv(3, 4, 3, 1, 0)):
        other.prepare()
        assert isinstance(other.kernel, nnx.Param) and other.kernel.ndim == 4


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_convolution_and_its_gradients_equal_xlas(stride):
    assert_same_function_and_gradients(
        *pure(Pointwise(4, 6, stride)),
        lambda state, x: convolution(x, state["kernel"][...][None, None], state["bias"][...], stride, "VALID"),
        SIZES,
    )


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (2, 1), (2, 3), (1, 2)])
def test_depthwise_convolution_and_its_gradients_equal_xlas(kernel_size, stride):
    assert_same_function_and_gradients(
        *pure(Depthwise(4, kernel_size, stride)),
        lambda state, x: convolution(x, state["kernel"][...][:, :, None], state["bias"][...], stride, "SAME", 4),
        SIZES,
    )


def test_max_pool_and_its_gradient_equal_xlas_windowed_maximum():
    def windowed(_, x):
        window = (3, 3, 1), (2, 2, 1), ((1, 1), (1, 1), (0, 0))
        return jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, *window)

    sizes = ((), (6, 10)), ((2,), (2, 14))  # it takes even sides
    assert_same_function_and_gradients(lambda _, x: max_pool(jax.nn.relu(x)), (), windowed, sizes)


# Positions


@pytest.mark.parametrize("size", [(14, 14), (6, 10), (28, 20), (1, 3), (15, 13)])
def test_positions_are_resized_as_in_pytorch(size):
    torch = pytest.importorskip("torch")
    positions = np.random.default_rng(0).normal(size=(14 * 14, 8)).astype(np.float32)
    grid = torch.tensor(positions.reshape(1, 14, 14, 8)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=size, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    found = resized_positions(jnp.asarray(positions), size)
    np.testing.assert_allclose(found, expected.reshape(-1, 8).numpy(), rtol=0, atol=1e-5)
