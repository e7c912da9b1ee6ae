"""The flow-matching loss: squared error of the velocity, and the angle between velocities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdit.shared.registry import check_finite

LEAST_NORM = 0.1
"""The least norm that the cosine divides a predicted velocity by, as a share of the true one's."""
EPS = 1e-8


@dataclass(kw_only=True)
class LossOptions:
    """Options of the loss."""

    cosine_weight: float = 1.0
    """Weight of the cosine term; LightningDiT's best configuration has 1, SiT 0."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_finite(self, "flow.loss.")
        if self.cosine_weight < 0:
            raise ValueError(f"flow.loss.cosine_weight must not be negative, got {self.cosine_weight}")


def velocity_mse(v_t: Tensor, u_t: Tensor) -> Tensor:
    """Returns the mean squared error over all but the first axis: (B,), in float32."""
    return (v_t.float() - u_t.float()).square().flatten(1).mean(1)


def velocity_cosine(v_t: Tensor, u_t: Tensor) -> Tensor:
    """Returns the mean over positions of 1 − cosine over channels: (B, C, H, W) twice → (B,), in float32.

    The gradient of a cosine is of size 1 / |v_t|, and a new model's v_t is zero. So |v_t| counts as at least
    0.1 of the root mean square of |u_t| in the sample: there the gradient is about as large as that of the
    squared error. Where |v_t| is larger, as with several channels it nearly always is, the cosine is exact.
    """
    # Differs from LightningDiT, whose bound of 1e-8 gives a first gradient norm of 1e8.
    v_t, u_t = v_t.float(), u_t.float()
    norm_v, norm_u = (torch.linalg.vector_norm(x, dim=1) for x in (v_t, u_t))  # (b, h, w)
    least = LEAST_NORM * norm_u.square().mean(dim=(1, 2), keepdim=True).sqrt()
    lengths = torch.maximum(norm_v, least).clamp(min=EPS) * norm_u.clamp(min=EPS)
    return (1 - (v_t * u_t).sum(1) / lengths).flatten(1).mean(1)


def flow_loss(v_t: Tensor, u_t: Tensor, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of each sample and its terms.

    Args:
        v_t: Predicted velocity (B, C, H, W).
        u_t: True velocity (B, C, H, W).
        options: Weight of the cosine term.

    Returns:
        Loss (B,), and its terms by name, (B,) each.

    Source: LightningDiT's transport, linear path, velocity prediction, cosine loss.
    """
    terms = {"mse": velocity_mse(v_t, u_t)}
    loss = terms["mse"]
    if options.cosine_weight:
        terms["cosine"] = velocity_cosine(v_t, u_t)
        loss = loss + options.cosine_weight * terms["cosine"]
    return loss, terms
