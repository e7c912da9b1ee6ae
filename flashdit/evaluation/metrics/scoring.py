"""Names of metrics → scores: which apply, what they read, their numbers and what to beware of."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

from flashdit.evaluation.features.extractor import Extractor
from flashdit.evaluation.features.statistics import ImageStatistics
from flashdit.evaluation.metrics.metric import METRICS, Compute, Score, ScoreName, Unavailable

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Scores:
    """Numbers by key; None where there is none, with the reason.

    Attributes:
        count: How many images were scored.
        values: Keys of the metrics' scores, in their order.
        reasons: Why a value is None.
    """

    count: int
    values: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def in_order(names: Iterable[str]) -> list[str]:
    """Returns names of metrics in the order of tables and plots.

    Raises:
        ValueError: If one is unknown, naming the nearest, or must be imported and does not.
    """
    return sorted(names, key=lambda name: (METRICS[name].order, name))


def scores_of(names: Iterable[str]) -> list[Score]:
    """Returns what the metrics report, in the order of tables and plots."""
    return [score for name in in_order(names) for score in METRICS[name].scores]


def score_names(names: Iterable[str], extractor: Extractor) -> dict[str, ScoreName]:
    """Returns by key what the metrics' scores are called under an extractor."""
    return {score.key: score.name(extractor) for score in scores_of(names)}


def default_metrics(knows_classes: bool) -> list[str]:
    """Returns every default metric that applies, whether or not the extractor knows the samples' classes.

    One that an outside package announces and does not import is left out, with a warning.
    """
    usable = []
    for name in METRICS.names():
        try:
            METRICS[name]
        except ValueError as error:
            logger.warning("left out: %s", error)
        else:
            usable.append(name)
    return [
        name
        for name in in_order(usable)
        if METRICS[name].by_default and (knows_classes or not METRICS[name].needs_classes)
    ]


def check_classes(names: Collection[str], unknown: str) -> None:
    """Raises ValueError for a metric that needs logits over the samples' classes, where they are unknown.

    Args:
        names: Keys of `METRICS`.
        unknown: Why they are; empty where the logits are over them.
    """
    for name in names:
        if METRICS[name].needs_classes and unknown:
            raise ValueError(f"{name} needs an extractor of the samples' own classes: {unknown}")


def parts_needed(names: Iterable[str]) -> set[str]:
    """Returns which parts of `collect` the metrics read."""
    return {part for name in names for part in METRICS[name].needs}


def computations(names: Iterable[str]) -> Iterator[tuple[tuple[Score, ...], Compute]]:
    """Yields (scores, what computes them); metrics that are cheaper together are computed together."""
    wanted = list(names)
    pairs = {
        name: together
        for name in wanted
        if (together := METRICS[name].together) is not None and together[0] in wanted
    }
    partners = {partner for partner, _ in pairs.values()}
    for name in wanted:
        if name in pairs:
            partner, compute = pairs[name]
            yield (*METRICS[name].scores, *METRICS[partner].scores), compute
        elif name not in partners:
            yield METRICS[name].scores, METRICS[name].compute


def compute_scores(
    names: Iterable[str], samples: ImageStatistics, reference: ImageStatistics, device: str = "cpu"
) -> Scores:
    """Returns every score that the statistics allow, and the reason for every other one.

    Args:
        names: Keys of `METRICS`.
        samples: What is scored.
        reference: What it is compared with.
        device: Where precision and recall are counted; changes no number.

    Raises:
        ValueError: If the input of a metric is invalid, such as fewer images than neighbours.
    """
    assert samples.count is not None
    scores = Scores(count=samples.count)
    if reference.pool is not None:  # the other set follows it
        reference = replace(reference, pool=reference.pool.to(device))
    for reported, compute in computations(names):
        keys = [score.key for score in reported]
        try:
            values = compute(samples, reference)
        except Unavailable as reason:
            values = (reason,) * len(keys)
        for key, value in zip(keys, values, strict=True):
            if not isinstance(value, Unavailable) and not math.isfinite(value):
                value = Unavailable(f"it came out as {value}")
            if isinstance(value, Unavailable):
                value, scores.reasons[key] = None, str(value)
            scores.values[key] = value
    return scores


def check_counts(names: Collection[str], num_samples: int, reference: ImageStatistics) -> None:
    """Raises ValueError for too few images for the metrics, before any sample is drawn."""
    least = max((METRICS[name].least_images for name in names), default=2)
    counts = {"samples": num_samples}
    if "pool" in parts_needed(names) and reference.pool is not None:
        counts["reference"] = len(reference.pool)
    if min(counts.values()) < least:
        found = " and ".join(f"{count:,} of the {side}" for side, count in counts.items())
        raise ValueError(f"these metrics need at least {least} images on each side, got {found}")


def cautions(names: Iterable[str], samples: ImageStatistics, reference: ImageStatistics) -> list[str]:
    """Returns what makes the metrics' scores hard to compare, each sentence once."""
    found = (METRICS[name].cautions for name in in_order(names))
    notes = (note for caution in found if caution for note in caution(samples, reference))
    return list(dict.fromkeys(notes))
