import pytest
import timm
import torch

from iwin_core import load_official_checkpoint
from iwin_tasks.detection import build_detector
from tests.iwin_tasks.detection.conftest import NAMES, golden_detector, golden_weights, small_detector

IMAGES = [torch.rand(3, 60, 90), torch.rand(3, 70, 50)]


def targets():
    """Returns two objects on the first image and none on the second."""
    masks = torch.zeros(2, 60, 90, dtype=torch.uint8)
    masks[0, 10:40, 10:50] = masks[1, 20:50, 30:80] = 1
    boxes = torch.tensor([[10.0, 10.0, 50.0, 40.0], [30.0, 20.0, 80.0, 50.0]])
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return [
        {"boxes": boxes, "labels": torch.tensor([0, 2]), "masks": masks},
        none | {"masks": torch.zeros(0, 70, 50, dtype=torch.uint8)},
    ]


@pytest.mark.parametrize("kind", NAMES)
def test_every_parameter_gets_a_gradient(kind):
    model = small_detector(kind).train()
    losses = model(IMAGES, targets())
    heads = ["loss_cls", "loss_bbox", "loss_mask"]
    stages = heads if kind == "mask" else [f"s{s}.{name}" for s in range(3) for name in heads]
    assert list(losses) == ["loss_rpn_cls", "loss_rpn_bbox", *stages]
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", NAMES)
def test_images_without_any_object_train(kind):
    model = small_detector(kind).train()
    losses = model(IMAGES[1:] * 2, targets()[1:] * 2)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses["loss_rpn_cls"] > 0
    assert not any(loss for name, loss in losses.items() if name.endswith(("bbox", "mask")))


@pytest.mark.parametrize("kind", NAMES)
def test_detections_are_in_pixels_of_their_images(kind):
    model = small_detector(kind).eval()
    model.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        found = model(IMAGES)
    for image, one in zip(IMAGES, found, strict=True):
        size = image.shape[-2:]
        assert one["masks"].shape == (len(one["boxes"]), *size)
        assert one["masks"].dtype == torch.bool
        assert (one["boxes"][:, 2:] <= torch.tensor([size[1], size[0]]) + 1e-3).all()
        assert set(one["labels"].tolist()) <= {0, 1, 2}
        assert len(one["boxes"]) == 100


