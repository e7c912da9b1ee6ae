"""What training starts from: a run, a checkpoint, a diffusers folder, or a file of LightningDiT's weights."""

from __future__ import annotations

import json
from pathlib import Path

from flashdit.models.dit import FlashDiT
from flashdit.models.lightningdit import ROPE_KEYS, read_state
from flashdit.models.weights import fit_weights
from flashdit.training.checkpoint import find_checkpoint, read_weights

UNSEEN = ("num_heads", "time_scale")
"""Options that no tensor's shape shows: with others, the weights load and mean nothing."""


def check_unseen(model: FlashDiT, folder: Path) -> None:
    """Raises ValueError if a model folder's weights were trained with other such options."""
    theirs = json.loads((folder / "config.json").read_text())
    own = model.config
    other = [f"{key}={own[key]} for {theirs[key]}" for key in UNSEEN if theirs.get(key, own[key]) != own[key]]
    if other:
        rule = f"weights need the options they were trained with, those of {folder} too"
        raise ValueError(f"{rule}, got {', '.join(other)}")


def start_from(model: FlashDiT, source: Path | str) -> list[str]:
    """Loads weights to start from, for the same or another set of classes, resolution or kind of attention.

    Args:
        model: Freshly built; changed in place.
        source: A run or a checkpoint, whose average is meant; a folder of `save_pretrained`; or a file of
            weights in LightningDiT's or FlashDiT's layout.

    Returns:
        The names of what the weights lacked: zero convolutions, a label table for other classes.

    Raises:
        ValueError: If there are no weights, or they do not fit.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"weights must be a run, a checkpoint, a model folder or a file, got {path}")
    if path.is_file():
        weights = read_state(path)
    else:
        folder = path if (path / "config.json").is_file() else find_checkpoint(path) / "ema"
        check_unseen(model, folder)
        weights = read_weights(folder)
    weights = {key: value for key, value in weights.items() if key not in ROPE_KEYS}
    return fit_weights(model, weights, new_classes=True)
