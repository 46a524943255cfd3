"""Checkpoints laid out as anomalib's, written here with torch: the tests need no anomalib (benchmarks/anomalib.py does)."""

import contextlib
import copyreg
import dataclasses
import enum
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import types
from collections import OrderedDict

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from test_torchfile import GOOD, HOSTILE, OPEN, SIX, call, hostile, name, ordered, plain, zip_file

from f2pad_jax import load_detector, save_detector
from f2pad_jax.backbones import load_backbone
from f2pad_jax.backbones._torchfile import Foreign, read_training_checkpoint
from f2pad_jax.detectors import CFlow, PaDiM, PatchCore, anomalib, calibration, load_anomalib
from f2pad_jax.detectors.base import ORIGIN
from f2pad_jax.detectors.calibration import _map
from f2pad_jax.detectors.patchcore import embed, nearest
from f2pad_jax.errors import CheckpointError, ImageError, ModelError
from f2pad_jax.images import MEAN, STD

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # on a busy machine threads wait for each other

SIDE = 64
SIZE = (SIDE, SIDE)
CHANNELS = (64, 128)  # of layer1 and layer2
POSITIONS = (SIDE // 4) ** 2
RTOL = 1e-4  # of the largest value
BACKBONE = "model.feature_extractor.feature_extractor."
ENCODER = "model.encoder.feature_extractor."  # CFLOW's
PARAMETERS = {"backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": True}
CFLOW_PARAMETERS = {**PARAMETERS, "condition_vector": 32, "coupling_blocks": 2, "clamp_alpha": 1.9, "permute_soft": False}


# The files


def resnet18(prefix, seed=0):
    """Random weights of a ResNet18 through layer2, as timm has it."""
    g, state = torch.Generator().manual_seed(seed), OrderedDict()

    def convolution(conv, norm, c_out, c_in, side):
        state[f"{prefix}{conv}.weight"] = torch.randn(c_out, c_in, side, side, generator=g) / (c_in * side**2) ** 0.5
        state[f"{prefix}{norm}.weight"] = torch.rand(c_out, generator=g) + 0.5
        state[f"{prefix}{norm}.bias"] = 0.3 * torch.randn(c_out, generator=g)
        state[f"{prefix}{norm}.running_mean"] = 0.3 * torch.randn(c_out, generator=g)
        state[f"{prefix}{norm}.running_var"] = torch.rand(c_out, generator=g) + 0.5
        state[f"{prefix}{norm}.num_batches_tracked"] = torch.tensor(7)

    convolution("conv1", "bn1", 64, 3, 7)
    c_in = 64
    for k, c in enumerate(CHANNELS, 1):
        for i in range(2):
            convolution(f"layer{k}.{i}.conv1", f"layer{k}.{i}.bn1", c, c_in, 3)
            convolution(f"layer{k}.{i}.conv2", f"layer{k}.{i}.bn2", c, c, 3)
            if c_in != c:
                convolution(f"layer{k}.{i}.downsample.0", f"layer{k}.{i}.downsample.1", c, c_in, 1)
            c_in = c
    return state


def post_processor():
    names = ("_image_threshold", "_pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max")
    return OrderedDict((f"post_processor.{name}", torch.tensor(0.5)) for name in names)


def padim(positions=POSITIONS, size=20):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(positions, size, size)) / np.sqrt(size)
    return OrderedDict(
        [
            ("_is_fitted", torch.tensor([True])),
            *post_processor().items(),
            ("model.idx", torch.from_numpy(rng.permutation(sum(CHANNELS))[:size])),  # in no order
            *resnet18(BACKBONE).items(),
            ("model.anomaly_map_generator.blur.kernel", torch.ones(1, 1, 33, 33)),
            ("model.gaussian.mean", torch.from_numpy(rng.uniform(0, 2, (size, positions)).astype(np.float32))),
            (
                "model.gaussian.inv_covariance",
                torch.from_numpy((root @ np.swapaxes(root, 1, 2) + 0.1 * np.eye(size)).astype(np.float32)),
            ),
        ]
    )


def patchcore(dtype=torch.float32):
    bank = 2 * torch.rand(50, sum(CHANNELS), generator=torch.Generator().manual_seed(1))
    return OrderedDict([*post_processor().items(), ("model.memory_bank", bank.to(dtype)), *resnet18(BACKBONE).items()])


