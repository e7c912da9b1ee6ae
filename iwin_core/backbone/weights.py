"""How the authors' checkpoints are read: strictly, and at another input size with every new tensor named."""

from __future__ import annotations

import logging
import math
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iwin_core.backbone.backbone import IwinTransformer, initialise
from iwin_core.backbone.config import BACKBONE_SIZES, SMALL_1K_HEADS, stage_grids
from iwin_core.backbone.resize import resize_bicubic

logger = logging.getLogger(__name__)

CONVOLUTION = re.compile(r"(?P<block>.*)\.dwconv\.depthwise\.(weight|bias)")
HEAD = ("head.weight", "head.bias")
LAST_NORM = ("norm.weight", "norm.bias")
MAP_NORM = re.compile(r"norm\d+\.(weight|bias)")
CONTAINERS = ("model", "state_dict")  # of classification, and of detection and segmentation
ABSOLUTE = "absolute_pos_embed"
TABLES = (ABSOLUTE, "relative_position_bias_table")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
TRAINER_CONFIG = "yacs.config.CfgNode"  # Swin's trainer pickles one beside the weights; it is read as a dict
LISTED = 5  # names in an error; a wrong file has hundreds


@dataclass(kw_only=True)
class LoadReport:
    """What a checkpoint did not hold as the model has it; everything else was loaded as it is."""

    new: tuple[str, ...] = ()
    """Convolutions that this input size needs and the checkpoint's did not: zeros, so the identity."""
    resized: tuple[str, ...] = ()
    """Position tables of another size: bicubic."""
    reinitialised: tuple[str, ...] = ()
    """A head for another number of classes, or the norms of a dense backbone's maps: fresh."""
    left_out: tuple[str, ...] = ()
    """What the checkpoint has and the model does not need: its head, the norm before it."""


def load_official_checkpoint(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any]
) -> LoadReport:
    """Loads released weights, or one's own, into a model of the same or another input size and class count.

    Head counts leave no trace in the shapes: the released Iwin-S 1K weights need `num_heads=(3, 4, 8, 16)`.
    A dense backbone takes a classifier's weights too; the norms of its maps are then fresh.

    Args:
        model: Unchanged if anything is refused. An IwinTransformer, or any model that has the released names
            or a method `official_state(given)`: the tensors by its own names, and the names left out.
        source: A torch file or .safetensors, or a state dict; the names at the top, under `model` or under
            `state_dict`.

    Returns:
        What had to be made up, by name.

    Raises:
        ValueError: If the file is unreadable, or it does not hold exactly this model's weights.
    """
    given = source if isinstance(source, Mapping) else read_file(Path(source))
    tensors = unwrap_checkpoint(given)
    state, report = (
        fit_tensors(model, tensors) if isinstance(model, IwinTransformer) else fit_task(model, tensors)
    )
    model.load_state_dict(state)
    for what, names in vars(report).items():
        if names:
            logger.info("loading weights: %s %s", what.replace("_", " "), ", ".join(names))
    return report


