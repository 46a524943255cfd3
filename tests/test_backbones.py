import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from golden.make_lite0_features import FILE, LAYERS, WINDOWS, picture, reference, score

from f2pad_jax import checkpoints, load_backbone
from f2pad_jax.backbones import EfficientNetLite0
from f2pad_jax.backbones.layers import Conv, Depthwise

NAME = "efficientnet-lite0"
RTOL = 1e-4  # of a map's largest magnitude


# Parity with PyTorch


@pytest.fixture(scope="module")
def taps():
    return load_backbone(NAME, layers=tuple(LAYERS))


@jax.jit
def class_scores(backbone, image):
    return backbone.logits(backbone.normalise(image))


@jax.jit
def maps_and_gradient(backbone, image):
    def scored(x):
        maps = backbone(x)
        return score(maps), maps

    gradient, maps = jax.grad(scored, has_aux=True)(backbone.normalise(image))
    return {**dict(zip(backbone.layers, maps, strict=True)), "gradient": gradient}


@pytest.fixture(scope="module", params=WINDOWS)
def window(request):
    return request.param


@pytest.fixture(scope="module")
def found(taps, window):
    """Maps, gradient and logits of the window, by this library."""
    image = jnp.asarray(picture(*WINDOWS[window]) / 255)
    logits = class_scores(taps, image)
    with jax.enable_x64(window == "square"):  # where rounding decides the gradient; see WINDOWS
        if window == "square":
            taps = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, taps)
            image = picture(*WINDOWS[window]).astype(np.float64) / 255
        return {name: np.asarray(v) for name, v in {**maps_and_gradient(taps, image), "logits": logits}.items()}


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
        (picture(20, 227, 224, 224), 285),  # Egyptian cat
        (skimage.data.coffee()[88:312, 188:412], 967),  # espresso
    ],
    ids=["chelsea", "coffee"],
)
def test_pictures_are_recognised(taps, image, label):
    assert np.argmax(class_scores(taps, image.astype(np.float32) / 255)) == label


# Shapes, units, traces


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (80, 16), (112, 176), (224, 224), (512, 64)])
def test_maps_have_one_position_per_stride(backbone, size):
    assert backbone.strides == (4, 8, 16) and backbone.stride == 16
    maps = jax.eval_shape(lambda x: backbone(x), jax.ShapeDtypeStruct((*size, 3), jnp.float32))
    assert [m.shape for m in maps] == [
        (size[0] // s, size[1] // s, c) for s, c in zip(backbone.strides, (24, 40, 112), strict=True)
    ]
    assert all(m.dtype == jnp.float32 for m in maps)


def test_every_stage_can_be_tapped_in_the_order_asked_for():
    layers = tuple(f"stage{i}" for i in (7, 6, 5, 4, 3, 2, 1))
    backbone = load_backbone(NAME, layers=layers)
    assert backbone.strides == (32, 32, 16, 16, 8, 4, 2) and backbone.stride == 32
    maps = jax.eval_shape(lambda x: backbone(x), jax.ShapeDtypeStruct((96, 160, 3), jnp.float32))
    assert [m.shape for m in maps] == [
        (3, 5, 320),
        (3, 5, 192),
        (6, 10, 112),
        (6, 10, 80),
        (12, 20, 40),
        (24, 40, 24),
        (48, 80, 16),
    ]


def test_another_set_of_weights_is_no_new_trace(tmp_path):
    tensors = checkpoints.load(NAME, EfficientNetLite0.convert)
    tensors["stages.0.0.project.bias"] = tensors["stages.0.0.project.bias"] + 1
    checkpoints.write_safetensors(tmp_path / "weights.safetensors", tensors, {})
    one = load_backbone(NAME, layers=("stage1",))
    other = load_backbone(NAME, layers=("stage1",), weights=tmp_path / "weights.safetensors")
    traces = []

    @jax.jit
    def first_stage(backbone, image):
        traces.append(image.shape)
        return backbone(image)[0]

    image = one.normalise(jnp.asarray(picture(0, 0, 32, 32) / 255))
    np.testing.assert_allclose(first_stage(other, image), first_stage(one, image) + 1, rtol=0, atol=1e-5)
    assert traces == [(32, 32, 3)]
    first_stage(one, image[:16])
    assert len(traces) == 2
    assert not np.array_equal(one.checksum, other.checksum)


def test_weights_are_arguments_of_the_program(backbone):
    program = jax.make_jaxpr(lambda backbone, image: backbone(image))(backbone, jnp.zeros((16, 16, 3)))
    assert sum(np.size(constant) for constant in program.consts) < 100
    assert len(program.in_avals) == len(jax.tree.leaves(backbone)) + 1 > 100


def test_network_units_are_those_lite0_was_trained_in(backbone):
    np.testing.assert_allclose(
        backbone.normalise(jnp.array([[0, 0.5, 1]])), [[-127 / 128, 0.5 / 128, 1]], rtol=0, atol=1e-7
    )


def test_denormalise_undoes_normalise(backbone):
    unit = jnp.asarray(np.random.default_rng(0).uniform(size=(5, 4, 3)), jnp.float32)
    np.testing.assert_allclose(backbone.denormalise(backbone.normalise(unit)), unit, rtol=0, atol=1e-6)
    np.testing.assert_allclose(backbone.normalise(backbone.denormalise(unit)), unit, rtol=0, atol=1e-6)


# Layers against XLA's convolution


def convolution(x, kernel, bias, stride, groups=1):
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x[None], kernel, (stride, stride), "SAME", dimension_numbers=dimensions, feature_group_count=groups
    )
    return y[0] + bias


@pytest.mark.parametrize("size", [(7, 10), (2, 1)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("kind", ["dense", "depthwise"])
def test_layers_and_their_gradients_equal_xlas_convolution(kind, kernel_size, stride, size):
    rng = np.random.default_rng(0)
    channels = 4
    depthwise = kind == "depthwise"
    layer = Depthwise(channels, kernel_size, stride) if depthwise else Conv(channels, 6, kernel_size, stride)
    layer.kernel[...] = kernel = jnp.asarray(rng.normal(size=layer.kernel.shape), jnp.float32)
    layer.bias[...] = bias = jnp.asarray(rng.normal(size=layer.bias.shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(*size, channels)), jnp.float32)

    @jax.jit
    def both(x):
        oracle = (
            (lambda x: convolution(x, kernel[:, :, None], bias, stride, channels))
            if depthwise
            else (lambda x: convolution(x, kernel, bias, stride))
        )
        (y, back), (expected, back_expected) = jax.vjp(layer, x), jax.vjp(oracle, x)
        weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return (y, *back(weight)), (expected, *back_expected(weight))

    for ours, theirs in zip(*both(x), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
