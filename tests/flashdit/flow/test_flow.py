import pytest
import torch
from golden_rule import assert_golden, golden_input, golden_state, load_json, load_npz
from scipy.stats import norm

from flashdit import FlashDiT
from flashdit.flow.guidance import evaluations, guide
from flashdit.flow.loss import LossOptions, flow_loss
from flashdit.flow.path import interpolate, velocity
from flashdit.flow.times import TIMES

GOLDEN = load_npz("transport.npz")
META = load_json("transport_meta.json")
X_1, X_0 = golden_input(11, (3, 4, 4, 4)), golden_input(12, (3, 4, 4, 4))
T = torch.tensor([0.1, 0.5, 0.85])


def test_path_and_velocity_equal_the_released_transport():
    assert_golden(interpolate(X_0, X_1, T), GOLDEN["loss/linear_velocity/xt"])
    assert_golden(velocity(X_0, X_1), GOLDEN["loss/linear_velocity/ut"])


@pytest.mark.parametrize(("case", "weight"), [("linear_velocity_cos", 1.0), ("linear_velocity", 0.0)])
def test_loss_equals_the_released_transport(case, weight):
    x_t = interpolate(X_0, X_1, T)
    v_t = torch.tanh(x_t) * (1 + T[:, None, None, None])
    loss, terms = flow_loss(v_t, velocity(X_0, X_1), LossOptions(cosine_weight=weight))
    expected = META[f"loss/{case}"]
    assert terms["mse"].tolist() == pytest.approx(expected["loss"], rel=1e-5)
    assert loss.mean().item() == pytest.approx(expected["total"], rel=1e-5)
    if weight:
        assert terms["cosine"].tolist() == pytest.approx(expected["cos_loss"], rel=1e-5)


def test_loss_of_the_released_model_equals_its_golden_loss():
    meta, case = load_json("dit_small_meta.json")["best"], META["loss/dit_small_best"]
    model = FlashDiT.from_lightningdit(golden_state(meta["keys"]), num_heads=4)
    x_1, x_0 = golden_input(21, (2, 32, 16, 16)), golden_input(22, (2, 32, 16, 16))
    t = torch.tensor([0.3, 0.7])
    with torch.no_grad():
        v_t = model(interpolate(x_0, x_1, t), t, torch.tensor([1, 10]))
    _, terms = flow_loss(v_t, velocity(x_0, x_1), LossOptions())
    assert terms["mse"].tolist() == pytest.approx(case["loss"], rel=2e-5)
    assert terms["cosine"].tolist() == pytest.approx(case["cos_loss"], rel=2e-5)


