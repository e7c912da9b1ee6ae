"""The detector of a run: what it is made of, what it starts from, and what a checkpoint holds of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import timm
from torch import Tensor, nn

from flashdit.data.sources import MOST_PIXELS
from flashdit.shared.process import without_memory
from flashdit.shared.registry import check_finite, check_type, make_options, unknown
from flashdit.shared.runs import find_average, find_checkpoint
from flashdit.shared.weights import read_model_config, read_tensors
from iwin_core import IwinConfig, IwinFeatures, load_official_checkpoint
from iwin_core.backbone.config import BACKBONE_SIZES
from iwin_core.backbone.dense import pretrained_backbone
from iwin_core.backbone.timm_models import variants
from iwin_core.backbone.weights import read_file, unwrap_checkpoint
from iwin_tasks.detection.boxes import ANCHOR_SCALE, StrideAnchors
from iwin_tasks.detection.build import DETECTORS, build_detector
from iwin_tasks.detection.coco import Categories
from iwin_tasks.detection.detector import LONG_SIDE, SHORT_SIDE, Detector
from iwin_tasks.detection.mmdet_names import MASK_RCNN, MMDET_PARTS, file_kind

OWN_PARTS = ("rpn.", "roi_heads.")
FROM_TIMM = "timm"
"""Of `weights`: what timm itself has."""
CLASS_SCORES = "roi_heads.box_predictor.0.cls_score.weight"
MOST_BOXES = 100_000
BLOCK = re.compile(r"backbone\.layers\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\.")


@dataclass(kw_only=True)
class DetectorSpec:
    """What a detector is made of; the defaults are the paper's Mask R-CNN on Iwin-T."""

    kind: str = MASK_RCNN
    """`mask_rcnn` or `cascade_mask_rcnn`."""
    backbone: str = "iwin_tiny_patch4_window7_224"
    """A timm name; of a model with more than four maps the last four are taken."""
    backbone_options: dict[str, Any] = field(default_factory=dict)
    """Fields of IwinConfig that differ from the entry point's; of another timm model what its entry point
    takes."""
    fpn_channels: int = 256
    """Of the maps of the pyramid."""
    fc_channels: int = 1024
    """Width of the box heads' Linears."""
    head_channels: int = 256
    """Of the convolutions of box and mask heads."""
    anchor_scale: float = float(ANCHOR_SCALE)
    """Side of a square anchor by the stride of its map."""
    sampled_boxes: int = 512
    """Boxes of an image that a stage is trained on, a quarter of them of objects at most."""
    proposals: int | None = None
    """Boxes of an image that the proposal network hands on, and of each map before overlaps are removed; None
    means the authors' 1000, in training 2000 of each map, and 2000 handed on for a cascade."""
    short_side: int = SHORT_SIDE
    """What a scored image's shorter side is resized to, in pixels."""
    long_side: int = LONG_SIDE
    """Of its longer side at most, in pixels, which then decides."""

    def __post_init__(self):
        check_finite(self, "model.")
        if self.kind not in DETECTORS:
            raise unknown("model.kind", self.kind, DETECTORS)
        if self.anchor_scale <= 0:
            raise ValueError(f"model.anchor_scale must be positive, got {self.anchor_scale}")
        for name in ("sampled_boxes", "proposals"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST_BOXES:
                raise ValueError(f"model.{name} must be from 1 to {MOST_BOXES}, got {value}")
        if not 1 <= self.short_side <= self.long_side <= MOST_PIXELS:
            raise ValueError(
                f"model.short_side and model.long_side must be 1 ≤ short ≤ long ≤ {MOST_PIXELS}, "
                f"got {self.short_side} and {self.long_side}"
            )


def check_detector(spec: DetectorSpec) -> None:
    """Raises ValueError unless a detector can be built of a spec; nothing takes memory."""
    if not timm.is_model(spec.backbone):
        raise unknown("model.backbone", spec.backbone, timm.list_models(f"{spec.backbone[:4]}*"))
    if spec.backbone in variants():
        types = get_type_hints(IwinConfig)
        for key, value in spec.backbone_options.items():
            if key not in types:
                raise unknown("option of model.backbone_options", key, types)
            check_type(f"model.backbone_options.{key}", value, types[key])
    without_memory(lambda: make_detector(spec, 1))


def make_detector(spec: DetectorSpec, num_classes: int) -> Detector:
    """Returns the detector of a spec, freshly initialised.

    Args:
        spec: What it is made of.
        num_classes: Of objects.

    Raises:
        ValueError: If a name or an option is invalid.
    """
    if strange := [name for name in spec.backbone_options if name.startswith("pretrained")]:
        raise ValueError(
            f"model.backbone_options must load no weights, which `weights` names, got {', '.join(strange)}"
        )
    try:
        model = build_detector(
            spec.kind,
            spec.backbone,
            num_classes,
            fpn_channels=spec.fpn_channels,
            fc_channels=spec.fc_channels,
            head_channels=spec.head_channels,
            backbone_options=spec.backbone_options,
        )
    except TypeError as error:  # of an entry point that has not the option
        raise ValueError(f"model.backbone_options must be what {spec.backbone} takes: {error}") from error
    model.transform.min_size, model.transform.max_size = (spec.short_side,), spec.long_side
    model.roi_heads.fg_bg_sampler.batch_size_per_image = spec.sampled_boxes
    if spec.proposals is not None:
        model.rpn.limit_boxes(spec.proposals)
    model.rpn.anchor_generator = StrideAnchors(model.rpn.strides, spec.anchor_scale)
    return model


def backbone_blocks(model: Detector) -> list[nn.Module]:
    """Returns the blocks of an Iwin backbone, none of another."""
    body = model.backbone.body
    return (
        [block for stage in body.stages() for block in stage.blocks] if isinstance(body, IwinFeatures) else []
    )


def load_detector_weights(
    model: Detector, spec: DetectorSpec, source: Path | str, *, whole: bool = False
) -> None:
    """Loads the weights that training starts from, or that are scored.

    Args:
        model: Changed in place. A classifier's weights are loaded into its backbone, a detector's into all
            of it.
        spec: That it was built from.
        source: A file, the authors' or one's own; a run of `iwin classify` or `iwin detect`, whose average is
            meant; of a backbone that is not Iwin a file that timm reads, or `timm` for what timm downloads.
        whole: Whether they must be a whole detector's.

    Raises:
        ValueError: If there are none, or they are of another detector, backbone or number of classes.
    """
    path = Path(source)
    is_iwin = spec.backbone in variants()
    if source == FROM_TIMM and not is_iwin and not whole:
        model.backbone.body.load_state_dict(pretrained_backbone(spec.backbone, spec.backbone_options, None))
        return
    if not path.exists():
        raise ValueError(f"weights must be a file of weights or a run, got {path}")
    if path.is_dir():
        tensors = read_tensors(find_average(path, "weights"))
    else:
        tensors = unwrap_checkpoint(read_file(path))
    if whole and not is_detector(tensors):
        raise ValueError(f"--eval-only needs the weights of a whole detector, got others in {path}")
    if not is_detector(tensors) and is_iwin:
        load_official_checkpoint(model.backbone.body, tensors)
        return
    if not is_detector(tensors):
        state = pretrained_backbone(spec.backbone, spec.backbone_options, path)
        model.backbone.body.load_state_dict(state)
        return
    state, _ = model.official_state(tensors)
    scores = state.get(CLASS_SCORES)
    if scores is not None and len(scores) != model.num_classes + 1:
        raise ValueError(
            f"weights must be of a detector of the data's {model.num_classes} classes, got one of "
            f"{len(scores) - 1} in {path}"
        )
    load_official_checkpoint(model, state)


def is_detector(tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether weights are a whole detector's and not a backbone's."""
    return any(name.startswith((*MMDET_PARTS, *OWN_PARTS)) for name in tensors)


def options_of_weights(source: Path | str) -> dict[str, Any]:
    """Returns what the authors' detection file says of its detector, by configuration key.

    That is the detector's name and, where it is a known one, the backbone's; nothing of other weights.
    """
    path = Path(source)
    if not path.is_file():
        return {}
    tensors = unwrap_checkpoint(read_file(path))
    found: dict[str, Any] = {}
    if any(name.startswith(MMDET_PARTS) for name in tensors) and (kind := file_kind(tensors)) in DETECTORS:
        found["model.kind"] = kind
    blocks = {(int(m["stage"]), int(m["block"])) for m in map(BLOCK.match, tensors) if m}
    depths = tuple(sum(stage == one for one, _ in blocks) for stage in range(4))
    stem = tensors.get("backbone.patch_embed.proj.weight")
    for size, about in BACKBONE_SIZES.items():
        if stem is not None and (len(stem), depths) == (about["embed_dim"], about["depths"]):
            found["model.backbone"] = f"iwin_{size}_patch4_window7_224"
    return found


def detector_config(spec: DetectorSpec, categories: Categories) -> dict[str, Any]:
    """Returns what config.json beside a detector's weights holds; `read_detector` takes it."""
    return {**asdict(spec), "categories": categories.listed()}


def read_detector(run: Path | str) -> tuple[Detector, Categories]:
    """Returns the averaged detector of a run or a checkpoint, in evaluation mode, and its categories.

    Raises:
        ValueError: If it is no run of `iwin detect`, or damaged.
    """
    checkpoint = find_checkpoint(run)
    config = read_model_config(checkpoint / "ema")
    categories = config.pop("categories", None)
    if categories is None or config.get("kind") not in DETECTORS:
        raise ValueError(f"--checkpoint must be a run of iwin detect, got {checkpoint} of something else")
    spec = make_options(DetectorSpec, config, "a detector")
    found = Categories(tuple(c["id"] for c in categories), tuple(c["name"] for c in categories))
    model = make_detector(spec, len(found))
    model.load_state_dict(read_tensors(find_average(checkpoint, "--checkpoint")))
    return model.eval(), found
