"""Which latents and labels a model takes, and what its sizes are where the data give them."""

import re
from types import SimpleNamespace

import pytest
import torch

from flashdit.data.fit import DataFacts, check_fit

VAE = SimpleNamespace(factor=8)


def data(shape=(4, 6, 6), labels=(0, 2, 1), class_names=("a", "b", "c"), vae=VAE):
    names = None if class_names is None else list(class_names)
    return DataFacts(shape, torch.tensor(labels), names, 3, vae)


def check(facts, **changes):
    check_fit({"in_channels": 4, "sample_size": 6, "num_classes": 3} | changes, facts, facts.vae)


def test_data_that_fit_are_taken_and_give_the_models_sizes():
    check(data())
    check(data(class_names=None))
    check(data(labels=(0, 1, 0), class_names=None))  # of a model with a class more
    check(data(), num_classes=0)  # which sees no labels
    assert data().sizes == {"in_channels": 4, "sample_size": 6, "num_classes": 3}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            data((4, 5, 5)),
            "model.sample_size=6, got 4 × 5 × 5 (images of data.image_size=40, factor 8); null",
        ),
        (data((3, 6, 6), vae=None), "model.in_channels=4 and model.sample_size=6, got 3 × 6 × 6; null takes"),
        (data((4, 6, 5)), "got 4 × 6 × 5"),
        (data(labels=(0, 3, 1)), "from 0 to below model.num_classes=3, got 0 to 3"),
        (data(labels=(-1, 2, 1)), "from 0 to below model.num_classes=3, got -1 to 2"),
        (data(class_names="abcd"), "model.num_classes must be the number of the data's classes, 4, got 3"),
        (
            data(labels=(0, 1, 0), class_names="ab"),
            "model.num_classes must be the number of the data's classes, 2, got 3",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_both_sides(facts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(facts)
