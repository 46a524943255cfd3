"""The pixel prior: a mixture of Gaussians over normal pixel values (paper, Eq. 9-10)."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from threadpoolctl import threadpool_limits

_GAIN = 1e-4
"""Gain of the variational bound below which the fit ends, nats a pixel. Smaller gains do not help held-out pixels."""


class PixelPrior(eqx.Module):
    """Mixture of Gaussians without its weights, as in the paper: rare normal colours count like frequent colours."""

    means: Float[Array, "q 3"]
    """Means of the components, normalised intensity."""
    whitening: Float[Array, "q 3 3"]
    """Transposed Cholesky factors of the precisions: ``whitening[q] @ (value - means[q])`` has unit covariance."""

    @property
    def num_components(self) -> int:
        """Number of distinct components."""
        return len(np.unique(np.asarray(self.means), axis=0))

    def __call__(self, image: Float[Array, "*b 3"]) -> Float[Array, "*b"]:
        """Returns the squared Mahalanobis distance of each pixel to its closest component, the summand of Eq. (10)."""
        # the index of the closest component has no gradient; one plane per channel is faster than channels last
        planes = jnp.moveaxis(jax.lax.stop_gradient(image), -1, 0)

        def distance(whitening: Float[Array, "3 3"], mean: Float[Array, "3"]) -> Float[Array, "*b"]:
            r, g, b = (planes[i] - mean[i] for i in range(3))
            x, y, z = (row[0] * r + row[1] * g + row[2] * b for row in whitening)
            return x**2 + y**2 + z**2

        distances = [distance(w, m) for w, m in zip(self.whitening, self.means, strict=True)]
        closest = jnp.argmin(jnp.stack(distances), axis=0)
        white = jnp.einsum("...ij,...j->...i", self.whitening[closest], image - self.means[closest])
        return jnp.sum(white**2, axis=-1)


def fit_prior(
    pixels: Float[np.ndarray, "n 3"], *, num_components: int = 6, floor: float = 0.05, seed: int = 0
) -> PixelPrior:
    """Fits the mixture to normal pixels by variational Bayes (Attias 1999), as in the paper.

    Args:
        pixels: sampled values, normalised intensity.
        num_components: largest number of Gaussians. Components that the fit leaves empty are replaced by copies of others:
            the minimum over components is unchanged, and all priors share compiled programs.
        floor: standard deviation whose square is added to the variances of every component, normalised intensity. It
            bounds the precision for grey images, whose channels are equal.
        seed: seed of the initial k-means.
    """
    from sklearn.exceptions import ConvergenceWarning  # takes most of a second to import, and is needed by a fit alone
    from sklearn.mixture import BayesianGaussianMixture

    mixture = BayesianGaussianMixture(
        n_components=min(num_components, len(pixels)),
        reg_covar=floor**2,
        random_state=seed,
        max_iter=500,
        tol=_GAIN * len(pixels),  # the bound is a sum over all pixels
    )
    # a second BLAS thread does not help small matrices; a missed tolerance does no harm, since the means settle long before
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(np.asarray(pixels, np.float64))
    kept = np.resize(np.flatnonzero(mixture.weights_ >= 1e-3), num_components)
    whitening = np.swapaxes(mixture.precisions_cholesky_[kept], 1, 2)
    return PixelPrior(jnp.asarray(mixture.means_[kept], jnp.float32), jnp.asarray(whitening, jnp.float32))
