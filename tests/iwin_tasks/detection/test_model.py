import pytest
import timm
import torch

from iwin_tasks.detection.coco import Categories
from iwin_tasks.detection.model import (
    DetectorSpec,
    backbone_blocks,
    check_detector,
    detector_config,
    load_detector_weights,
    make_detector,
)

SMALL = {"window_size": 4, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}


def spec(**options):
    small = {"backbone_options": SMALL, "fpn_channels": 8, "fc_channels": 16, "head_channels": 8}
    return DetectorSpec(**(small | options))


def test_every_number_of_a_spec_reaches_the_detector():
    model = make_detector(
        spec(proposals=7, sampled_boxes=24, anchor_scale=3.0, short_side=64, long_side=96), 4
    ).eval()
    canvas, _ = model.transform([torch.rand(3, 50, 60)])
    assert canvas.image_sizes == [(64, 77)]
    boxes, _ = model.rpn(canvas, model.backbone(canvas.tensors))
    assert len(boxes[0]) <= 7
    assert model.rpn.pre_nms_top_n() == 7
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 24
    anchors = model.rpn.anchor_generator(canvas, list(model.backbone(canvas.tensors).values()))[0]
    sides = (anchors[:, 2:] - anchors[:, :2]).prod(1).sqrt()
    torch.testing.assert_close(sides[0], torch.tensor(12.0))
    assert model.num_classes == 4
    assert len(backbone_blocks(model)) == 4


def test_the_defaults_are_the_authors_numbers():
    model = make_detector(DetectorSpec(backbone_options=SMALL), 80)
    assert (model.rpn.post_nms_top_n(), model.rpn.pre_nms_top_n()) == (1000, 2000)
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 512
    assert (model.transform.min_size, model.transform.max_size) == ((800,), 1333)


def test_a_detector_s_config_builds_it_again():
    config = detector_config(spec(kind="cascade_mask_rcnn"), Categories((2, 9), ("cat", "dog")))
    assert config.pop("categories") == [{"id": 2, "name": "cat"}, {"id": 9, "name": "dog"}]
    assert DetectorSpec(**config) == spec(kind="cascade_mask_rcnn")


def test_another_timm_backbone_starts_from_a_file_of_its_weights(tmp_path):
    other = spec(backbone="convnext_atto", backbone_options={})
    check_detector(other)
    model = make_detector(other, 3)
    state = timm.create_model("convnext_atto").state_dict()
    torch.save({name: torch.full_like(value, 0.5) for name, value in state.items()}, tmp_path / "whole.pth")
    load_detector_weights(model, other, tmp_path / "whole.pth")
    assert all((value == 0.5).all() for value in model.backbone.body.state_dict().values())
    torch.save({n: v for n, v in state.items() if "stages.0" not in n}, tmp_path / "part.pth")
    with pytest.raises(
        ValueError, match=r"those of convnext_atto, got .*part.pth without .*stages_0.* and \d+ more"
    ):
        load_detector_weights(model, other, tmp_path / "part.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": True}, "must load no weights, which `weights` names, got pretrained"),
        ({"widht": 3}, "model.backbone_options must be what convnext_atto takes: "),
    ],
)
def test_invalid_options_of_another_backbone_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_detector(spec(backbone="convnext_atto", backbone_options=options))
