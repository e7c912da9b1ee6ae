"""FLOPs of segmenters against torch's counter over the authors' configurations (shared/DENSE.md, FCM/2)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from iwin_tasks.segmentation import build_segmenter
from iwin_tasks.segmentation.costs import segmenter_flops

MULTIPLY_ADDS_G = {  # at 512 × 2048 and 512 × 512
    ("upernet", "tiny"): (949.17, 238.06),
    ("semantic_fpn", "tiny"): (190.50, 48.38),
}


@pytest.mark.parametrize(("kind", "size"), MULTIPLY_ADDS_G)
def test_multiply_adds_are_those_of_the_authors_segmenters(kind, size):
    with torch.device("meta"):
        model = build_segmenter(kind, f"iwin_{size}_patch4_window7_224", 150)
    found = tuple(round(segmenter_flops(model, *sides) / 2e9, 2) for sides in ((512, 2048), (512, 512)))
    assert found == MULTIPLY_ADDS_G[kind, size]


def test_what_is_counted_is_what_a_real_pass_computes():
    model = build_segmenter("upernet", "resnet10t", 5, channels=8, auxiliary_channels=4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.rand(1, 3, 70, 90))
    model.train()
    assert segmenter_flops(model, 70, 90) == counter.get_total_flops()
    assert model.training
    assert all(not parameter.is_meta for parameter in model.parameters())
