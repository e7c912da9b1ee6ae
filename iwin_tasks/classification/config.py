"""The whole configuration of a classifier's run: composed, loaded from YAML and key=value, checked."""

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
from iwin_tasks.classification.augmentation import AugmentationOptions
from iwin_tasks.classification.data import CLASSIFICATION_DATASETS
from iwin_tasks.classification.model import check_classifier_model, check_takes_pictures

DEFAULT_CLASSIFIER = "iwin/digits_32"
"""The shipped configuration of a run that names none."""


@dataclass(kw_only=True)
class ClassifierConfig:
    """Everything a classifier's run is made from."""

    seed: int = 0
    """Of everything random in training."""
    run: RunOptions = field(default_factory=RunOptions)
    data: dict[str, Any] = field(default_factory=dict, metadata={REGISTRY: CLASSIFICATION_DATASETS})
    """`{name, **options}`."""
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    model: dict[str, Any] = field(default_factory=dict)
    """`{name, **options}`: a timm entry point and the fields of IwinConfig that differ from its own."""
    weights: str | None = None
    """What training starts from: a file of weights, or a run whose average is meant; None starts fresh."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)


def load_classifier_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> ClassifierConfig:
    """Returns the checked configuration of a YAML file and what the command line says otherwise.

    Args:
        path: YAML that states what differs from the defaults, or a shipped one's name; None means
            iwin/digits_32.
        overrides: `key=value` texts with dotted keys.

    Raises:
        ValueError: If the file, a key or a value is invalid; an unknown key names the nearest known one.
    """
    config = read_settings(path or DEFAULT_CLASSIFIER, overrides, ClassifierConfig)
    check_classifier_config(config)
    return config


def check_classifier_config(config: ClassifierConfig) -> None:
    """Raises ValueError for options that are invalid or do not fit each other, before anything is built."""
    check_run(config)
    CLASSIFICATION_DATASETS.options(config.data)
    check_classifier_model(config.model)
    check_takes_pictures(config.model)
