"""What a run is at a step: written as a checkpoint, given back from one, told in a line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from flashdit.shared.registry import counted
from flashdit.shared.runs import step_folder
from flashdit.training.checkpoint import Saved, prune, write_checkpoint
from flashdit.training.profiles import Profile
from flashdit.training.snapshots import TRACKS, write_snapshots
from flashdit.training.state import load_model_state, load_optimizer_state, model_state, optimizer_state
from flashdit.training.task import Tensors

if TYPE_CHECKING:
    from flashdit.training.loop import TrainingLoop

logger = logging.getLogger(__name__)


def what_is_trained(loop: TrainingLoop) -> str:
    """Returns in a line what is trained, where and how."""
    training, classes = loop.config.training, loop.task.state().get("class_names")
    parameters = sum(parameter.numel() for parameter in loop.model.parameters())
    places = f"{loop.accelerator.num_processes} processes on " if loop.accelerator.num_processes > 1 else ""
    data = counted(loop.task.images_per_epoch, "image")
    data += f" in {counted(len(classes), 'class', 'classes')}" if classes else ""
    begins = f"goes on after step {loop.step:,}" if loop.resumed_from else "new run"
    return (
        f"{loop.run_dir}: {begins}, to step {training.steps:,}; {parameters:,} parameters in "
        f"{training.precision} on {places}{loop.device}; {data}"
    )


def restore_run(loop: TrainingLoop, folder: Path, saved: Saved) -> None:
    """Continues from a checkpoint: weights, averages, optimiser, loss scaler, position, random state.

    Args:
        loop: Before its first step.
        folder: The checkpoint's.
        saved: What it holds of any task.
    """
    state, states = saved.state, saved.processes
    loop.step, loop.images_seen = state["step"], state["images_seen"]
    loop.guard.skipped, loop.guard.in_a_row = state["skipped"], state["skipped_in_a_row"]
    load_model_state(loop.model, saved.model)
    loop.task.restore(folder)
    loop.ema.load(saved.ema, state["ema_updates"], saved.tracks)
    load_optimizer_state(loop.task.trained, loop.optimizer.optimizer, saved.optimizer["optimizer"])
    if loop.accelerator.scaler is not None and saved.optimizer["scaler"] is not None:
        loop.accelerator.scaler.load_state_dict(saved.optimizer["scaler"])
    rank, processes = loop.accelerator.process_index, loop.accelerator.num_processes
    if len(states) != processes and loop.main:
        logger.info("resumed with %d processes, was %d; images seen go on", processes, len(states))
    if rank < len(states):
        torch.set_rng_state(states[rank]["cpu"])
        if loop.device.type == "cuda" and "cuda" in states[rank]:
            torch.cuda.set_rng_state(states[rank]["cuda"], loop.device)
    if len(states) == processes:
        loop.meter.load(states[rank]["meter"])


def save_checkpoint(loop: TrainingLoop, average: Tensors, tracks: dict[Profile, Tensors]) -> None:
    """Writes a checkpoint; every process calls it, the main one writes."""
    mine: dict[str, Any] = {"cpu": torch.get_rng_state(), "meter": loop.meter.state()}
    if loop.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(loop.device)
    processes = gather_object([mine])
    weights = model_state(loop.model)
    scaler = loop.accelerator.scaler
    optimizer = {
        "optimizer": optimizer_state(loop.task.trained, loop.optimizer.optimizer),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    position = {
        "step": loop.step,
        "images_seen": loop.images_seen,
        "ema_updates": loop.ema.updates,
        "skipped": loop.guard.skipped,
        "skipped_in_a_row": loop.guard.in_a_row,
    }
    if loop.main:

        def write_models(folder: Path) -> None:
            loop.task.write_models(folder, weights, average)
            write_snapshots(folder / TRACKS, loop.step, tracks)

        state = position | loop.task.state()
        folder = step_folder(loop.run_dir, loop.step)
        write_checkpoint(folder, write_models, optimizer, processes, loop.config_text, state)
        training = loop.config.training
        prune(loop.run_dir, training.keep_last, training.keep_every, ends=loop.task.ends_are_kept)
    loop.accelerator.wait_for_everyone()
