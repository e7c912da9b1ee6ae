import hashlib
import subprocess
import sys

import pytest
import torch
from torchvision.ops import masks_to_boxes

from iwin_tasks.scenes import SceneOptions, draw_scene, drawing

OPTIONS = SceneOptions(image_size=(60, 92), digit_size=(18, 40))


def digest(scene):
    """Returns what tells scenes apart."""
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in scene)).hexdigest()


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("split", drawing.REGIONS)
def test_boxes_masks_and_label_map_tell_one_truth(split, index):
    image, boxes, labels, masks, label_map = draw_scene(OPTIONS, split, index)
    n = len(labels)
    assert (image.shape, image.dtype) == ((3, 60, 92), torch.uint8)
    assert (boxes.shape, boxes.dtype) == ((n, 4), torch.float32)
    assert (labels.dtype, label_map.shape, label_map.dtype) == (torch.int64, (60, 92), torch.uint8)
    assert (masks.shape, masks.dtype) == ((n, 60, 92), torch.bool)
    assert masks.sum(0).max() <= 1
    assert masks.flatten(1).any(1).all()
    torch.testing.assert_close(boxes, masks_to_boxes(masks).float() + torch.tensor([0.0, 0, 1, 1]))
    assert label_map.equal(((labels + 1)[:, None, None] * masks).sum(0).to(torch.uint8))


def test_a_scene_depends_on_seed_split_and_index_alone():
    scenes = {
        (seed, split, index): digest(draw_scene(SceneOptions(seed=seed), split, index))
        for seed in (0, 1)
        for split in drawing.REGIONS
        for index in (0, 1)
    }
    assert len(set(scenes.values())) == 8
    drawn = [next(drawing._numbers(0, split, 1)) for split in drawing.REGIONS]
    assert drawn[0] != drawn[1], "two splits share no random number"
    code = (
        "import hashlib; from iwin_tasks.scenes import *; "
        "s = draw_scene(SceneOptions(seed=1), 'held-out', 1); "
        "print(hashlib.sha256(b''.join(x.numpy().tobytes() for x in s)).hexdigest())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == scenes[1, "held-out", 1]


def test_every_digit_stays_visible(monkeypatch):
    crowded = SceneOptions(image_size=(48, 64), digits=(12, 12), digit_size=(20, 30))
    wholes = []
    check = drawing._leaves_others_visible

    def spied(owner, given, *rest):
        wholes.append(given)
        return check(owner, given, *rest)

    monkeypatch.setattr(drawing, "_leaves_others_visible", spied)
    counts = []
    for index in range(4):
        _, _, labels, masks, _ = draw_scene(crowded, "train", index)
        counts.append(len(labels))
        drawn = wholes[-1]
        shares = [mask.sum() / whole.sum() for mask, whole in zip(masks, drawn, strict=True)]
        assert min(shares) >= drawing.LEAST_VISIBLE
    assert 0 < min(counts) < 12  # those without room are left out


def test_a_digit_is_drawn_where_its_mask_is():
    one, none = (SceneOptions(digits=(n, n), digit_size=(32, 40)) for n in (1, 0))
    for index in range(8):
        scene, ground = draw_scene(one, "train", index), draw_scene(none, "train", index)
        changed = (scene.image.int() - ground.image.int()).abs().sum(0).float()
        x1, y1, x2, y2 = scene.boxes[0].int().tolist()
        beside = ~scene.masks[0]
        beside[:y1], beside[y2:], beside[:, :x1], beside[:, x2:] = (False,) * 4
        assert changed[scene.masks[0]].mean() > 2.4 * changed[beside].mean()


def test_a_scene_may_be_empty():
    image, boxes, labels, masks, label_map = draw_scene(SceneOptions(digits=(0, 0)), "train", 3)
    assert (boxes.shape, labels.shape, masks.shape) == ((0, 4), (0,), (0, 96, 96))
    assert not label_map.any()
    assert image.float().std() > 1


def test_splits_share_no_digit_and_no_part_of_a_photograph(monkeypatch):
    parts = {}
    for split in drawing.REGIONS:
        boxes = parts.setdefault(split, [])
        resize = drawing.Image.Image.resize

        def spied(image, size, resample=None, box=None, boxes=boxes, resize=resize, **options):
            if box is not None:
                boxes.append((box[0] / image.width, box[2] / image.width))
            return resize(image, size, resample, box=box, **options)

        with monkeypatch.context() as patch:
            patch.setattr(drawing.Image.Image, "resize", spied)
            for index in range(20):
                draw_scene(SceneOptions(digits=(0, 0)), split, index)
    assert max(last for _, last in parts["train"]) <= min(first for first, _ in parts["held-out"])
    train, held_out = (
        {image.tobytes() for image in drawing._small_digits(split)[0]} for split in drawing.REGIONS
    )
    assert len(train) + len(held_out) == 1797
    assert not train & held_out


def test_the_smallest_digits_have_masks():
    for split in drawing.REGIONS:
        for digit in drawing._small_digits(split)[0]:
            assert (drawing._enlarged(digit, drawing.SIZE_BOUNDS[0]) > 0.5).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "data.seed must be from 0"),
        ({"digits": (3, 2)}, "data.digits must be 0 ≤ least ≤ most ≤ 64, got 3 and 2"),
        ({"digits": (0, 65)}, "got 0 and 65"),
        ({"digit_size": (7, 20)}, r"data.digit_size must be 8 ≤ least .* got 7 and 20 for \[96, 96\]"),
        ({"digit_size": (30, 20)}, "got 30 and 20"),
        ({"image_size": (30, 96)}, r"fit the image, got 18 and 36 for \[30, 96\]"),
        ({"image_size": (5000, 96)}, r"data.image_size must be at most 4096, got \[5000, 96\]"),
        ({"train_images": 0}, "must be at least 1, got 0 and 200"),
    ],
)
def test_invalid_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SceneOptions(**options)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"unknown split 'test' .*held-out, train"):
        draw_scene(OPTIONS, "test", 0)
