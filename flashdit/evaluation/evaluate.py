"""One evaluation from images to result: reference, floor where there is one, samples, scores."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import torch

from flashdit.evaluation.classes import Classes, match_classes
from flashdit.evaluation.features.cache import FeatureCache
from flashdit.evaluation.features.extractor import Extractor
from flashdit.evaluation.features.ranks import Ranks
from flashdit.evaluation.features.statistics import ImageStatistics, collect
from flashdit.evaluation.images.reading import BALANCED, label_mode
from flashdit.evaluation.images.sources import GeneratedSource, Source
from flashdit.evaluation.metrics import NEIGHBOURS, SPLIT_SIZE
from flashdit.evaluation.metrics.kid import KERNEL_SUBSET
from flashdit.evaluation.metrics.metric import METRICS
from flashdit.evaluation.metrics.scoring import (
    Scores,
    cautions,
    check_counts,
    compute_scores,
    parts_needed,
    score_names,
)
from flashdit.evaluation.reference import Reference, first_colours
from flashdit.evaluation.reports.report import EvalResult
from flashdit.sampling.generator import ImageGenerator
from flashdit.sampling.options import SamplingOptions

OTHER_SHARES = 0.1
"""Of the samples that would need another class, above which a report says so."""
MANY_A_CLASS = 20
"""Images of a class, on average, from which a reference's shares are taken for those of its source."""


class Plan(NamedTuple):
    """Everything an evaluation needs, opened and checked before the first image is drawn.

    Attributes:
        samples: The images to score.
        extractor: In eval mode, on the device.
        reference: What they are compared with.
        metrics: Names of `METRICS`.
        cache: Where features are kept; None keeps none.
        batch_size: Images read at a time; changes no number.
        device: Where features are computed.
    """

    samples: Source
    extractor: Extractor
    reference: Reference
    metrics: list[str]
    cache: FeatureCache | None = None
    batch_size: int = 100
    device: str = "cpu"

    @property
    def classes(self) -> Classes:
        """Which classes its labels mean, matched by name."""
        return match_classes(self.extractor, self.samples, self.reference.source)

    def redrawn(
        self, *, generator: ImageGenerator | None = None, options: SamplingOptions | None = None
    ) -> Plan:
        """Returns the plan for samples of the same labels by another generator or with other options."""
        samples = self.samples
        assert isinstance(samples, GeneratedSource)
        drawn_by = generator or samples.generator, samples.labels, options or samples.options
        return self._replace(samples=GeneratedSource(*drawn_by, samples.mode))


class Evaluation(NamedTuple):
    """A result, and on the main process the statistics that it comes from."""

    result: EvalResult
    samples: ImageStatistics
    reference: ImageStatistics


class Stages:
    """Seconds between marks, by the name of what ended there."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, stage: str) -> None:
        """Ends a stage."""
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now


def check_image_sizes(plan: Plan) -> None:
    """Raises ValueError for images of another size than the reference's: distances would be of the sizes."""
    sizes = {"samples": plan.samples.image_size, "reference": plan.reference.image_size}
    known = {side: f"{size[0]}×{size[1]}" for side, size in sizes.items() if size is not None}
    if len(set(known.values())) > 1:
        raise ValueError(
            f"samples and reference must be images of one size (h×w), got {known['samples']} and "
            f"{known['reference']}: --image-size or evaluation.image_size crops those of folders"
        )


def colour_warnings(plan: Plan) -> list[str]:
    """Returns a sentence for each set of existing images that is grey or coloured unlike the extractor's."""
    own, found = plan.extractor.colours, {"reference": plan.reference.colours}
    if not isinstance(plan.samples, GeneratedSource):
        found["samples"] = first_colours(plan.samples)
    return [
        f"the {side} are {colours} images, extractor '{plan.extractor.name}' was trained on {own} ones"
        for side, colours in found.items()
        if None not in (own, colours) and own != colours
    ]


def class_warnings(plan: Plan) -> list[str]:
    """Returns why there is no accuracy though the extractor has classes, or how labels were matched."""
    classes = plan.classes
    if any(METRICS[name].needs_classes for name in plan.metrics):
        own, name = plan.extractor.accuracy, plan.extractor.name
        notes = [classes.note] if classes.note else []
        if own is not None:
            notes.append(f"the judge of accuracy, '{name}', is right on {own:.1%} of its held-out images")
        return notes
    lacks = plan.extractor.class_names and plan.samples.labels is not None and classes.unknown
    return [f"no accuracy: {classes.unknown}"] if lacks else []


