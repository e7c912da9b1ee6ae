import pytest
import torch

from tests.iwin_tasks.detection.conftest import small_detector

TARGET = {
    "boxes": torch.tensor([[10.0, 10.0, 50.0, 40.0], [20.0, 12.0, 60.0, 44.0]]),
    "labels": torch.tensor([2, 3]),
}


def shifted(*shares):
    """Returns the first object's box, moved to the right by these shares of its width."""
    box = TARGET["boxes"][0]
    return torch.stack([box + torch.tensor([40.0 * s, 0, 40.0 * s, 0]) for s in shares])


@pytest.mark.parametrize(("stage", "kept"), [(0, 4), (1, 3), (2, 2)])  # IoU 0.82, 0.67, 0.54, 0.43
def test_each_stage_of_a_cascade_takes_closer_boxes(stage, kept):
    heads = small_detector("cascade").roi_heads
    proposals = shifted(-0.1, -0.2, -0.3, -0.4)
    (sample,) = heads.sample(stage, [proposals], [TARGET])
    assert sample.added.tolist() == [True, True] + 4 * [False]
    assert sample.matched[:2].tolist() == [0, 1]
    assert sample.labels.tolist() == [2, 3] + [2] * (kept - 1) + [0] * (5 - kept)


def test_at_most_128_of_512_boxes_are_of_objects():
    heads = small_detector("mask").roi_heads
    proposals = torch.cat(
        [shifted(0.01).expand(300, 4), torch.tensor([[70.0, 0.0, 80.0, 9.0]]).expand(900, 4)]
    )
    (sample,) = heads.sample(0, [proposals], [TARGET])
    assert (len(sample.boxes), int((sample.labels > 0).sum())) == (512, 128)


def test_boxes_move_by_their_class_and_those_of_background_by_their_best_class():
    heads = small_detector("cascade").roi_heads
    boxes = [torch.tensor([[10.0, 10.0, 20.0, 30.0]]), torch.tensor([[0.0, 0.0, 40.0, 40.0]] * 2)]
    logits = torch.tensor([[9.0, 0, 1, 0], [9.0, 0, 0, 1], [9.0, 0, 0, 1]])
    offsets = torch.zeros(3, 3, 4)
    offsets[:, :, 0] = torch.tensor([1.0, 2.0, 3.0])  # tenths of the width
    sizes = [(50, 100), (50, 45)]
    moved = heads.move(0, boxes, logits, offsets, sizes, labels=torch.tensor([1, 0, 1]))
    torch.testing.assert_close(moved[0], torch.tensor([[11.0, 10.0, 21.0, 30.0]]))
    torch.testing.assert_close(moved[1], torch.tensor([[12.0, 0.0, 45.0, 40.0], [4.0, 0.0, 44.0, 40.0]]))
    best = heads.move(1, boxes, logits, offsets, sizes)  # twentieths
    torch.testing.assert_close(best[0], torch.tensor([[11.0, 10.0, 21.0, 30.0]]))


def test_boxes_that_are_objects_own_do_not_enter_the_next_stage(monkeypatch):
    heads = small_detector("cascade").train().roi_heads
    seen = []
    sample = heads.sample
    monkeypatch.setattr(heads, "sample", lambda s, b, t: seen.append([len(x) for x in b]) or sample(s, b, t))
    features = {str(i): torch.randn(1, 8, 64 >> i, 64 >> i) for i in range(5)}
    target = TARGET | {"masks": torch.zeros(2, 256, 256)}
    losses = heads(features, [shifted(0.1, 0.5, 0.9)], [(256, 256)], [target])[1]
    assert seen == [[3], [3], [3]]
    assert list(losses)[:4] == ["s0.loss_cls", "s0.loss_bbox", "s0.loss_mask", "s1.loss_cls"]


def test_a_stage_counts_by_its_weight(monkeypatch):
    heads = small_detector("cascade").train().roi_heads
    monkeypatch.setattr(heads, "mask_loss", lambda *given: torch.tensor(1.0))
    features = {str(i): torch.randn(1, 8, 64 >> i, 64 >> i) for i in range(5)}
    losses = heads(features, [shifted(0.1, 0.5, 0.9)], [(256, 256)], [TARGET])[1]
    assert [losses[f"s{stage}.loss_mask"].item() for stage in range(3)] == [1, 0.5, 0.25]


def test_masks_of_a_cascade_are_averaged_as_probabilities(monkeypatch):
    heads = small_detector("cascade").eval().roi_heads
    monkeypatch.setattr(heads, "draw", lambda stage, pooled, labels: torch.full((2, 28, 28), 2.0 * stage))
    features = {str(i): torch.randn(1, 8, 64 >> i, 64 >> i) for i in range(5)}
    (masks,) = heads.forward_masks(features, [TARGET["boxes"]], [TARGET["labels"]])
    expected = torch.tensor([0.0, 2.0, 4.0]).sigmoid().mean()
    torch.testing.assert_close(masks, expected.expand(2, 28, 28))
