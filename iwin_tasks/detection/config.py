"""The whole configuration of a detector's run: composed, loaded from YAML and key=value, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashdit.shared.settings import REGISTRY, read_settings
from flashdit.training.ema import EmaOptions
from flashdit.training.optim import OptimizerOptions
from flashdit.training.options import RunOptions, TrainingOptions, check_run
from flashdit.training.tracking import TrackingOptions
from iwin_tasks.detection.augmentation import ObjectAugmentation
from iwin_tasks.detection.data import DETECTION_DATASETS
from iwin_tasks.detection.model import DetectorSpec, check_detector

DEFAULT_DETECTOR = "iwin/detect_scenes"
"""The shipped configuration of a run that names none."""
PAPER_DETECTOR = "iwin/mask_rcnn_tiny_1x"
"""That of one that gives `data.path`, or the authors' weights."""


@dataclass(kw_only=True)
class DetectionConfig:
    """Everything a detector's run is made from."""

    seed: int = 0
    """Of everything random in training."""
    run: RunOptions = field(default_factory=RunOptions)
    data: dict[str, Any] = field(default_factory=dict, metadata={REGISTRY: DETECTION_DATASETS})
    """`{name, **options}`; the classes are the data's categories."""
    augmentation: ObjectAugmentation = field(default_factory=ObjectAugmentation)
    model: DetectorSpec = field(default_factory=DetectorSpec)
    weights: str | None = None
    """What training starts from: the authors' file of a detector or a classifier, or a run of either, whose
    average is meant; None starts fresh."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)


def load_detection_config(
    path: Path | str | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> DetectionConfig:
    """Returns the checked configuration of a YAML file and what the command line says otherwise.

    Args:
        path: YAML that states what differs from the defaults, or a shipped one's name; None means
            iwin/detect_scenes, or where the overrides give `data.path` iwin/mask_rcnn_tiny_1x.
        overrides: `key=value` texts with dotted keys.
        options: Values by dotted key that options of a command gave, before the overrides.

    Raises:
        ValueError: If the file, a key or a value is invalid; an unknown key names the nearest known one.
    """
    has_path = any(text.startswith("data.path=") for text in overrides)
    config = read_settings(
        path or (PAPER_DETECTOR if has_path else DEFAULT_DETECTOR), overrides, DetectionConfig, options
    )
    check_detection_config(config)
    return config


def check_detection_config(config: DetectionConfig) -> None:
    """Raises ValueError for options that are invalid or do not fit each other, before anything is built."""
    check_run(config)
    DETECTION_DATASETS.options(config.data)
    check_detector(config.model)
    if config.training.compile == "model":
        raise ValueError(
            "training.compile must be none or block for a detector, whose boxes differ in number, got model"
        )
