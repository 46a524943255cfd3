"""Every constant of the method in one place: the paper's value beside ours, and the reason where they differ."""

import equinox as eqx
from jaxtyping import Array, Float, Int

Scalar = float | Float[Array, ""]


class Settings(eqx.Module):
    """Settings of :func:`f2pad_jax.refine`. Numbers are traced (changing one is no new compile) unless marked static."""

    # Eq. (12)
    alpha1: Scalar = 0.01
    """Weight of the pixel prior. Paper: grid search per category."""
    alpha2: Scalar = 1e-4
    """Weight of total variation. Paper: 1e-4."""
    sparsity: Scalar = 5.0
    """β = sparsity · Σ excess scores of x / (l_a(x - n0) - l_a(0)); see :func:`f2pad_jax.objective.sparsity_weight`."""
    beta0: Scalar | None = None
    """If given, the paper's β = beta0 / Σm0 instead. Paper: grid search per category."""
    epsilon: Scalar = 1e-4
    """ε of the LOG penalty, Eq. (8). Paper: 1e-4."""

    # the step
    learning_rate: Scalar = 0.3
    """Adan's step before Eq. (15). Paper: not stated."""
    gamma0: Scalar = 1.0
    """γ0 of Eq. (15). Paper: 1.0."""
    delta: Scalar = 1.0
    """Floor of |a| in Eq. (15), normalised intensity. Paper: none, and the step diverges as a -> 0."""
    clip: Scalar = float("inf")
    """Bound on each component of the shared gradient. Paper: 0.03 at an unstated scale of the loss; at ours it hurts."""

    # gradient sharing, Eq. (13)-(14)
    sharing_radius: int = eqx.field(static=True, default=5)
    """k_s, pixels, static. Paper: 5."""
    sigma0: float = eqx.field(static=True, default=1.1)
    """Spatial scale, pixels², static. Paper: 1.1."""
    sigma1: Scalar = 3.0
    """Colour scale, squared normalised intensity. Paper: 3.0."""
    sharing_tolerance: float = eqx.field(static=True, default=2e-4)
    """Taps of smaller spatial weight are dropped (29 of 121 stay), static. Paper: keeps all."""

    # stopping
    max_steps: int | Int[Array, ""] = 150
    """Most steps; rounded up to a multiple of ``steps_per_check``. Paper: 1200."""
    tolerance: Scalar = 0.05
    """Converged when the objective falls by less than this a step. Paper: 0.05, PaDiM 0.1, at an unstated scale."""
    steps_per_check: int = eqx.field(static=True, default=10)
    """Steps between looks at the stopping rule and at the detector's candidates, static. Paper: 1."""

    # region and mask
    dilation: int = eqx.field(static=True, default=6)
    """Growth of m0, pixels, static. Paper: "simple morphological dilation"."""
    reach: int = eqx.field(static=True, default=8)
    """Positions within this many pixels of the region enter l_n, static. Paper: all affected."""
    margin: int = eqx.field(static=True, default=24)
    """Pixels of context a window keeps around the region, static. Paper: whole image."""
    tau: Scalar = 0.2
    """A pixel is anomalous where |a| exceeds this, normalised intensity. Paper: a ≠ 0, which LOG under a gradient method
    never reaches."""
    restore_rate: Scalar = 0.03
    """Learning rate of the re-estimation of n: there is no sparsity term whose kink needs long steps, and short ones leave
    no noise. Paper: that of the first solve."""
    restore_steps: int | Int[Array, ""] = 50
    """Most steps of the re-estimation of n with β = 0 inside the mask; 0 leaves the first guess. Paper: to convergence."""

    def with_rate(self, learning_rate: Scalar) -> "Settings":
        """The same settings with another learning rate."""
        return eqx.tree_at(lambda s: s.learning_rate, self, learning_rate)
