"""The whole configuration of a segmenter's run: composed, loaded from YAML and key=value, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashdit.shared.settings import REGISTRY, read_settings
from flashdit.training.ema import EmaOptions
from flashdit.training.optim import OptimizerOptions
from flashdit.training.options import RunOptions, TrainingOptions, check_run
from flashdit.training.tracking import TrackingOptions
from iwin_tasks.segmentation.augmentation import PixelAugmentation
from iwin_tasks.segmentation.data import SEGMENTATION_DATASETS
from iwin_tasks.segmentation.inference import InferenceOptions
from iwin_tasks.segmentation.start import SegmenterOptions, make_segmenter

SCENES_SEGMENTER, ADE20K_SEGMENTER = "iwin/segment_scenes", "iwin/upernet_tiny"
"""The shipped configurations of a run that names none: without and with `data.path`."""


@dataclass(kw_only=True)
class SegmentationConfig:
    """Everything a segmenter's run is made from."""

    seed: int = 0
    """Of everything random in training."""
    run: RunOptions = field(default_factory=RunOptions)
    data: dict[str, Any] = field(default_factory=dict, metadata={REGISTRY: SEGMENTATION_DATASETS})
    """`{name, **options}`."""
    augmentation: PixelAugmentation = field(default_factory=PixelAugmentation)
    model: SegmenterOptions = field(default_factory=SegmenterOptions)
    weights: str | None = None
    """What training starts from: a run of `iwin segment` or `iwin classify`, a file of a whole segmenter or
    of a classifier, or `timm` for what timm has of the backbone; None starts fresh."""
    class_weights: list[float] | None = None
    """What a pixel of each class counts in the training loss; None counts all alike."""
    inference: InferenceOptions = field(default_factory=InferenceOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)


def load_segmentation_config(
    path: Path | str | None = None, overrides: Sequence[str] = ()
) -> SegmentationConfig:
    """Returns the checked configuration of a YAML file and what the command line says otherwise.

    Args:
        path: YAML that states what differs from the defaults, or a shipped one's name; None means
            iwin/segment_scenes, or where the overrides give `data.path` iwin/upernet_tiny.
        overrides: `key=value` texts with dotted keys.

    Raises:
        ValueError: If the file, a key or a value is invalid; an unknown key names the nearest known one.
    """
    has_path = any(text.startswith("data.path=") for text in overrides)
    default = ADE20K_SEGMENTER if has_path else SCENES_SEGMENTER
    config = read_settings(path or default, overrides, SegmentationConfig)
    check_segmentation_config(config)
    return config


def check_segmentation_config(config: SegmentationConfig) -> None:
    """Raises ValueError for options that are invalid or do not fit each other, before anything is built."""
    check_run(config)
    SEGMENTATION_DATASETS.options(config.data)
    make_segmenter(config.model, device="meta")
    weights = config.class_weights
    if weights is not None and (len(weights) != config.model.num_classes or not all(w > 0 for w in weights)):
        raise ValueError(
            f"class_weights must be {config.model.num_classes} positive numbers, one a class, got {weights}"
        )
