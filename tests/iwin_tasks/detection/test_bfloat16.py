"""Under bfloat16 only networks compute in it: what they give is boxes and losses in float32, bit for bit."""

import pytest
import torch

from tests.iwin_tasks.detection.conftest import Maps, small_detector


def in_float32(module):
    """Makes a network compute in float32 also under autocast."""
    forward = module.forward

    def computed(*given):
        with torch.autocast("cpu", enabled=False):
            return forward(*given)

    module.forward = computed


def networks(model):
    heads = model.roi_heads
    lists = (heads.box_head, heads.box_predictor, heads.mask_head, heads.mask_predictor)
    return [model.backbone, model.rpn.head, *(part for parts in lists for part in parts)]


@pytest.mark.parametrize("kind", ["mask", "cascade"])
def test_with_networks_in_float32_autocast_changes_no_bit_of_losses_and_detections(kind):
    torch.manual_seed(0)
    model = small_detector(kind, Maps())
    for network in networks(model):
        in_float32(network)
    images = [torch.rand(3, 64, 1312), torch.rand(3, 90, 70)]
    masks = torch.zeros(2, 64, 1312, dtype=torch.uint8)
    masks[0, 10:50, 1200:1300], masks[1, 5:30, 10:60] = 1, 1
    boxes = torch.tensor([[1200.3, 10.2, 1299.9, 50.7], [10.1, 5.3, 60.2, 30.4]])
    objects = {"boxes": boxes, "labels": torch.tensor([2, 0]), "masks": masks}
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 90, 70),
    }
    found, state = [], {name: value.clone() for name, value in model.state_dict().items()}
    model.roi_heads.score_thresh = 0.0
    for enabled in (False, True):
        model.load_state_dict(state)  # BatchNorm's, which training changes
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = model.train()(images, [objects, nothing])
            with torch.no_grad():
                detections = model.eval()(images)
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        tensors = {
            f"{n}.{name}": value for n, found in enumerate(detections) for name, value in found.items()
        }
        found.append(losses | tensors)
    assert len(found[0]["0.boxes"])
    for name, value in found[0].items():
        assert value.equal(found[1][name]), name


@pytest.mark.parametrize("kind", ["mask", "cascade"])
def test_a_box_far_from_the_corner_keeps_its_place_under_bfloat16(kind):
    model = small_detector(kind, Maps()).eval()
    model.roi_heads.score_thresh = 0.0
    for predictor in model.roi_heads.box_predictor:
        torch.nn.init.zeros_(predictor.bbox_pred.weight)
    model.transform.min_size, model.transform.max_size = (64,), 1400
    box = torch.tensor([[1201.3, 10.2, 1299.9, 50.7]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model([torch.rand(3, 64, 1312)], proposals=[box])
    assert found["boxes"].dtype == torch.float32
    torch.testing.assert_close(found["boxes"], box.expand_as(found["boxes"]), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("kind", ["mask", "cascade"])
def test_what_the_heads_give_is_float32_under_bfloat16(kind):
    model = small_detector(kind, Maps()).eval()
    heads = model.roi_heads
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = model.backbone(torch.rand(1, 3, 64, 96))
        pooled = heads.mask_roi_pool(features, [torch.tensor([[3.0, 4.0, 60.0, 40.0]])])
        found = [*heads.classify(0, features, [torch.tensor([[3.0, 4.0, 60.0, 40.0]])])]
        found += [heads.draw(0, pooled, torch.tensor([1])), pooled]
    assert features["0"].dtype == torch.bfloat16
    assert {tensor.dtype for tensor in found} == {torch.float32}
