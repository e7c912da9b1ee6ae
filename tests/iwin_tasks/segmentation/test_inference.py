import pytest
import torch
from torch import nn

from iwin_tasks.segmentation import predict_probabilities
from iwin_tasks.segmentation.inference import slide, starts

IMAGES = torch.randn(2, 3, 13, 22, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    """Returns a small model of one convolution, whose logits depend on where a window's border is."""
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 5, padding=2).requires_grad_(False)


def test_a_whole_image_gives_the_softmax_of_its_logits(model):
    torch.testing.assert_close(predict_probabilities(model, IMAGES), model(IMAGES).softmax(1))
    huge = predict_probabilities(model, IMAGES, window=64)
    torch.testing.assert_close(huge, model(IMAGES).softmax(1))


def test_windows_cover_every_pixel_and_end_at_the_border():
    assert starts(22, 8, 5) == [0, 5, 10, 14]
    assert starts(8, 8, 5) == starts(3, 8, 5) == [0]
    assert starts(23, 8, 5) == [0, 5, 10, 15]


def test_overlapping_windows_are_averaged(model):
    expected, seen = torch.zeros(2, 4, 13, 22), torch.zeros(13, 22)
    for top in (0, 5):
        for left in (0, 6, 12):
            expected[..., top : top + 8, left : left + 10] += model(
                IMAGES[..., top : top + 8, left : left + 10]
            )
            seen[top : top + 8, left : left + 10] += 1
    torch.testing.assert_close(slide(model, IMAGES, (8, 10), (5, 6)), expected / seen)
    shares = predict_probabilities(model, IMAGES, window=(8, 10), stride=(5, 6))
    torch.testing.assert_close(shares, (expected / seen).softmax(1))
    torch.testing.assert_close(predict_probabilities(model, IMAGES, window=(8, 10)), shares)  # two thirds


def test_scales_and_mirror_images_are_averaged(model):
    sides = [(7, 11), (26, 44)]
    expected = torch.zeros(2, 4, 20, 30)
    for side in sides:
        scaled = nn.functional.interpolate(IMAGES, side, mode="bilinear")
        for mirror in (False, True):
            logits = model(scaled.flip(-1) if mirror else scaled)
            full = nn.functional.interpolate(logits, (20, 30), mode="bilinear").softmax(1)
            expected += (full.flip(-1) if mirror else full) / 4
    shares = predict_probabilities(model, IMAGES, scales=(0.5, 2), flip=True, size=(20, 30))
    torch.testing.assert_close(shares, expected)
    mirrored = predict_probabilities(model, IMAGES.flip(-1), flip=True)
    torch.testing.assert_close(mirrored.flip(-1), predict_probabilities(model, IMAGES, flip=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, r"scales must be positive numbers, at least one, got \[\]"),
        ({"scales": (1, 0)}, r"scales must be positive numbers, at least one, got \[1, 0\]"),
        ({"stride": 4}, "stride needs a window, got 4 without"),
        ({"window": 4, "stride": 5}, "stride must be at most the window, got 5 for 4"),
        ({"window": 0}, "window must be a positive integer"),
    ],
)
def test_options_that_cannot_be_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        predict_probabilities(model, IMAGES, **options)
