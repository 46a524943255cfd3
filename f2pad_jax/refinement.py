"""``refine`` and ``refine_many``: from coarse maps to pixel-accurate masks by Algorithm 1 of the paper."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Num, Shaped

from f2pad_jax._backend import on_cpu
from f2pad_jax.data.mvtec import read_mask
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.errors import F2padError, ImageError, OptionError
from f2pad_jax.images.files import read_image, read_map
from f2pad_jax.images.pixels import to_unit
from f2pad_jax.inpainting._choice import choose
from f2pad_jax.inpainting.base import Inpainter
from f2pad_jax.method.algorithm import Refined, decompose
from f2pad_jax.method.coarse import Given
from f2pad_jax.method.settings import Settings
from f2pad_jax.streaming import _programs as programs
from f2pad_jax.streaming._buckets import Device
from f2pad_jax.streaming._programs import Calls, Setup
from f2pad_jax.streaming._stream import stream

MAX_LANES = 64
"""Largest number of lanes in a bucket, unless ``lanes`` is given. A lane solves one part of an image at a time."""
LANES = 16
"""Number of images that ``refine`` solves side by side on an accelerator, unless ``lanes`` is given."""
_NO_MORE = object()
AHEAD = 4
"""Number of images in memory per lane. Buckets then stay full while a finished result waits for the earlier ones."""


def refine(
    detector: AbstractDetector,
    images: Shaped[Array | np.ndarray, "..."] | Sequence,
    *,
    settings: Settings | None = None,
    inpaint: Inpainter | str = "exemplar",
    ignore: Bool[Array | np.ndarray, "*b h w"] | None = None,
    coarse_map: Num[Array | np.ndarray, "*b _h _w"] | None = None,
    coarse_mask: Bool[Array | np.ndarray, "*b _H _W"] | None = None,
    windows: bool = False,
    lanes: int | None = None,
) -> Refined:
    """Segments anomalies to the pixel and restores the images without them.

    The function is pure: called eagerly, it runs the program that ``jax.jit`` would compile from it. It can be compiled and
    vectorised, but has no derivative. The result of an image
    never depends on the other images of its batch. The network sees the resized image, but the normal image n and the mask
    have the original resolution. :func:`refine_many` solves many images on all cores and devices.

    Args:
        detector: fitted detector.
        images: ``(h, w)``, ``(h, w, 3)`` or ``(n, h, w, 3)``; uint8, uint16 or float in 0..1; any size.
        settings: constants of the method.
        inpaint: inpainter of the first guess n0: ``"exemplar"``, ``"mae"`` (the paper's), ``"harmonic"``, or any callable
            of a normalised image and a region.
        ignore: pixels that do not count, one mask for all images or one for each. The pixels that the detector ignores do
            not count either.
        coarse_map: anomaly map of each image from elsewhere, of any size, higher where an anomaly is likelier. Its scale is
            the scale of the fit's ``coarse_maps``, or any scale without them. It takes the place of the detector's map.
            The detector then only supplies the features that judge n. See
            :class:`~f2pad_jax.method.Given` for its levels.
        coarse_mask: pixels of each image where an anomaly is suspected: a mask of any size, a box, points or a scribble. It
            is suspect as a whole; inside it, the detector's map weighs the pixels. An image without such a pixel is good.
        windows: whether each separate part of the suspect region is solved in the smallest window that holds it. Otherwise
            the region is solved in the whole image. Windows are several times faster on a CPU. They depend on the data,
            and a transform such as ``jit`` refuses them. A network whose every feature depends on the whole image is always
            shown the whole image.
        lanes: number of images solved side by side, or of parts with ``windows``; default: 1 on a CPU, 16 elsewhere. The
            default with ``windows`` is 1 on each core of a CPU, elsewhere as many as the memory holds, at most 64.

    Raises:
        ImageError: the images have a wrong shape, dtype or range, or a coarse map is not finite.
        CheckpointError: the inpainter is unknown, or its weights are missing or damaged.
        OptionError: an argument is of another type, or ``lanes`` is less than 1. Or a derivative is asked for, or
            ``windows`` inside a transform. Or there are both a coarse map and a coarse mask, or neither for a detector
            that was fitted without maps of its own.
    """
    _check(detector, settings, lanes)
    constants, unit = _undifferentiable(((settings or Settings()).traced(), to_unit(images)))
    if not windows:
        inpainter = choose(inpaint, detector.calibrated.normals)
        masks = None if ignore is None else jnp.broadcast_to(jnp.asarray(ignore, bool), unit.shape[:-1])
        given = Given.of(coarse_map, coarse_mask)
        if given is not None and given.values.shape[:-2] != unit.shape[:-3]:
            raise ImageError(f"coarse maps of shape {given.values.shape} for images of shape {unit.shape}")
        lanes = lanes or (1 if on_cpu() else LANES)
        return _whole_images(detector, unit, masks, given, constants, inpainter, lanes)
    inputs = detector, unit, constants, inpaint, ignore, coarse_map, coarse_mask
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(inputs)):
        raise OptionError("windows depend on the data, and a transform such as jit fixes all shapes; use windows=False")
    batch = unit if unit.ndim == 4 else unit[None]
    options = {"settings": constants, "inpaint": inpaint, "windows": True, "lanes": lanes, "devices": ()}
    given = {"coarse_map": coarse_map, "coarse_mask": coarse_mask}
    given = {name: v if v is None or unit.ndim == 4 else v[None] for name, v in given.items()}
    found = refine_many(detector, batch, ignore=ignore, **given, **options)
    results = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    return results if unit.ndim == 4 else jax.tree.map(lambda leaf: leaf[0], results)


@eqx.filter_jit
def _whole_images(
    detector: AbstractDetector,
    unit: Float[Array, "*b h w 3"],
    ignore: Bool[Array, "*b h w"] | None,
    given: Given | None,
    settings: Settings,
    inpaint: Inpainter,
    lanes: int,
) -> Refined:
    # inside a caller's jit the settings are often constants: without the barrier XLA folds them, and rounding changes
    settings = jax.lax.optimization_barrier(settings)

    def one(inputs: tuple[Float[Array, "h w 3"], Bool[Array, "h w"] | None, Given | None]) -> Refined:
        image, ignored, given = inputs
        return decompose(detector, image, settings, inpaint, ignored, given)

    if unit.ndim == 3:
        return one((unit, ignore, given))
    # a vmap over one lane would round differently from the image alone
    return jax.lax.map(one, (unit, ignore, given), batch_size=lanes if lanes > 1 else None)


def refine_many(
    detector: AbstractDetector,
    source: Iterable[Shaped[Array | np.ndarray, "..."] | str | Path],
    *,
    settings: Settings | None = None,
    inpaint: Inpainter | str = "exemplar",
    ignore: Bool[Array | np.ndarray, "h w"] | Iterable[Bool[Array | np.ndarray, "h w"] | str | Path | None] | None = None,
    coarse_map: Iterable[Num[Array | np.ndarray, "..."] | str | Path] | None = None,
    coarse_mask: Iterable[Bool[Array | np.ndarray, "..."] | str | Path] | None = None,
    windows: bool | None = None,
    lanes: int | None = None,
    devices: Sequence[Any] | None = None,
    budget: float | int | None = None,
    on_error: Callable[[int, F2padError], None] | None = None,
) -> Iterator[Refined]:
    """Refines any number of images, on all devices, in bounded memory.

    Yields the results of :func:`refine` in the order of ``source``. A result is yielded as soon as it and all earlier
    results are done. Images are read, and results sent, while other images are solved.

    Args:
        detector: fitted detector.
        source: images as ``refine`` takes them, one at a time and of any sizes, or paths of image files.
        settings: constants of the method.
        inpaint: inpainter of the first guess, as for ``refine``.
        ignore: pixels that do not count: one mask for all images, or for each image in turn a mask or its file.
        coarse_map: coarse map of each image in turn, as for ``refine``, or its file.
        coarse_mask: coarse mask of each image in turn, as for ``refine``, or its file.
        windows: as for ``refine``; default: True on a CPU, False elsewhere.
        lanes: number of parts solved side by side on each device; on each core, if a CPU is the only device. Default: 1 on
            a CPU, elsewhere as many as the memory holds, at most 64.
        devices: devices to run on; default: all devices of this process (``jax.local_devices()``).
        budget: time that the solver may take for an image, seconds; divided among the image's parts. It stops at the next
            check (``Settings.steps_per_check``), with the outcome ``TIME_LIMIT``. The verdict, the first guess and the
            drawing of the mask take further time, and compiling does not count. Default: no limit.
        on_error: function that receives the number of an image that can't be used, and its error. The image then has no
            result, and the others go on. Default: the error is raised.

    Yields:
        A :class:`Refined` of NumPy arrays for each image.

    Raises:
        ImageError: an image has a wrong shape, dtype or range, or can't be read; the results before it have been yielded.
        CheckpointError: the inpainter is unknown, or its weights are missing or damaged.
        OptionError: ``lanes`` is less than 1, or ``budget`` is not positive; or there are not as
            many masks or maps as images; or as for ``refine``.
    """
    _check(detector, settings, lanes)
    if budget is not None and not budget > 0:
        raise OptionError(f"budget={budget}: must be above 0")
    if isinstance(source, (str, Path)) or (isinstance(source, (np.ndarray, jax.Array)) and not _is_batch(source)):
        raise ImageError("refine_many takes several images: a list of arrays or paths, or an array (n, h, w, 3)")
    inpainter = choose(inpaint, detector.calibrated.normals)
    if devices is None:  # () is the default device, as in ``refine``: both then share their programs
        devices = jax.local_devices() if jax.local_device_count() > 1 else ()
    count = max(len(source), 1) if isinstance(source, Sized) else MAX_LANES
    max_lanes = min(MAX_LANES, 1 << (count - 1).bit_length())  # powers of two only, for few programs
    with jax.default_device(devices[0] if devices else jax.config.values["jax_default_device"]):
        use_windows = on_cpu() if windows is None else windows
        one_lane = programs.memory() == 0  # on a CPU
        num_threads = min(programs.cores(), count) if on_cpu() else 1

    def worker(device: Any, calls: Calls) -> Device:
        constants = (settings or Settings()).traced()
        return Device(device, Setup(detector, constants, inpainter, use_windows, lanes, max_lanes, calls, budget))

    if devices:
        workers = [functools.partial(worker, device, Calls()) for device in devices]
    else:  # one device: its threads share programs
        workers = [functools.partial(worker, jax.config.values["jax_default_device"], Calls())] * num_threads
    lanes_each = lanes or (1 if one_lane else max_lanes)
    one_mask = ignore is None or (isinstance(ignore, (np.ndarray, jax.Array)) and ignore.ndim == 2)

    def read(item: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Given | None]:
        image, *others = item
        if isinstance(image, (str, Path)):
            image = read_image(image, white=detector.calibrated.white)
        readers = read_mask, read_map, read_mask
        mask, *given = (reader(v) if isinstance(v, (str, Path)) else v for reader, v in zip(readers, others, strict=True))
        if any(values is not None and np.ndim(values) != 2 for values in given):
            raise ImageError("a coarse map or mask of the stream has no shape (h, w); give the map of one image at a time")
        return image, mask, Given.of(*given)

    extras = (itertools.repeat(ignore) if one_mask else ignore), coarse_map, coarse_mask
    results = stream(
        _together(source, *(itertools.repeat(None) if extra is None else extra for extra in extras)),
        workers,
        read=read,
        most_ahead=AHEAD * lanes_each * len(workers),
        one_at_a_time=lanes_each == 1,  # a busy core with one lane leaves the next image to another core
    )
    with contextlib.closing(results):
        for number, result in enumerate(results):
            if not isinstance(result, F2padError):
                yield result
            elif on_error is None:
                raise result
            else:
                on_error(number, result)


def _together(source: Iterable[Any], *extras: Any) -> Iterator[tuple[Any, ...]]:
    """Yields each image with its masks and maps. An endless ``itertools.repeat`` may go on after the last image."""
    endless = [isinstance(extra, itertools.repeat) for extra in extras]
    for item, *values in itertools.zip_longest(source, *extras, fillvalue=_NO_MORE):
        if item is _NO_MORE and all(end or value is _NO_MORE for end, value in zip(endless, values, strict=True)):
            return
        if any(value is _NO_MORE for value in (item, *values)):
            raise OptionError("there are not as many masks or maps as images")
        yield item, *values


def _is_batch(images: np.ndarray | jax.Array) -> bool:
    """Returns whether an array holds several images, not one."""
    return images.ndim == 4 or (images.ndim == 3 and images.shape[-1] not in (1, 3))


def _check(detector: Any, settings: Any, lanes: int | None) -> None:
    """Refuses arguments of wrong types, before other code fails on them.

    Raises:
        OptionError: an argument is of another type, or ``lanes`` is less than 1.
    """
    if not isinstance(detector, AbstractDetector):
        raise OptionError(f"the first argument is a {type(detector).__name__}; it must be a fitted detector")
    if not isinstance(settings, Settings | None):
        raise OptionError(f"settings is a {type(settings).__name__}; it must be a Settings, such as Settings(sparsity=2.0)")
    if lanes is not None and lanes < 1:
        raise OptionError(f"lanes={lanes}: at least 1 is needed")


@jax.custom_jvp
def _undifferentiable(tree: Any) -> Any:
    """Returns its argument; its derivative is an error at once, not after minutes of compiling."""
    return tree


@_undifferentiable.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise OptionError(
        "refine has no derivative: its mask is a decision, and its loop ends by a rule; differentiate the detector's "
        "anomaly_map, or the objective of f2pad_jax.method.pose"
    )
