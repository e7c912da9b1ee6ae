"""The flow-matching loss: squared error of the velocity, and the angle between velocities."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(kw_only=True)
class LossOptions:
    """Options of the loss."""

    cosine_weight: float = 1.0
    """Weight of the cosine term; LightningDiT's best configuration has 1, SiT 0."""


def velocity_mse(v_t: Tensor, u_t: Tensor) -> Tensor:
    """Returns the mean squared error over all but the first axis: (B,), in float32."""
    return (v_t.float() - u_t.float()).square().flatten(1).mean(1)


def velocity_cosine(v_t: Tensor, u_t: Tensor) -> Tensor:
    """Returns the mean over positions of 1 − cosine over channels: (B, C, H, W) twice → (B,), in float32."""
    return (1 - F.cosine_similarity(v_t.float(), u_t.float(), dim=1)).flatten(1).mean(1)


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
