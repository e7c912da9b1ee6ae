"""Laws of the samplers, over the registry's names."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from golden_rule import assert_golden, golden_input, load_json, load_npz

from flashdit.flow.one_step import Dopri5Options, dopri5, sde_euler
from flashdit.flow.path import data_prediction, score
from flashdit.flow.samplers import SAMPLERS, time_grid
from flashdit.shared.registry import announced

GOLDEN = load_npz("transport.npz")
META = load_json("transport_meta.json")
MEAN, STD = 1.3, 0.4
X_0 = torch.tensor([[0.7], [-1.3]], dtype=torch.float64)
ORDERS = {"euler": 1, "heun": 2, "dpm++2m": 2, "unipc": 3}
NAMES = SAMPLERS.names()
DETERMINISTIC = [name for name in NAMES if not SAMPLERS[name].stochastic]
SHIFTS = [1.0, 0.3, 3.0]


def run(name, v, x, times):
    """Returns x at the last time; sde-euler without noise, which leaves an ODE of another drift."""
    return SAMPLERS.build(name, lambda _step: torch.zeros_like(x))(v, x, times)


def gaussian(x, t):
    """Returns the velocity of the flow from N(0, 1) to N(MEAN, STD²)."""
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def gaussian_at(x_0, t):
    """Returns the exact solution: x_0 keeps its quantile."""
    return t * MEAN + math.sqrt((t * STD) ** 2 + (1 - t) ** 2) * x_0


def gaussian_error(name, steps, start=0.0, end=1.0, shift=1.0):
    times = [start + (end - start) * t for t in time_grid(steps, shift)]
    x = run(name, gaussian, gaussian_at(X_0, start), times)
    return (x - gaussian_at(X_0, end)).abs().max().item()


def cubic_error(name, steps, shift=1.0):
    """Returns the error at t = 1 on dx/dt = 3t², whose solution is x_0 + t³."""
    x = run(name, lambda x, t: torch.full_like(x, 3 * t**2), X_0, time_grid(steps, shift))
    return (x - X_0 - 1).abs().max().item()


@pytest.mark.parametrize(("case", "shift"), [("euler10_noshift", 1.0), ("euler10_shift0.3", 0.3)])
def test_euler_equals_the_released_ode(case, shift):
    times = time_grid(META[case]["n_points"] - 1, shift)
    assert_golden(torch.tensor(times), GOLDEN[f"{case}/t_grid"])
    evaluations = []

    def v(x_t, t):
        evaluations.append(t)
        return -x_t + t

    x = run("euler", v, golden_input(7, (2, 3, 4, 4)), times)
    assert_golden(x, GOLDEN[f"{case}/final"])
    assert len(evaluations) == META[case]["model_evals"]
    assert evaluations[-1] == pytest.approx(META[case]["t_last_eval"], rel=1e-6)


@pytest.mark.parametrize("name", ORDERS)
def test_halving_the_step_divides_the_error_by_two_to_the_order(name):
    errors = [gaussian_error(name, steps, 0.1, 0.9) for steps in (128, 256)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.05)


@pytest.mark.parametrize("error", [gaussian_error, cubic_error])
@pytest.mark.parametrize("name", ORDERS)
def test_from_noise_to_data_the_order_stays_but_for_the_first_order_ends(name, error):
    coarse, fine = error(name, 128), error(name, 512)
    # dpm++2m and unipc start and end on a step of infinite log-SNR: second order at most, less a logarithm
    assert math.log2(coarse / fine) / 2 > min(ORDERS[name], 2) - 0.4
    assert fine < 4e-3


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", sorted(set(ORDERS) - {"euler"}))
def test_higher_orders_beat_euler_at_any_shift(name, shift):
    assert gaussian_error(name, 64, shift=shift) < 0.2 * gaussian_error("euler", 64, shift=shift)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize(
    ("scheduler", "name"), [(DPMSolverMultistepScheduler, "dpm++2m"), (UniPCMultistepScheduler, "unipc")]
)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_multistep_samplers_equal_diffusers_on_the_same_grid(scheduler, name, steps):
    times = time_grid(steps, 0.4)
    times[0] = 0.01  # theirs needs a finite log-SNR at the start
    theirs = scheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
    theirs.set_timesteps(steps)
    theirs.sigmas = 1 - torch.tensor(times, dtype=torch.float64)
    theirs.set_begin_index(0)

    def v(x_t, t):
        return torch.tanh(x_t) * (1 + t) - x_t * t

    x = x_0 = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    for t, timestep in zip(times, theirs.timesteps, strict=False):
        x = theirs.step(-v(x, t), timestep, x).prev_sample
    torch.testing.assert_close(run(name, v, x_0, times), x, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_straight_flow_is_exact_in_one_step(name):
    x_0, u = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(run(name, lambda _x, _t: u, x_0, time_grid(1)), x_0 + u)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [1, 2, 3, 25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_end_points_are_finite_and_keep_their_dtype(name, dtype, steps, shift):
    x_0 = torch.linspace(-3, 3, 12).reshape(1, 1, 3, 4).to(dtype)
    times = []

    def v(x, t):
        assert x.shape == x_0.shape
        times.append(t)
        return gaussian(x, t)

    x = run(name, v, x_0, time_grid(steps, shift))
    assert torch.isfinite(x).all()
    assert x.dtype == dtype
    assert min(times) == 0
    assert max(times) <= 1


def test_noise_grows_no_bias_and_its_distribution_converges_at_first_order():
    def moments(steps):
        """Returns mean and standard deviation at t = 1: the map is linear, so unit responses tell both."""
        responses = torch.zeros(steps + 2, 1, dtype=torch.float64)  # of x_0, of each noise, of nothing

        def v(x, t):
            slope = gaussian(x, t) - gaussian(torch.zeros_like(x), t)
            slope[-1] = gaussian(x[-1], t)
            return slope

        def noise(step):
            unit = torch.zeros_like(responses)
            unit[1 + step] = 1
            return unit

        start = responses.clone()
        start[0] = 1
        end = sde_euler(v, start, time_grid(steps), noise=noise)
        return end[-1].item(), end[:-1].norm().item()

    (mean, coarse), (_, fine) = moments(64), moments(128)
    assert mean == pytest.approx(MEAN)
    assert fine == pytest.approx(STD, abs=2e-3)
    assert math.log2(abs(coarse - STD) / abs(fine - STD)) == pytest.approx(1, abs=0.15)


def test_sde_draws_once_an_update_but_for_the_last():
    drawn = []
    sde_euler(gaussian, X_0, time_grid(5), noise=lambda step: drawn.append(step) or torch.zeros_like(X_0))
    assert drawn == [0, 1, 2, 3]


def test_score_and_data_prediction_are_those_of_a_gaussian():
    t, x = 0.3, torch.tensor([0.2, -1.0], dtype=torch.float64)
    variance = (t * STD) ** 2 + (1 - t) ** 2
    v = gaussian(x, t)
    torch.testing.assert_close(score(x, v, t), -(x - t * MEAN) / variance)
    expected = MEAN + t * STD**2 / variance * (x - t * MEAN)
    torch.testing.assert_close(data_prediction(x, v, t), expected)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_dopri5_keeps_its_tolerance_and_spends_more_on_a_tighter_one(tolerance):
    evaluations = []

    def v(x, t):
        evaluations.append(t)
        return gaussian(x, t)

    x = dopri5(v, X_0, time_grid(1), options=Dopri5Options(atol=tolerance, rtol=tolerance))
    assert (x - gaussian_at(X_0, 1.0)).abs().max() < 10 * tolerance
    assert len(evaluations) < 60 if tolerance == 1e-3 else 60 < len(evaluations) < 200


def test_dopri5_steps_onto_the_jumps_it_is_given():
    def v(x, t):
        return torch.full_like(x, 5.0 if t <= 0.37 else -1.0)

    exact, inexact = (
        SAMPLERS.build("dopri5", torch.zeros, jumps)(v, torch.zeros(1, 1), time_grid(1)).item()
        for jumps in ([0.0, 0.37], [])
    )
    assert exact == pytest.approx(5 * 0.37 - 0.63, abs=1e-5)
    assert abs(inexact - (5 * 0.37 - 0.63)) > 1e-4


@pytest.mark.parametrize(
    ("given", "integrated"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dopri5_integrates_in_float32_at_least(given, integrated):
    seen = set()

    def v(x, t):
        seen.add(x.dtype)
        return -x

    run("dopri5", v, torch.ones(1, 1, dtype=given), time_grid(1))
    assert seen == {integrated}


def test_shift_is_applied_once_and_its_ends_are_exact():
    for shift in SHIFTS:
        times = time_grid(8, shift)
        assert times[0] == 0
        assert times[-1] == 1
        assert times[4] == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))


@pytest.mark.parametrize(
    ("steps", "shift", "message"),
    [
        (0, 1.0, "steps must be at least 1, got 0"),
        (1_000_001, 1.0, "steps must be at most 1,000,000, got 1000001"),
        (5, 0.0, "shift must be positive"),
        (5, math.inf, "shift must be positive"),
    ],
)
def test_invalid_time_grids_are_named(steps, shift, message):
    with pytest.raises(ValueError, match=message):
        time_grid(steps, shift)


def test_unknown_sampler_names_the_nearest():
    with pytest.raises(ValueError, match="unknown sampler 'eulr'; did you mean 'euler'"):
        SAMPLERS.build("eulr", torch.zeros)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "euler", "atol": 1e-3}, "unknown option of sampler 'euler' 'atol'"),
        ({"name": "dopri5", "atl": 1e-3}, "unknown option of sampler 'dopri5' 'atl'; did you mean 'atol'"),
        ({"name": "dopri5", "atol": 0.0}, "atol and rtol must be positive, got 0.0 and 1e-05"),
        ({"name": "dopri5", "rtol": math.nan}, "dopri5's rtol must be finite, got nan"),
        ({"name": "dopri5", "atol": "tight"}, "option 'atol' of sampler 'dopri5' must be a number"),
    ],
)
def test_invalid_options_of_a_sampler_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        SAMPLERS.options(spec)


def test_every_announced_sampler_registers_itself_and_no_other_is_registered():
    ours = {name for name, module in announced("flashdit.samplers").items() if module.startswith("flashdit.")}
    assert ours == {name for name in NAMES if SAMPLERS[name].integrate.__module__.startswith("flashdit.")}
    assert ours == SAMPLERS.entries.keys()


def test_samplers_declare_what_they_need():
    assert [name for name in NAMES if SAMPLERS[name].adaptive] == ["dopri5"]
    assert [name for name in NAMES if SAMPLERS[name].stochastic] == ["sde-euler"]