class CountingModel:
    """v = (1 + label) · x, counting how many samples each forward has."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        return (1 + y.float()).reshape(-1, 1, 1, 1) * x


@pytest.mark.parametrize(
    ("scale", "t", "batch"),
    [(1.0, 0.5, 2), (3.0, 0.5, 4), (3.0, 0.1, 2), (0.0, 0.5, 2), (0.0, 0.9, 2), (-1.0, 0.5, 4)],
)
def test_guidance_costs_a_second_forward_only_where_both_velocities_count(scale, t, batch):
    model, labels, x = CountingModel(), torch.tensor([0, 1]), torch.ones(2, 3, 4, 4)
    v = guide(model, labels, null_label=9, scale=scale, interval=(0.3, 0.8))(x, t)
    assert model.batches == [batch]
    assert evaluations(t, scale, (0.3, 0.8)) == batch // 2
    effective = scale if 0.3 <= t <= 0.8 else 1.0
    expected = 10 + effective * ((1 + labels) - 10)
    torch.testing.assert_close(v, expected.float().reshape(2, 1, 1, 1).expand_as(x))


def test_guidance_interval_includes_its_ends_up_to_rounding():
    model = CountingModel()
    v = guide(model, torch.tensor([0]), null_label=1, scale=2.0, interval=(0.25, 0.75))
    for t in (0.25, 0.75, 0.75 + 1e-15, 0.2499, 0.7501):
        v(torch.ones(1, 3, 2, 2), t)
    assert model.batches == [2, 2, 2, 1, 1]


def test_legacy_guidance_touches_the_first_channels_alone():
    x = torch.ones(1, 5, 2, 2)
    v = guide(CountingModel(), torch.tensor([0]), null_label=1, scale=3.0, channels=3)(x, 0.5)
    assert v[0, :, 0, 0].tolist() == [-1, -1, -1, 1, 1]
    v = guide(CountingModel(), torch.tensor([0]), null_label=1, scale=0.0, channels=3)(x, 0.5)
    assert v[0, :, 0, 0].tolist() == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("interval", [(0.8, 0.3), (-0.1, 0.5), (0.5, 1.2)])
def test_interval_that_cannot_be_is_named(interval):
    with pytest.raises(ValueError, match="guidance interval must be 0 ≤ low ≤ high ≤ 1"):
        guide(CountingModel(), torch.tensor([0]), 1, 2.0, interval)


def test_logit_normal_times_have_the_quantiles_of_their_distribution():
    uniform = torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64)
    times = TIMES.build({"name": "logit_normal", "mean": -0.7, "std": 1.3})(uniform)
    expected = 1 / (1 + torch.exp(-torch.from_numpy(-0.7 + 1.3 * norm.ppf(uniform.numpy()))))
    torch.testing.assert_close(times, expected)


@pytest.mark.parametrize("name", TIMES.names())
def test_times_stay_inside_zero_and_one(name):
    times = TIMES.build(name)(torch.tensor([0.0, 0.3, 1.0]))
    assert torch.isfinite(times).all()
    assert ((times >= 0) & (times <= 1)).all()


def test_time_distributions_that_cannot_be_are_named():
    with pytest.raises(
        ValueError, match="unknown time distribution 'lognormal'; did you mean 'logit_normal'"
    ):
        TIMES.build("lognormal")
    with pytest.raises(ValueError, match="std of logit-normal times must be positive, got -1"):
        TIMES.build({"name": "logit_normal", "std": -1})


@pytest.mark.parametrize("channels", [1, 4, 32])
def test_the_first_gradient_of_the_cosine_is_as_large_as_later_ones(channels):
    torch.manual_seed(0)
    options = {"sample_size": 4, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 2}
    model = FlashDiT(**options, in_channels=channels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    norms = []
    for _ in range(8):
        x_1, x_0, t = torch.randn(16, channels, 4, 4), torch.randn(16, channels, 4, 4), torch.rand(16)
        v_t = model(interpolate(x_0, x_1, t), t, torch.zeros(16, dtype=torch.long))
        optimizer.zero_grad()
        flow_loss(v_t, velocity(x_0, x_1), LossOptions(cosine_weight=1.0))[0].mean().backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        optimizer.step()
    assert 0 < norms[0] < 8 * max(norms[1:])


def test_the_cosine_is_exact_above_its_bound_and_finite_at_zero():
    torch.manual_seed(0)
    u_t, direction = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    root = u_t.square().sum(1).mean((1, 2)).sqrt()[:, None, None, None]
    v_t = direction / direction.norm(dim=1, keepdim=True) * root * 0.11
    exact = torch.nn.functional.cosine_similarity(v_t.double(), u_t.double(), dim=1)
    cosine = flow_loss(v_t, u_t, LossOptions())[1]["cosine"]
    torch.testing.assert_close(cosine, (1 - exact).mean((1, 2)).float(), rtol=1e-5, atol=1e-6)
    zero = torch.zeros(2, 3, 4, 4, requires_grad=True)
    flow_loss(zero, u_t, LossOptions())[1]["cosine"].sum().backward()
    slope = (
        -u_t / u_t.norm(dim=1, keepdim=True) / (0.1 * root) / 16
    )  # of 1 − v·u / (0.1·root·|u|), mean of 16
    torch.testing.assert_close(zero.grad, slope, rtol=1e-5, atol=1e-6)
    nothing = torch.zeros(1, 3, 4, 4)
    assert flow_loss(nothing, nothing, LossOptions())[1]["cosine"].item() == 1
