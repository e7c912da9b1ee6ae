"""The Accelerator of a run: processes, precision, what FSDP2 gathers in, and switches for a while."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from flashdit.shared.command import resolve_device
from flashdit.shared.files import mend
from flashdit.shared.process import AUTOCAST, check_processes
from flashdit.shared.runs import list_checkpoints
from flashdit.shared.settings import to_yaml
from flashdit.training.optim import MUON
from flashdit.training.options import LoopConfig, TrainingOptions, share_of_batch
from flashdit.training.resume import check_run_folder, check_unchanged, main_first, settle
from flashdit.training.task import Task

logger = logging.getLogger(__name__)


def start_run(config: LoopConfig, task: type[Task]) -> Accelerator:
    """Returns the Accelerator of a run that is new or resumed, and seeds the weights that are built next.

    Args:
        config: Of the run; what it leaves to the start is put into it.
        task: What is trained.

    Raises:
        ValueError: If the global batch cannot be shared evenly, another process trains in the folder, or it
            holds another run.
    """
    settle(config, task, resolve_device(None))
    accelerator, run_dir = make_accelerator(config.training), Path(config.run.dir)
    if config.optimizer.name == MUON and is_sharded(accelerator):
        rule = "optimizer.name=muon requires whole matrices on every process"
        raise ValueError(f"{rule}, got FSDP, which splits them: launch without it, or take adamw")
    share_of_batch(config.training, accelerator.num_processes)

    def check_folder() -> None:
        check_run_folder(run_dir)
        mend(run_dir / "checkpoints")
        for checkpoint in list_checkpoints(run_dir)[-1:]:
            for line in check_unchanged(checkpoint, to_yaml(config), task):
                logger.info(line)

    main_first(accelerator, check_folder)
    torch.manual_seed(config.seed)
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Returns whether processes share the model's parameters (FSDP)."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def make_accelerator(training: TrainingOptions) -> Accelerator:
    """Returns the Accelerator of the run; what it is launched with decides on processes and sharding."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # otherwise each of several CPU processes trains alone
        mixed_precision=precision_name(training.precision),
        # as a plugin, since a number gives way to ACCELERATE_GRADIENT_ACCUMULATION_STEPS
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=training.accumulation),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=training.timeout_s))],
    )
    set_shard_precision(accelerator, training.precision)
    check_processes(accelerator.num_processes)
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision_name(training.precision)) and accelerator.is_main_process:
        logger.info(
            "training.precision=%s decides, the launcher's mixed_precision=%s is not used",
            *(training.precision, asked),
        )
    return accelerator


def set_shard_precision(accelerator: Accelerator, precision: str) -> None:
    """Makes FSDP2 gather weights in the precision, add gradients in float32 and leave inputs as they are.

    Accelerate's own policy would round times and add gradients in bf16.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    dtype = AUTOCAST[precision]
    if plugin is not None and dtype is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def precision_name(precision: str) -> str:
    """Returns what Accelerate calls a precision."""
    return "no" if precision == "fp32" else precision


def whole_norm(norm: Any) -> Tensor:
    """Returns the gradient norm as one number of the whole model, also where the gradients lie in shards."""
    norm = torch.as_tensor(norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@contextmanager
def gradient_strides_ignored() -> Iterator[None]:
    """Runs a backward pass without DDP's warning about strides.

    A (C, 1, 3, 3) gradient in channels-last order has other strides and the same memory: nothing is slower.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        yield


def compile_parts(model: nn.Module, blocks: Callable[[], Iterable[nn.Module]], compiled: str) -> None:
    """Has a model compiled when it first computes: the `model` whole, each `block`, or `none` of it.

    Args:
        model: The model.
        blocks: Returns its blocks, if they are asked for: not every task has some.
        compiled: Which of them.
    """
    for part in (model,) if compiled == "model" else blocks() if compiled == "block" else ():
        part.compile()


def blocks_compiled_whole(compiled: str) -> AbstractContextManager[Any]:
    """Returns the context in which blocks that are compiled one by one are not cut at DDP's buckets."""
    if compiled != "block":
        return nullcontext()
    return torch._dynamo.config.patch(optimize_ddp=False)
