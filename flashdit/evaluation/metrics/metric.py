"""What a metric is: what it reads, how it is computed, and all that tables, plots and help need of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from torch import Tensor

from flashdit.evaluation.features.extractor import Extractor
from flashdit.evaluation.features.statistics import ImageStatistics
from flashdit.shared.registry import Registry

ScoreValue = TypeVar("ScoreValue")


class Unavailable(Exception):
    """Says why these statistics give no such score."""


Compute = Callable[[ImageStatistics, ImageStatistics], tuple[float | Unavailable, ...]]
"""(samples, reference) → a number for each score, or why there is none."""

METRICS: Registry[Metric] = Registry("metric", "flashdit.metrics")


class ScoreName(NamedTuple):
    """What a score is called under one extractor.

    Attributes:
        stem: Its key in metrics.json and metrics.jsonl, before the number of images.
        label: Its name in tables and plots.
        column: Its column in the CSV.
        counted: Whether the key carries the number of images.
    """

    stem: str
    label: str
    column: str
    counted: bool


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number that a metric reports; `{extractor}` in a text stands for the extractor's name.

    Attributes:
        key: Its name in code and in sweep.json.
        label: Its name in tables and plots; None is the key.
        stem: Its key in metrics.json, before the number of images; None is the key.
        inception: (stem, label) under Inception, where they differ, as FID is Inception's alone.
        column: Its column in the CSV; None is the key.
        counted: Whether it moves with the number of images, which its key in metrics.json then carries.
        better: Which values are better, `lower` or `higher`; None for a spread, which no plot shows.
        panel: Scores of one panel share a plot in a sweep; None is a plot of its own.
    """

    key: str
    label: str | None = None
    stem: str | None = None
    inception: tuple[str, str] | None = None
    column: str | None = None
    counted: bool = False
    better: str | None = None
    panel: str | None = None

    def name(self, extractor: Extractor) -> ScoreName:
        """Returns what it is called under an extractor."""
        stem, label = self.stem or self.key, self.label or self.key
        if extractor.is_inception and self.inception:
            stem, label = self.inception
        label = label.replace("{extractor}", extractor.name)
        return ScoreName(stem, label, self.column or self.key, self.counted)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric of `METRICS`: `METRICS.add(name, Metric(...))` is all that a new one takes.

    Attributes:
        compute: (samples, reference) → a number for each score, or an `Unavailable` in its place; raises it
            where there is none at all.
        needs: The parts of `collect` that it reads: `moments`, `spatial`, `pool` or `logits`.
        scores: What it reports.
        order: Where it stands in tables and plots; of equal ones the names decide.
        by_default: Whether it is computed unless metrics are named.
        needs_classes: Whether the extractor's logits must be over the samples' own classes.
        least_images: How many images it takes on each side.
        together: (metric, compute): with that metric wanted too, this computes the scores of both, its own
            first.
        cautions: (samples, reference) → what makes its scores hard to compare.
    """

    compute: Compute
    needs: tuple[str, ...]
    scores: tuple[Score, ...]
    order: int = 100
    by_default: bool = True
    needs_classes: bool = False
    least_images: int = 2
    together: tuple[str, Compute] | None = None
    cautions: Callable[[ImageStatistics, ImageStatistics], list[str]] | None = None


def known(value: ScoreValue | None, statistics: ImageStatistics, what: str) -> ScoreValue:
    """Returns the value, or raises `Unavailable` with what the statistics lack."""
    if value is None:
        raise Unavailable(f"'{statistics.name}' has no {what}")
    return value


def pool_rows(statistics: ImageStatistics) -> Tensor:
    """Returns the pool features of every image."""
    return known(statistics.pool, statistics, "images, only statistics")
