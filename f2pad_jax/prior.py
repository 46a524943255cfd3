"""The pixel prior: a mixture of Gaussians over normal pixel values (paper, Eq. 9-10)."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture
from threadpoolctl import threadpool_limits

_GAIN = 1e-4
"""Natural units a pixel by which a round must raise the bound; held-out pixels gain nothing from the rounds after."""


class PixelPrior(eqx.Module):
    """Means and whitening matrices of the mixture; its weights are dropped, as the paper does, so rare colours count."""

    means: Float[Array, "q 3"]
    whitening: Float[Array, "q 3 3"]
    """``whitening[q] @ (value - means[q])`` has unit covariance: the transposed Cholesky factor of the precision."""

    @property
    def num_components(self) -> int:
        """How many different ones there are."""
        return len(np.unique(np.asarray(self.means), axis=0))

    def __call__(self, image: Float[Array, "*b 3"]) -> Float[Array, "*b"]:
        """Squared Mahalanobis distance to the closest component, per pixel; the summand of Eq. (10)."""
        # which one it is has no gradient, and three planes of pixels are faster than pixels of three
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
    """Fit the mixture to sampled normal pixels by variational Bayes (Attias 1999, the paper's choice).

    Args:
        pixels: values in normalised intensity.
        num_components: at most this many Gaussians; those the variational prior leaves empty are dropped, and others
            repeated in their place, which leaves the minimum as it is: priors of one shape share compiled programs.
        floor: standard deviation added to every component, in normalised intensity. A grey image has no spread between its
            channels; without the floor its precision would be unbounded.
        seed: of the initial k-means.
    """
    mixture = BayesianGaussianMixture(
        n_components=min(num_components, len(pixels)),
        reg_covar=floor**2,
        random_state=seed,
        max_iter=500,
        tol=_GAIN * len(pixels),  # its bound is the sum over all pixels
    )
    # a second BLAS thread only waits, on a busy machine for most of the time
    with threadpool_limits(1), warnings.catch_warnings():  # means and widths are long settled when the bound still creeps
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(np.asarray(pixels, np.float64))
    kept = np.resize(np.flatnonzero(mixture.weights_ >= 1e-3), num_components)
    whitening = np.swapaxes(mixture.precisions_cholesky_[kept], 1, 2)
    return PixelPrior(jnp.asarray(mixture.means_[kept], jnp.float32), jnp.asarray(whitening, jnp.float32))
