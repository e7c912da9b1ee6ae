"""Any backbone of four maps for dense tasks: an Iwin Transformer, another timm model, or a module."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from iwin_core.backbone.config import BACKBONE_SIZES, IwinConfig
from iwin_core.backbone.features import IwinFeatures
from iwin_core.backbone.timm_models import variants
from iwin_core.backbone.weights import listed

MAPS = 4
PROBE = 64
"""Side of the zero image that shows what maps a backbone gives, in pixels."""
_LONGEST_REASON = 200  # characters of what timm says


class ChannelsFirst(nn.Module):
    """(B, 3, H, W) → the maps of a timm model that has its channels last, NCHW."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns the maps."""
        return [m.movedim(-1, 1).contiguous() for m in self.model(x)]


def make_dense_backbone(
    backbone: str | nn.Module,
    options: Mapping[str, Any] | None = None,
    *,
    drop_path_rate: float | None = None,
) -> tuple[nn.Module, list[int]]:
    """Returns a module (B, 3, H, W) → four NCHW maps, the finest first, and the channels of each.

    An Iwin Transformer is an `IwinFeatures` of the entry point's size and window, with the heads of the
    paper's Table III: of the small one the released classification weights have others. Of another timm model
    the last four maps are taken.

    Args:
        backbone: A timm name, or a module that gives four NCHW maps.
        options: Of an Iwin Transformer fields of IwinConfig, of another what its entry point takes.
        drop_path_rate: An Iwin Transformer's, where the options do not say; None means the classifier's.

    Raises:
        ValueError: If the name or an option is unknown, or there are other than four maps.
    """
    options = dict(options or {})
    if isinstance(backbone, nn.Module):
        if options:
            raise ValueError(f"backbone options go with a timm name, got {listing(options)} for a module")
        model = backbone
    elif backbone in variants():
        strange = options.keys() - {field.name for field in fields(IwinConfig)}
        if strange:
            raise ValueError(f"options of {backbone} must be fields of IwinConfig, got {listing(strange)}")
        variant = variants()[backbone]
        given: dict[str, Any] = dict(BACKBONE_SIZES[variant["size"]])
        given |= {"img_size": variant["side"], "window_size": variant["window"]}
        if drop_path_rate is not None:
            given["drop_path_rate"] = drop_path_rate
        model = IwinFeatures(**(given | options))
        check_maps(len(model.channels))
        return model, model.channels
    elif timm.is_model(backbone):
        taken: dict[str, Any] = {"out_indices": (-4, -3, -2, -1), **options}
        model = timm.create_model(backbone, features_only=True, **taken)
    else:
        near = difflib.get_close_matches(backbone, timm.list_models(), 1)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise ValueError(f"backbone must be a module or a name that timm knows, got {backbone!r}{hint}")
    channels = map_channels(model)
    return ChannelsFirst(model) if getattr(model, "output_fmt", "NCHW") == "NHWC" else model, channels


def map_channels(model: nn.Module) -> list[int]:
    """Returns the channels of each of a backbone's four maps: as it says itself, or of a small zero image's.

    Raises:
        ValueError: If there are other than four maps, or they are no maps.
    """
    says = getattr(model, "channels", None) or getattr(model, "feature_info", None)
    if says is not None:
        channels = list(says if isinstance(says, list | tuple) else says.channels())
        check_maps(len(channels))
        return channels
    like = next(model.parameters(), torch.empty(0))
    was_training = model.training
    with torch.no_grad():
        maps = model.eval()(torch.zeros(1, 3, PROBE, PROBE, device=like.device, dtype=like.dtype))
    model.train(was_training)
    shapes = [tuple(m.shape) for m in maps] if isinstance(maps, list | tuple) else [tuple(maps.shape)]
    check_maps(len(shapes))
    if not all(len(shape) == 4 for shape in shapes):
        raise ValueError(f"backbone must give maps (B, C, H, W), got {', '.join(map(str, shapes))}")
    return [shape[1] for shape in shapes]


def check_maps(count: int) -> None:
    """Raises ValueError unless a backbone gives four maps."""
    if count != MAPS:
        raise ValueError(f"backbone must give {MAPS} maps, got {count}")


def listing(names: Any) -> str:
    """Returns names in order with commas between."""
    return ", ".join(sorted(names))


def pretrained_backbone(
    backbone: str, options: Mapping[str, Any], file: Path | str | None
) -> dict[str, Tensor]:
    """Returns the tensors of a timm backbone other than Iwin, with the weights that timm reads or downloads.

    timm passes over tensors that a file lacks; two backbones then differ in them.

    Args:
        backbone: A timm name.
        options: As `make_dense_backbone` takes them.
        file: A file of weights under the model's own names; None means what timm downloads.

    Raises:
        ValueError: If the weights cannot be read or are another model's.
    """
    overlay = {} if file is None else {"file": str(file)}
    given = {**options, "pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        first, second = (make_dense_backbone(backbone, given)[0].state_dict() for _ in range(2))
    except (RuntimeError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise ValueError(f"weights must be those of {backbone}, got {file or 'timm'}: {reason}") from error
    lacks = [name for name, value in first.items() if not value.equal(second[name])]
    if lacks:
        raise ValueError(f"weights must be those of {backbone}, got {file or 'timm'} without {listed(lacks)}")
    return first
