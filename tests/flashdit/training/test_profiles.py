import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flashdit.training.ema import Ema, EmaOptions
from flashdit.training.profiles import (
    Profile,
    gamma_of_width,
    inner_products,
    kept_share,
    solve,
    width_of_gamma,
)
from flashdit.training.snapshots import drop_later, list_snapshots, read_tracks, write_snapshots

UPDATES, SNAPSHOT_EVERY = 480, 30


class Weights(nn.Module):
    """A few parameters that a test moves by hand."""

    def __init__(self, *values):
        super().__init__()
        self.values = nn.ParameterList(values)

    @torch.no_grad()
    def move(self, *values):
        for parameter, value in zip(self.values, values, strict=True):
            parameter.copy_(value)


def tracking(model, *widths):
    return Ema(model, EmaOptions(power_widths=list(widths)))


def random_walk(updates, seed=0):
    """Yields the parameters (7, 11) and (5,) of each update: they start large and wander far."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(7, 11, generator=generator), torch.randn(5, generator=generator)]
    for _ in range(updates):
        values = [value + 0.02 * torch.randn(value.shape, generator=generator) for value in values]
        yield values


def flat(track):
    return torch.cat([value.detach().flatten() for value in track.values()]).double()


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_are_those_of_the_paper(width, gamma):
    assert gamma_of_width(width) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("width", [0.001, 0.01, 0.05, 0.1, 0.2, 0.288])
def test_width_and_exponent_undo_each_other(width):
    assert width_of_gamma(gamma_of_width(width)) == pytest.approx(width, rel=1e-9)
    assert gamma_of_width(width) > 0


@pytest.mark.parametrize("width", [0.0, -0.1, 0.29, float("nan")])
def test_a_width_that_cannot_be_is_named(width):
    with pytest.raises(ValueError, match=r"a width must be above 0 and below 0\.2887, got"):
        gamma_of_width(width)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_the_tracked_profile_has_its_width(width):
    model = Weights(torch.zeros(UPDATES))
    ema = tracking(model, width)
    for place in torch.eye(UPDATES):  # what is averaged says which update it is of
        model.move(place)
        ema.update(model)
    profile = ema.tracks[width]["values.0"].double().numpy()
    times = (np.arange(UPDATES) + 0.5) / UPDATES
    mean = (profile * times).sum()
    assert profile.sum() == pytest.approx(1, abs=1e-5)
    assert np.sqrt((profile * (times - mean) ** 2).sum()) == pytest.approx(width, rel=1e-3)
    gamma = gamma_of_width(width)
    np.testing.assert_allclose(profile[-1], 1 - kept_share(gamma, UPDATES), rtol=1e-5)
    np.testing.assert_allclose(profile, np.diff(np.linspace(0, 1, UPDATES + 1) ** (gamma + 1)), atol=1e-7)


@pytest.mark.parametrize(
    "pair", [((0.05, 300), (0.1, 300)), ((0.05, 200), (0.2, 450)), ((0.03, 450), (0.1, 200))]
)
def test_inner_products_are_the_integrals(pair):
    first, second = (Profile(width=width, updates=updates) for width, updates in pair)
    times, step = np.linspace(0, 450, 900_001, retstep=True)
    densities = [
        np.where(times <= p.updates, (p.gamma + 1) * times**p.gamma / p.updates ** (p.gamma + 1), 0.0)
        for p in (first, second)
    ]
    integral = (densities[0] * densities[1]).sum() * step
    assert inner_products([first], [second])[0, 0] == pytest.approx(integral, rel=1e-4)
    assert inner_products([second], [first])[0, 0] == pytest.approx(integral, rel=1e-4)


def test_profiles_of_a_million_updates_stay_within_float64():
    known = [Profile(width=width, updates=updates) for updates in (10, 10**6) for width in (0.005, 0.1)]
    assert np.isfinite(inner_products(known, known)).all()
    coefficients, missed = solve(known, known[3])
    np.testing.assert_allclose(coefficients, [0, 0, 0, 1], atol=1e-9)
    assert missed < 1e-6


def track_and_rebuild(folder, widths):
    """Returns direct averages, those rebuilt from snapshots of two tracks on disk, and the last weights."""
    model = Weights(torch.zeros(7, 11), torch.zeros(5))
    direct, two = tracking(model, *widths), tracking(model, 0.05, 0.1)
    for step, values in enumerate(random_walk(UPDATES), start=1):
        model.move(*values)
        direct.update(model)
        two.update(model)
        if step % SNAPSHOT_EVERY == 0:
            write_snapshots(folder, step, two.tracks_state())
    snapshots = list_snapshots(folder)
    stored = torch.stack([flat(snapshot.load()) for snapshot in snapshots])
    rebuilt = {}
    for width in widths:
        wanted = Profile(width=width, updates=UPDATES)
        coefficients, _ = solve([snapshot.profile for snapshot in snapshots], wanted)
        rebuilt[width] = torch.from_numpy(coefficients) @ stored
    return (
        {width: flat(track) for width, track in direct.tracks.items()},
        rebuilt,
        flat(dict(model.named_parameters())),
    )


def test_widths_rebuilt_from_two_tracks_equal_those_tracked_directly(tmp_path):
    widths = (0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2)
    direct, rebuilt, last = track_and_rebuild(tmp_path, widths)
    errors = {w: float((rebuilt[w] - direct[w]).norm() / direct[w].norm()) for w in widths}
    assert max(errors.values()) < 1e-3, errors
    assert max(errors[width] for width in (0.05, 0.1)) < 1e-6, "what was tracked comes back as it was"
    apart = {w: float((rebuilt[w] - direct[w]).norm() / (direct[w] - last).norm()) for w in widths}
    assert max(apart[width] for width in widths if 0.05 <= width <= 0.15) < 1e-3, apart


def test_a_weight_that_does_not_move_is_rebuilt_exactly_even_from_two_snapshots():
    known = [Profile(width=width, updates=100) for width in (0.05, 0.1)]
    for width in (0.03, 0.07, 0.25):
        coefficients, missed = solve(known, Profile(width=width, updates=100))
        assert coefficients.sum() == pytest.approx(1, abs=1e-12)
        assert missed > 0.01, "two snapshots are few, and that is said"


def test_the_error_that_is_said_is_that_of_the_profile():
    known = [Profile(width=width, updates=updates) for updates in (150, 300) for width in (0.05, 0.1)]
    wanted = Profile(width=0.15, updates=300)
    coefficients, missed = solve(known, wanted)
    times = np.linspace(0, 300, 600_001)

    def density(profile):
        inside = times <= profile.updates
        return np.where(
            inside, (profile.gamma + 1) * (times / profile.updates) ** profile.gamma / profile.updates, 0
        )

    rebuilt = sum(x * density(profile) for x, profile in zip(coefficients, known, strict=True))
    expected = np.linalg.norm(rebuilt - density(wanted)) / np.linalg.norm(density(wanted))
    assert missed == pytest.approx(expected, rel=1e-3)


def test_the_first_update_takes_the_weights_and_forgets_the_initial_ones():
    model = Weights(torch.full((3,), 100.0))
    ema = tracking(model, 0.05)
    assert ema.tracks_state() == {}
    model.move(torch.tensor([1.0, 2.0, 3.0]))
    ema.update(model)
    ((profile, average),) = ema.tracks_state().items()
    assert profile == Profile(width=0.05, updates=1)
    assert average["values.0"].tolist() == [1, 2, 3]


def test_a_resumed_track_goes_on_bit_for_bit(tmp_path):
    model = Weights(torch.zeros(7, 11), torch.zeros(5))
    whole, paused = tracking(model, 0.05, 0.1), tracking(model, 0.05, 0.1)
    for step, values in enumerate(random_walk(20), start=1):
        model.move(*values)
        whole.update(model)
        paused.update(model)
        if step == 8:
            write_snapshots(tmp_path, step, paused.tracks_state())
            paused_average, paused = paused.state(), tracking(model, 0.05, 0.1)
            paused.load(paused_average, 8, read_tracks(tmp_path))
    for width, track in whole.tracks.items():
        assert all(value.equal(paused.tracks[width][name]) for name, value in track.items())
    assert paused.updates == 20


def test_no_widths_track_nothing():
    ema = tracking(Weights(torch.zeros(2)))
    ema.update(Weights(torch.ones(2)))
    assert ema.tracks_state() == {}
    ema.load(ema.average, 5)
    assert ema.updates == 5


def test_averages_are_float32_and_leave_the_model_alone():
    model = Weights(torch.ones(3)).to(torch.bfloat16)
    ema = tracking(model, 0.1)
    ema.update(model)
    assert ema.tracks[0.1]["values.0"].dtype == torch.float32
    assert model.values[0].dtype == torch.bfloat16


def test_what_cannot_be_tracked_is_named():
    model = Weights(torch.zeros(2))
    with pytest.raises(ValueError, match=r"a width must be above 0 and below 0\.2887, got 0\.5"):
        tracking(model, 0.5)
    with pytest.raises(ValueError, match=r"ema\.power_widths must differ in their first three decimals, got"):
        tracking(model, 0.05, 0.0501)
    with pytest.raises(ValueError, match=r"ema\.snapshot_every must be at least 1, got 0"):
        EmaOptions(power_widths=[0.05], snapshot_every=0)
    with pytest.raises(
        ValueError, match=r"must be tracked from a run's first step, got 0\.1 for a run that tracks \[\]"
    ):
        (ema := tracking(model, 0.1)).load(ema.average, 7)


def test_snapshots_are_the_same_bytes_when_a_resumed_run_writes_them_again(tmp_path):
    model = Weights(torch.randn(7, 11))
    ema = tracking(model, 0.05)
    ema.update(model)
    for folder in ("first", "second"):
        write_snapshots(tmp_path / folder, 3, ema.tracks_state())
    first, second = (
        (tmp_path / f / "step_00000003_std0.050.safetensors").read_bytes() for f in ("first", "second")
    )
    assert first == second


def test_snapshots_say_what_they_are_and_later_ones_can_be_dropped(tmp_path):
    model = Weights(torch.zeros(2))
    ema = tracking(model, 0.1, 0.05)
    for step in (10, 20, 30):
        ema.update(model)  # as where steps are skipped: fewer updates than steps
        write_snapshots(tmp_path, step, ema.tracks_state())
    found = [(s.step, s.profile.width, s.profile.updates) for s in list_snapshots(tmp_path)]
    assert found == [(10, 0.05, 1), (10, 0.1, 1), (20, 0.05, 2), (20, 0.1, 2), (30, 0.05, 3), (30, 0.1, 3)]
    drop_later(tmp_path, 20)
    assert [s.step for s in list_snapshots(tmp_path)] == [10, 10, 20, 20]
    assert list_snapshots(tmp_path / "absent") == []


def test_a_broken_snapshot_is_named(tmp_path):
    path = tmp_path / "step_00000001_std0.050.safetensors"
    save_file({"values.0": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"a snapshot of the averages must be whole, .*std0\.050.* is not"):
        list_snapshots(tmp_path)
    save_file(
        {"values.0": torch.zeros(200)},
        path,
        {"profile": json.dumps({"step": 1, "width": 0.05, "updates": 1})},
    )
    os.truncate(path, 300)
    with pytest.raises(ValueError, match=r"a snapshot of the averages must be whole"):
        list_snapshots(tmp_path)


def test_a_byte_that_changed_in_a_snapshot_is_noticed_when_it_is_read(tmp_path):
    model = Weights(torch.randn(4, 3))
    ema = tracking(model, 0.1)
    ema.update(model)
    write_snapshots(tmp_path, 3, ema.tracks_state())
    (snapshot,) = list_snapshots(tmp_path)
    assert all(
        torch.equal(value, ema.tracks_state()[snapshot.profile][name])
        for name, value in snapshot.load().items()
    )
    content = bytearray(snapshot.path.read_bytes())
    content[-5] ^= 1
    snapshot.path.write_bytes(content)
    (snapshot,) = list_snapshots(tmp_path)
    with pytest.raises(ValueError, match=r"step_00000003_std0.100.safetensors is damaged: its checksum"):
        snapshot.load()
