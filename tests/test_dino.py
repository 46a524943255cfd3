"""DINOv2 and DINOv3 against transformers, in a small configuration with random weights; the layouts of their files."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_parity as parity

from f2pad_jax.backbones import BACKBONES, load_backbone
from f2pad_jax.backbones import _dino as dinos
from f2pad_jax.backbones import _weight_files as weight_files
from f2pad_jax.backbones._conversion import convert, parameter_shapes
from f2pad_jax.backbones._vit import resized_positions, rotated
from f2pad_jax.backbones.backbone import NETWORKS
from f2pad_jax.data import load_texture
from f2pad_jax.detectors import PatchCore
from f2pad_jax.detectors.base import NormalImages
from f2pad_jax.detectors.resolution import detector_size
from f2pad_jax.errors import CheckpointError

torch = pytest.importorskip("torch")

TINY = {"dinov2-tiny": (2, 0), "dinov2-tiny-registers": (2, 4), "dinov3-tiny": (3, 4)}
"""Version, number of registers."""
PATCHES = ((4, 4), (3, 7), (9, 2))
"""Sizes of images, in patches; DINOv2's positions are a grid of 5 x 5 here."""


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Small networks in the registry."""
    monkeypatch.setattr(dinos, "GRID", 5)
    width, depth, heads = parity.DINOS["tiny"]
    for name, (version, num_registers) in TINY.items():
        for networks in (BACKBONES, NETWORKS):
            monkeypatch.setitem(networks, name, dinos._network(width, heads, depth, version, num_registers))
        monkeypatch.setitem(weight_files.manifest(), name, weight_files.manifest()[name.replace("tiny", "small")])


@pytest.fixture(params=TINY)
def name(request):
    return request.param


@pytest.mark.parametrize("patches", PATCHES)
def test_maps_and_gradients_equal_those_of_transformers(name, patches, tmp_path):
    made = parity.reference(name)
    loaded = parity.load(name, parity.save(made.module, tmp_path / "weights.safetensors"), ("block1", "block2", "block3"))
    patch = loaded.backbone.stride
    image = parity.random_image((patches[0] * patch, patches[1] * patch), np.float32)
    if patches == PATCHES[-1]:  # faint: the constant ε of the layer norms counts
        image *= np.float32(0.01)
    expected = parity.expect(made, image)
    assert expected.maps["block3"].shape == (*patches, 64)
    parity.assert_close(parity.errors(loaded, expected))


# The layouts of weight files, written independently of the converter


def on_the_hub(state):
    """transformers 5's modules as the hub's files name them."""
    names = {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
    }
    out = {}
    for name, value in state.items():
        if name.startswith("encoder."):
            for module, hub in names.items():
                name = name.replace(f".{module}.", f".{hub}.")
        out[name.removeprefix("model.")] = value
    return out


def facebook(state):
    """transformers 5's modules as Facebook names them."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.register_tokens": "storage_tokens" if "norm.weight" in state else "register_tokens",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
        "embeddings.patch_embeddings.": "patch_embed.proj.",
        "layernorm.": "norm.",
        "encoder.layer.": "blocks.",
        "model.layer.": "blocks.",
        ".attention.o_proj.": ".attn.proj.",
        ".layer_scale1.lambda1": ".ls1.gamma",
        ".layer_scale2.lambda1": ".ls2.gamma",
        ".up_proj.": ".fc1.",
        ".down_proj.": ".fc2.",
    }
    out = {}
    for name, value in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            keys = name.replace(".q_proj.", ".k_proj.")
            parts = [value, state.get(keys, torch.full_like(value, 7.0)), state[name.replace(".q_proj.", ".v_proj.")]]
            fused = name.replace(".attention.q_proj.", ".attn.qkv.")
            if keys not in state:
                mask = [torch.ones_like(value), torch.zeros_like(value), torch.ones_like(value)]
                out[re.sub("^model.layer", "blocks", fused) + "_mask"] = torch.cat(mask)
            name, value = fused, torch.cat(parts)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        out[name] = value
    if "norm.weight" in state:
        out["rope_embed.periods"] = torch.ones(8, dtype=torch.bfloat16)
    return out


def timm(state):
    """transformers 5's modules as timm names them: DINOv3 is one of its EVA networks."""
    out = {name: value for name, value in facebook(state).items() if not re.search("mask_token|bias_mask|rope", name)}
    if "norm.weight" in state:
        for name in [name for name in out if name.endswith("qkv.bias")]:
            query, _, value = out.pop(name).chunk(3)
            out |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
        names = {"storage_tokens": "reg_token", ".ls1.gamma": ".gamma_1", ".ls2.gamma": ".gamma_2"}
        for theirs, ours in names.items():
            out = {name.replace(theirs, ours): value for name, value in out.items()}
    elif "register_tokens" in out:
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


def test_files_of_all_layouts_give_equal_weights(name, tmp_path):
    state = parity.reference(name).module.state_dict()
    ours = convert(NETWORKS[name], parity.numpy_state(state))
    assert ours.keys() == parameter_shapes(NETWORKS[name]).keys()
    layouts = {layout: layout(state) for layout in (on_the_hub, facebook, timm)}
    layouts["converted"] = {name: torch.tensor(value) for name, value in ours.items()}
    if name == "dinov3-tiny":
        assert "blocks.2.attn.qkv.bias_mask" in layouts[facebook] and "blocks.2.gamma_1" in layouts[timm]
        assert "layer.2.attention.q_proj.bias" in layouts[on_the_hub]
    else:
        assert "encoder.layer.2.attention.attention.query.bias" in layouts[on_the_hub]
        assert ("reg_token" in layouts[timm]) == ("registers" in name)
    for layout, tensors in layouts.items():
        path = tmp_path / "weights.pth"
        torch.save(tensors, path)
        found = weight_files.convert_file(path, name, lambda tensors: convert(NETWORKS[name], tensors))
        assert list(found) == list(ours), layout
        for key, value in found.items():
            np.testing.assert_array_equal(value, ours[key], err_msg=f"{layout}: {key}")


