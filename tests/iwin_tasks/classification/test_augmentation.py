import random

import numpy as np
import pytest
import torch
from timm.data import Mixup

from flashdit.shared.seeds import generator_for
from iwin_tasks.classification.augmentation import AugmentationOptions, kept_globals, seed_globals

UNMIXED = {"mixup": 0.0, "cutmix": 0.0}


def draw():
    """Returns one number of each global generator."""
    return random.random(), np.random.rand(), torch.rand(()).item(), np.random.normal()


def test_global_generators_are_seeded_within_and_put_back_after():
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draw()  # NumPy now holds half of a normal pair
    with kept_globals():
        expected = draw()
    with kept_globals():
        seed_globals(5, "x", 7)
        seeded = draw()
        seed_globals(5, "x", 8)
        assert draw() != seeded
    with kept_globals():
        seed_globals(5, "x", 7)
        assert draw() == seeded
    assert draw() == expected


@pytest.mark.parametrize(
    "options", [{}, {"mixup": 0.0}, {"cutmix": 0.0}, {"mix_prob": 0.5, "label_smoothing": 0.0}], ids=str
)
def test_pairs_are_mixed_as_timm_mixes_a_batch_of_two(training, options):
    mixed, plain = training(4, **options), training(4, **options | UNMIXED)
    full = AugmentationOptions(**options)
    reference = Mixup(
        full.mixup, full.cutmix, prob=full.mix_prob, label_smoothing=full.label_smoothing, num_classes=3
    )
    changed = 0
    for pair in range(6):
        places = [2 * pair, 2 * pair + 1]
        images = torch.stack([plain[place]["image"] for place in places])
        labels = plain.images.labels[[plain.order(place) for place in places]]
        np.random.seed(generator_for(4, "mix", pair).initial_seed() % 2**32)
        expected = reference(images.clone(), labels)
        for i, place in enumerate(places):
            torch.testing.assert_close(mixed[place]["image"], expected[0][i])
            torch.testing.assert_close(mixed[place]["target"], expected[1][i])
            changed += not torch.equal(mixed[place]["image"], images[i])
    assert changed


def test_without_mixing_targets_are_smoothed_labels(training):
    examples = training(0, label_smoothing=0.3, **UNMIXED)
    for position in range(4):
        label = examples.images.labels[examples.order(position)]
        expected = torch.full((3,), 0.1).index_fill(0, label, 0.8)
        torch.testing.assert_close(examples[position]["target"], expected)


def test_turns_shifts_and_zooms_move_the_picture_anew_each_epoch(training):
    still = {"crop_scale": (1.0, 1.0), "hflip": 0.0, "rand_augment": None, "color_jitter": None}
    still |= {"random_erasing": 0.0, **UNMIXED}
    plain = training(**still)
    later = next(p for p in range(plain.size, 2 * plain.size) if plain.order(p) == plain.order(0))
    assert torch.equal(plain[later]["image"], plain[0]["image"])
    for moved in ({"rotation": 30.0}, {"shift": 0.3}, {"zoom": (0.6, 1.6)}):
        examples = training(**still, **moved)
        assert not torch.equal(examples[later]["image"], examples[0]["image"])
        assert not torch.equal(examples[later]["image"], plain[0]["image"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hflip": 1.5}, r"augmentation.hflip must be from 0 to 1, got 1.5"),
        ({"label_smoothing": -0.1}, r"augmentation.label_smoothing must be from 0 to 1, got -0.1"),
        ({"mixup": -1.0}, r"augmentation.mixup must not be negative, got -1.0"),
        ({"crop_scale": (0.5, 0.1)}, r"crop_scale must be 0 < least ≤ largest, got 0.5 and 0.1"),
        ({"crop_scale": (0.5, 1.5)}, r"crop_scale must be .* at most 1, got 0.5 and 1.5"),
        ({"color_jitter": -1.0}, r"augmentation.color_jitter must not be negative, got -1.0"),
        ({"crop_pct": 1e-9}, r"augmentation.crop_pct must be from 0.1 to 1, got 1e-09"),
        ({"crop_pct": 1.2}, r"augmentation.crop_pct must be from 0.1 to 1, got 1.2"),
        ({"interpolation": "bicubc"}, r"unknown augmentation.interpolation 'bicubc'; did you mean 'bicubic'"),
        ({"rand_augment": "auto-m9"}, r"rand_augment must be timm's description .*, got 'auto-m9'"),
        ({"rand_augment": "rand-q9"}, r"rand_augment must be timm's description .*, got 'rand-q9'"),
    ],
)
def test_augmentation_that_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        AugmentationOptions(**options)


@pytest.mark.parametrize("name", ["mixup", "rotation", "color_jitter", "label_smoothing", "crop_pct"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_options_that_are_not_finite_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"augmentation\.{name} must be finite, got {value}"):
        AugmentationOptions(**{name: value})
