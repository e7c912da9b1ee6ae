"""Mean flows: the identity of average and instantaneous velocity, the loss in plain lines, long updates."""

import itertools

import pytest
import torch

from flashdit import FlashDiT
from flashdit.flow.mean_flow import (
    MeanFlowOptions,
    Stretch,
    along,
    check_guidance,
    derivative,
    draw_stretch,
    mean_flow_loss,
)

SMALL = {
    "sample_size": 8,
    "in_channels": 2,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 3,
    "attention": {"name": "iwin", "window": 2},
}


def model_of_means(**options):
    """Returns a small model in float64 with weights that are nowhere zero."""
    torch.manual_seed(0)
    model = FlashDiT(**SMALL, most_guidance=4.0, **options).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def stretches(rows, dtype=torch.float64):
    draws = torch.rand(3, rows, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return Stretch(t=draws[0] / 2, duration=draws[1] / 2, guidance=1 + 3 * draws[2])


@pytest.mark.parametrize("attention", ["iwin", "window", "global"])
def test_the_derivative_is_that_of_small_differences(attention):
    spec = {"name": attention} | ({} if attention == "global" else {"window": 2})
    torch.manual_seed(0)
    model = FlashDiT(**{**SMALL, "attention": spec}, most_guidance=4.0, qk_norm=True).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    at, labels = stretches(3), torch.tensor([0, 1, 2])
    x, tangent = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64)
    given = {"y": labels, "guidance": at.guidance}
    got = derivative(model, x, at, tangent, **given)
    step = 2e-3  # times are embedded in float32
    with torch.no_grad():
        after, before = (
            model(x + sign * step * tangent, at.t + sign * step, duration=at.duration - sign * step, **given)
            for sign in (1, -1)
        )
    torch.testing.assert_close(got.double(), (after - before) / (2 * step), rtol=1e-3, atol=1e-4)
    assert got.grad_fn is None


def test_of_a_gaussian_the_average_velocity_gives_back_the_instantaneous_one():
    """Data N(0, s²): the flow carries x_t to x_t · r(end) / r(t), with r(t)² = t²s² + (1 − t)²."""
    variance = 0.3

    def spread(t):
        return (t * t * variance + (1 - t) ** 2).sqrt()

    def u(x, t, duration):
        t, duration = t.reshape(-1, 1, 1, 1), duration.reshape(-1, 1, 1, 1)
        return x * (spread(t + duration) / spread(t) - 1) / duration

    at, x = stretches(5), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    t = at.t.reshape(-1, 1, 1, 1)
    v = x * (t * variance - (1 - t)) / (t * t * variance + (1 - t) ** 2)
    change = derivative(u, x, at, v)
    got = u(x, at.t, at.duration) - at.duration.reshape(-1, 1, 1, 1) * change
    torch.testing.assert_close(got, v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_loss_is_that_of_a_few_plain_lines(power):
    model, at = model_of_means(), stretches(4)
    x_0, x_1 = torch.randn(2, 4, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels, drop = torch.tensor([0, 1, 2, 1]), torch.tensor([False, False, True, False])
    at = Stretch(t=at.t, duration=at.duration, guidance=torch.where(drop, 1.0, at.guidance))
    loss, terms = mean_flow_loss(model, model, x_0, x_1, labels, drop, at, MeanFlowOptions(power=power))
    null, zero = torch.full_like(labels, 3), torch.zeros(4, dtype=torch.float64)
    t, d, w = (value.reshape(-1, 1, 1, 1) for value in (at.t, at.duration, at.guidance))
    x_t = t * x_1 + (1 - t) * x_0
    with torch.no_grad():
        v_c = model(x_t, at.t, labels, duration=zero, guidance=at.guidance)
        v_u = model(x_t, at.t, null, duration=zero, guidance=torch.ones_like(zero))
        goal = x_1 - x_0 + (1 - 1 / w) * (v_c - v_u)
        way = torch.where(drop.reshape(-1, 1, 1, 1), v_u, v_c)
        mine = torch.where(drop, 3, labels)
        step = 2e-3  # times are embedded in float32
        after, before = (
            model(x_t + s * way, at.t + s, mine, duration=at.duration - s, guidance=at.guidance)
            for s in (step, -step)
        )
    velocity = model(x_t, at.t, mine, duration=at.duration, guidance=at.guidance) - d * (after - before) / (
        2 * step
    )
    squares = (velocity - goal).square().flatten(1)
    expected = squares.sum(1) / (squares.sum(1).detach() + 0.01) ** power
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["mse"].double(), squares.mean(1), rtol=1e-4, atol=1e-6)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    got = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
    for one, other in zip(
        got, torch.autograd.grad(expected.sum(), parameters, allow_unused=True), strict=True
    ):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_stretches_are_drawn_as_their_options_say():
    uniform = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    first = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    drop = first < 0.1
    at = draw_stretch(
        first, lambda draws: draws, uniform, drop, MeanFlowOptions(most_guidance=8, instant_share=0.25)
    )
    assert ((at.t >= 0) & (at.duration >= 0) & (at.t + at.duration <= 1)).all()
    assert abs((at.duration == 0).float().mean() - 0.25) < 0.01
    moves = at.duration > 0
    assert ((at.t == first) | (at.t + at.duration - first).abs().lt(1e-6))[moves].all()
    assert (at.guidance[drop] == 1).all()
    assert abs(at.guidance[~drop].log().mean() - torch.tensor(8.0).log() / 2) < 0.02
    assert 1 <= at.guidance.min() <= at.guidance.max() <= 8


def test_a_new_model_of_means_is_its_model_of_velocities_under_any_duration_and_guidance():
    torch.manual_seed(0)
    plain = FlashDiT(**SMALL).eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    means = FlashDiT(**SMALL, most_guidance=4.0).eval()
    missing = means.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"stretch_embedder"}
    x, t, y = torch.randn(2, 2, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 3])
    duration, guidance = torch.tensor([0.1, 0.3]), torch.tensor([1.0, 3.0])
    assert means(x, t, y, duration=duration, guidance=guidance).equal(plain(x, t, y))
    with pytest.raises(ValueError, match="duration and guidance are for models of average velocities"):
        plain(x, t, y, duration=duration)


def test_updates_of_any_length_add_up_where_the_network_is_exact():
    """Of a Gaussian, one update from noise to data equals many."""
    variance = 0.3

    def model(x, t, y, duration, guidance):
        assert (guidance == 2).all()
        t, duration = (value.double().reshape(-1, 1) for value in (t, duration))
        r, end = ((s * s * variance + (1 - s) ** 2).sqrt() for s in (t, t + duration))
        return x * (end / r - 1) / duration

    x = torch.randn(3, 4, dtype=torch.float64)
    found = []
    for times in ([0.0, 1.0], [0.0, 0.3, 1.0], [0.0, 0.1, 0.25, 0.7, 1.0]):
        u, now = along(model, torch.zeros(3, dtype=torch.int64), 2.0, times), x
        for t, end in itertools.pairwise(times):
            now = now + (end - t) * u(now, t)
        found.append(now)
    for other in found:
        torch.testing.assert_close(other, variance**0.5 * x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "interval", "message"),
    [
        (0.5, (0, 1), "must be from 1 to 4, got 0.5"),
        (5, (0, 1), "got 5"),
        (2, (0.1, 1), "must be 0 1, got 0.1 1"),
    ],
)
def test_guidance_that_was_not_trained_is_refused(scale, interval, message):
    check_guidance(1.0, (0.2, 1.0), 4.0)
    with pytest.raises(ValueError, match=message):
        check_guidance(scale, interval, 4.0)
