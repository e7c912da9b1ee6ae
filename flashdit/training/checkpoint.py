"""Checkpoints on disk: one folder per step, written under a temporary name and renamed.

runs/<name>/checkpoints/step_XXXXXXXX/
    model/ ema/           the weights and their average as safetensors; FlashDiT.from_pretrained reads either
    ema_tracks/           power-function averages, where `ema.power_widths` names some
    …                     what the task writes beside them
    optimizer.pt          AdamW's moments by parameter name, and the loss scaler
    processes.pt          of each process: random states and what it has measured since the last record
    state.json            step, images seen, EMA updates, steps skipped, and what the task adds
    config.yaml           the resolved configuration
The .pt files are loaded with weights_only=True.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import nn

from flashdit.shared.files import write_atomically, write_json
from flashdit.shared.runs import CHECKPOINT_FORMAT, PREFIX, STATE, list_checkpoints


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
        torch.save(optimizer, temporary / "optimizer.pt")
        torch.save(processes, temporary / "processes.pt")
        (temporary / "config.yaml").write_text(config_text)
        write_json(temporary / STATE, {"format": CHECKPOINT_FORMAT, **state})

    try:
        write_atomically(folder, write)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise the latter two
        raise OSError(
            f"{folder} could not be written, is the disk full? Earlier ones stay: {error}"
        ) from error


def prune(run_dir: Path, keep_last: int | None, keep_every: int | None) -> None:
    """Removes checkpoints but the last few and those at multiples of `keep_every`; None keeps all."""
    if keep_last is None:
        return
    for folder in list_checkpoints(run_dir)[:-keep_last]:
        if keep_every is None or int(folder.name.removeprefix(PREFIX)) % keep_every:
            (folder / STATE).unlink()  # a kill from here on leaves no half checkpoint that looks whole
            shutil.rmtree(folder)


def check_room(run_dir: Path, model: nn.Module, tracks: int = 0) -> None:
    """Refuses a disk that cannot hold two checkpoints: weights, average and the two moments of AdamW each.

    Args:
        run_dir: The run's folder.
        model: What is saved.
        tracks: Power-function averages that a checkpoint holds besides.
    """
    needed = 2 * (4 + tracks) * sum(4 * parameter.numel() for parameter in model.parameters())
    existing = run_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        gib = 2**30
        raise ValueError(
            f"run.dir needs room for two checkpoints, {needed / gib:.2f} GiB, "
            f"got {free / gib:.2f} GiB free for {run_dir}"
        )


def check_unchanged(checkpoint: Path, config_text: str, fixed: tuple[str, ...]) -> list[str]:
    """Refuses to resume with another model or other data.

    Args:
        checkpoint: What is resumed.
        config_text: The new configuration as YAML.
        fixed: Prefixes of the keys that may not change.

    Returns:
        A line for every other key that has changed.

    Raises:
        ValueError: If one of the fixed keys has another value.
    """
    old, new = yaml.safe_load((checkpoint / "config.yaml").read_text()), yaml.safe_load(config_text)
    lines = []
    for key, (before, after) in changes(old, new).items():
        if key.startswith(fixed):
            rule = f"{checkpoint.parent.parent} holds a run whose {key} is {before}, not {after}"
            raise ValueError(f"{rule}: give another run.dir")
        if key != "run.dir":
            lines.append(f"resumed with another {key}: {after}, was {before}")
    return lines


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns the dotted keys in which two plain configurations differ, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= changes(before, after, f"{prefix}{key}.")
        elif before != after:
            found[prefix + key] = (before, after)
    return found
