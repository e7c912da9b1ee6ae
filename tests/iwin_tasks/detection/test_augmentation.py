import pytest
import torch

from iwin_tasks.detection.augmentation import ObjectAugmentation, augmented
from iwin_tasks.detection.data import ObjectExamples, open_objects
from tests.iwin_tasks.detection.coco_folder import write_folder

NOTHING = {"hflip": 0.0, "short_sides": [], "crop_prob": 0.0}


def scene(height=120, width=180):
    """Returns an image whose red channel is 200 in two rectangles, their boxes, labels and masks."""
    boxes = torch.tensor([[20.0, 10, 80, 60], [100, 50, 150, 110]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0] = 200 * masks.amax(0)
    return image, boxes, torch.tensor([4, 7]), masks


def draw(seed=0, inputs=None, **options):
    generator = torch.Generator().manual_seed(seed)
    return augmented(*(inputs or scene()), ObjectAugmentation(**options), generator)


def edges(masks):
    found = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        found.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return torch.tensor(found).float()


def test_without_any_change_an_example_is_the_image():
    image, boxes, labels, masks = scene()
    found = draw(**NOTHING)
    torch.testing.assert_close(found["image"], image.float() / 255)
    assert found["target"]["boxes"].equal(boxes)
    assert found["target"]["labels"].equal(labels)
    assert found["target"]["masks"].equal(masks)
    assert {type(value) for value in found["target"].values()} == {torch.Tensor}


@pytest.mark.parametrize("seed", range(8))
def test_image_boxes_and_masks_stay_together(seed):
    found = draw(
        seed, short_sides=[96, 160, 240], long_side=333, crop_range=(70, 110), crop_short_sides=[90, 120]
    )
    target = found["target"]
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
    assert target["masks"].shape[1:] == found["image"].shape[1:]
    whole = target["masks"].flatten(1).bool().any(1)
    torch.testing.assert_close(target["boxes"][whole], edges(target["masks"][whole]), atol=4, rtol=0)
    red = found["image"][0] > 0.4
    if len(target["masks"]):
        assert (red != (target["masks"].amax(0) > 0)).float().mean() < 0.06


def test_mirroring_is_left_to_right():
    found = draw(hflip=1.0, short_sides=[], crop_prob=0.0)["target"]
    assert found["boxes"].tolist() == [[100, 10, 160, 60], [30, 50, 80, 110]]
    assert found["masks"].equal(scene()[3].flip(-1))


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((120, 180), 240, 1333, (240, 360)),
        ((120, 180), 240, 300, (200, 300)),
        ((427, 640), 800, 1333, (800, 1199)),
    ],
)
def test_resizing_keeps_the_form_within_both_sides(size, short, long, expected):
    inputs = (
        torch.zeros(3, *size, dtype=torch.uint8),
        *scene(*size)[1:3],
        torch.zeros(2, *size, dtype=torch.uint8),
    )
    found = draw(inputs=inputs, hflip=0.0, short_sides=[short], long_side=long, crop_prob=0.0)
    assert tuple(found["image"].shape[1:]) == expected
    factors = torch.tensor([expected[1] / size[1], expected[0] / size[0]]).repeat(2)
    torch.testing.assert_close(found["target"]["boxes"], inputs[1] * factors)


def test_every_short_side_is_drawn_and_half_of_the_images_are_mirrored_and_cut():
    seen = [
        draw(seed, short_sides=[100, 110, 120], crop_short_sides=[90], crop_range=(60, 80))
        for seed in range(60)
    ]
    assert {min(one["image"].shape[1:]) for one in seen} == {100, 110, 120}
    whole = sum(abs(max(one["image"].shape[1:]) / min(one["image"].shape[1:]) - 1.5) < 0.01 for one in seen)
    assert 18 <= whole <= 42


def test_parts_have_sides_within_the_range_and_may_hold_no_object():
    image, boxes, labels, masks = scene()
    inputs = image, boxes[:1], labels[:1], masks[:1]
    options = {
        "hflip": 0.0,
        "short_sides": [],
        "crop_prob": 1.0,
        "crop_short_sides": [120],
        "crop_range": (30, 45),
    }
    seen = [draw(seed, inputs, **options) for seed in range(40)]
    sides = {side for one in seen for side in one["image"].shape[1:]}
    assert sides <= set(range(30, 46))
    assert {30, 45} <= sides
    assert any(not len(one["target"]["boxes"]) for one in seen)
    for one in seen:
        boxes = one["target"]["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([one["image"].shape[2], one["image"].shape[1]])).all()


def test_images_smaller_than_a_part_are_taken_whole():
    found = draw(hflip=0.0, short_sides=[], crop_prob=1.0, crop_short_sides=[60], crop_range=(384, 600))
    assert tuple(found["image"].shape) == (3, 60, 90)


def test_one_seed_and_position_are_one_example(tmp_path):
    images = open_objects({"name": "coco", "path": str(write_folder(tmp_path))}, "train")
    options = ObjectAugmentation(short_sides=[40, 56, 64, 72], crop_short_sides=[40], crop_range=(20, 30))
    examples = ObjectExamples(images, options, seed=5)
    first = [examples[position] for position in range(6)]
    torch.rand(3)
    for position in (4, 0):
        again = ObjectExamples(images, options, seed=5)[position]
        assert again["image"].equal(first[position]["image"])
        assert all(value.equal(first[position]["target"][name]) for name, value in again["target"].items())
    other = ObjectExamples(images, options, seed=6)
    assert any(
        other[position]["image"].shape != one["image"].shape
        or not other[position]["image"].equal(one["image"])
        for position, one in enumerate(first)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hflip": 1.5}, r"augmentation.hflip must be from 0 to 1, got 1.5"),
        ({"short_sides": [0]}, r"augmentation.short_sides must be sides in pixels from 1 to 8192, got \[0\]"),
        ({"long_side": 9000}, r"augmentation.long_side must be sides in pixels from 1 to 8192, got 9000"),
        ({"crop_range": (9, 3)}, r"augmentation.crop_range must be least ≤ largest, got \[9, 3\]"),
        ({"crop_short_sides": []}, r"crop_short_sides must have a side where crop_prob is above 0, got \[\]"),
        ({"crop_prob": float("nan")}, r"augmentation.crop_prob must be finite, got nan"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ObjectAugmentation(**options)
