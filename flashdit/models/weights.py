"""Weights from elsewhere loaded into a FlashDiT: what is kept, what is new, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashdit.flow.prediction import VELOCITY
from flashdit.shared.runs import STATE, find_average, read_state
from flashdit.shared.weights import read_model_config, read_tensors

LABEL_TABLE = "y_embedder.embedding_table.weight"
POSITION_TABLE = "pos_embed"
DEPTHWISE = ".dwconv."
REGISTERS = "register_tokens"
ROPE_KEYS = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")  # computed, so never loaded
PATCHES = ("x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias")
UNSEEN = {"num_heads": None, "time_scale": None, "prediction": VELOCITY}
"""Options that no tensor's shape shows: with others, the weights load and mean nothing. With the value of a
folder that does not say; None means the model's own."""
NAMED_TENSORS = 3  # tensors that a message names


def fit_weights(
    model: nn.Module, given: Mapping[str, Tensor], rows: Sequence[int | None] | None = None
) -> list[str]:
    """Loads weights into a model of another kind of attention, patch size or set of classes, too.

    A depthwise convolution that they lack starts at zero, so that the attention is all there is at first; one
    that the model lacks is left out. What depends on the patch size stays as the model was initialised. A
    position table is computed, never loaded into another size. Of another number of registers all are new.

    Args:
        model: Changed in place.
        given: Tensors by FlashDiT's names.
        rows: Which of their classes each of the model's is, None for a new one; None where they are the same.

    Returns:
        What is new, and what was left out, in words.

    Raises:
        ValueError: If other tensors are missing, left over or of another shape.
    """
    own = model.state_dict()
    state = {key: value for key, value in given.items() if key not in ROPE_KEYS}
    told = [*_fit_positions(state, own), *_fit_convolutions(state, own)]
    told += [*_fit_registers(state, own), *_fit_patches(state, own), *_fit_labels(state, own, rows)]
    missing, left_over = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or left_over:
        lists = (("they lack", missing), ("they have besides", left_over))
        found = " and ".join(f"{what} {_named(keys)}" for what, keys in lists if keys)
        raise ValueError(f"weights must be of the configured model, {found}")
    wrong = [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise ValueError(f"weights must have the shapes that the configuration gives, not so {_named(wrong)}")
    model.load_state_dict(state)
    return told


def _named(keys: Sequence[str]) -> str:
    """Returns the first few names, and how many more there are."""
    return ", ".join(keys[:NAMED_TENSORS]) + (
        f" and {len(keys) - NAMED_TENSORS} more" if len(keys) > NAMED_TENSORS else ""
    )


def _fit_positions(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Takes the model's own position table in place of theirs."""
    if POSITION_TABLE not in own:
        left_out = state.pop(POSITION_TABLE, None) is not None
        return ["without their position table, as position_embedding=none has it"] if left_out else []
    if POSITION_TABLE not in state or state[POSITION_TABLE].shape != own[POSITION_TABLE].shape:
        state[POSITION_TABLE] = own[POSITION_TABLE]
    return []


def _fit_convolutions(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Adds zero depthwise convolutions where only the model has them, and drops those that it has not."""
    new = [key for key in own if DEPTHWISE in key and key not in state]
    old = [key for key in state if DEPTHWISE in key and key not in own]
    for key in new:
        state[key] = torch.zeros_like(own[key])
    for key in old:
        del state[key]
    blocks = len({key.partition(DEPTHWISE)[0] for key in new or old})
    if not blocks:
        return []
    count = f"the depthwise convolutions of {blocks} blocks"
    return [f"{count}, which start at zero" if new else f"without {count}, which the model does not have"]


def _fit_registers(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Takes the model's own registers where they have none or others, and drops those that it has not."""
    theirs, ours = (tensors.get(REGISTERS) for tensors in (state, own))
    if theirs is None and ours is None:
        return []
    if ours is None:
        return [f"without their {len(state.pop(REGISTERS))} registers, as registers=0 has it"]
    if theirs is not None and (len(theirs) == len(ours) or theirs.shape[1:] != ours.shape[1:]):
        return []
    state[REGISTERS] = ours
    return [f"{len(ours)} registers, since the weights have {0 if theirs is None else len(theirs)}"]


def _fit_patches(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Takes the model's own first and last layer where they are for another patch size."""
    key = PATCHES[0]
    if key not in state or state[key].shape[:2] != own[key].shape[:2] or state[key].shape == own[key].shape:
        return []
    state.update({key: own[key] for key in PATCHES})
    return ["the patch embedding and the last layer, since the weights are for another patch size"]


def _fit_labels(
    state: dict[str, Tensor], own: Mapping[str, Tensor], rows: Sequence[int | None] | None
) -> list[str]:
    """Makes the label table of the rows of classes that both have, the model's own others, and their null."""
    if LABEL_TABLE not in state or (rows is None and len(state[LABEL_TABLE]) == len(own[LABEL_TABLE])):
        return []
    theirs, table = state[LABEL_TABLE], own[LABEL_TABLE].clone()
    if theirs.shape[1:] != table.shape[1:]:
        return []
    rows = [None] * (len(table) - 1) if rows is None else rows
    for row, source in enumerate([*rows, len(theirs) - 1]):
        if source is not None:
            table[row] = theirs[source].to(table)
    state[LABEL_TABLE] = table
    count = sum(row is None for row in rows)
    return [f"the label rows of {count} of {len(rows)} classes"] if count else []


def same_classes(names: Sequence[str], theirs: Sequence[str]) -> list[int | None] | None:
    """Returns which of their classes each name is, or None where both lists are one; of doubles in order."""
    if list(names) == list(theirs):
        return None
    places: dict[str, list[int]] = {}
    for place, name in reversed(list(enumerate(theirs))):
        places.setdefault(name, []).append(place)
    return [places[name].pop() if places.get(name) else None for name in names]


def check_unseen(model: Any, folder: Path) -> None:
    """Raises ValueError if a model folder's weights were trained with other such options."""
    theirs = read_model_config(folder)
    own = model.config
    trained = {key: theirs.get(key, own[key] if usual is None else usual) for key, usual in UNSEEN.items()}
    other = [f"{key}={own[key]} for {value}" for key, value in trained.items() if value != own[key]]
    if other:
        rule = f"weights need the options they were trained with, those of {folder} too"
        raise ValueError(f"{rule}, got {', '.join(other)}")


def start_from(model: Any, source: Path | str, class_names: Sequence[str] = ()) -> list[str]:
    """Loads weights to start from, for the same or another set of classes, patch size or kind of attention.

    Args:
        model: A fresh FlashDiT; changed in place.
        source: A run or a checkpoint, whose average is meant; a folder of `save_pretrained`; or a file of
            weights in LightningDiT's or FlashDiT's layout.
        class_names: The model's, by which its classes find theirs where the source has names.

    Returns:
        What is new, and what was left out, in words.

    Raises:
        ValueError: If there are no weights, or they do not fit.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"weights must be a run, a checkpoint, a model folder or a file, got {path}")
    rows = None
    if path.is_dir():
        path = path if (path / "config.json").is_file() else find_average(path, "weights")
        check_unseen(model, path)
        if class_names and (path.parent / STATE).is_file():
            rows = same_classes(class_names, read_state(path.parent).get("class_names") or ())
    return fit_weights(model, read_tensors(path), rows)
