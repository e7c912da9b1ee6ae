"""The authors' detection weights by our names: mmdetection's names, and its background class."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

MASK_RCNN, CASCADE = "mask_rcnn", "cascade_mask_rcnn"
MMDET_PARTS = ("neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.")
CLASS_LAYER = re.compile(r"roi_head\.bbox_head\.(?P<stage>\d+\.)?fc_cls\.weight")
RENAMES = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"neck\.lateral_convs\.(\d+)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
        (r"neck\.fpn_convs\.(\d+)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
        (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
        (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
        (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
        (r"roi_head\.(bbox|mask)_head\.(?!\d)", r"roi_head.\1_head.0."),  # one stage is unnumbered
        (r"roi_head\.bbox_head\.(\d+)\.shared_convs\.(\d+)\.conv\.", r"roi_heads.box_head.\1.\2.0."),
        (r"roi_head\.bbox_head\.(\d+)\.shared_convs\.(\d+)\.bn\.", r"roi_heads.box_head.\1.\2.1."),
        (r"roi_head\.bbox_head\.(\d+)\.fc_cls\.", r"roi_heads.box_predictor.\1.cls_score."),
        (r"roi_head\.bbox_head\.(\d+)\.fc_reg\.", r"roi_heads.box_predictor.\1.bbox_pred."),
        (r"roi_head\.mask_head\.(\d+)\.convs\.(\d+)\.conv\.", r"roi_heads.mask_head.\1.\2.0."),
        (r"roi_head\.mask_head\.(\d+)\.upsample\.", r"roi_heads.mask_predictor.\1.conv5_mask."),
        (r"roi_head\.mask_head\.(\d+)\.conv_logits\.", r"roi_heads.mask_predictor.\1.mask_fcn_logits."),
    )
]
LINEARS = re.compile(r"roi_head\.bbox_head\.(\d+)\.shared_fcs\.(\d+)\.")
LINEAR_NAMES = {MASK_RCNN: {"0": "fc6", "1": "fc7"}, CASCADE: {"0": "5"}}
WRAPPED_BODY = "backbone.body.model."
"""Where timm puts a network whose maps it hands out."""


def from_mmdet(state: Mapping[str, Tensor], kind: str, wanted: Collection[str]) -> dict[str, Tensor]:
    """Returns mmdetection's weights by the names of our detector; others as they are.

    Background is the last class there and the first here.

    Args:
        state: Tensors by name.
        kind: Which detector ours is.
        wanted: Its names.

    Raises:
        ValueError: If they are of another detector.
    """
    if not any(name.startswith(MMDET_PARTS) for name in state):
        return dict(state)
    theirs = file_kind(state)
    if theirs != kind:
        raise ValueError(f"weights must be of a {kind}, got an mmdetection file of {theirs}")
    wrapped = any(name.startswith(WRAPPED_BODY) for name in wanted)
    body = WRAPPED_BODY if wrapped else "backbone.body."
    renamed = {}
    for name, value in state.items():
        new = f"{body}{name.removeprefix('backbone.')}" if name.startswith("backbone.") else name
        for pattern, replacement in RENAMES:
            new = pattern.sub(replacement, new)
        new = LINEARS.sub(
            lambda m: f"roi_heads.box_head.{m[1]}.{LINEAR_NAMES[kind].get(m[2], f'shared_fcs.{m[2]}')}.", new
        )
        if ".cls_score." in new:
            value = torch.cat([value[-1:], value[:-1]])
        renamed[new] = value
    return renamed


def file_kind(state: Mapping[str, Tensor]) -> str:
    """Returns which of our detectors mmdetection's names are of, or what names another one's heads."""
    found = next((m for m in map(CLASS_LAYER.fullmatch, state) if m), None)
    if found is None:
        return "other heads"
    if not any(name.startswith("roi_head.mask_head.") for name in state):
        return "a detector without masks"
    return CASCADE if found["stage"] else MASK_RCNN
