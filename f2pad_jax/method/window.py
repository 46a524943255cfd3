"""One part of an image: its window, its first guess and its problem (lines 1-2 of Algorithm 1)."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.errors import ImageError
from f2pad_jax.images._views import Box, View, scaled, scaled_mask, size_of, view_of
from f2pad_jax.images.pixels import normalise, to_unit
from f2pad_jax.inpainting._choice import choose
from f2pad_jax.inpainting.base import Inpainter
from f2pad_jax.inpainting.laplace import harmonic
from f2pad_jax.method._tiling import window_offset
from f2pad_jax.method.coarse import Coarse, look
from f2pad_jax.method.settings import Settings
from f2pad_jax.objective.problem import Problem, paper_weight, sparsity_weight


class Posed(NamedTuple):
    """Problem of one window, and the first guess from which a solver starts."""

    problem: Problem
    n0: Float[Array, "h w 3"]
    """First guess, normalised intensity; x outside the region."""


class Window(eqx.Module):
    """Part of the suspect region and its surroundings, at the network's and at the image's own resolution."""

    box: Box
    """Rectangle that the network sees, in the image at the detector's size."""
    crop: Box
    """Rectangle whose pixels are optimised, in the full-resolution image."""
    view: View
    """Map from the pixels of the crop to the pixels of the box."""
    source: Float[Array, "h w 3"]
    """Input of the inpainter: the image at the detector's size with all other parts filled in, normalised intensity."""
    image: Float[Array, "H W 3"]
    """Full-resolution image, normalised intensity."""
    m0: Bool[Array, "_h _w"]
    """Coarse mask of this part, inside the crop."""
    region: Bool[Array, "_h _w"]
    """Suspect region of this part, inside the crop."""
    excess: Float[Array, "_h _w"]
    """Excess of the coarse map (:class:`Coarse`), inside the crop."""
    threshold: Float[Array, ""]
    """Threshold of the detector, on the scale of ``excess``."""

    @staticmethod
    def around(
        detector: AbstractDetector,
        image: Float[Array, "H W 3"],
        coarse: Coarse,
        part: Bool[Array, "h w"],
        size: tuple[int, int] | None = None,
        crop_size: tuple[int, int] | None = None,
    ) -> "Window":
        """Returns the window around a part of the suspect region.

        Args:
            detector: detector whose stride the window is aligned to.
            image: full-resolution image in 0..1.
            coarse: result of the coarse stage.
            part: part of the suspect region, at the detector's size.
            size: height and width of the window at the detector's size; None: the whole image.
            crop_size: height and width of the crop of the full-resolution image; None: the whole image.
        """
        whole, full, x = size_of(coarse.mask), size_of(image), normalise(image)
        size, crop_size = size or whole, crop_size or full
        m0, region = (scaled_mask(mask, full) for mask in (coarse.mask & part, part))
        box = Box(window_offset(part, size, detector.stride), size)
        crop = box if whole == full else Box(window_offset(region, crop_size, 1), crop_size)
        view = view_of(box, crop, coarse.x, x)
        source = harmonic(coarse.x, coarse.region & ~part)
        m0, region, excess = (crop.cut(values) for values in (m0, region, scaled(coarse.excess, full)))
        return Window(box, crop, view, source, x, m0, region, excess, coarse.threshold)

    def pose(
        self,
        detector: AbstractDetector,
        region: Bool[Array, "_h _w"],
        settings: Settings,
        inpaint: Inpainter,
        sparse: float | Float[Array, ""] = 1.0,
    ) -> Posed:
        """Fills ``region`` with the first guess, and poses Eq. (12) for its pixels, with β times ``sparse``."""
        s, empty = settings.adapted(detector), jnp.zeros(size_of(self.source), bool)
        hidden = self.box.paste(self.view.touched(region), empty)
        x = self.crop.cut(self.image)
        guess = scaled(inpaint(self.source, hidden), size_of(self.image))
        n0 = jnp.where(region[..., None], self.crop.cut(guess), x)
        problem = Problem.make(
            detector,
            x,
            region,
            detector.locate(self.view(n0), self.box.corner),
            alpha1=s.alpha1,
            alpha2=s.alpha2,
            penalty=s.penalty,
            reach=s.reach,
            view=self.view,
        )
        beta = sparsity_weight(problem, n0, s.sparsity) if s.beta0 is None else paper_weight(s.beta0, self.m0)
        return Posed(problem.with_beta(sparse * beta), n0)


def pose(
    detector: AbstractDetector,
    image: Shaped[Array | np.ndarray, "..."],
    *,
    settings: Settings | None = None,
    inpaint: Inpainter | str = "exemplar",
) -> Posed:
    """Poses Eq. (12) for an image: coarse stage, first guess and weights, up to line 2 of Algorithm 1.

    ``solve(settings.solver, *pose(detector, image))`` then minimises it. The whole image is the window.

    Args:
        detector: fitted detector.
        image: ``(h, w)`` or ``(h, w, 3)``, as :func:`f2pad_jax.refine` takes it.
        settings: constants of the method.
        inpaint: inpainter of the first guess, as for ``refine``.

    Returns:
        The problem and the first guess n0, at the image's own resolution.

    Raises:
        ImageError: the image has a wrong shape, dtype or range, or several images are given.
        CheckpointError: the inpainter is unknown, or its weights are missing or damaged.
    """
    unit, settings = to_unit(image), (settings or Settings()).traced()
    if unit.ndim != 3:
        raise ImageError(f"a problem is posed for one image; got an array of shape {unit.shape}")
    coarse = look(detector, unit, settings)
    window = Window.around(detector, unit, coarse, coarse.region)
    return window.pose(detector, window.region, settings, choose(inpaint, detector.calibrated.normals))
