"""Refined batches of anomalib: its predictions go in, and come out with pixel-accurate masks."""

import collections
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.errors import OptionError
from f2pad_jax.images._views import scaled
from f2pad_jax.inpainting.base import Inpainter
from f2pad_jax.method.algorithm import Refined
from f2pad_jax.method.settings import Settings
from f2pad_jax.refinement import refine_many

Batch = Any
"""``ImageBatch`` of anomalib 2.x, or any object with its fields and its ``update``; of PyTorch tensors or NumPy arrays."""


def refine_batches(
    detector: AbstractDetector,
    batches: Iterable[Batch],
    *,
    settings: Settings | None = None,
    inpaint: Inpainter | str = "exemplar",
    lanes: int | None = None,
) -> Iterator[tuple[Batch, list[Refined]]]:
    """Refines batches that any model of anomalib has predicted, as ``Engine.predict`` returns them. It needs no anomalib.

    The model says where an anomaly is; ``detector`` supplies the features that judge the restored image. If the detector
    was fitted with ``coarse_maps`` of the model, scores and labels are this library's, at the false-alarm rate of the
    settings. Otherwise they stay the model's, and images that the model calls good are not refined.

    Images are read from their paths, at their own resolution.

    Args:
        detector: detector fitted with ``features_only=True``, or with the model's ``coarse_maps`` of normal images.
        batches: predictions with ``image_path`` and ``anomaly_map``, as few in memory as can be.
        settings: constants of the method.
        inpaint: inpainter of the first guess, as for :func:`~f2pad_jax.refine`.
        lanes: number of parts solved side by side, as for :func:`~f2pad_jax.refine_many`.

    Yields:
        A copy of each batch, and the result of each of its images at the image's own resolution. In the copy,
        ``anomaly_map`` is the probability at the size of the model's map, and ``pred_mask`` where it exceeds 0.5.
        ``pred_score`` and ``pred_label`` are the score and the verdict.

    Raises:
        OptionError: a batch has no paths or no maps.
        ImageError: an image can't be read, or a map is not finite.
    """
    given = detector.calibrated.maps == "given"
    waiting: collections.deque[Batch] = collections.deque()

    def predictions() -> Iterator[tuple[Path, Float[np.ndarray, "h w"]]]:
        for batch in batches:
            if batch.image_path is None or batch.anomaly_map is None:
                raise OptionError("a batch has no image_path or no anomaly_map; take batches of Engine.predict")
            maps, labels = _maps(batch), batch.pred_label
            waiting.append(batch)
            for number, path in enumerate(batch.image_path):
                good = not given and labels is not None and not bool(labels[number])
                # a constant map says that the image is good
                yield Path(path), np.zeros_like(maps[number]) if good else maps[number]

    paths, maps = itertools.tee(predictions())
    found: list[Refined] = []
    options = {"settings": settings, "inpaint": inpaint, "lanes": lanes}
    for result in refine_many(detector, (path for path, _ in paths), coarse_map=(m for _, m in maps), **options):
        found.append(result)
        if len(found) == len(waiting[0].image_path):
            yield _refined(waiting.popleft(), found, given), found
            found = []


def _maps(batch: Batch) -> Float[np.ndarray, "n h w"]:
    """Returns the anomaly maps of a batch as one array."""
    maps = batch.anomaly_map
    maps = np.asarray(maps.detach().cpu() if hasattr(maps, "detach") else maps, np.float32)
    return maps.reshape(-1, *maps.shape[-2:])


def _refined(batch: Batch, results: list[Refined], verdicts: bool) -> Batch:
    """Returns a copy of a batch with the results of its images; with their scores and labels too if ``verdicts`` is set."""
    size = _maps(batch).shape[1:]
    probability = np.stack([_shrunk(jnp.asarray(result.probability), size) for result in results])
    changes = {"anomaly_map": probability, "pred_mask": probability > 0.5}
    if verdicts:
        changes["pred_score"] = np.array([result.score for result in results], np.float32)
        changes["pred_label"] = np.array([result.defective for result in results])
    alike = getattr(batch.anomaly_map, "new_tensor", np.asarray)
    return batch.update(in_place=False, **{name: alike(values) for name, values in changes.items()})


@jax.jit(static_argnums=1)
def _shrunk(values: Float[Array, "h w"], size: tuple[int, int]) -> Float[Array, "_h _w"]:
    return scaled(values, size)
