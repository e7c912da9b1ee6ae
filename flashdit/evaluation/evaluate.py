"""One evaluation from images to result: reference, floor where there is one, samples, scores."""

from __future__ import annotations

import time
from typing import NamedTuple

from flashdit.evaluation.features import Extractor
from flashdit.evaluation.metrics import NEIGHBOURS, SPLIT_SIZE
from flashdit.evaluation.reference import Reference
from flashdit.evaluation.report import EvalResult, names_of
from flashdit.evaluation.scoring import Scores, cautions, check_counts, compute_scores, parts_needed
from flashdit.evaluation.sources import DigitsSource, Source
from flashdit.evaluation.statistics import ImageStatistics, collect


class Plan(NamedTuple):
    """Everything an evaluation needs, opened and checked before the first image is drawn.

    Attributes:
        samples: The images to score.
        extractor: In eval mode, on the device of the evaluation.
        reference: What they are held against.
        metrics: Names of `METRICS`.
    """

    samples: Source
    extractor: Extractor
    reference: Reference
    metrics: list[str]


def digits_floor(plan: Plan, reference: ImageStatistics, batch_size: int, device: str) -> Scores:
    """Returns the scores of the real training split, and the extractor's accuracy on the held-out one."""
    train = collect(DigitsSource("train"), plan.extractor, parts_needed(plan.metrics), batch_size, device)
    floor = compute_scores(plan.metrics, train, reference)
    if "accuracy" in plan.metrics:  # of images that the extractor was not trained on
        floor.values |= compute_scores(["accuracy"], reference, reference).values
    return floor


def evaluate(plan: Plan, batch_size: int = 100, device: str = "cpu") -> EvalResult:
    """Returns the scores of the samples; the reference is read before them, as it may still be refused.

    Args:
        plan: What to score, how and against what.
        batch_size: Images per forward of the extractor; changes no number.
        device: Where features are computed.

    Raises:
        ValueError: If images cannot be read or are too few for the metrics.
    """
    parts = parts_needed(plan.metrics)
    started = time.perf_counter()
    reference = plan.reference.statistics(parts, batch_size, device)
    check_counts(plan.metrics, plan.samples.count, reference)
    floor = digits_floor(plan, reference, batch_size, device) if plan.reference.spec == "digits" else None
    reference_done = time.perf_counter()
    samples = collect(plan.samples, plan.extractor, parts, batch_size, device)
    samples_done = time.perf_counter()
    scores = compute_scores(plan.metrics, samples, reference)
    names = names_of(plan.extractor)
    return EvalResult(
        scores=scores.renamed(names),
        floor=floor.renamed(names) if floor else None,
        labels=dict(names[key] for key in scores.values),
        num_images=plan.samples.count,
        samples=plan.samples.recipe(),
        reference={"name": plan.reference.spec, "num_images": reference.count},
        extractor={"name": plan.extractor.name, "fingerprint": plan.extractor.fingerprint},
        settings={"neighbours": NEIGHBOURS, "split_size": SPLIT_SIZE},
        device=device,
        timings_s={
            "reference": reference_done - started,
            "samples": samples_done - reference_done,
            "metrics": time.perf_counter() - samples_done,
        },
        warnings=[*plan.extractor.warnings, *cautions(plan.metrics, samples, reference)],
    )
