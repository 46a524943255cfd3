"""``refine`` and ``refine_many``: from coarse maps to pixel-accurate masks, Algorithm 1 of the paper."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Shaped

from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.errors import OptionError
from f2pad_jax.inpaint import Inpainter, choose
from f2pad_jax.lanes import stream
from f2pad_jax.settings import Settings
from f2pad_jax.solvers import Outcome
from f2pad_jax.units import to_unit
from f2pad_jax.window import Refined, compose, look, solve_window, untouched


def refine(
    detector: AbstractDetector,
    images: Shaped[Array | np.ndarray, "..."] | Sequence,
    *,
    settings: Settings | None = None,
    inpaint: Inpainter | str | None = None,
    lanes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Refined:
    """Segment anomalies to the pixel, and restore the image without them.

    Pure and traceable: inside ``jax.jit`` (or any transform) the whole image is solved for. Called on concrete arrays on a
    CPU, each separate part of an image's suspect region is solved in the smallest window of
    :data:`f2pad_jax.region.WINDOWS` that holds it, which is several times faster, unless the network sees the whole image
    at every position; one program is compiled per window and image size, and kept. An image's result never depends on the
    others of its batch. The network sees the image resized, but n, and so the mask, has the image's own resolution.

    Args:
        detector: a fitted detector.
        images: ``(h, w)``, ``(h, w, 3)`` or ``(n, h, w, 3)``; uint8, uint16 or float in 0..1; any size.
        settings: constants of the method.
        inpaint: what makes the first guess n0: ``"mae"`` (the paper's), ``"exemplar"``, ``"harmonic"`` or any callable of
            (normalised image, region), a pytree or a function. Default: ``"mae"`` where a masked autoencoder's weights are
            installed and this is no trace, else ``"exemplar"``; the result says which.
        lanes: parts of images solved side by side; default: 1 on each core of a CPU, where more are worked at one after
            another, elsewhere as many as the device has memory for, 64 at most (inside a transform 1 and 16).
        progress: called on the host as (done, total).

    Raises:
        ImageError: the images have a wrong shape, dtype or range.
        CheckpointError: the inpainter is unknown, or its weights are missing or damaged.
        OptionError: ``lanes`` is less than 1.
    """
    _check(lanes)
    # arrays, not numbers, so that another value is no other program
    constants: Settings = jax.tree.map(jnp.asarray, settings or Settings())
    unit = to_unit(images)
    batch = unit if unit.ndim == 4 else unit[None]
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((detector, batch, constants, inpaint)))
    name, inpainter = choose(inpaint, detector.calibrated.normals, traced=traced)
    if traced:

        def whole(image):
            coarse = look(detector, image, constants)
            nothing = untouched(image, coarse)
            covered = nothing.outcome == Outcome.COVERS_IMAGE
            solved = solve_window(detector, image, coarse, coarse.region & ~covered, constants, inpainter)
            return compose(image, coarse, jax.tree.map(lambda a, b: jnp.where(covered, a, b), nothing, solved))

        default = 1 if jax.default_backend() == "cpu" else 16
        results = jax.lax.map(whole, batch, batch_size=lanes or default)
    else:
        several = []
        progress(0, len(batch))
        for result in stream(detector, batch, constants, inpainter, lanes):
            several.append(result)
            progress(len(several), len(batch))
        results = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    results = dataclasses.replace(results, inpainter=name)
    return results if unit.ndim == 4 else jax.tree.map(lambda leaf: leaf[0], results)


def refine_many(
    detector: AbstractDetector,
    source: Iterable[Shaped[Array | np.ndarray, "..."] | str | Path],
    *,
    settings: Settings | None = None,
    inpaint: Inpainter | str | None = None,
    lanes: int | None = None,
    devices: Sequence[Any] | None = None,
) -> Iterator[Refined]:
    """Refine any number of images, on all devices, in bounded memory.

    The results of :func:`refine` (on an accelerator: with as many lanes), in the order of ``source``, each as soon as it
    and those before it are there. Images are read, and results sent, while others are solved for.

    Args:
        detector: a fitted detector.
        source: images as ``refine`` takes them, one at a time and of any sizes, or paths of image files.
        settings: as for ``refine``.
        inpaint: as for ``refine``.
        lanes: as for ``refine``, on each device, and on each core of a CPU that is the only one.
        devices: a bucket of lanes runs on each; default: all of this process (``jax.local_devices()``).

    Yields:
        A :class:`Refined` of NumPy arrays for each image.

    Raises:
        ImageError: an image has a wrong shape, dtype or range, or can't be read; those before it have been yielded.
        CheckpointError: the inpainter is unknown, or its weights are missing or damaged.
        OptionError: ``lanes`` is less than 1.
    """
    _check(lanes)
    constants: Settings = jax.tree.map(jnp.asarray, settings or Settings())
    name, inpainter = choose(inpaint, detector.calibrated.normals, traced=False)
    if devices is None:  # one alone is the default: :func:`refine` compiles for the same
        devices = jax.local_devices() if jax.local_device_count() > 1 else ()
    for result in stream(detector, source, constants, inpainter, lanes, devices):
        yield dataclasses.replace(result, inpainter=name)


def _check(lanes: int | None) -> None:
    if lanes is not None and lanes < 1:
        raise OptionError(f"lanes={lanes}: at least 1 is needed")
