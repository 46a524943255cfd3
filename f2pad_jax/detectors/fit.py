"""Fit a PatchCore on normal images, and calibrate it without a label."""

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from f2pad_jax.backbones import Backbone
from f2pad_jax.data.cutpaste import irregular_shape, paste_flat
from f2pad_jax.detectors.base import coarse_map
from f2pad_jax.detectors.patchcore import PatchCore, coreset, embed, nearest
from f2pad_jax.errors import ImageError
from f2pad_jax.evaluation.metrics import best_threshold
from f2pad_jax.prior import fit_prior
from f2pad_jax.units import normalise, resized, to_unit

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total)."""


def fit_patchcore(
    images: Iterable[Shaped[np.ndarray | Array, "..."]],
    backbone: Backbone,
    *,
    size: tuple[int, int] = (224, 224),
    coreset_ratio: float = 0.1,
    max_bank: int = 4096,
    num_candidates: int = 50,
    num_components: int = 6,
    num_exemplars: int = 16,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> PatchCore:
    """Fit PatchCore on defect-free images.

    The scale of the scores and the threshold of the coarse map need no labels: up to 32 training images are scored against
    the memory bank without their own entries, once as they are and once with a synthetic defect pasted on them; the
    threshold is the one of best pixel F1 over both. Flat patches of a far colour score higher than many real defects, so an
    image that nowhere reaches that level is judged by a lower one: the geometric mean of it and of the highest level of the
    normal images.

    Args:
        images: at least two normal images, each as :func:`~f2pad_jax.units.to_unit` takes them; any sizes.
        backbone: frozen feature extractor.
        size: height and width images are resized to, multiples of the backbone's stride.
        coreset_ratio: share of all features kept in the memory bank.
        max_bank: most features kept.
        num_candidates: |M_ij| of Eq. (5).
        num_components: most Gaussians of the pixel prior.
        num_exemplars: most training images kept for the inpainter to borrow from.
        seed: of the coreset, the prior, the synthetic defects and the images kept.
        progress: told how far it is.

    Raises:
        ImageError: fewer than two images, or one that can't be used.
    """
    if any(side % backbone.stride or side <= 0 for side in size):
        raise ImageError(f"size {size} is not a multiple of the backbone's stride {backbone.stride}")
    unit = [np.asarray(resized(to_unit(image), size)) for image in images]
    if len(unit) < 2:
        raise ImageError(f"fitting needs at least two normal images; got {len(unit)}")

    embed_jit = jax.jit(lambda backbone, image: embed(backbone, normalise(image)))
    maps = [np.asarray(embed_jit(backbone, image)) for image in _counted(unit, "features", progress)]
    shape = maps[0].shape[:2]
    features = np.concatenate([m.reshape(-1, m.shape[-1]) for m in maps])
    progress("coreset", 0, 1)
    chosen = coreset(features, min(int(np.ceil(coreset_ratio * len(features))), max_bank), seed=seed)
    bank, sources = jnp.asarray(features[chosen]), chosen // (shape[0] * shape[1])
    progress("coreset", 1, 1)

    progress("pixel prior", 0, 1)
    rng = np.random.default_rng(seed)
    pixels = np.concatenate([np.asarray(normalise(image)).reshape(-1, 3) for image in unit])
    pixels = pixels[rng.choice(len(pixels), min(20_000, len(pixels)), replace=False)]
    prior = fit_prior(pixels, num_components=num_components, seed=seed)
    progress("pixel prior", 1, 1)

    @jax.jit
    def held_out(features: Float[Array, "h w c"], bank: Float[Array, "m c"], penalty: Float[Array, " m"]):
        distances, _ = nearest(features.reshape(-1, features.shape[-1]), bank, 1, penalty)
        return distances.reshape(shape), coarse_map(distances.reshape(shape), size)

    raw, levels, labels = [], [], []
    for i in _counted(rng.permutation(len(unit))[:32], "threshold", progress):
        others = jnp.where(sources == i, jnp.inf, 0.0)
        if not np.any(sources != i):
            continue
        distances, level = held_out(jnp.asarray(maps[i]), bank, others)
        raw.append(float(jnp.mean(distances)))
        pasted = paste_flat(rng, unit[i], irregular_shape(rng, size))
        _, pasted_level = held_out(embed_jit(backbone, pasted.image), bank, others)
        levels += [level, pasted_level]
        labels += [np.zeros(size, bool), pasted.mask]
    scale = max(float(np.mean(raw)), 1e-6)
    maps, pasted = np.stack(levels) / scale, np.stack(labels)
    threshold = best_threshold(maps, pasted)
    highest = np.max(maps[~pasted.any(axis=(1, 2))])  # of normal images
    kept = [np.rint(255 * unit[i]).astype(np.uint8) for i in sorted(rng.permutation(len(unit))[:num_exemplars])]
    return PatchCore(
        backbone=backbone,
        memory_bank=bank,
        scale=jnp.float32(scale),
        prior=prior,
        threshold=jnp.float32(threshold),
        size=size,
        num_candidates=num_candidates,
        faint_threshold=jnp.float32(np.sqrt(threshold * highest) if highest < threshold else np.inf),
        normals=jnp.asarray(np.stack(kept)) if kept else None,
    )


def _counted(items: Iterable, stage: str, progress: Progress) -> Iterator:
    items = list(items)
    progress(stage, 0, len(items))
    for done, item in enumerate(items, 1):
        yield item
        progress(stage, done, len(items))