def test_given_proposals_are_in_pixels_of_their_images(monkeypatch):
    model = small_detector("mask").eval()
    seen = []
    monkeypatch.setattr(model.rpn, "forward", None)
    forward = model.roi_heads.forward
    monkeypatch.setattr(
        model.roi_heads, "forward", lambda f, b, *rest: seen.extend(b) or forward(f, b, *rest)
    )
    model(IMAGES, proposals=[torch.tensor([[9.0, 6.0, 45.0, 30.0]]), torch.zeros(0, 4)])
    torch.testing.assert_close(seen[0], torch.tensor([[120.0, 80.0, 600.0, 400.0]]))
    assert model(IMAGES[:1], proposals=[torch.zeros(0, 4)])[0]["masks"].shape == (0, 60, 90)


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((60, 90), (800, 1200)),
        ((427, 640), (800, 1199)),
        ((500, 375), (1067, 800)),
        ((300, 900), (444, 1333)),
    ],
)
def test_images_are_resized_as_mmdetection_does(size, resized):
    transform = small_detector("mask").eval().transform
    canvas, _ = transform([torch.rand(3, *size)])
    assert canvas.image_sizes == [resized]
    assert tuple(canvas.tensors.shape[-2:]) == tuple(-(-side // 32) * 32 for side in resized)
    assert not canvas.tensors[..., resized[0] :, :].any()


def test_training_leaves_images_at_their_size():
    canvas, _ = small_detector("mask").train().transform(IMAGES)
    assert (canvas.image_sizes, tuple(canvas.tensors.shape)) == ([(60, 90), (70, 50)], (2, 3, 96, 96))


@pytest.mark.parametrize("kind", NAMES)
def test_under_bfloat16_boxes_and_losses_are_float32(kind):
    model = small_detector(kind)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(IMAGES, targets())
        found = model.eval()(IMAGES[:1], proposals=[torch.tensor([[9.0, 6.0, 45.0, 30.0]])])[0]
        logits, offsets = model.rpn.head([torch.rand(1, 8, 4, 4)])
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {found["boxes"].dtype, logits[0].dtype, offsets[0].dtype} == {torch.float32}


FAULTS = {  # what is done to good targets, and what the error says of it
    "none": (lambda good: None, "needs one target for each image, got none for 2"),
    "one": (lambda good: good[:1], "needs one target for each image, got 1 for 2"),
    "no masks": (lambda good: [good[0], {"boxes": good[1]["boxes"]}], "must have boxes, labels, masks, got"),
    "mask size": (
        lambda good: [good[0], good[1] | {"masks": torch.zeros(0, 60, 90)}],
        r"of an image of \(70, 50\), got \(0, 4\), \(0,\), \(0, 60, 90\) of image 1",
    ),
    "label": (
        lambda good: [good[0] | {"labels": torch.tensor([0, 3])}, good[1]],
        r"from 0 to 2, got \[0, 3\] of image 0",
    ),
    "flat": (
        lambda good: [good[0] | {"boxes": torch.tensor([[1.0, 1, 5, 5], [9, 9, 9, 20]])}, good[1]],
        r"x1 < x2 and y1 < y2, got \[9.0, 9.0, 9.0, 20.0\] of image 0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_invalid_target_is_named(fault):
    damage, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        small_detector("mask").train()(IMAGES, damage(targets()))


def test_the_authors_weights_load_into_a_backbone_that_timm_wraps():
    options = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
    options |= {"feature_norms": True, "padding": "zeros"}
    body = timm.create_model("iwin_tiny_patch4_window7_224", features_only=True, **options)
    model = build_detector("mask_rcnn", body, 5, fpn_channels=64, fc_channels=128, head_channels=64)
    load_official_checkpoint(model, golden_weights("mask"))
    x, (plain, container) = torch.rand(1, 3, 64, 96), golden_detector("mask")
    load_official_checkpoint(plain, container)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().backbone(x)["3"], plain.eval().backbone(x)["3"])


def test_its_own_weights_load():
    source, model = small_detector("cascade"), small_detector("cascade")
    load_official_checkpoint(model, source.state_dict())
    assert all(value.equal(source.state_dict()[name]) for name, value in model.state_dict().items())


WRONG = {
    "mask in cascade": (
        "cascade",
        lambda: golden_weights("mask"),
        "must be of a cascade_mask_rcnn, got an mmd.*mask_rcnn$",
    ),
    "cascade in mask": (
        "mask",
        lambda: golden_weights("cascade"),
        "must be of a mask_rcnn, got .* of cascade_mask_rcnn$",
    ),
    "retina": (
        "mask",
        lambda: {"bbox_head.retina_cls.weight": torch.ones(1)},
        "must be of a mask_rcnn, got .* of other heads$",
    ),
    "faster": (
        "mask",
        lambda: {n: v for n, v in golden_weights("mask").items() if "mask_head" not in n},
        "must be of a mask_rcnn, got .* of a detector without masks$",
    ),
    "segmenter": (
        "mask",
        lambda: {"decode_head.conv_seg.weight": torch.ones(1)},
        "exactly the model's, got missing: .*left over: decode_head",
    ),
    "classes": ("mask", lambda: golden_weights("mask"), r"of another shape: .*"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_weights_of_another_detector_are_refused_in_one_sentence(wrong):
    kind, weights, message = WRONG[wrong]
    model = small_detector(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_official_checkpoint(model, {"state_dict": weights(), "meta": {}})
    assert "\n" not in str(caught.value)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
