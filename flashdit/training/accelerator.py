"""The Accelerator of a run: precision, accumulation, patience, and what FSDP2 gathers in."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed.fsdp import MixedPrecisionPolicy

from flashdit.shared.process import allow_tf32
from flashdit.training.options import DTYPES, TrainingOptions


def make_accelerator(training: TrainingOptions) -> Accelerator:
    """Returns the Accelerator of the run; what it is launched with decides on processes and sharding."""
    allow_tf32(training.tf32)
    accelerator = Accelerator(
        mixed_precision=precision_name(training.precision),
        gradient_accumulation_steps=training.accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=training.timeout_s))],
    )
    set_shard_precision(accelerator, training.precision)
    return accelerator


def set_shard_precision(accelerator: Accelerator, precision: str) -> None:
    """Makes FSDP2 gather weights in the precision, add gradients in float32 and leave inputs as they are.

    Accelerate's own policy would round times and add gradients in bf16.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and precision != "fp32":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def precision_name(precision: str) -> str:
    """Returns what Accelerate calls a precision."""
    return "no" if precision == "fp32" else precision
