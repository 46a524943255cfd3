"""The pixel prior: a mixture of Gaussians over normal pixel values (paper, Eq. 9-10)."""

import warnings

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture
from threadpoolctl import threadpool_limits


class PixelPrior(eqx.Module):
    """Means and whitening matrices of the mixture; its weights are dropped, as the paper does, so rare colours count."""

    means: Float[Array, "q 3"]
    whitening: Float[Array, "q 3 3"]
    """``whitening[q] @ (value - means[q])`` has unit covariance: the transposed Cholesky factor of the precision."""

    def __call__(self, image: Float[Array, "*b 3"]) -> Float[Array, "*b"]:
        """Squared Mahalanobis distance to the closest component, per pixel; the summand of Eq. (10)."""
        white = jnp.einsum("qij,...j->...qi", self.whitening, image) - jnp.einsum("qij,qj->qi", self.whitening, self.means)
        return jnp.min(jnp.sum(white**2, axis=-1), axis=-1)


def fit_prior(
    pixels: Float[np.ndarray, "n 3"], *, num_components: int = 6, floor: float = 0.05, seed: int = 0
) -> PixelPrior:
    """Fit the mixture to sampled normal pixels by variational Bayes (Attias 1999, the paper's choice).

    Args:
        pixels: values in normalised intensity.
        num_components: at most this many Gaussians; those the variational prior leaves empty are dropped.
        floor: standard deviation added to every component, in normalised intensity. A grey image has no spread between its
            channels; without the floor its precision would be unbounded.
        seed: of the initial k-means.
    """
    mixture = BayesianGaussianMixture(
        n_components=min(num_components, len(pixels)), reg_covar=floor**2, random_state=seed, max_iter=500, tol=1e-2
    )
    # a second BLAS thread only waits, on a busy machine for most of the time
    with threadpool_limits(1), warnings.catch_warnings():  # means and widths are long settled when the bound still creeps
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(np.asarray(pixels, np.float64))
    kept = mixture.weights_ >= 1e-3
    whitening = np.swapaxes(mixture.precisions_cholesky_[kept], 1, 2)
    return PixelPrior(jnp.asarray(mixture.means_[kept], jnp.float32), jnp.asarray(whitening, jnp.float32))