def cflow(condition=32):
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return torch.from_numpy((scale * rng.normal(size=shape)).astype(np.float32))

    state = OrderedDict([*post_processor().items(), *resnet18(ENCODER).items()])
    for k, c in enumerate(CHANNELS):
        for i in range(2):
            prefix, into = f"model.decoders.{k}.module_list.{i}.", c - c // 2 + condition
            state[prefix + "global_scale"] = normal(1, c) + 9
            state[prefix + "global_offset"] = normal(1, c)
            state[prefix + "w_perm"] = torch.from_numpy(np.eye(c, dtype=np.float32)[rng.permutation(c)])
            state[prefix + "w_perm_inv"] = state[prefix + "w_perm"].T
            state[prefix + "subnet.0.weight"] = normal(2 * into, into, scale=into**-0.5)
            state[prefix + "subnet.0.bias"] = normal(2 * into)
            state[prefix + "subnet.2.weight"] = normal(2 * (c // 2), 2 * into, scale=3 * into**-0.5)
            state[prefix + "subnet.2.bias"] = normal(2 * (c // 2))
    return state


@contextlib.contextmanager
def modules(**classes):
    """Classes that can be pickled by their names, which no one knows afterwards."""
    before = dict(sys.modules)
    try:
        for path, cls in classes.items():
            module, _, cls.__qualname__ = path.replace("__", ".").rpartition(".")
            cls.__name__, cls.__module__ = cls.__qualname__, module
            parts = module.split(".")
            for end in range(1, len(parts) + 1):
                parent = ".".join(parts[:end])
                if parent not in sys.modules or sys.modules[parent] is before.get(parent):
                    sys.modules[parent] = types.ModuleType(parent)
            setattr(sys.modules[module], cls.__name__, cls)
        yield
    finally:
        for each in sys.modules.keys() - before.keys():
            if each.partition(".")[0] in ("anomalib", "torchvision"):
                del sys.modules[each]
        sys.modules.update(before)


class Precision(enum.Enum):
    FLOAT32 = "float32"


class Holder(torch.nn.Module):
    """A module of any attributes."""

    def __init__(self, **attributes):
        super().__init__()
        for key, value in attributes.items():
            setattr(self, key, value)


class Processor(Holder):
    pass


class Compose(Holder):
    pass


class Resize(Holder):
    pass


class CenterCrop(Holder):
    pass


class Normalize(Holder):
    pass


CLASSES = {
    "anomalib__PrecisionType": Precision,
    "anomalib__pre_processing__pre_processor__PreProcessor": Processor,
    "torchvision__transforms__v2___container__Compose": Compose,
    "torchvision__transforms__v2___geometry__Resize": Resize,
    "torchvision__transforms__v2___geometry__CenterCrop": CenterCrop,
    "torchvision__transforms__v2___misc__Normalize": Normalize,
}
NORMALISED = Normalize, {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "inplace": False}


def resize(*size):
    return Resize, {"size": list(size), "interpolation": "bilinear", "max_size": None, "antialias": True}


STEPS = [resize(SIDE, SIDE), NORMALISED]


def config(steps):
    """The pre-processor's entry of a checkpoint, since anomalib 2.7."""
    path = "torchvision.transforms.v2."
    transforms = [{"class_path": path + cls.__name__, "init_args": arguments} for cls, arguments in steps]
    transform = {"class_path": path + "Compose", "init_args": {"transforms": transforms}}
    return {"anomalib_pre_processor_config": {"transform": transform}}


def processor(steps):
    """The pre-processor among the parameters, as before: the pickled object."""
    transforms = [cls(**arguments) for cls, arguments in steps]
    return {"pre_processor": Processor(transform=Compose(transforms=transforms), export_transform=Compose(transforms=[]))}


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Write a checkpoint, of 2.7's layout unless ``old``."""
    folder = tmp_path_factory.mktemp("anomalib")

    def write(state, parameters=PARAMETERS, steps=STEPS, *, old=False, name="model.ckpt", **others):
        root = {
            "epoch": 0,
            "global_step": 2,
            "pytorch-lightning_version": "2.6.6",
            "loops": {"fit_loop": {"state_dict": {}, "epoch_loop.batch_progress": {"total": {"ready": 2}}}},
            "callbacks": {
                "PostProcessor": {"image_min": torch.tensor(0.5)},
                "ModelCheckpoint{'mode': 'min'}": {"best": None},
            },
            "state_dict": state,
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
        }
        with modules(**CLASSES):
            if old:
                parameters = {**parameters, "post_processor": True, "precision": Precision.FLOAT32, **processor(steps)}
            elif steps is not None:
                root |= config(steps)
            torch.save({**root, "hyper_parameters": parameters, **others}, folder / name)
        assert "anomalib.pre_processing" not in sys.modules
        return folder / name

    return write


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8))


@pytest.fixture(scope="module")
def image(images):
    return jnp.asarray((images[0] / np.float32(255) - MEAN) / STD)


@pytest.fixture
def load(images, monkeypatch):
    """Load, but leave out the calibration, which takes most of the time and doesn't come into the scores."""
    monkeypatch.setattr(calibration, "calibrate", lambda detector, *_, **__: detector)
    return lambda path, **options: load_anomalib(path, images, **options)


# anomalib's arithmetic


def features(state, prefix, image):
    """The maps of layer1 and layer2, by torch, batch norm and all."""

    def convolution(x, conv, norm, stride=1):
        weight = state[f"{prefix}{conv}.weight"]
        x = torch.nn.functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, variance, weight, bias = (
            state[f"{prefix}{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias)

    x = torch.from_numpy(np.array(image).transpose(2, 0, 1)[None])
    x = torch.nn.functional.max_pool2d(convolution(x, "conv1", "bn1", 2).relu(), 3, 2, 1)
    maps = []
    for k in (1, 2):
        for i in range(2):
            block, stride = f"layer{k}.{i}", 2 if k == 2 and i == 0 else 1
            y = convolution(x, f"{block}.conv1", f"{block}.bn1", stride).relu()
            y = convolution(y, f"{block}.conv2", f"{block}.bn2")
            shortcut = f"{prefix}{block}.downsample.0.weight" in state
            x = (y + (convolution(x, f"{block}.downsample.0", f"{block}.downsample.1", 2) if shortcut else x)).relu()
        maps.append(x)
    return maps


def padim_oracle(state, image):
    """Squared Mahalanobis distances, (h, w)."""
    first, second = features(state, BACKBONE, image)
    embedding = torch.cat([first, torch.nn.functional.interpolate(second, size=first.shape[2:], mode="nearest")], 1)
    embedding = embedding.numpy()[0].astype(np.float64)[state["model.idx"].numpy()]
    delta = embedding.reshape(len(embedding), -1) - state["model.gaussian.mean"].numpy()
    return np.einsum("cp,pcd,dp->p", delta, state["model.gaussian.inv_covariance"].numpy(), delta).reshape(SIDE // 4, -1)


def patchcore_oracle(state, image):
    """Distance to the bank, (h, w)."""
    first, second = (torch.nn.functional.avg_pool2d(m, 3, 1, 1) for m in features(state, BACKBONE, image))
    embedding = torch.cat([first, torch.nn.functional.interpolate(second, size=first.shape[2:], mode="bilinear")], 1)
    rows = embedding[0].flatten(1).T.numpy().astype(np.float64)
    return cdist(rows, state["model.memory_bank"].numpy().astype(np.float64)).min(axis=1).reshape(SIDE // 4, -1)


def encoding(h, w, channels):
    """Of positions, (h, w, channels)."""
    half, out = channels // 2, np.zeros((h, w, channels))
    for j in range(half // 2):
        frequency = 1e4 ** (-2 * j / half)
        out[..., 2 * j], out[..., 2 * j + 1] = np.sin(np.arange(w) * frequency), np.cos(np.arange(w) * frequency)
        at = np.arange(h)[:, None] * frequency
        out[..., half + 2 * j], out[..., half + 2 * j + 1] = np.sin(at), np.cos(at)
    return out


def cflow_oracle(state, image, condition=32):
    """Log-likelihoods per channel of both layers, each (h, w)."""
    out = []
    for k, m in enumerate(features(state, ENCODER, image)):
        _, c, h, w = m.shape
        x, log_det = m[0].flatten(1).T.numpy().astype(np.float64), 0.0
        where = encoding(h, w, condition).reshape(h * w, condition)
        for i in range(2):
            p = {
                key.partition(f"decoders.{k}.module_list.{i}.")[2]: value.numpy().astype(np.float64)
                for key, value in state.items()
            }
            kept, moved = x[:, : c - c // 2], x[:, c - c // 2 :]
            hidden = np.concatenate([kept, where], axis=1) @ p["subnet.0.weight"].T + p["subnet.0.bias"]
            a = 0.1 * (np.maximum(hidden, 0) @ p["subnet.2.weight"].T + p["subnet.2.bias"])
            log_scale = 1.9 * np.tanh(a[:, : c // 2])
            x = np.concatenate([kept, moved * np.exp(log_scale) + a[:, c // 2 :]], axis=1)
            scale = 0.2 * np.log1p(np.exp(0.5 * p["global_scale"]))
            x = (x * scale + p["global_offset"]) @ p["w_perm"].T
            log_det = log_det + log_scale.sum(axis=1) + np.log(scale).sum()
        log_p = -0.5 * c * np.log(2 * np.pi) - 0.5 * (x**2).sum(axis=1) + log_det
        out.append((log_p / c).reshape(h, w))
    return out


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=RTOL * np.abs(expected).max())
    assert np.std(expected) > 100 * RTOL * np.abs(expected).max()  # or it would show nothing


scores = eqx.filter_jit(lambda detector, image: detector.raw_scores(image, detector.locate(image, ORIGIN)))
log_likelihoods = eqx.filter_jit(lambda detector, image: detector.log_likelihoods(image, detector.locate(image, ORIGIN)))


@eqx.filter_jit
def bank_distances(detector, image):
    rows = embed(detector.backbone, image)
    distances, _ = nearest(rows.reshape(-1, rows.shape[-1]), detector.memory_bank, 1)
    return jnp.sqrt(distances).reshape(rows.shape[:2])


# Scores


@pytest.mark.parametrize("old", [False, True], ids=["2.7", "2.6"])
def test_padim_scores_are_anomalibs(load, write, image, old):
    state = padim()
    assert (np.diff(state["model.idx"]) < 0).any()
    detector = load(write(state, {**PARAMETERS, "n_features": 20}, old=old))
    assert isinstance(detector, PaDiM) and detector.size == SIZE and detector.backbone.layers == ("layer1", "layer2")
    close(scores(detector, image)[0], padim_oracle(state, image))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_patchcore_distances_are_anomalibs(load, write, image, dtype):
    state = patchcore(dtype)
    detector = load(write(state, {**PARAMETERS, "coreset_sampling_ratio": 0.1, "num_neighbors": 9}))
    assert isinstance(detector, PatchCore) and detector.memory_bank.dtype == jnp.float32
    close(bank_distances(detector, image), patchcore_oracle(state, image))


def test_a_network_in_half_precision_is_widened(load, write, image):
    state = OrderedDict((k, v.half() if v.is_floating_point() else v) for k, v in patchcore().items())
    widened = OrderedDict((k, v.float() if v.is_floating_point() else v) for k, v in state.items())
    close(bank_distances(load(write(state)), image), patchcore_oracle(widened, image))


def test_cflow_likelihoods_are_anomalibs(load, write, image, images):
    state = cflow()
    detector = load(write(state, CFLOW_PARAMETERS, old=True))
    assert isinstance(detector, CFlow) and [flow.condition_size for flow in detector.flows] == [32, 32]
    expected = cflow_oracle(state, image)
    for found, one in zip(log_likelihoods(detector, image), expected, strict=True):
        close(found, one)
    other = cflow_oracle(state, (images[1] / np.float32(255) - MEAN) / STD)
    peaks = [max(a.max(), b.max()) for a, b in zip(expected, other, strict=True)]  # of both normal images
    np.testing.assert_allclose(detector.peaks, peaks, rtol=1e-4)


def test_the_likelihood_is_that_of_freia():
    """The oracle's, that is."""
    framework = pytest.importorskip("FrEIA.framework")
    blocks = pytest.importorskip("FrEIA.modules")
    state, condition = cflow(), 32
    image = np.random.default_rng(3).normal(size=(SIDE, SIDE, 3)).astype(np.float32)

    def subnet(c_in, c_out):
        return torch.nn.Sequential(torch.nn.Linear(c_in, 2 * c_in), torch.nn.ReLU(), torch.nn.Linear(2 * c_in, c_out))

    for k, (m, expected) in enumerate(zip(features(state, ENCODER, image), cflow_oracle(state, image), strict=True)):
        _, c, h, w = m.shape
        flow = framework.SequenceINN(c)
        for _ in range(2):
            flow.append(
                blocks.AllInOneBlock,
                cond=0,
                cond_shape=(condition,),
                subnet_constructor=subnet,
                affine_clamping=1.9,
                global_affine_type="SOFTPLUS",
                permute_soft=False,
            )
        prefix = f"model.decoders.{k}."
        flow.load_state_dict({key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)})
        rows = m[0].flatten(1).T
        with torch.no_grad():
            z, log_det = flow(rows, [torch.from_numpy(encoding(h, w, condition).reshape(h * w, -1).astype(np.float32))])
        log_p = (-0.5 * (z**2).sum(1) + log_det) / c - 0.5 * np.log(2 * np.pi)
        np.testing.assert_allclose(log_p.numpy().reshape(h, w), expected, rtol=1e-4, atol=1e-3)


def test_layers_named_in_another_order_come_in_the_networks(load, write, image):
    # timm returns them so, and anomalib gives the names it was asked for to them in turn
    state = padim()
    detector = load(write(state, {**PARAMETERS, "layers": ["layer2", "layer1"]}))
    assert detector.backbone.layers == ("layer1", "layer2")
    close(scores(detector, image)[0], padim_oracle(state, image))


def test_a_backbones_tag_and_spelling_are_understood(load, write):
    detector = load(write(patchcore(), {**PARAMETERS, "backbone": "resnet18.tv_in1k"}))
    assert detector.backbone.name == "resnet18"


# The detector


@pytest.fixture(scope="module")
def padim_file(write):
    return write(padim(), name="padim.ckpt")


@pytest.fixture(scope="module")
def stages():
    return []


@pytest.fixture(scope="module")
def calibrated(padim_file, images, stages):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("f2pad_jax.detectors.calibration.NUM_PIXELS", 500)
        return load_anomalib(padim_file, images, seed=3, progress=lambda *told: stages.append(told))


def test_the_detector_is_calibrated(calibrated, stages, image, images):
    calibration = calibrated.calibrated
    assert float(calibration.scale) > 0 and float(calibration.threshold) > 0
    assert calibration.normals.shape == (2, SIDE, SIDE, 3)
    bare = dataclasses.replace(calibrated, calibration=None)
    expected = np.mean([scores(bare, jnp.asarray((i / np.float32(255) - MEAN) / STD))[0].mean() for i in images])
    np.testing.assert_allclose(calibration.scale, expected, rtol=1e-4)
    found = _map(calibrated, image)
    assert found.shape == SIZE and np.isfinite(found).all()
    assert stages[0][0] == "pixel prior" and stages[-1] == ("maps of normal images", 2, 2)


def test_a_saved_detector_loads_with_its_checkpoint_alone(calibrated, padim_file, write, tmp_path, image):
    save_detector(tmp_path / "model.f2pad", calibrated)
    loaded = load_detector(tmp_path / "model.f2pad", weights=padim_file)
    np.testing.assert_array_equal(_map(loaded, image), _map(calibrated, image))
    state = padim()
    state[BACKBONE + "layer2.1.conv2.weight"][0, 0, 0, 0] += 1
    with pytest.raises(ModelError, match="other weights"):
        load_detector(tmp_path / "model.f2pad", weights=write(state))


@pytest.mark.parametrize("make", [patchcore, cflow], ids=["PatchCore", "CFLOW"])
def test_other_detectors_save_and_load_too(load, write, tmp_path, make):
    path = write(make(), CFLOW_PARAMETERS)
    detector = load(path)
    save_detector(tmp_path / "model.f2pad", detector)
    assert eqx.tree_equal(load_detector(tmp_path / "model.f2pad", weights=path), detector)


@pytest.mark.parametrize("make", [padim, cflow], ids=["feature_extractor", "encoder"])
def test_the_network_of_a_checkpoint_serves_by_itself(load, write, make):
    path = write(make())
    backbone = load_backbone("resnet18", layers=("layer1", "layer2"), weights=path)
    assert eqx.tree_equal(backbone, load(path, size=SIZE).backbone)  # whose maps are anomalib's, see above


def test_a_network_that_ends_before_a_layer_is_refused(padim_file):
    with pytest.raises(
        CheckpointError, match=re.escape(f"{padim_file}: these weights of resnet18 end before layer 'layer3'")
    ):
        load_backbone("resnet18", layers=("layer3",), weights=padim_file)
    with pytest.raises(CheckpointError, match=re.escape(f"{padim_file}: not the weights of resnet34")):
        load_backbone("resnet34", layers=("layer1",), weights=padim_file)


# The size


@pytest.fixture
def input_size(write):
    """The size a checkpoint asks for."""

    def input_size(steps, **options):
        path = write(OrderedDict(w=torch.zeros(1)), steps=steps, **options)
        rest = read_training_checkpoint(path)[1]
        return anomalib._input_size(rest["hyper_parameters"], rest)

    return input_size


either = pytest.mark.parametrize("old", [False, True], ids=["2.7", "2.6"])


@either
def test_the_size_is_the_pre_processors(input_size, old):
    assert input_size([resize(64, 96), NORMALISED], old=old) == (64, 96)
    assert input_size([NORMALISED], old=old) == (256, 256)
    assert input_size([resize(96, 96), resize(64, 32)], old=old) == (64, 32)


def test_a_transform_that_is_no_sequence_is_read(input_size):
    cls, arguments = resize(64, 96)
    transform = {"class_path": f"torchvision.transforms.v2.{cls.__name__}", "init_args": arguments}
    assert input_size(None, anomalib_pre_processor_config={"transform": transform}) == (64, 96)
    parameters = {**PARAMETERS, "pre_processor": Processor(transform=cls(**arguments))}
    assert input_size(None, parameters=parameters) == (64, 96)


@pytest.mark.parametrize("given", [None, True, False])
def test_without_a_transform_the_size_is_256(input_size, given):
    assert input_size(None) == (256, 256)
    assert input_size(None, anomalib_pre_processor_config=given) == (256, 256)
    assert input_size(None, parameters={**PARAMETERS, "pre_processor": given}) == (256, 256)


@either
@pytest.mark.parametrize(
    ("step", "message"),
    [
        ((CenterCrop, {"size": [64, 64]}), "has a CenterCrop step"),
        (resize(64), "has a Resize step"),
        (resize(64.5, 64), "is no size of images"),
        (resize(0, 64), "is no size of images"),
        (resize(2**31, 64), "is no size of images"),
        ((Normalize, {"mean": [0.5, 0.5, 0.5], "std": [0.229, 0.224, 0.225]}), "normalises by other values"),
        ((Normalize, {"mean": [0.485, 0.456, 0.406], "std": [1.0, 1.0, 1.0]}), "normalises by other values"),
    ],
    ids=["crop", "shorter side", "fraction", "nothing", "huge", "mean", "deviation"],
)
def test_a_pre_processor_without_counterpart_is_refused(input_size, step, message, old):
    with pytest.raises(CheckpointError, match=message) as caught:
        input_size([resize(96, 96), step], old=old)
    assert "\n" not in str(caught.value)


@either
def test_a_size_given_stands_for_the_pre_processor(load, write, image, old):
    state = padim()
    path = write(state, steps=[resize(96, 96), (CenterCrop, {"size": [64, 64]}), NORMALISED], old=old)
    with pytest.raises(CheckpointError, match="CenterCrop"):
        load(path)
    detector = load(path, size=SIZE)
    assert detector.size == SIZE
    close(scores(detector, image)[0], padim_oracle(state, image))


# What is refused


@pytest.fixture
def refusal(load, write):
    """The line with which a file is refused, after its name."""

    def refusal(state, *arguments, error=CheckpointError, size=None, **options):
        path = write(state, *arguments, **options)
        with pytest.raises(error) as caught:
            load(path, size=size)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{path}: ")

    return refusal


@pytest.mark.parametrize("parameters", [None, [], {}, {"backbone": "resnet18"}, {"layers": ["layer1"]}], ids=str)
def test_a_file_without_parameters_is_refused(refusal, parameters):
    assert "no checkpoint of anomalib's" in refusal(patchcore(), parameters)


def test_another_model_is_refused(refusal):
    assert "none of anomalib's" in refusal(OrderedDict([*resnet18(BACKBONE).items(), ("model.net.weight", torch.zeros(3))]))


@pytest.mark.parametrize(
    ("make", "missing"),
    [
        (padim, "model.idx"),
        (padim, "model.gaussian.inv_covariance"),
        (padim, BACKBONE + "layer1.0.conv1.weight"),
        (padim, BACKBONE + "layer2.0.downsample.1.running_var"),
        (patchcore, BACKBONE + "conv1.weight"),
        (cflow, "model.decoders.0.module_list.0.w_perm"),
        (cflow, "model.decoders.1.module_list.1.subnet.2.bias"),
        (cflow, "model.decoders.1.module_list.0.global_scale"),
        (cflow, ENCODER + "bn1.weight"),
    ],
)
def test_a_missing_tensor_is_named(refusal, make, missing):
    state = make()
    del state[missing]
    line = refusal(state, CFLOW_PARAMETERS)
    ours = missing.removeprefix(BACKBONE).removeprefix(ENCODER).rpartition(".")[0]
    norm = "downsample" in missing or "bn1" in missing
    assert "missing" in line and ("norm" if norm else ours) in line


def test_a_model_without_its_network_is_refused(refusal):
    state = OrderedDict((k, v) for k, v in patchcore().items() if not k.startswith(BACKBONE))
    assert "not the weights of resnet18" in refusal(state)


def test_an_unknown_layer_is_named(refusal):
    assert "taps ['layer1', 'layer7'] of resnet18; expected some of layer1, " in refusal(
        patchcore(), {**PARAMETERS, "layers": ["layer1", "layer7"]}
    )


def test_statistics_of_another_size_are_refused(refusal):
    assert "256 positions, not the 24x16" in refusal(padim(), size=(96, 64))


def test_a_size_that_is_no_multiple_of_the_stride_is_refused(refusal):
    assert "(60, 64) is not a multiple" in refusal(padim(), size=(60, 64), error=ImageError)


def test_another_clamp_is_refused(refusal):
    assert "clamp at 2.5; this library's flows clamp at 1.9" in refusal(cflow(), {**CFLOW_PARAMETERS, "clamp_alpha": 2.5})


def test_no_images_are_refused(padim_file):
    with pytest.raises(ImageError, match="at least one normal image"):
        load_anomalib(padim_file, [])


def test_images_that_can_not_be_used_are_refused(padim_file):
    with pytest.raises(ImageError, match=re.escape("within 0..1")):
        load_anomalib(padim_file, [np.full((SIDE, SIDE, 3), 2.0)])


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_file_cut_short_is_refused(padim_file, tmp_path, images, kept):
    content, path = padim_file.read_bytes(), tmp_path / "cut.ckpt"
    path.write_bytes(content[: int(kept * len(content) if 0 < kept < 1 else kept)])
    for load in (load_anomalib, lambda path, _: load_backbone("resnet18", layers=("layer1",), weights=path)):
        with pytest.raises(CheckpointError, match=re.escape(f"{path}: ")) as caught:
            load(path, images)
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path, images):
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'none.ckpt'}: no such")):
        load_anomalib(tmp_path / "none.ckpt", images)


# The lenient reader, which passes over classes it does not know


@pytest.fixture
def read(tmp_path):
    """Read the given opcodes as the root of a training checkpoint."""

    def read(root, **options):
        (tmp_path / "hostile.ckpt").write_bytes(zip_file(root, SIX, **options))
        return read_training_checkpoint(tmp_path / "hostile.ckpt")

    return read


@pytest.fixture
def refused(read):
    """The line with which the opcodes are refused."""

    def refused(root):
        with pytest.raises(CheckpointError) as caught:
            read(root)
        text = str(caught.value)
        assert "hostile.ckpt: " in text and "\n" not in text and len(text) < 500
        return text

    return refused


def live(payload, mark):
    """Whether the standard unpickler falls for it."""
    loaded = pickle.loads(b"\x80\x02" + payload + b".")
    if isinstance(loaded, subprocess.Popen):
        loaded.wait()
    there = mark.exists()
    mark.unlink()
    return there


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_code_is_passed_over_and_not_run(read, refused, tmp_path, how):
    mark = tmp_path / "mark"
    payload = hostile(how, mark)
    assert live(payload, mark)
    weights = ordered(w=GOOD)
    tensors, rest = read(ordered(payload=payload, state_dict=weights, hidden=b"]" + payload + b"a"))
    np.testing.assert_array_equal(tensors["w"], SIX["0"].reshape(2, 3))
    assert (
        isinstance(rest["payload"], Foreign)
        and isinstance(rest["hidden"][0], Foreign)
        and rest.keys() == {"payload", "hidden"}
    )
    keyed = read(ordered(state_dict=weights, keyed=b"}" + payload + plain(3) + b"s"))[1]["keyed"]
    assert len(keyed) == 1 and isinstance(next(iter(keyed)), Foreign)
    state = b"}" + plain("_metadata") + payload + b"sb"
    assert list(read(ordered(state_dict=weights + state))[0]) == ["w"]
    for root in (payload, ordered(state_dict=payload), ordered(state_dict=ordered(w=GOOD, payload=payload))):
        with contextlib.suppress(CheckpointError):  # an object of no known class may hold no tensors, too
            assert read(root)[0] == {}
    refused(ordered(state_dict=ordered(w=GOOD, payload=payload)))
    assert not mark.exists()


def test_attributes_are_kept_and_no_method_is_called(read, tmp_path):
    mark = tmp_path / "mark"
    thing = name("anomalib", "Thing") + b")\x81" + plain({"size": [3, 4], "__class__": 0, "update": 1}) + b"b"
    looked_up = call(name("builtins", "getattr"), thing, plain("size"))
    method = call(looked_up, plain(f"touch {mark}"))
    rest = read(ordered(state_dict=ordered(w=GOOD), thing=thing, looked_up=looked_up, method=method))[1]
    assert type(rest["thing"]).__name__ == "Thing"
    assert dict(rest["thing"]) == {"size": [3, 4], "__class__": 0, "update": 1}
    for thing in (rest["looked_up"], rest["method"]):
        assert isinstance(thing, Foreign) and not thing
    assert not mark.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"]" + plain(1) + b"ab",
        b"(" + plain(1) + plain(2) + b"e",
        plain(1) + b"a",
        b"(" + plain(1) + b"\x90",
        plain(3) + b"b",
    ],
    ids=["BUILD of a list", "APPENDS", "APPEND", "ADDITEMS", "BUILD of a number"],
)
def test_a_foreign_object_drops_its_items(read, opcodes):
    thing = name("set", "Thing") + b")R"
    try:
        rest = read(ordered(state_dict=ordered(w=GOOD), thing=thing + opcodes))[1]
    except CheckpointError:
        return
    assert isinstance(rest["thing"], Foreign) and not rest["thing"]


def test_registered_extensions_are_refused_by_the_lenient_reader_too(refused, tmp_path):
    mark, code = tmp_path / "mark", 199
    payload = call(b"\x82" + bytes([code]), plain(OPEN.format(str(mark))))
    copyreg.add_extension("builtins", "eval", code)
    try:
        assert live(payload, mark)  # from here on the standard unpickler no longer asks for the name
        assert "EXT1" in refused(ordered(state_dict=ordered(w=GOOD), payload=payload))
        assert not mark.exists()
    finally:
        copyreg.remove_extension("builtins", "eval", code)


@pytest.mark.parametrize(("opcode", "size"), [("EXT2", b"\x83\x07\x00"), ("EXT4", b"\x84\x07\x00\x00\x00")])
def test_wide_extensions_are_refused_by_the_lenient_reader_too(refused, opcode, size):
    assert opcode in refused(ordered(state_dict=ordered(w=GOOD), payload=size))


@pytest.mark.parametrize(
    "opcodes",
    [
        b"r" + struct.pack("<I", 1 << 28),
        b"p268435456\n",
        b"X" + struct.pack("<I", 1 << 30),
        b"\x8d" + struct.pack("<Q", 1 << 50),
        b"\x8e" + struct.pack("<Q", 1 << 50),
        b"\x95" + struct.pack("<Q", 1 << 50),
        b"\x8b" + struct.pack("<I", 1 << 30),
    ],
    ids=["LONG_BINPUT", "PUT", "BINUNICODE", "BINUNICODE8", "BINBYTES8", "FRAME", "LONG4"],
)
def test_a_number_in_the_file_takes_no_memory_here_either(read, opcodes):
    tracemalloc.start()
    try:
        with contextlib.suppress(CheckpointError):
            read(plain(None) + opcodes + ordered(state_dict=ordered(w=GOOD)))
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()


def test_a_tensor_of_a_foreign_storage_is_refused(refused):
    foreign = name("anomalib", "Thing") + b")R"
    tensor = call(name("torch._utils", "_rebuild_tensor_v2"), foreign, plain(0), plain((1,)), plain((1,)))
    assert "malformed" in refused(ordered(state_dict=ordered(w=tensor)))
    storage = b"(" + plain("storage") + name("torch", "ComplexFloatStorage") + plain("0") + plain("cpu") + plain(6) + b"tQ"
    assert "storage's description" in refused(ordered(state_dict=ordered(w=GOOD), x=storage))


def test_what_is_not_foreign_stays_unaltered(refused, read):
    for target in (GOOD, name("torch._utils", "_rebuild_tensor_v2"), name("torch", "FloatStorage")):
        assert "alter" in refused(ordered(state_dict=ordered(w=GOOD), x=target + plain({"offset": 4}) + b"b"))
    np.testing.assert_array_equal(read(ordered(state_dict=ordered(w=GOOD)))[0]["w"], SIX["0"].reshape(2, 3))


def test_a_class_is_no_name_the_next_file_knows(read):
    for _ in range(2):
        rest = read(ordered(state_dict=ordered(w=GOOD), x=name("torch._utils", "Thing") + plain(()) + b"\x81"))[1]
        assert type(rest["x"]).__mro__[1] is Foreign
    assert not hasattr(sys.modules["f2pad_jax.backbones._torchfile"], "Thing")


@pytest.mark.parametrize("attribute", ["a\x00b", "é" * 3000, ""], ids=["NUL", "long", "empty"])
def test_odd_names_are_read_or_refused(read, attribute):
    with contextlib.suppress(CheckpointError):
        read(ordered(state_dict=ordered(w=GOOD), x=plain("m") + plain(attribute) + b"\x93" + b")R"))


@pytest.mark.parametrize(
    "root", [plain([1]), GOOD, ordered(w=GOOD), ordered(model=ordered(w=GOOD)), ordered(epoch=plain(3))]
)
def test_a_file_without_a_state_dict_is_no_training_checkpoint(refused, root):
    refused(root)


def test_a_training_checkpoint_stays_refused_as_a_weight_file(padim_file, write, tmp_path):
    other = tmp_path / "model.pth"
    other.write_bytes(write(padim(), old=True).read_bytes())
    with pytest.raises(CheckpointError, match="nothing was run"):
        load_backbone("resnet18", layers=("layer1",), weights=other)
