"""Power-function profiles: how an average weighs its past, and one rebuilt from snapshots of others.

An average of relative width σ is the standard deviation of its profile over the time t it has run for:
p(τ; t) = (γ + 1) τ^γ / t^(γ+1). Time is counted in updates.

Source: Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models" (EDM2),
section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDEST = 12**-0.5  # of γ = 0, the plain mean; wider ones would weigh the beginning most


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A profile p_γ(·; t)."""

    width: float
    """Relative standard deviation σ."""
    updates: int
    """Its end t."""

    @property
    def gamma(self) -> float:
        """Returns the exponent γ."""
        return gamma_of_width(self.width)


def width_of_gamma(gamma: float) -> float:
    """Returns the relative width of an exponent: σ = (γ+1)^½ (γ+2)^−1 (γ+3)^−½, EDM2 eq. 3."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def gamma_of_width(width: float) -> float:
    """Returns the exponent of a relative width: the largest root of σ² (γ+2)² (γ+3) = γ+1.

    Args:
        width: Above 0 and below 12^−½ ≈ 0.289.

    Raises:
        ValueError: If the width is not.
    """
    if not 0 < width < WIDEST:
        raise ValueError(f"a width must be above 0 and below {WIDEST:.4f}, got {width}")
    area = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - area, 12.0 - area]).real.max())


def kept_share(gamma: float, updates: int) -> float:
    """Returns what update t keeps of the old average: β = (1 − 1/t)^(γ+1), EDM2 eq. 2."""
    return (1 - 1 / updates) ** (gamma + 1)


def inner_products(rows: Sequence[Profile], columns: Sequence[Profile]) -> np.ndarray:
    """Returns ∫ p_i p_j dτ of all pairs in closed form, float64 (rows, columns); EDM2 appendix C.

    It is (γ_i+1)(γ_j+1) / (γ_i+γ_j+1) · min(t_i, t_j)^(γ_i+γ_j+1) / (t_i^(γ_i+1) t_j^(γ_j+1)), written with
    the ratio of the times so that no power leaves the range of float64.
    """
    gamma_i, t_i = _columns(rows)
    gamma_j, t_j = (values.T for values in _columns(columns))
    later, gamma_later = np.maximum(t_i, t_j), np.where(t_i <= t_j, gamma_j, gamma_i)
    scale = (gamma_i + 1) * (gamma_j + 1) / (gamma_i + gamma_j + 1)
    return scale * (np.minimum(t_i, t_j) / later) ** gamma_later / later


def _columns(profiles: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
    """Returns exponents and ends, each (profiles, 1)."""
    pairs = np.array([(profile.gamma, profile.updates) for profile in profiles], dtype=np.float64)
    return pairs[:, :1], pairs[:, 1:]


def solve(known: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Returns the coefficients that best rebuild a profile from others, and how far they miss it.

    Least squares of ‖p − Σ x_i p_i‖ over the profiles, EDM2 appendix C.

    Args:
        known: Profiles of the averages at hand, none twice.
        wanted: The profile to rebuild.

    Returns:
        x (known,) float64 and ‖p − Σ x_i p_i‖ / ‖p‖.
    """
    gram, target = inner_products(known, known), inner_products(known, [wanted])[:, 0]
    square = inner_products([wanted], [wanted])[0, 0]
    length = np.sqrt(np.diag(gram))  # unit profiles, since early ones are tall and narrow
    gram, target = gram / np.outer(length, length), target / (length * np.sqrt(square))
    mass = np.sqrt(square) / length
    # Differs from EDM2: Σ x_i = 1 is required (by a Lagrange multiplier), so that a weight which does not
    # move is rebuilt exactly; with 16 snapshots errors are up to 8 times smaller.
    system = np.block([[gram, mass[:, None]], [mass[None], np.zeros((1, 1))]])
    scaled = np.linalg.lstsq(system, np.append(target, 1.0), rcond=None)[0][:-1]
    missed = 1 - 2 * scaled @ target + scaled @ gram @ scaled
    return scaled * mass, float(np.sqrt(max(0.0, missed)))
