"""Options of scoring the average's samples while training; importing them imports no extractor."""

from __future__ import annotations

from dataclasses import dataclass, field

from flashdit.data.sources import MOST_PIXELS
from flashdit.evaluation.metrics.metric import METRICS
from flashdit.sampling.classes import check_labels_fit
from flashdit.shared.registry import unknown

LABEL_MODES = ("balanced", "random", "reference")


@dataclass(kw_only=True)
class EvaluationOptions:
    """Options of scoring the EMA's samples while training, checked when made."""

    every: int = 0
    """Steps between evaluations; 0 makes none."""
    num_images: int = 5_000
    """Samples, shared among all processes; a score compares only with others of the same number."""
    labels: str = "balanced"
    """Of the samples: `balanced`, `random`, or `reference`, in the shares that the reference has."""
    reference: str | None = None
    """An npz of ADM's or of make-reference, a folder, or a data set that brings one; None means what the
    run's own data set brings."""
    extractor: str | None = None
    """As `flashdit eval --extractor` has it; None means the one that the reference's data set brings or its
    npz names, or else Inception."""
    weights: str | None = None
    """The extractor's weights file."""
    image_size: int | None = None
    """Side of the square that images of a reference folder are cropped to, in pixels; None means that of the
    samples."""
    metrics: list[str] = field(default_factory=lambda: ["fid"])
    """As `flashdit eval --metrics` has them."""

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.every < 0:
            raise ValueError(f"every must not be negative, got {self.every}")
        if self.num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {self.num_images}")
        check_labels_fit(self.num_images)
        if self.labels not in LABEL_MODES:
            raise unknown("labels", self.labels, LABEL_MODES)
        if self.image_size is not None and not 1 <= self.image_size <= MOST_PIXELS:
            raise ValueError(f"image_size must be from 1 to {MOST_PIXELS}, got {self.image_size}")
        if not self.metrics:
            raise ValueError(f"metrics must name one or more of {', '.join(METRICS.names())}, got []")
        for name in self.metrics:
            if name not in METRICS.names():
                raise unknown("metric", name, METRICS.names())
