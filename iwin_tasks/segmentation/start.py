"""The segmenter of a run: built from its options, started from weights, read back from a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from flashdit.shared.runs import find_average
from flashdit.shared.weights import read_tensors
from iwin_core import IwinFeatures, load_official_checkpoint
from iwin_core.backbone.dense import pretrained_backbone
from iwin_core.backbone.weights import read_file, unwrap_checkpoint
from iwin_tasks.segmentation.model import DROPOUT, Segmenter, build_segmenter

BODY = "backbone."
TIMM = "timm"
"""Of `weights`: what timm itself has."""


@dataclass(kw_only=True)
class SegmenterOptions:
    """Options of a segmenter, as `build_segmenter` takes them."""

    kind: str = "upernet"
    """`upernet` or `semantic_fpn`."""
    backbone: str = "iwin_tiny_patch4_window7_224"
    """A timm name."""
    num_classes: int = 150
    """K, without what does not count."""
    channels: int | None = None
    """Of UPerNet's head, or of the Semantic FPN's neck; None means 512 and 256."""
    auxiliary_channels: int = 256
    """Of UPerNet's auxiliary head; 0 leaves it out."""
    dropout: float = DROPOUT
    """Share of channels dropped before the logits in training."""
    backbone_options: dict[str, Any] = field(default_factory=dict)
    """Fields of IwinConfig, or what another timm model takes."""


def make_segmenter(options: SegmenterOptions, device: str = "cpu") -> Segmenter:
    """Returns the segmenter of its options, freshly initialised.

    Args:
        options: Of the segmenter.
        device: Where its tensors are; `meta` has none.

    Raises:
        ValueError: If an option is invalid.
    """
    if strange := [name for name in options.backbone_options if name.startswith("pretrained")]:
        raise ValueError(
            f"model.backbone_options must load no weights, which `weights` names, got {', '.join(strange)}"
        )
    given = asdict(options)
    with torch.device(device):
        return build_segmenter(given.pop("kind"), given.pop("backbone"), given.pop("num_classes"), **given)


def load_start(
    model: Segmenter, options: SegmenterOptions, source: Path | str, *, whole: bool = False
) -> None:
    """Loads what training starts from, or what is tested.

    Args:
        model: Changed in place.
        options: That it was built from.
        source: `timm` for what timm downloads for the backbone; a run or a checkpoint of `iwin segment` or
            `iwin classify`, whose average is meant; a file of a whole segmenter, the authors' or one's own;
            or a classifier's file, for the backbone.
        whole: Whether they must be a whole segmenter's.

    Raises:
        ValueError: If there are none, or they are not this model's.
    """
    is_iwin = isinstance(model.backbone, IwinFeatures)
    if source == TIMM and not is_iwin and not whole:
        model.backbone.load_state_dict(pretrained_backbone(options.backbone, options.backbone_options, None))
        return
    path = Path(source)
    if not path.exists():
        raise ValueError(f"weights must be a file of weights or a run, got {path}")
    is_run = path.is_dir()
    tensors = read_tensors(find_average(path, "weights")) if is_run else unwrap_checkpoint(read_file(path))
    if any(name.startswith(BODY) for name in tensors):
        load_official_checkpoint(model, tensors)
    elif whole:
        raise ValueError(f"--eval-only needs the weights of a whole segmenter, got others in {path}")
    elif is_iwin:
        load_official_checkpoint(model.backbone, tensors)
    else:
        state = pretrained_backbone(options.backbone, options.backbone_options, path)
        model.backbone.load_state_dict(state)
