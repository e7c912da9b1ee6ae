import pytest
import torch

from iwin_tasks.detection.proposals import ProposalNetwork


def network(inside=False, beta=0.0):
    return ProposalNetwork(4, (8, 16), kept=5, beta=beta, inside=inside).train()


def target(size, *boxes):
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "size": torch.tensor(size)}


def test_anchors_past_an_images_own_padding_are_unused():
    anchors = torch.tensor([[c - 20.0, 10.0, c + 20.0, 30.0] for c in (24, 56, 64, 88)])
    assert network().usable(anchors, torch.tensor([20, 40])).tolist() == [True, True, False, False]


def test_a_cascades_anchors_must_lie_inside_the_image():
    anchors = torch.tensor([[0.0, 0, 39, 19], [-1, 0, 9, 9], [0, -1, 9, 9], [0, 0, 40, 9], [0, 0, 9, 20]])
    assert network(inside=True).usable(anchors, torch.tensor([20, 40])).tolist() == [True] + 4 * [False]


def test_an_object_takes_its_best_usable_anchor():
    anchors = torch.tensor([[-2.0, 0.0, 18.0, 20.0], [4.0, 0.0, 24.0, 20.0], [60.0, 60.0, 80.0, 80.0]])
    place = target((90, 90), [0.0, 0.0, 20.0, 20.0])
    (labels,), _ = network().assign_targets_to_anchors([anchors], [place])
    assert labels.tolist() == [1, -1, 0]
    (labels,), (boxes,) = network(inside=True).assign_targets_to_anchors([anchors], [place])
    assert labels.tolist() == [-1, 1, 0]
    assert boxes[1].equal(place["boxes"][0])


@pytest.mark.parametrize("beta", [0.0, 1 / 9])
def test_losses_are_sums_over_drawn_anchors_by_their_number_and_an_empty_kind_counts_one(beta):
    logits, offsets = torch.randn(6, 1), torch.randn(6, 4)
    wanted = torch.randn(6, 4)
    labels = [torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, -1.0])]
    class_loss, box_loss = network(beta=beta).compute_loss(logits, offsets, labels, list(wanted.split(3)))
    drawn = 1 + 1 + 1 + 2  # the second image has no object
    entropy = torch.nn.functional.softplus(torch.stack([-logits[0], logits[1], logits[3], logits[4]]))
    torch.testing.assert_close(class_loss, entropy.sum() / drawn)
    error = (offsets[0] - wanted[0]).abs()
    smooth = torch.where(error < beta, error**2 / (2 * beta or 1), error - beta / 2)
    torch.testing.assert_close(box_loss, smooth.sum() / drawn)
