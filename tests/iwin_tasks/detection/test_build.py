import pytest
import torch
from torch import nn

from iwin_tasks.detection import build_detector
from tests.iwin_tasks.detection.conftest import Maps, small_detector

PARAMETERS = {  # of the authors' configurations; their README prints Swin's
    ("mask_rcnn", "tiny"): 49_732_752,
    ("mask_rcnn", "small"): 71_072_400,
    ("cascade_mask_rcnn", "tiny"): 87_567_954,
    ("cascade_mask_rcnn", "small"): 108_907_602,
    ("cascade_mask_rcnn", "base"): 148_450_354,
}


@pytest.mark.parametrize(("name", "size"), PARAMETERS)
def test_parameters_are_those_of_the_authors_detectors(name, size):
    with torch.device("meta"):
        model = build_detector(name, f"iwin_{size}_patch4_window7_224", 80)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, size]
    config = model.backbone.body.config
    assert config.num_heads == ((4, 8, 16, 32) if size == "base" else (3, 6, 12, 24))
    assert config.drop_path_rate == (0.3 if size == "base" else 0.2)
    assert config.padding == "zeros"


def test_any_timm_name_of_four_maps_is_a_backbone():
    model = small_detector("mask", "resnet10t").eval()
    assert len(model([torch.rand(3, 40, 70)], proposals=[torch.tensor([[3.0, 4.0, 30.0, 20.0]])])) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mask_rccn"}, "unknown detector 'mask_rccn'; did you mean 'mask_rcnn'"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"head_channels": 0}, "head_channels must be at least 1, got 0"),
        ({"backbone": "iwin_tinny"}, "a name that timm knows, got 'iwin_tinny'"),
        ({"backbone": nn.Identity()}, "must give 4 maps"),
    ],
)
def test_an_invalid_argument_is_named(arguments, message):
    given = {"name": "mask_rcnn", "backbone": Maps(), "num_classes": 2} | arguments
    with pytest.raises(ValueError, match=message):
        build_detector(**given)


def test_maps_of_other_strides_are_refused():
    body = Maps()
    body.stages[0] = nn.Conv2d(3, 4, 2, 2)
    with pytest.raises(ValueError, match=r"maps of strides \(4, 8, 16, 32\), got maps of \[\(16, 32\), "):
        small_detector("mask", body).eval().backbone(torch.zeros(1, 3, 32, 64))
