"""Against eager PyTorch: ``python benchmarks/eager.py FOLDER ... --weights FILE [--images N] [--methods patchcore padim]``.

    pip install torch

The eager form of the algorithm is written the plain way: whole images, one at a time, autograd, all 50 candidates and all
121 taps of the gradient sharing at every step. Both forms solve equal problems: cut-paste defects of ``cutpaste.py``,
224x224, ResNet18. They share detector, m0, first guess, β, settings, and the rule that draws the mask. This library runs
twice: for as many steps as the eager form, and until its stopping rule applies. Lines give images per second, their ratio
to PyTorch's, and the mean IoU. All programs are compiled before. Both forms use all cores: this library with an image on
each, PyTorch with its threads.
"""

import argparse
import dataclasses
import platform
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from cutpaste import cut_paste
from safetensors.torch import load_file

import f2pad_jax
from f2pad_jax import Settings
from f2pad_jax.backbones import load_backbone
from f2pad_jax.detectors import DETECTORS, PaDiM, PatchCore
from f2pad_jax.images import HIGHEST, LOWEST, to_unit
from f2pad_jax.images.metrics import iou
from f2pad_jax.method import Evidence, look, pose

EAGER = "eager PyTorch"
LAYERS = ("layer1", "layer2", "layer3")


class ResNet18(torch.nn.Module):
    """ResNet18 as far as layer3, with torchvision's names of the weights."""

    def __init__(self, path: str):
        super().__init__()
        self.weights = {key: value.to(torch.get_default_device()) for key, value in load_file(path).items()}

    def norm(self, x, name):
        parts = (self.weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    def block(self, x, name, stride):
        w = self.weights
        y = F.relu(self.norm(F.conv2d(x, w[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
        y = self.norm(F.conv2d(y, w[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if f"{name}.downsample.0.weight" in w:
            x = self.norm(F.conv2d(x, w[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1")
        return F.relu(x + y)

    def forward(self, x):
        x = F.relu(self.norm(F.conv2d(x, self.weights["conv1.weight"], stride=2, padding=3), "bn1"))
        x, maps = F.max_pool2d(x, 3, 2, 1), []
        for k in (1, 2, 3):
            x = self.block(self.block(x, f"layer{k}.0", 1 if k == 1 else 2), f"layer{k}.1", 1)
            maps.append(x)
        return maps


def tensor(array) -> torch.Tensor:
    """Returns an array as a tensor on PyTorch's device."""
    return torch.from_numpy(np.array(array)).to(torch.get_default_device())


class PatchCoreScores:
    """Scores of Eq. (5): the least of the distances to all candidates."""

    def __init__(self, detector, context):
        self.candidates = tensor(detector.memory_bank[context.indices])  # p k c

    def __call__(self, maps):
        maps = [F.avg_pool2d(m, 3, 1, 1) for m in maps]
        size = maps[0].shape[2:]
        features = torch.cat([F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps], 1)
        features = features.flatten(2)[0].T
        return ((features[:, None] - self.candidates) ** 2).sum(-1).min(1).values


class PaDiMScores:
    """Scores of Eq. (7)."""

    def __init__(self, detector, context):
        mean, precision = context
        bounds = np.cumsum([0, *detector.backbone.channels])
        self.channels = tensor(np.concatenate([np.asarray(c) + b for c, b in zip(detector.channels, bounds, strict=False)]))
        self.mean, self.precision = (tensor(a.reshape(-1, *a.shape[2:])) for a in (mean, precision.precision))

    def __call__(self, maps):
        size = maps[0].shape[2:]
        features = torch.cat([F.interpolate(m, size, mode="nearest") for m in maps], 1)[0, self.channels]
        d = features.flatten(1).T - self.mean
        return torch.einsum("pi,pij,pj->p", d, self.precision, d)


SCORES = {PatchCore: PatchCoreScores, PaDiM: PaDiMScores}


def length(a):
    """Returns the Euclidean length over channels, with gradient 0 at 0."""
    square = (a**2).sum(0)
    return torch.where(square > 0, square.clamp(min=1e-30).sqrt(), torch.zeros(()))


def taps(image, radius: int = 5):
    """Returns the neighbours within ``radius``, (121, c, h, w); zeros beyond the border."""
    c, h, w = image.shape
    return F.unfold(image[None], 2 * radius + 1, padding=radius).reshape(c, -1, h, w).transpose(0, 1)


def solve(network, problem, n0, steps: int) -> np.ndarray:
    """Runs lines 3-8 of Algorithm 1, a line at a time; returns n."""
    planes = lambda a: tensor(a).permute(2, 0, 1)  # noqa: E731
    x, n, region = planes(problem.x), planes(n0), tensor(problem.region)
    score, affected = (
        SCORES[type(problem.detector)](problem.detector, problem.context),
        tensor(problem.affected[0]).flatten(),
    )
    prior, weights, scale = problem.detector.calibrated.prior, problem.weights, float(problem.detector.scale)
    means, whitening, epsilon = tensor(prior.means), tensor(prior.whitening), float(problem.penalty.epsilon)
    low, high = (tensor(a)[:, None, None] for a in (LOWEST, HIGHEST))
    alpha1, alpha2, beta = (float(w) for w in weights)

    def objective(n):
        feature = (affected * score(network(n[None]))).sum() / scale  # n has ImageNet's normalisation already
        d = n.permute(1, 2, 0)[region][:, None] - means
        closest = (torch.einsum("qij,pqj->pqi", whitening, d) ** 2).sum(-1).min(1).values.sum()
        variation = length(n[:, 1:] - n[:, :-1]).sum() + length(n[:, :, 1:] - n[:, :, :-1]).sum()
        a = length(x - n)
        sparse = torch.log(torch.sqrt(a**2 + epsilon) + a)[region].sum()
        return feature + alpha1 * closest + alpha2 * variation + beta * sparse

    spread = torch.arange(-5, 6) ** 2
    spatial = torch.exp(-(spread[:, None] + spread).flatten() / 1.1)
    colour = torch.exp(-((taps(x) - x) ** 2).sum(1) / 3.0) * taps(torch.ones_like(x[:1]))[:, 0]
    weight = spatial[:, None, None] * colour
    weight = weight / weight.sum(0)
    m = v = s = before = torch.zeros_like(x)
    b1, b2, b3 = 0.98, 0.92, 0.99
    for k in range(1, steps + 1):
        leaf = n.clone().requires_grad_()
        (g,) = torch.autograd.grad(objective(leaf), leaf)
        g = (taps(g * region) * weight[:, None]).sum(0)
        d = g - before if k > 1 else torch.zeros_like(g)
        m, v, s = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * d, b3 * s + (1 - b3) * (g + b2 * d) ** 2
        direction = (m / (1 - b1**k) + b2 * v / (1 - b2**k)) / (torch.sqrt(s / (1 - b3**k)) + 1e-8)
        gamma = 0.3 / (x - n).abs().clamp(min=1.0)
        moved = torch.clamp(n - gamma * direction, low, high)
        n, before = torch.where(region & (((x - n) * (x - moved)).sum(0) >= 0), moved, x), g
    return n.permute(1, 2, 0).cpu().numpy()


@eqx.filter_jit
def draw(settings, coarse, problem, n0, n):
    """Returns the mask of a solution."""
    return settings.decision(settings.solver, Evidence(problem, n0, n, coarse.excess, coarse.threshold)) > 0.5


def main() -> None:
    """Runs both forms image by image, and prints the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--methods", nargs="+", choices=["patchcore", "padim"], default=["patchcore", "padim"])
    parser.add_argument("--images", type=int, default=2, help="number of images of each folder")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--device", default="cpu", help="device of PyTorch; JAX takes the fastest it finds")
    arguments = parser.parse_args()
    print(
        f"JAX {jax.__version__} on {jax.default_backend()}, PyTorch {torch.__version__}, "
        f"PyTorch on {arguments.device}, {torch.get_num_threads()} threads, {platform.machine()}; {arguments.steps} steps"
    )
    torch.set_default_device(arguments.device)
    network = ResNet18(arguments.weights)
    backbone = load_backbone("resnet18", layers=LAYERS, weights=arguments.weights)
    settings = Settings(max_steps=arguments.steps, restore_steps=0).traced()
    ways = {
        "all steps": dataclasses.replace(settings, solver=settings.solver.without_stopping()),
        "until settled": settings,
    }
    for method in arguments.methods:
        rows: dict[str, list] = {way: [] for way in (*ways, EAGER)}
        for folder in arguments.folders:
            train, defects = cut_paste(folder, arguments.images)
            detector = f2pad_jax.fit(DETECTORS[method], train, backbone, size=(224, 224))
            images = [defect.image for defect in defects]  # as many lanes on a GPU, no more
            list(f2pad_jax.refine_many(detector, images, settings=settings))  # compiles
            for way, own in ways.items():
                began = time.perf_counter()
                results = list(f2pad_jax.refine_many(detector, images, settings=own))
                seconds = (time.perf_counter() - began) / len(defects)
                for result, (_, truth) in zip(results, defects, strict=True):
                    rows[way].append((iou(result.mask, truth), seconds, int(result.steps)))
            for image, truth in defects:
                problem, n0 = pose(detector, jnp.asarray(image), settings=settings)
                coarse = look(detector, to_unit(image), settings)
                began = time.perf_counter()
                n = solve(network, problem, n0, arguments.steps)
                eager = time.perf_counter() - began
                mask = np.asarray(draw(settings, coarse, problem, n0, jnp.asarray(n)))
                rows[EAGER].append((iou(mask, truth), eager, arguments.steps))
                found = ", ".join(f"{way} {own[len(rows[EAGER]) - 1][0]:.3f}" for way, own in rows.items())
                print(f"  {method} {folder.name}: IoU {found}; {eager:.1f} s", flush=True)
            jax.clear_caches()
        slow = np.mean([seconds for _, seconds, _ in rows[EAGER]])
        for way, own in rows.items():
            quality, seconds, steps = np.mean(own, axis=0)
            print(
                f"{method}, {way}: {len(own)} images, {1 / seconds:.3f} images/s, {slow / seconds:.1f} times, "
                f"IoU {quality:.3f}, {steps:.0f} steps",
                flush=True,
            )


if __name__ == "__main__":
    main()
