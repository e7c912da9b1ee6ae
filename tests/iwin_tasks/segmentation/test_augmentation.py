import pytest
import torch
from torch import Tensor

from flashdit.shared.seeds import generator_for
from iwin_tasks.segmentation.augmentation import (
    PixelAugmentation,
    distort,
    held_out_image,
    normalised,
    scaled_size,
    train_pair,
)

STILL = PixelAugmentation(scale=None, ratio=(1.0, 1.0), crop=None, hflip=0.0, photometric=0.0)


def still(**options):
    """Returns a recipe that changes nothing but what is given."""
    return PixelAugmentation(**{**vars(STILL), **options})


def pixels(height=20, width=30):
    """Returns an image uint8 whose red channel is its labels times 20."""
    labels = torch.randint(0, 12, (height, width), generator=torch.Generator().manual_seed(0))
    image = torch.stack([20 * labels, torch.full_like(labels, 90), torch.full_like(labels, 200)])
    return image.to(torch.uint8), labels


def red(image):
    """Returns the red channel of a normalised image as bytes."""
    return ((image[0] * 0.229 + 0.485) * 255).round().long()


@pytest.mark.parametrize(
    ("size", "scale", "ratio", "expected"),
    [
        ((480, 640), (2048, 512), 1.0, [512, 683]),  # as mmcv.rescale_size
        ((640, 480), (2048, 512), 1.0, [683, 512]),
        ((100, 1000), (2048, 512), 1.0, [205, 2048]),
        ((480, 640), (2048, 512), 0.5, [256, 341]),
        ((480, 640), None, 1.5, [720, 960]),
        ((1, 4096), (2048, 512), 0.5, [1, 1024]),
    ],
)
def test_an_image_is_resized_to_fit_and_keeps_its_form(size, scale, ratio, expected):
    assert scaled_size(size, scale, ratio) == expected


def test_a_recipe_that_changes_nothing_only_normalises():
    image, labels = pixels()
    found, classes = train_pair(image, labels, STILL, 255, torch.Generator())
    assert (type(found), found.dtype) == (Tensor, torch.float32)
    assert (type(classes), classes.dtype) == (Tensor, torch.int64)
    assert classes.equal(labels)
    torch.testing.assert_close(found, held_out_image(image, None))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(found, (image / 255 - mean) / std)


@pytest.mark.parametrize("options", [{"crop": (12, 18)}, {"hflip": 1.0}, {"crop": (24, 34), "hflip": 0.5}])
def test_image_and_labels_stay_registered(options):
    image, labels = pixels()
    moved = 0
    for item in range(8):
        found, classes = train_pair(image, labels, still(**options), 255, generator_for(0, "a", item))
        counted = classes != 255
        assert red(found)[counted].equal(20 * classes[counted])
        moved += classes.shape != labels.shape or not classes.equal(labels)
        height, width = options.get("crop", (20, 30))
        assert counted.sum() == min(20, height) * min(30, width)
        assert counted[:20, :30].all()  # filled up at the right and below, with what is 0 once normalised
        assert not found[:, ~counted].any()
    assert moved == 8


def test_resized_labels_are_classes_and_the_crop_has_its_size():
    image, labels = pixels(40, 60)
    sizes = set()
    for item in range(12):
        options = still(scale=(60, 40), ratio=(0.4, 2.0), crop=(32, 48))
        found, classes = train_pair(image, labels, options, 9, generator_for(0, "a", item))
        assert found.shape == (3, 32, 48)
        assert classes.shape == (32, 48)
        sizes.add(int((classes != 9).sum()))
        assert set(classes.unique().tolist()) <= {*range(12)}
    assert min(sizes) < 32 * 48, "a small image is filled up"


