"""Mean flows: a network of the average velocity over a stretch of time, which crosses it in one evaluation.

With u(x_t, t, d) = 1/d ∫ v(x_τ, τ) dτ over τ from t to t + d, an update of any length is x + d·u. Where d is
0, u is the velocity.

Source: MeanFlow (Geng et al. 2025, arXiv 2505.13447) and its improved objective (Geng et al. 2025, arXiv
2512.02012), in which time runs from data to noise; here it runs from 0 (noise) to 1 (data).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashdit.flow.guidance import Velocity
from flashdit.flow.path import interpolate, per_sample, velocity
from flashdit.shared.registry import check_finite
from iwin_core.kernels.cpu_attention import PRODUCTS, attention_of

RANDOM_NUMBERS = 3
"""Uniform draws that an example takes beside those of flow matching."""
COST = 7 / 3
"""FLOPs of a training step over those of flow matching: 3 forward passes, 2 for guidance, 2 for du/dt."""
ERROR_FLOOR = 0.01
"""Added to a sample's squared error before it is divided by a power of itself, as in the source."""


@dataclass(kw_only=True)
class MeanFlowOptions:
    """Options of mean flows."""

    enabled: bool = False
    """Whether the network learns average velocities, for samples of one or few evaluations."""
    most_guidance: float = 8.0
    """The largest guidance scale that the network is told of; training draws log-uniformly from 1 on."""
    instant_share: float = 0.5
    """Share of the examples whose stretch of time has no length: flow matching."""
    power: float = 1.0
    """The error of a sample is divided by this power of itself, without gradient; 0 is the squared error."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_finite(self, "flow.mean_flow.")
        if self.most_guidance < 1:
            raise ValueError(f"flow.mean_flow.most_guidance must be at least 1, got {self.most_guidance}")
        if not 0 <= self.instant_share <= 1:
            raise ValueError(f"flow.mean_flow.instant_share must be from 0 to 1, got {self.instant_share}")
        if self.power < 0:
            raise ValueError(f"flow.mean_flow.power must not be negative, got {self.power}")


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Which stretch of time each example is of, and under which guidance."""

    t: Tensor
    """Where it begins (B,)."""
    duration: Tensor
    """Its length (B,), 0 or more."""
    guidance: Tensor
    """Guidance scale (B,), at least 1; 1 where the label is dropped."""


def draw_stretch(
    first: Tensor, times: Callable[[Tensor], Tensor], uniform: Tensor, drop: Tensor, options: MeanFlowOptions
) -> Stretch:
    """Returns the stretches of examples: from the earlier of two training times to the later one.

    Args:
        first: One training time of each (B,).
        times: Uniform draws → training times, by which the second is drawn.
        uniform: Three draws of each in [0, 1): (B, 3).
        drop: Whose label is dropped, bool (B,).
        options: Shares and scales.
    """
    second = times(uniform[:, 0])
    t, end = torch.minimum(first, second), torch.maximum(first, second)
    duration = torch.where(uniform[:, 1] < options.instant_share, 0.0, end - t)
    scale = options.most_guidance ** uniform[:, 2]
    return Stretch(t=t, duration=duration, guidance=torch.where(drop, 1.0, scale))


def derivative(
    model: Callable[..., Tensor], x_t: Tensor, at: Stretch, tangent: Tensor, **given: Tensor
) -> Tensor:
    """Returns du/dt along the flow, its end held where it is: (B, …), in float32 and without a gradient.

    It is the model's Jacobian times (tangent, 1, −1) for (x_t, t, duration), in forward mode; attention is
    computed by two products and a softmax, which have one.

    Args:
        model: (x, t, duration=, **given) → u.
        x_t: States (B, …).
        at: Times and durations.
        tangent: dx_t/dt (B, …).
        **given: What else the model takes.
    """
    one, dual = torch.ones_like(at.t), forward_ad.make_dual
    with warnings.catch_warnings(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), attention_of(PRODUCTS):
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # torch's own use of it
        with forward_ad.dual_level():
            u = model(dual(x_t, tangent), dual(at.t, one), duration=dual(at.duration, -one), **given)
            change = forward_ad.unpack_dual(u).tangent
    assert change is not None, "the model takes no notice of where it is"
    return change.float()


