import math

import numpy as np
import pytest
import torch

from iwin_tasks.segmentation import ConfusionMatrix, LabelFormat


class TwoProcesses:
    """Adds what another process counted, as an accelerator does."""

    def __init__(self, other):
        self.other = other

    def reduce(self, counts, how):
        assert how == "sum"
        return counts + self.other.counts


def test_scores_are_those_of_the_definition_and_absent_classes_do_not_count():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (3, 8, 12), generator=generator)
    predictions = torch.where(torch.rand(labels.shape, generator=generator) < 0.6, labels, (labels + 1) % 4)
    labels[0, :2] = 255
    matrix, other = ConfusionMatrix(6), ConfusionMatrix(6)
    matrix.add(predictions[:1], labels[:1])
    other.add(predictions[1:], labels[1:])
    matrix.gather(TwoProcesses(other))
    scores, kept = matrix.scores(), labels != 255
    ious, accuracies = [], []
    for k in range(4):
        truth, guess = (labels == k) & kept, (predictions == k) & kept
        ious.append(float((truth & guess).sum() / (truth | guess).sum()))
        accuracies.append(float((truth & guess).sum() / truth.sum()))
    assert scores.iou[:4] == pytest.approx(ious)
    assert all(math.isnan(iou) for iou in scores.iou[4:])
    assert scores.miou == pytest.approx(np.mean(ious))
    assert scores.mean_accuracy == pytest.approx(np.mean(accuracies))
    assert scores.pixel_accuracy == pytest.approx(float((predictions == labels)[kept].float().mean()))
    assert str(scores).startswith(f"mIoU {scores.miou:.2%}  mAcc")


def test_a_class_that_is_only_predicted_lowers_the_mean_iou():
    matrix = ConfusionMatrix(3)
    matrix.add(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1]))
    scores = matrix.scores()
    assert scores.iou == (1, 0.5, 0)
    assert scores[:3] == (0.5, 0.75, 0.75)


def test_what_cannot_be_counted_is_named():
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=r"must have one shape, got \(2,\) and \(1,\)"):
        matrix.add(torch.tensor([1, 2]), torch.tensor([0]))
    with pytest.raises(ValueError, match="classes must be 0 to 2, got 0 to 3"):
        matrix.add(torch.tensor([0]), torch.tensor([3]))
    matrix.add(torch.tensor([0]), torch.tensor([255]))
    with pytest.raises(ValueError, match="scores need at least one pixel that counts, got none"):
        matrix.scores()


def test_an_offset_makes_what_lies_below_it_ignored():
    values = np.array([[0, 1, 2], [3, 255, 1]], dtype=np.uint8)
    assert LabelFormat().classes(values, 4, "a.png").tolist() == [[0, 1, 2], [3, 255, 1]]
    ade20k = LabelFormat(offset=1)
    assert ade20k.classes(values, 3, "a.png").tolist() == [[255, 0, 1], [2, 255, 0]]
    wide = np.array([[300, 65535]], dtype=np.uint16)
    assert LabelFormat(ignore=65535).classes(wide, 301, "a.png").tolist() == [[300, 65535]]


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([[0, 4]], {}, "labels must be 0 to 3, or to be ignored 255, got 4 in a.png"),
        ([[0, 5]], {"offset": 1}, "labels must be 1 to 4, or to be ignored 255, 0, got 5 in a.png"),
        ([[-1, 0]], {}, "labels must be 0 to 3, .* got -1 in a.png"),
        ([[[0, 1, 2]]], {}, r"labels must be integers \(H, W\), got int64 \(1, 1, 3\) in a.png"),
        ([[0.5]], {}, r"labels must be integers \(H, W\), got float64 \(1, 1\) in a.png"),
        ([[0]], {"ignore": 3}, "ignore must be no class, got 3 for 4 classes"),
        ([[0]], {"offset": -1}, "ignore and offset must be at least 0, got 255 and -1"),
    ],
)
def test_labels_that_cannot_be_are_named_with_their_file(values, options, message):
    with pytest.raises(ValueError, match=message):
        LabelFormat(**options).classes(np.array(values), 4, "a.png")
