"""Oracle: a model that notes what it is asked about, and data whose every image is known."""

import pytest
import torch
from torch import nn

from flashdit.data.latents import LatentOptions, LatentSpace
from flashdit.evaluation.loss import held_out_loss
from flashdit.flow.loss import LossOptions

SHAPE = (2, 4, 6)


class KnownLatents:
    """Ten latents: number i is i everywhere, and of class i modulo 5."""

    mirrors, shape = False, SHAPE
    labels = torch.arange(10) % 5

    def read(self, indices, mirrored):
        return indices.float().reshape(-1, 1, 1, 1).expand(-1, *SHAPE)


class Asked(nn.Module):
    """Returns half of x_t and keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((x, t, y))
        return self.weight * x


@pytest.fixture
def loss_of():
    mean, std = torch.full((1, 2, 1, 1), 2.0), torch.full((1, 2, 1, 1), 4.0)
    space = LatentSpace(mean, std, LatentOptions(multiplier=1.0), None)

    def compute(model, **changes):
        options = {"times": "uniform", "options": LossOptions(cosine_weight=0.0), "num_images": 23}
        return held_out_loss(model, space, KnownLatents(), **{**options, **changes})

    return compute


def test_each_loss_is_that_of_the_velocity_from_its_noise_to_its_normalised_image(loss_of):
    model = Asked()
    found = loss_of(model)
    ((x_t, t, y),) = model.calls
    assert set(y.tolist()) == {0, 1, 2, 3, 4}
    # Of ten latents in equal shares the first twenty examples are each twice; solve for which it was.
    per_image = torch.arange(10.0).reshape(1, 10, 1, 1, 1).expand(23, 10, *SHAPE)
    x_1 = (per_image - 2) / 4
    when = t.reshape(-1, 1, 1, 1, 1)
    x_0 = (x_t[:, None] - when * x_1) / (1 - when)
    losses = (0.5 * x_t[:, None] - (x_1 - x_0)).square().flatten(2).mean(2)  # (examples, images)
    fits = (losses - found["loss"][:, None]).abs()
    other_class = torch.arange(10) % 5 != y[:, None]
    which = fits.masked_fill(other_class, torch.inf).argmin(1)
    rows = torch.arange(23)
    torch.testing.assert_close(losses[rows, which], found["loss"])
    noise = x_0[rows, which]
    assert 0.9 < noise.std() < 1.1
    assert noise.flatten(1).unique(dim=0).shape == (23, 48), "each example has its own noise"
    torch.testing.assert_close(found["mse"], found["loss"])


def test_examples_are_the_same_whatever_the_batch_and_the_random_state(loss_of):
    first = loss_of(Asked())["loss"]
    torch.manual_seed(77)
    torch.testing.assert_close(loss_of(Asked(), batch_size=4)["loss"], first)
    assert len(first) == 23
    assert first.std() > 0


def test_the_cosine_is_a_term_of_its_own(loss_of):
    found = loss_of(Asked(), options=LossOptions(cosine_weight=2.0))
    torch.testing.assert_close(found["loss"], found["mse"] + 2 * found["cosine"])


@pytest.mark.parametrize("name", ["num_images", "batch_size"])
def test_a_count_below_one_is_named(loss_of, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        loss_of(Asked(), **{name: 0})
