"""Weights from elsewhere loaded into a FlashDiT: what is kept, what is new, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashdit.shared.runs import find_checkpoint
from flashdit.shared.weights import read_tensors

logger = logging.getLogger(__name__)
LABEL_TABLE = "y_embedder.embedding_table.weight"
POSITION_TABLE = "pos_embed"
ROPE_KEYS = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")  # computed, so never loaded
UNSEEN = ("num_heads", "time_scale")
"""Options that no tensor's shape shows: with others, the weights load and mean nothing."""


def fit_weights(model: nn.Module, given: Mapping[str, Tensor], new_classes: bool = False) -> list[str]:
    """Loads weights that may lack what the model has more than theirs; everything else must fit.

    A depthwise convolution that they lack starts at zero, so that the attention is all there is at first. A
    position table is computed, never loaded into another size.

    Args:
        model: Changed in place.
        given: Tensors by FlashDiT's names.
        new_classes: Whether they may be of another number of classes: then the label table stays as the model
            was initialised, but for the null label's row, which is kept.

    Returns:
        The names of what is new.

    Raises:
        ValueError: If tensors are missing, left over or of another shape.
    """
    own = model.state_dict()
    state = {key: value for key, value in given.items() if key not in ROPE_KEYS}
    if POSITION_TABLE not in own:
        if state.pop(POSITION_TABLE, None) is not None:
            logger.warning("these weights know a position table, which position_embedding=none leaves out")
    elif POSITION_TABLE not in state or state[POSITION_TABLE].shape != own[POSITION_TABLE].shape:
        state[POSITION_TABLE] = own[POSITION_TABLE]
    new = [key for key in own if ".dwconv." in key and key not in state]
    state |= {key: torch.zeros_like(own[key]) for key in new}
    if new_classes and LABEL_TABLE in state and len(state[LABEL_TABLE]) != len(own[LABEL_TABLE]):
        state[LABEL_TABLE] = torch.cat([own[LABEL_TABLE][:-1], state[LABEL_TABLE][-1:].to(own[LABEL_TABLE])])
        new.append(LABEL_TABLE)
    missing, left_over = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or left_over:
        raise ValueError(f"the weights do not fit the configuration: {missing=}, {left_over=}")
    wrong = [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise ValueError(f"weights of another shape than the configuration's: {', '.join(wrong)}")
    model.load_state_dict(state)
    return new


def check_unseen(model: Any, folder: Path) -> None:
    """Raises ValueError if a model folder's weights were trained with other such options."""
    theirs = json.loads((folder / "config.json").read_text())
    own = model.config
    other = [f"{key}={own[key]} for {theirs[key]}" for key in UNSEEN if theirs.get(key, own[key]) != own[key]]
    if other:
        rule = f"weights need the options they were trained with, those of {folder} too"
        raise ValueError(f"{rule}, got {', '.join(other)}")


def start_from(model: Any, source: Path | str) -> list[str]:
    """Loads weights to start from, for the same or another set of classes, resolution or kind of attention.

    Args:
        model: A fresh FlashDiT; changed in place.
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
    if path.is_dir():
        path = path if (path / "config.json").is_file() else find_checkpoint(path) / "ema"
        check_unseen(model, path)
    return fit_weights(model, read_tensors(path), new_classes=True)
