"""Scores of each class by itself."""

import pytest
import torch

from flashdit.evaluation.features.statistics import ImageStatistics
from flashdit.evaluation.metrics import frechet_distance
from flashdit.evaluation.reports.by_class import class_notes, class_scores

NAMES = ["cat", "dog", "<eel>"]


def one_hot(rows: list[int]) -> torch.Tensor:
    return torch.eye(3)[rows]


@pytest.fixture
def samples():
    draws = torch.Generator().manual_seed(0)
    labels = torch.tensor([2, 0, 0, 2, 0, 2, 2])
    predicted = [2, 1, 0, 1, 1, 2, 1]  # of class 0 two are taken for 1, of class 2 two
    return ImageStatistics(
        name="samples",
        count=7,
        pool=torch.randn(7, 5, generator=draws),
        logits=one_hot(predicted),
        labels=labels,
    )


@pytest.fixture
def real():
    draws = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 2, 0, 2, 0, 2, 1])
    return ImageStatistics(name="real", count=7, pool=torch.randn(7, 5, generator=draws), labels=labels)


def test_every_class_has_its_counts_accuracy_and_most_frequent_mistake(samples, real):
    cat, eel = class_scores(samples, real, NAMES.__getitem__, predicts=True)
    assert (cat.name, cat.num_samples, cat.num_real) == ("cat", 3, 3)
    assert (eel.name, eel.num_samples, eel.num_real) == ("<eel>", 4, 3)
    assert cat.accuracy == pytest.approx(1 / 3)
    assert eel.accuracy == pytest.approx(0.5)
    assert cat.mistaken_for == eel.mistaken_for == "dog (2)"


def test_distance_of_a_class_is_that_of_its_rows_alone(samples, real):
    _, eel = class_scores(samples, real, NAMES.__getitem__, predicts=False)
    ours, theirs = samples.pool[samples.labels == 2].double(), real.pool[real.labels == 2].double()
    expected = frechet_distance(ours.mean(0), ours.T.cov(), theirs.mean(0), theirs.T.cov(), 4, 3)
    assert eel.distance == pytest.approx(expected, rel=1e-6)
    assert eel.accuracy is None
    assert eel.mistaken_for == ""


def test_a_class_that_the_reference_lacks_has_no_distance(samples, real):
    real.labels = torch.zeros(7, dtype=torch.int64)
    _, eel = class_scores(samples, real, NAMES.__getitem__, predicts=True)
    assert (eel.num_real, eel.distance) == (0, None)


def test_what_is_missing_or_biased_is_said(samples, real):
    scores = class_scores(samples, real, NAMES.__getitem__, predicts=True)
    assert class_notes(scores, samples, real, "") == [
        "2 of 2 classes have no more images than the 5 dimensions on one side (the least: 3), which biases "
        "their distances upwards: compare them only at equal counts"
    ]
    real.labels = None
    scores = class_scores(samples, real, NAMES.__getitem__, predicts=False)
    assert [score.num_real for score in scores] == [None, None]
    assert class_notes(scores, samples, real, "it does not know eel") == [
        "'real' has no labelled images: no Fréchet distance by class",
        "no accuracy: it does not know eel",
    ]
    samples.labels = None
    assert class_scores(samples, real, NAMES.__getitem__, predicts=True) == []
    assert class_notes([], samples, real, "") == ["the samples have no labels"]
