"""Compiling ahead: all programs that images of one size need, before the first image comes."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from f2pad_jax._backend import on_cpu
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.images._views import size_of
from f2pad_jax.images.pixels import to_unit
from f2pad_jax.inpainting.base import Inpainter
from f2pad_jax.method import _tiling as tiling
from f2pad_jax.method.settings import Settings
from f2pad_jax.progress import Progress, silent
from f2pad_jax.refinement import refine_many
from f2pad_jax.streaming import _programs as programs

Shape = tuple[tuple[int, int], tuple[int, int]]
"""Height and width of a window at the detector's size, and of its crop of the image."""


def warm_up(
    detector: AbstractDetector,
    image: Shaped[Array | np.ndarray, "..."],
    *,
    settings: Settings | None = None,
    inpaint: Inpainter | str = "exemplar",
    windows: bool | None = None,
    lanes: int | None = None,
    progress: Progress = silent,
) -> int:
    """Compiles the programs of :func:`~f2pad_jax.refine_many` for images of one size; returns the number of windows.

    JAX keeps the programs on disk, and a later process loads them. The programs solve the image for one step, once in each
    window that a defect may need. On a CPU all cores compile, each for another window.

    Args:
        detector: fitted detector.
        image: any image of this size and type, as :func:`~f2pad_jax.refine` takes it.
        settings: constants of the method. Only the fields marked "static" and the classes of its parts matter.
        inpaint: inpainter of the first guess, as for ``refine_many``.
        windows: as for ``refine_many``.
        lanes: as for ``refine_many``.
        progress: function that receives stage, number of windows done and total.

    Raises:
        ImageError: the image has a wrong shape, dtype or range.
        CheckpointError: the inpainter is unknown, or its weights are missing or damaged.
        OptionError: an argument is of another type, or ``lanes`` is less than 1.
    """
    constants = dataclasses.replace(settings or Settings(), max_steps=1, restore_steps=1)
    use_windows = on_cpu() if windows is None else windows
    found = _shapes(detector, size_of(to_unit(image)), constants, use_windows)
    options = {"settings": constants, "inpaint": inpaint, "windows": use_windows, "lanes": lanes}

    def solve(mask: Bool[np.ndarray, "h w"] | None) -> None:
        given = {} if mask is None else {"coarse_mask": iter([mask])}
        for _ in refine_many(detector, iter([image]), **given, **options):
            pass

    jobs: list[Callable[[], None]] = [partial(solve, mask) for mask in found.values()]
    if detector.calibrated.maps == "own":
        jobs.append(partial(solve, None))
    jax.block_until_ready(jnp.zeros(()))  # the backend starts in one thread
    with ThreadPoolExecutor(programs.cores() if on_cpu() else 1) as pool:
        progress("compiling", 0, len(jobs))
        for done, job in enumerate(as_completed([pool.submit(job) for job in jobs]), 1):
            job.result()
            progress("compiling", done, len(jobs))
    return len(found)


def _shapes(
    detector: AbstractDetector, full: tuple[int, int], settings: Settings, windows: bool
) -> dict[Shape, Bool[np.ndarray, "h w"]]:
    """Returns a coarse mask for each shape of window and crop that a defect may need."""
    height, width = detector.size
    sizes = tiling.WINDOWS if windows and detector.local else ()
    masks: dict[Shape, Bool[np.ndarray, "h w"]] = {}
    margin, grown = settings.margin, settings.dilation  # the suspect region is the mask, grown
    middles = [(height // 2 - side // 2, width // 2 - side // 2, side) for side in range(1, max(height, width))]
    for top, left, side in [(0, 0, side) for side in range(1, max(height, width) - grown - 1)] + middles:
        mask = _square(detector.size, top, left, side)
        region = _square(detector.size, top - grown, left - grown, side + 2 * grown)
        if region.all():
            continue
        size = detector.size if margin is None else tiling.window_size(region, margin, detector.stride, sizes)
        crop = tiling.crop_size(region, size, full, margin if windows else None)
        masks.setdefault((size, crop), mask)
    return masks


def _square(size: tuple[int, int], top: int, left: int, side: int) -> Bool[np.ndarray, "h w"]:
    """Returns a square of an image, as far as it lies inside."""
    mask = np.zeros(size, bool)
    mask[max(top, 0) : top + side, max(left, 0) : left + side] = True
    return mask
