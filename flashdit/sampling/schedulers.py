"""Which of diffusers' schedulers follow the linear path, and the times at which they step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
"""What makes diffusers' multistep schedulers follow the linear path."""


def is_flow_matching(scheduler: Any) -> bool:
    """Returns whether a scheduler knows no other path than ours."""
    return type(scheduler).__name__.startswith("FlowMatch")


def remember_flow(scheduler: Any) -> None:
    """Makes schedulers that are made `from_config` of a flow-matching one follow the same path and shift."""
    scheduler.register_to_config(**FLOW, flow_shift=scheduler.config.get("shift", 1.0))


def without_flow(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a flow-matching scheduler's configuration without what its own class would warn of."""
    return {key: value for key, value in config.items() if key not in (*FLOW, "flow_shift")}


def check_scheduler(scheduler: Any) -> None:
    """Raises ValueError unless the scheduler follows the linear path with velocity prediction."""
    config: Mapping[str, Any] = scheduler.config
    takes = inspect.signature(type(scheduler).__init__).parameters  # its config keeps what it does not take
    follows = all(key in takes and config.get(key) == FLOW[key] for key in FLOW)
    if not (is_flow_matching(scheduler) or follows):
        raise ValueError(
            "the scheduler must be a FlowMatch… one, or one that takes use_flow_sigmas=True and "
            f"prediction_type='flow_prediction', got {type(scheduler).__name__}"
        )


def set_timesteps(scheduler: Any, steps: int, device: torch.device) -> None:
    """Gives the scheduler the native sampler's times, which it shifts; one that takes none has its own."""
    if steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