def mean_flow_loss(
    network: Callable[..., Tensor],
    model: Callable[..., Tensor],
    x_0: Tensor,
    x_1: Tensor,
    labels: Tensor,
    drop: Tensor,
    at: Stretch,
    options: MeanFlowOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of each sample and its terms.

    The network's u gives V = u − d·sg(du/dt), a velocity (d·u = ∫ v, differentiated), and V meets the guided
    velocity v + (1 − 1/w)(v_cond − v_uncond) of a guidance scale w that the network is told. du/dt follows
    the network's own velocity, not that of the example.

    Args:
        network: (x, t, y, drop=, duration=, guidance=) → u, as the run computes it.
        model: The same without autocast or wrapping, for the derivative.
        x_0: Noise (B, …).
        x_1: Data (B, …).
        labels: Labels (B,).
        drop: Whose label is dropped, bool (B,).
        at: Stretches of time and guidance scales.
        options: Power of the error.

    Returns:
        Loss (B,), and its terms by name, (B,) each.

    Source: arXiv 2512.02012, u(x_t, t, 0) being the velocity (no head of its own), guidance a condition,
    without an interval. Differs: conditions are added to those of time and class instead of being tokens;
    where a label is dropped, the derivative follows the velocity without class.
    """
    x_t, v_t = interpolate(x_0, x_1, at.t), velocity(x_0, x_1)
    with torch.no_grad():
        none, every = torch.zeros_like(drop), torch.ones_like(drop)
        now, scale = torch.zeros_like(at.t), at.guidance
        both = network(
            torch.cat([x_t, x_t]),
            at.t.repeat(2),
            labels.repeat(2),
            drop=torch.cat([none, every]),
            duration=now.repeat(2),
            guidance=torch.cat([scale, torch.ones_like(scale)]),
        )
        v_cond, v_uncond = both.to(v_t.dtype).chunk(2)
        toward = per_sample(1 - 1 / scale, v_t) * (v_cond - v_uncond)  # none where the label is dropped
        tangent = torch.where(per_sample(drop, v_t), v_uncond, v_cond)
    change = derivative(model, x_t, at, tangent, y=labels, drop=drop, guidance=scale)
    u = network(x_t, at.t, labels, drop=drop, duration=at.duration, guidance=scale)
    squares = (u.float() - per_sample(at.duration, x_t) * change - (v_t + toward).float()).square().flatten(1)
    error = squares.sum(1)
    return error / (error.detach() + ERROR_FLOOR) ** options.power, {"mse": squares.mean(1)}


def along(
    model: Callable[..., Tensor], labels: Tensor, scale: float, times: Sequence[float] = ()
) -> Velocity:
    """Returns (x, t) → the average velocity from t to the next of some times; elsewhere the velocity itself.

    Args:
        model: (x, t, y, duration=, guidance=) → u.
        labels: Labels (B,).
        scale: Guidance scale, a condition of the network.
        times: In order: Euler's update from one to the next is then the network's whole stretch.
    """
    durations = {t: end - t for t, end in pairwise(times)}

    def u(x: Tensor, t: float) -> Tensor:
        """Returns the average velocity at one time for the whole batch."""
        now, duration, guidance = (
            torch.full((len(x),), value, device=x.device) for value in (t, durations.get(t, 0.0), scale)
        )
        return model(x, now, labels, duration=duration, guidance=guidance)

    return u


def check_guidance(scale: float, interval: tuple[float, float], most: float) -> None:
    """Raises ValueError for guidance that a network of mean flows was not told of in training."""
    if not 1 <= scale <= most:
        raise ValueError(
            f"the guidance scale of a model of mean flows must be from 1 to {most:g}, got {scale:g}"
        )
    if scale != 1 and tuple(interval) != (0, 1):
        raise ValueError(
            f"a model of mean flows is guided at all times, its interval must be 0 1, got {interval[0]:g} "
            f"{interval[1]:g}"
        )
