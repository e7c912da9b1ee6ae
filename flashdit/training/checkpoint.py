"""Checkpoints on disk: one folder per step, written under a temporary name and renamed.

runs/<name>/checkpoints/step_XXXXXXXX/
    model/ ema/           the weights and their average as safetensors; FlashDiT.from_pretrained reads either
    ema_tracks/           power-function averages, where `ema.power_widths` names some
    …                     what the task writes beside them
    optimizer.pt          the optimiser's moments by parameter name, and the loss scaler
    processes.pt          of each process: random states and what it has measured since the last record
    state.json            step, images seen, EMA updates, steps skipped, what the task adds, and the CRC-32 of
                          every file but config.yaml, and of itself
    config.yaml           the resolved configuration
The .pt files are loaded with weights_only=True.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from flashdit.shared.files import discard, write_atomically, write_checked_json
from flashdit.shared.paths import check_disk
from flashdit.shared.runs import (
    CHECKPOINT_FORMAT,
    CHECKSUMS,
    STATE,
    DamagedCheckpoint,
    additions,
    checksums,
    is_count,
    list_checkpoints,
    read_state,
    step_of,
)
from flashdit.shared.weights import read_content, read_tensors
from flashdit.training.profiles import Profile
from flashdit.training.snapshots import TRACKS, read_tracks

logger = logging.getLogger(__name__)
OPTIMIZER, PROCESSES = "optimizer.pt", "processes.pt"
POSITION = ("step", "images_seen", "ema_updates", "skipped", "skipped_in_a_row")


def write_checkpoint(
    folder: Path,
    write_models: Callable[[Path], None],
    optimizer: dict[str, Any],
    processes: list[dict[str, Any]],
    config_text: str,
    state: dict[str, Any],
) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        folder: Its folder.
        write_models: Makes the folder that it is given and writes the models into it.
        optimizer: For optimizer.pt.
        processes: For processes.pt.
        config_text: For config.yaml.
        state: For state.json.

    Raises:
        OSError: If it cannot be written, as on a full disk; earlier checkpoints stay.
    """

    def write(temporary: Path) -> None:
        write_models(temporary)
        torch.save(optimizer, temporary / OPTIMIZER)
        torch.save(processes, temporary / PROCESSES)
        (temporary / "config.yaml").write_text(config_text)
        whole = {"format": CHECKPOINT_FORMAT, **state, CHECKSUMS: checksums(temporary)}
        write_checked_json(temporary / STATE, whole)

    try:
        write_atomically(folder, write)
    except OSError as error:
        raise OSError(f"{error}; earlier checkpoints stay") from error


@dataclass(kw_only=True)
class Saved:
    """What a checkpoint holds, on the CPU."""

    state: dict[str, Any]
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    tracks: dict[Profile, dict[str, Tensor]]
    optimizer: dict[str, Any]
    processes: list[dict[str, Any]]


def read_checkpoint(folder: Path) -> Saved:
    """Returns all that a run goes on with.

    Raises:
        DamagedCheckpoint: If a file cannot be read; names it.
        ValueError: If its format is not one this version reads.
    """
    state = read_state(folder)
    missing = [name for name in POSITION if not is_count(state.get(name))]
    if missing:
        raise DamagedCheckpoint(
            f"{folder / STATE} is damaged: it has no whole number, 0 or more, as {', '.join(missing)}"
        )
    for name in state.get(CHECKSUMS, (OPTIMIZER, PROCESSES, "model", "ema")):
        if not (folder / name).exists():
            raise DamagedCheckpoint(f"{folder} is damaged: it has no {name}")
    try:
        optimizer, processes = (read_content(folder / name) for name in (OPTIMIZER, PROCESSES))
        if not isinstance(optimizer, dict) or not {"optimizer", "scaler"} <= optimizer.keys():
            raise ValueError(f"{OPTIMIZER} must hold the optimiser and the scaler")
        if not isinstance(processes, list):
            raise ValueError(f"{PROCESSES} must hold a list of processes")
        for path in sorted(folder.glob("*.safetensors")):  # what the task writes beside the models
            read_content(path)
        return Saved(
            state=state,
            model=read_tensors(folder / "model"),
            ema=read_tensors(folder / "ema"),
            tracks=read_tracks(folder / TRACKS),
            optimizer=optimizer,
            processes=processes,
        )
    except (ValueError, OSError) as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {error}") from error


def prune(run_dir: Path, keep_last: int | None, keep_every: int | None, *, ends: bool = False) -> None:
    """Removes checkpoints but the last few and those at multiples of `keep_every`; None keeps all.

    One to which something was added, such as an average made after training, stays, and that is said.

    Args:
        run_dir: The run's folder.
        keep_last: How many of the last stay.
        keep_every: Steps whose multiples stay.
        ends: Whether those stay too at which a training came to its `training.steps`.
    """
    if keep_last is None:
        return
    passed = list_checkpoints(run_dir)[:-keep_last]
    for folder in passed:
        step = step_of(folder)
        training = stored_config(folder).get("training")
        is_end = ends and isinstance(training, dict) and training.get("steps") == step
        if is_end or (keep_every is not None and step % keep_every == 0):
            continue
        added = additions(folder)
        if not added:
            discard(folder)
        elif folder == passed[-1]:  # told once, not at each later save
            logger.warning("%s stays: it holds %s besides what training wrote", folder, ", ".join(added))


def check_room(run_dir: Path, model: nn.Module, tracks: int = 0) -> None:
    """Refuses a disk that cannot hold two checkpoints: weights, average and two moments each, as AdamW's.

    Args:
        run_dir: The run's folder.
        model: What is saved.
        tracks: Power-function averages that a checkpoint holds besides.
    """
    needed = 2 * (4 + tracks) * sum(4 * parameter.numel() for parameter in model.parameters())
    check_disk(run_dir, needed, "run.dir", "two checkpoints")


def stored_config(checkpoint: Path) -> dict[str, Any]:
    """Returns the configuration that a checkpoint or else its run holds; empty where neither can be read."""
    for path in (checkpoint / "config.yaml", checkpoint.parent.parent / "config.yaml"):
        try:
            stored = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            continue
        if isinstance(stored, dict) and stored:
            return stored
    return {}
