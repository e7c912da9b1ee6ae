"""Weights from elsewhere fitted to a FlashDiT: what is kept, what is new, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
LABELS = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"


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
    own, state = model.state_dict(), dict(given)
    if POSITIONS not in own:
        if state.pop(POSITIONS, None) is not None:
            logger.warning("these weights know a position table, which position_embedding=none leaves out")
    elif POSITIONS not in state or state[POSITIONS].shape != own[POSITIONS].shape:
        state[POSITIONS] = own[POSITIONS]
    new = [key for key in own if ".dwconv." in key and key not in state]
    state |= {key: torch.zeros_like(own[key]) for key in new}
    if new_classes and LABELS in state and len(state[LABELS]) != len(own[LABELS]):
        state[LABELS] = torch.cat([own[LABELS][:-1], state[LABELS][-1:].to(own[LABELS])])
        new.append(LABELS)
    missing, left_over = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or left_over:
        raise ValueError(f"the weights do not fit the configuration: {missing=}, {left_over=}")
    wrong = [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise ValueError(f"weights of another shape than the configuration's: {', '.join(wrong)}")
    model.load_state_dict(state)
    return new
