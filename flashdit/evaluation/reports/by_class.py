"""How each class does by itself: its Fréchet distance, its accuracy, what it is mistaken for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from flashdit.evaluation.features.statistics import ImageStatistics
from flashdit.evaluation.metrics.frechet import distance_of_rows
from flashdit.shared.registry import counted


@dataclass(kw_only=True)
class ClassScore:
    """One class by itself; None is what is unknown.

    Attributes:
        name: The class.
        num_samples: Samples of it.
        num_real: Reference images of it; None where the reference has no labels.
        distance: Fréchet distance of the two.
        accuracy: Share of the samples that the extractor takes for it.
        mistaken_for: What it takes most of the others for, and how many; empty where there are none.
    """

    name: str
    num_samples: int
    num_real: int | None = None
    distance: float | None = None
    accuracy: float | None = None
    mistaken_for: str = ""


def rows_of(features: Tensor | None, labels: Tensor | None, label: int) -> Tensor | None:
    """Returns the rows of a class, or None where features or labels are not known."""
    return None if features is None or labels is None else features[labels == label]


def class_scores(
    samples: ImageStatistics, real: ImageStatistics, name_of: Callable[[int], str], predicts: bool
) -> list[ClassScore]:
    """Returns the scores of every class of the samples, empty where they have no labels.

    Args:
        samples: Statistics with pool features and logits.
        real: The reference's.
        name_of: What a label is called.
        predicts: Whether the logits are over the samples' classes.
    """
    scores = []
    for label in [] if samples.labels is None else samples.labels.unique().tolist():
        score = ClassScore(name=name_of(label), num_samples=int((samples.labels == label).sum()))
        scores.append(score)
        ours, theirs = (rows_of(side.pool, side.labels, label) for side in (samples, real))
        score.num_real = None if theirs is None else len(theirs)
        if ours is not None and theirs is not None and min(len(ours), len(theirs)) > 1:
            score.distance = distance_of_rows(ours, theirs)
        logits = rows_of(samples.logits if predicts else None, samples.labels, label)
        if logits is not None:
            predicted = logits.argmax(dim=1)
            score.accuracy = (predicted == label).double().mean().item()
            wrong = predicted[predicted != label]
            if len(wrong):
                other = int(wrong.mode().values)
                score.mistaken_for = f"{name_of(other)} ({int((wrong == other).sum())})"
    return scores


def class_notes(
    scores: Sequence[ClassScore], samples: ImageStatistics, real: ImageStatistics, unknown: str
) -> list[str]:
    """Returns what to know of the class scores before one believes or misses them.

    Args:
        scores: Of the classes.
        samples: As in `class_scores`.
        real: Likewise.
        unknown: Why the logits are not over the samples' classes; empty where they are.
    """
    if not scores:
        return ["the samples have no labels"]
    notes = []
    if real.labels is None or real.pool is None:
        notes.append(f"'{real.name}' has no labelled images: no Fréchet distance by class")
    elif samples.pool is not None:
        dimensions = samples.pool.shape[1]
        counts = [min(score.num_samples, score.num_real or 0) for score in scores]
        few = sum(count <= dimensions for count in counts)
        if few:
            notes.append(
                f"{few:,} of {counted(len(scores), 'class', 'classes')} have no more images than the "
                f"{dimensions} dimensions on one side (the least: {min(counts)}), which biases their "
                "distances upwards: compare them only at equal counts"
            )
    if unknown or samples.logits is None:
        notes.append(f"no accuracy: {unknown or 'the extractor has no logits'}")
    return notes