def share_warnings(plan: Plan) -> list[str]:
    """Returns how far the classes' shares differ between drawn samples and reference, where it is much."""
    source = plan.reference.source
    if not isinstance(plan.samples, GeneratedSource) or source is None:
        return []
    sets = [plan.classes.numbered(one.labels, one) for one in (plan.samples, source)]
    labels = [one for one in sets if one is not None]
    if len(labels) < 2:
        return []
    count = 1 + max(int(one.max()) for one in labels)
    shares = torch.stack([one.bincount(minlength=count) / len(one) for one in labels])
    moved = float((shares[0] - shares[1]).abs().sum() / 2)
    by_chance = len(labels[1]) < MANY_A_CLASS * count and label_mode(labels[0]) != BALANCED
    if moved <= OTHER_SHARES or by_chance:
        return []
    widest = int((shares[0] - shares[1]).abs().argmax())
    return [
        "the classes have other shares in the samples than in the reference, "
        f"{plan.classes.name_of(widest)} {shares[0, widest]:.0%} and {shares[1, widest]:.0%}, which adds to "
        "the distances: --labels reference, or evaluation.labels, draws them alike"
    ]


def floor_scores(plan: Plan, train: ImageStatistics, reference: ImageStatistics) -> Scores:
    """Returns the scores of real training images, and the extractor's accuracy on the held-out ones."""
    floor = compute_scores(plan.metrics, train, reference, plan.device)
    of_classes = [name for name in plan.metrics if METRICS[name].needs_classes]
    # Of images that the extractor was not trained on.
    floor.values |= compute_scores(of_classes, reference, reference).values
    return floor


def evaluate(plan: Plan, ranks: Ranks | None = None) -> EvalResult:
    """Returns the scores of the samples, on every process; arguments are as in `evaluate_fully`."""
    return evaluate_fully(plan, ranks).result


def evaluate_fully(plan: Plan, ranks: Ranks | None = None, extra_parts: Collection[str] = ()) -> Evaluation:
    """Returns the scores of the samples; the reference is read before them, as it may still be invalid.

    Args:
        plan: What to score, how and against what.
        ranks: Who shares the work; None is this process alone. Changes no number.
        extra_parts: What `collect` should keep beside what the metrics read.

    Raises:
        ValueError: If images cannot be read, are too few, or of another size than the reference's.
    """
    ranks = ranks or Ranks()
    parts = parts_needed(plan.metrics) | set(extra_parts)
    reading = (plan.batch_size, plan.device, ranks, plan.cache)
    check_image_sizes(plan)
    stages = Stages()
    reference = plan.reference.statistics(parts, *reading)
    with ranks.agree():
        check_counts(plan.metrics, plan.samples.count, reference)
    train = plan.reference.floor(parts, *reading)
    stages.mark("reference")
    samples = collect(plan.samples, plan.extractor, parts, *reading)
    stages.mark("samples")
    result = None
    with ranks.agree():
        if ranks.is_main:
            classes = plan.classes
            samples = replace(samples, labels=classes.numbered(samples.labels, plan.samples))
            reference = replace(reference, labels=classes.numbered(reference.labels, plan.reference.source))
            floor = floor_scores(plan, train, reference) if train else None
            scores = compute_scores(plan.metrics, samples, reference, plan.device)
            stages.mark("metrics")
            result = make_result(plan, scores, floor, stages.seconds, ranks)
            result.warnings += class_warnings(plan) + cautions(plan.metrics, samples, reference)
    result = ranks.broadcast(result)
    assert result is not None
    return Evaluation(result, samples, reference)


def make_result(
    plan: Plan, scores: Scores, floor: Scores | None, timings_s: dict[str, float], ranks: Ranks
) -> EvalResult:
    """Returns the scores with everything that a reader needs to know of them."""
    names = score_names(plan.metrics, plan.extractor)
    extractor = plan.extractor
    return EvalResult(
        scores=scores,
        floor=floor,
        names={key: names[key] for key in scores.values},
        num_images=plan.samples.count,
        samples=plan.samples.recipe(),
        image_size=plan.samples.image_size,
        reference=plan.reference.recipe(),
        extractor={
            "name": extractor.name,
            "fingerprint": extractor.fingerprint,
            "weights_sha256": extractor.weights_sha256,
            "resize": extractor.resize,
        },
        settings={"neighbours": NEIGHBOURS, "split_size": SPLIT_SIZE, "kernel_subset": KERNEL_SUBSET},
        device=plan.device,
        processes=ranks.world,
        timings_s=timings_s,
        warnings=[
            *extractor.warnings,
            *plan.reference.warnings,
            *colour_warnings(plan),
            *share_warnings(plan),
        ],
    )