def read_file(path: Path) -> Mapping[str, Any]:
    """Returns what a torch file or .safetensors holds, on the CPU: tensors and plain values alone."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # only here: iwin_core runs without

            return load_file(path)
        with torch.serialization.safe_globals([(OrderedDict, TRAINER_CONFIG)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as it has readers
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"it holds a {found[1]}, not tensors alone" if found else "it is no torch file"
        raise ValueError(
            f"weights must be a whole torch file or .safetensors, got {path}: {reason}"
        ) from error


def unwrap_checkpoint(given: Any) -> dict[str, Tensor]:
    """Returns the tensors by name, out of what holds them, without the prefixes of wrappers."""
    if isinstance(given, Mapping):
        held = (given[name] for name in CONTAINERS if isinstance(given.get(name), Mapping))
        given = next(held, given)
    rule = "weights must be tensors by name, at the top or under 'model' or 'state_dict'"
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{rule}, got {'nothing' if isinstance(given, Mapping) else type(given).__name__}")
    strange = [str(name) for name, value in given.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{rule}, got something else under {listed(strange)}")
    state = dict(given)
    while prefix := next((p for p in WRAPPER_PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def fit_tensors(model: IwinTransformer, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LoadReport]:
    """Returns weights of exactly the model's names and shapes, and what was made up for them.

    Args:
        model: Only read.
        given: Tensors by the released names.

    Raises:
        ValueError: Naming what is missing, left over or of another shape.
    """
    wanted = model.state_dict()
    new = [name for name in wanted if name not in given and lacks_convolution(name, given)]
    left_out = [name for name in given if name in HEAD and model.num_classes == 0]
    map_norms = {}
    if model.config.feature_norms and all(name in given for name in LAST_NORM):
        left_out += LAST_NORM
        map_norms = fresh_norms(wanted)
        warn_of_heads(model)
    state = {name: given[name] for name in wanted if name in given}
    state |= {name: torch.zeros_like(wanted[name]) for name in new}
    resized = resize_tables(state, wanted, stage_grids(model.config)[0])
    fresh = fresh_head(state, wanted)
    state |= resized | fresh | map_norms
    check_exact(state, wanted, [name for name in given if name not in left_out])
    fresh |= map_norms
    return state, LoadReport(
        new=tuple(new), resized=tuple(resized), reinitialised=tuple(fresh), left_out=tuple(left_out)
    )


def fit_task(model: nn.Module, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LoadReport]:
    """Returns weights of exactly a task's model's names and shapes, and what was left out."""
    translate = getattr(model, "official_state", None)
    state, left_out = translate(given) if translate else (given, ())
    check_exact(state, model.state_dict(), list(state))
    return dict(state), LoadReport(left_out=tuple(left_out))


def check_exact(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], given: Sequence[str]) -> None:
    """Raises ValueError unless there is each tensor that a model has, in its shape, and no other.

    Args:
        state: What is to be loaded.
        wanted: The model's weights.
        given: Names of what came and was not left out.
    """
    faults = {
        "missing": [name for name in wanted if name not in state],
        "left over": [name for name in given if name not in wanted],
        "of another shape": [
            f"{name} {tuple(value.shape)} for {tuple(wanted[name].shape)}"
            for name, value in state.items()
            if name in wanted and value.shape != wanted[name].shape
        ],
    }
    if any(faults.values()):
        came = "; ".join(f"{what}: {listed(names)}" for what, names in faults.items() if names)
        raise ValueError(f"weights must be exactly the model's, got {came}")


def fresh_norms(wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns scales of 1 and shifts of 0 for the norms of a dense backbone's maps."""
    return {
        name: torch.full_like(value, float(name.endswith("weight")))
        for name, value in wanted.items()
        if MAP_NORM.fullmatch(name)
    }


def warn_of_heads(model: IwinTransformer) -> None:
    """Says that the released classification weights have other heads, where the model is the small one."""
    config, small = model.config, BACKBONE_SIZES["small"]
    heads = tuple(config.num_heads)
    is_small = (config.embed_dim, tuple(config.depths)) == (small["embed_dim"], small["depths"])
    if is_small and heads != SMALL_1K_HEADS:
        what = (
            "loading weights: the released Iwin-S 1K classification weights have heads %s, this model has %s"
        )
        logger.warning(what, SMALL_1K_HEADS, heads)


def lacks_convolution(name: str, given: Mapping[str, Tensor]) -> bool:
    """Returns whether a name is of the convolution of a block that the checkpoint has without one."""
    found = CONVOLUTION.fullmatch(name)
    if found is None:
        return False
    names = [other for other in given if other.startswith(f"{found['block']}.")]
    return bool(names) and not any(CONVOLUTION.fullmatch(other) for other in names)


def resize_tables(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], grid: Sequence[int]
) -> dict[str, Tensor]:
    """Returns the position tables that come at another size, bicubic at the model's.

    Args:
        state: What was given; a table of another size is of a square map or window.
        wanted: The model's weights.
        grid: Sides of the model's first map, which the absolute table is for.
    """
    resized = {}
    for name, table in state.items():
        if not name.endswith(TABLES) or table.shape == wanted[name].shape:
            continue
        rows = table.flatten(0, -2)  # (n, c)
        side = math.isqrt(len(rows))
        if side * side == len(rows) and rows.shape[-1] == wanted[name].shape[-1]:
            sides = grid if name == ABSOLUTE else (math.isqrt(len(wanted[name])),) * 2
            square = rows.float().unflatten(0, (side, side))[None]
            resized[name] = resize_bicubic(square, sides).reshape(wanted[name].shape)
    return resized


def fresh_head(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a newly initialised head if the one given differs from the model's in its classes alone."""
    if not all(name in state for name in HEAD):
        return {}
    (classes, dim), (given_classes, given_dim) = (source[HEAD[0]].shape for source in (wanted, state))
    if classes == given_classes or dim != given_dim:
        return {}
    head = nn.Linear(dim, classes)
    initialise(head)
    return {
        name: value.to(wanted[name])
        for name, value in zip(HEAD, (head.weight.data, head.bias.data), strict=True)
    }


def listed(names: Sequence[str]) -> str:
    """Returns names with commas between; of very many the first ones and how many more."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