def test_a_crop_with_too_much_of_one_class_is_drawn_again():
    labels = torch.zeros(40, 40, dtype=torch.int64)
    labels[:, 20:] = 1
    labels[0, :] = 255
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)

    def largest_share(limit, item):
        options = still(crop=(20, 20), cat_max_ratio=limit)
        _, classes = train_pair(image, labels, options, 255, generator_for(0, "a", item))
        counts = classes[classes != 255].unique(return_counts=True)[1]
        return float(counts.max() / counts.sum()) if len(counts) > 1 else 1.0

    free, held = ([largest_share(limit, item) for item in range(40)] for limit in (1.0, 0.75))
    assert sum(share < 0.75 for share in held) > 36
    assert sum(share < 0.75 for share in free) < 28


def test_ignored_pixels_are_no_class_of_a_crop():
    labels = torch.full((40, 40), 255)
    labels[:, 20:32], labels[:, 32:] = 0, 1
    image, options = torch.zeros(3, 40, 40, dtype=torch.uint8), still(crop=(20, 20))
    found = [train_pair(image, labels, options, 255, generator_for(0, "a", item))[1] for item in range(40)]
    assert sum(bool((classes == 1).any()) for classes in found) > 30


def test_an_image_is_resized_bilinearly_to_whole_levels():
    image, _ = pixels()
    found = held_out_image(image, (60, 31))
    expected = torch.nn.functional.interpolate(image[None].float(), (31, 47), mode="bilinear").round()[0]
    torch.testing.assert_close(found, normalised(expected / 255))


def test_what_is_drawn_depends_on_the_generator_alone():
    image, labels = pixels()
    options = PixelAugmentation(scale=(60, 40), crop=(24, 32))
    torch.manual_seed(0)
    first = train_pair(image, labels, options, 255, generator_for(3, "a", 5))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = train_pair(image, labels, options, 255, generator_for(3, "a", 5))
    assert before.equal(torch.get_rng_state())
    other = train_pair(image, labels, options, 255, generator_for(3, "a", 6))
    assert first[0].equal(again[0])
    assert first[1].equal(again[1])
    assert not first[0].equal(other[0])


def test_distortion_changes_brightness_contrast_saturation_and_hue_within_bounds():
    grey = torch.full((3, 4, 5), 0.5)
    values = []
    for item in range(60):
        generator = generator_for(0, "d", item)

        def between(low, high, generator=generator):
            return low + (high - low) * float(torch.rand((), generator=generator))

        x = distort(grey, 1.0, between)
        assert x.min() >= 0
        assert x.max() <= 1
        torch.testing.assert_close(x[0], x[2])  # a grey pixel has neither saturation nor hue
        values.append(float(x.mean()))
    low, high = (0.5 - 32 / 255) * 0.5, (0.5 + 32 / 255) * 1.5
    assert low <= min(values) < 0.3
    assert 0.7 < max(values) <= high
    coloured = torch.tensor([0.8, 0.4, 0.2]).view(3, 1, 1).expand(3, 4, 5)
    assert distort(coloured, 0.0, between).equal(coloured)
    hues = {round(float(distort(coloured, 1.0, between)[:, 0, 0].argmax())) for _ in range(20)}
    assert hues == {0}, "red stays red: the hue turns by a tenth of the circle at most"


def test_normalised_is_float32():
    assert normalised(torch.zeros(3, 2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hflip": 1.5}, "augmentation.hflip must be from 0 to 1, got 1.5"),
        ({"photometric": -1.0}, "augmentation.photometric must be from 0 to 1, got -1.0"),
        ({"cat_max_ratio": 0.0}, "augmentation.cat_max_ratio must be above 0 and at most 1, got 0.0"),
        ({"ratio": (2.0, 0.5)}, r"augmentation.ratio must be 0 < least ≤ largest, got 2.0 and 0.5"),
        ({"ratio": (0.5, float("inf"))}, "augmentation.ratio must be finite"),
        ({"crop": (0, 512)}, r"augmentation.crop must be two sides from 1 to 8192, got \[0, 512\]"),
        ({"scale": (99999, 512)}, r"augmentation.scale must be two sides from 1 to 8192, got \[99999, 512\]"),
    ],
)
def test_invalid_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PixelAugmentation(**options)
