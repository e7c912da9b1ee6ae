"""The detectors by name, with the settings of the authors' configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from flashdit.shared.registry import unknown
from iwin_core.backbone.dense import make_dense_backbone
from iwin_core.backbone.timm_models import variants
from iwin_tasks.detection.detector import Detector
from iwin_tasks.detection.mmdet_names import CASCADE, MASK_RCNN
from iwin_tasks.detection.proposals import ProposalNetwork
from iwin_tasks.detection.pyramid import STRIDES, PyramidBackbone
from iwin_tasks.detection.roi_heads import CascadeRoIHeads, RoIOptions, StageOptions


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """What the two detectors differ in."""

    roi: RoIOptions
    kept: int
    """Proposals of an image that training keeps."""
    beta: float
    """Where the proposals' smooth L1 loss becomes linear; 0 means L1."""
    inside: bool
    """Whether anchors that leave the image are left out of training."""


DETECTORS = {
    MASK_RCNN: DetectorOptions(
        roi=RoIOptions(
            stages=(StageOptions(iou=0.5, offset_weights=(10, 10, 5, 5)),),
            convolutions=False,
            giou=False,
            match_best=True,
        ),
        kept=1000,
        beta=0.0,
        inside=False,
    ),
    CASCADE: DetectorOptions(
        roi=RoIOptions(
            stages=(
                StageOptions(iou=0.5, offset_weights=(10, 10, 5, 5)),
                StageOptions(iou=0.6, offset_weights=(20, 20, 10, 10), loss_weight=0.5),
                StageOptions(
                    iou=0.7,
                    offset_weights=(1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067),
                    loss_weight=0.25,
                ),
            ),
            convolutions=True,
            giou=True,
            match_best=False,
        ),
        kept=2000,
        beta=1 / 9,
        inside=True,
    ),
}
DROP_PATHS = {"tiny": 0.2, "small": 0.2, "base": 0.3}  # of the configurations of 36 epochs


def build_detector(
    name: str,
    backbone: str | nn.Module,
    num_classes: int,
    *,
    fpn_channels: int = 256,
    fc_channels: int = 1024,
    head_channels: int = 256,
    backbone_options: Mapping[str, Any] | None = None,
) -> Detector:
    """Returns a detector, freshly initialised; `load_official_checkpoint` takes it.

    Args:
        name: `mask_rcnn` or `cascade_mask_rcnn`.
        backbone: A timm name, of which the last four maps are taken, or a module that gives four maps
            (B, C, h, w) of strides 4, 8, 16 and 32. An Iwin Transformer has heads and drop path of the
            authors' detectors, whose small one has not the heads of the classification weights.
        num_classes: Of objects, background not counted: 80 for COCO.
        fpn_channels: Of the maps of the pyramid.
        fc_channels: Width of the box heads' Linears.
        head_channels: Of the convolutions of box and mask heads.
        backbone_options: Where `backbone` is a name: fields of IwinConfig of an Iwin Transformer, of others
            what the entry point takes.

    Raises:
        ValueError: If a name, a number or the backbone is invalid.

    Source: Iwin paper (arXiv 2507.18405), Table II; Mask R-CNN (arXiv 1703.06870) and Cascade R-CNN (arXiv
        1712.00726) as the authors' configurations set them.
    """
    if name not in DETECTORS:
        raise unknown("detector", name, DETECTORS)
    numbers = {
        "num_classes": num_classes,
        "fpn_channels": fpn_channels,
        "fc_channels": fc_channels,
        "head_channels": head_channels,
    }
    for key, number in numbers.items():
        if number < 1:
            raise ValueError(f"{key} must be at least 1, got {number}")
    options = DETECTORS[name]
    size = variants()[backbone]["size"] if isinstance(backbone, str) and backbone in variants() else ""
    body, widths = make_dense_backbone(backbone, backbone_options, drop_path_rate=DROP_PATHS.get(size))
    rpn = ProposalNetwork(
        fpn_channels,
        (*STRIDES, 2 * STRIDES[-1]),
        kept=options.kept,
        beta=options.beta,
        inside=options.inside,
    )
    roi_heads = CascadeRoIHeads(
        options.roi,
        STRIDES,
        num_classes=num_classes,
        channels=fpn_channels,
        width=fc_channels,
        hidden=head_channels,
    )
    return Detector(name, num_classes, PyramidBackbone(body, widths, fpn_channels), rpn, roi_heads)