def test_dinov3_without_biases_of_queries_keys_and_values():
    """timm's usual files: all of these biases are 0."""
    state = timm(parity.reference("dinov3-tiny").module.state_dict())
    bare = {name: value for name, value in state.items() if not name.endswith(("q_bias", "v_bias"))}
    zero = {name: value if name in bare else torch.zeros_like(value) for name, value in state.items()}
    found, expected = (convert(NETWORKS["dinov3-tiny"], parity.numpy_state(tensors)) for tensors in (bare, zero))
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    assert not np.any(found["blocks.1.attn.qkv.bias"])


@pytest.mark.parametrize(
    ("file", "network", "message"),
    [
        ("dinov2-tiny", "dinov2-tiny-registers", "'register_tokens' is missing"),
        ("dinov2-tiny-registers", "dinov2-tiny", "unexpected tensor 'embeddings.register_tokens'"),
        ("dinov2-tiny", "dinov3-tiny", "unexpected tensor 'embeddings.position_embeddings'"),
        ("dinov3-tiny", "dinov2-tiny-registers", r"wrong shape: \[768, 64\], expected \[588, 64\]"),
    ],
)
def test_the_weights_of_another_network_are_refused(file, network, message):
    tensors = parity.numpy_state(on_the_hub(parity.reference(file).module.state_dict()))
    with pytest.raises(CheckpointError, match=message):
        convert(NETWORKS[network], tensors)


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("blocks.1.ls2.gamma", "'blocks.1.fc2.layer_scale' is missing"),
        ("cls_token", "'cls_token' is missing"),
        ("blocks.0.attn.proj.bias", "'blocks.0.attn.proj.bias' is missing"),
        ("blocks.0.attn.qkv.bias", "'blocks.0.attn.qkv.bias' is missing"),
    ],
)
def test_a_file_without_a_tensor_is_refused(absent, message):
    tensors = parity.numpy_state(facebook(parity.reference("dinov2-tiny").module.state_dict()))
    del tensors[absent]
    with pytest.raises(CheckpointError, match=message):
        convert(NETWORKS["dinov2-tiny"], tensors)


def test_a_tensor_of_the_wrong_shape_is_refused():
    tensors = parity.numpy_state(facebook(parity.reference("dinov2-tiny").module.state_dict()))
    for name in ("blocks.1.ls2.gamma", "pos_embed", "cls_token"):
        with pytest.raises(CheckpointError, match="shape"):
            convert(NETWORKS["dinov2-tiny"], tensors | {name: tensors[name][..., 1:]})


# Positions


@pytest.mark.parametrize("size", [(3, 7), (10, 5), (1, 3), (16, 13)])
def test_antialiased_positions_are_resized_as_in_pytorch(size):
    positions = np.random.default_rng(0).normal(size=(7 * 7, 8)).astype(np.float32)
    grid = torch.tensor(positions.reshape(1, 7, 7, 8)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=size, mode="bicubic", align_corners=False, antialias=True)
    found = resized_positions(jnp.asarray(positions), size, antialias=True)
    np.testing.assert_allclose(found, expected[0].permute(1, 2, 0).reshape(-1, 8).numpy(), rtol=0, atol=1e-5)


def test_rotary_positions_turn_pairs_of_channels_and_leave_their_length():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.normal(size=(6, 2, 16)), jnp.float32)
    angles = dinos.rotary_angles((2, 3), 16)
    assert angles.shape == (6, 8)
    np.testing.assert_allclose(angles[0, 0], -np.pi, rtol=1e-6)  # y = -1/2, period 1
    np.testing.assert_allclose(angles[5, 5], 2 * np.pi * (2 / 3) / 100 ** (1 / 4), rtol=1e-6)  # x = 2/3
    as_complex = np.asarray(tokens[..., :8] + 1j * tokens[..., 8:]) * np.exp(1j * np.asarray(angles))[:, None]
    expected = np.concatenate([as_complex.real, as_complex.imag], axis=-1)
    np.testing.assert_allclose(rotated(tokens, angles), expected, rtol=0, atol=1e-5)


def test_sides_are_multiples_of_the_patch(name, tmp_path):
    path = parity.save(parity.reference(name).module, tmp_path / "weights.safetensors")
    backbone = load_backbone(name, layers=("block1",), weights=path)
    patch = 16 if "v3" in name else 14
    assert backbone.stride == patch and not backbone.local
    with pytest.raises(ValueError, match=f"multiples of {patch}"):
        jax.eval_shape(lambda x: backbone(x), jnp.zeros((patch, patch + 2, 3)))


def test_patchcore_scores_the_patches(tmp_path):
    name = "dinov2-tiny-registers"
    path = parity.save(parity.reference(name).module, tmp_path / "weights.safetensors")
    brick = load_texture("brick", size=100, num_train=2, num_test=1)
    size = detector_size((100, 100), 14)
    assert size == (98, 98)
    images = NormalImages(brick.train, size)
    detector = PatchCore.fit(images, load_backbone(name, weights=path), coreset_ratio=1.0)
    assert detector.memory_bank.shape == (2 * 7 * 7, 3 * 64) and not detector.local

    @jax.jit
    def scores(detector, image):
        return detector.raw_scores(image, detector.locate(image, np.zeros(2, int)))[0]

    found = scores(detector, NormalImages([brick.test[0].image], size)[0])
    assert found.shape == (7, 7)
    assert scores(detector, images[0]).max() < 1e-4 * found.min()
