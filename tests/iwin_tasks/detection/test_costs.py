"""FLOPs of detectors against torch's counter over the authors' configurations (shared/DENSE.md, FCM/2)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from iwin_tasks.detection import build_detector
from iwin_tasks.detection.costs import detector_flops
from tests.iwin_tasks.detection.conftest import Maps, small_detector

MULTIPLY_ADDS_G = {
    ("mask_rcnn", "tiny"): 271.23,
    ("mask_rcnn", "small"): 363.43,
    ("cascade_mask_rcnn", "tiny"): 749.48,
    ("cascade_mask_rcnn", "small"): 841.68,
}


@pytest.mark.parametrize(("name", "size"), MULTIPLY_ADDS_G)
def test_multiply_adds_are_those_of_the_authors_detectors(name, size):
    with torch.device("meta"):
        model = build_detector(name, f"iwin_{size}_patch4_window7_224", 80)
    found = {detector_flops(model, *sides) for sides in ((800, 1280), (1280, 800))}
    assert len(found) == 1
    assert round(found.pop() / 2e9, 2) == MULTIPLY_ADDS_G[name, size]


@pytest.mark.parametrize("kind", ["mask", "cascade"])
def test_what_is_counted_is_what_a_real_pass_over_so_many_boxes_computes(kind):
    model = small_detector(kind, Maps()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    boxes = torch.tensor([[3.0, 4.0, 60.0, 40.0]]).repeat(7, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = model.backbone(torch.rand(1, 3, 64, 96))
        model.rpn.head(list(features.values()))
        model.roi_heads.forward_boxes(features, [boxes], [(64, 96)])
        model.roi_heads.forward_masks(features, [boxes[:3]], [torch.ones(3, dtype=torch.int64)])
    model.train()
    assert detector_flops(model, 64, 96, boxes=7, masks=3) == counter.get_total_flops()
    assert model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_canvas_of_other_sides_is_refused():
    with pytest.raises(ValueError, match="sides of multiples of 32, got 64 × 90"):
        detector_flops(small_detector("mask", Maps()), 64, 90)
