"""What a network's output stands for, by name, and the velocity that it gives."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flashdit.flow.path import per_sample
from flashdit.shared.registry import Registry

Prediction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(output (B, …), x_t (B, …), t (B,)) → v (B, …)."""
PREDICTIONS: Registry[Prediction] = Registry("prediction")
VELOCITY = "velocity"
"""What a network predicts of which nothing else is said."""
LEAST_TIME_LEFT = 0.05
"""The least 1 − t that a predicted datum is divided by, JiT's: errors of it grow by at most 20."""


def velocity_itself(output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The output is v."""
    return output


def velocity_from_data(output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The output is x̂_1; v = (x̂_1 − x_t) / max(1 − t, 0.05), computed in float32.

    Source: Li & He 2025 (JiT, arXiv 2511.13720), x-prediction with the loss on v.
    """
    left = (1 - per_sample(t, x_t).float()).clamp(min=LEAST_TIME_LEFT)
    return ((output.float() - x_t.float()) / left).to(output.dtype)


PREDICTIONS.add(VELOCITY, velocity_itself)
PREDICTIONS.add("data", velocity_from_data)
