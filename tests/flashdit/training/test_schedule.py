"""The learning rate as a function of the step, against torch's schedulers and mmcv's formulas."""

import pytest
import torch
import yaml
from torch.optim.lr_scheduler import MultiStepLR, PolynomialLR

from flashdit import config
from flashdit.trainer import Trainer
from flashdit.training.optim import OptimizerOptions, learning_rate, unfinished_decay
from flashdit.training.options import RunOptions, TrainingOptions, check_run


def torchs_rates(make, steps, lr):
    """Returns the rate of each update of a scheduler of torch's."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_step_falls_after_each_milestone_as_torchs_multi_step():
    options = OptimizerOptions(lr=0.3, schedule="step", milestones=[8, 11], milestone_factor=0.1)
    wanted = torchs_rates(lambda optimizer: MultiStepLR(optimizer, [8, 11], 0.1), 14, 0.3)
    assert [learning_rate(step, options) for step in range(1, 15)] == pytest.approx(wanted)
    assert [learning_rate(step, options) for step in (8, 9)] == pytest.approx([0.3, 0.03])
    least = OptimizerOptions(lr=0.3, schedule="step", milestones=[2, 4], min_lr=0.02)
    assert [learning_rate(step, least) for step in (2, 3, 5)] == pytest.approx([0.3, 0.03, 0.02])


@pytest.mark.parametrize("power", [1.0, 0.9])
def test_poly_falls_from_the_first_step_as_torchs_polynomial(power):
    options = OptimizerOptions(lr=0.3, schedule="poly", decay_steps=12, decay_power=power)
    wanted = torchs_rates(lambda optimizer: PolynomialLR(optimizer, 12, power), 16, 0.3)
    assert [learning_rate(step, options) for step in range(1, 16)] == pytest.approx(wanted[1:])
    least = OptimizerOptions(lr=0.3, schedule="poly", decay_steps=12, min_lr=0.1)
    assert learning_rate(6, least) == pytest.approx(0.2)
    assert learning_rate(12, least) == learning_rate(99, least) == 0.1


def mmcv_rate(i, regular, warmup, ratio):
    """Returns mmcv's rate of iteration i, from 0: LrUpdaterHook with a linear warm-up."""
    return regular * (1 - (1 - i / warmup) * (1 - ratio)) if i < warmup else regular


def test_a_warm_up_from_a_share_multiplies_the_schedule_as_in_mmcv():
    poly = OptimizerOptions(lr=6e-5, schedule="poly", decay_steps=160, warmup_steps=15, warmup_start=1e-6)
    for i in range(1, 160):
        wanted = mmcv_rate(i, 6e-5 * (1 - i / 160), 15, 1e-6)
        assert learning_rate(i, poly) == pytest.approx(wanted, rel=1e-12)
    step = OptimizerOptions(
        lr=1e-4, schedule="step", milestones=[80, 110], warmup_steps=5, warmup_start=0.001
    )
    for i in range(1, 120):
        wanted = mmcv_rate(i, 1e-4 * 0.1 ** sum(i - 1 >= m for m in (80, 110)), 5, 0.001)
        assert learning_rate(i, step) == pytest.approx(wanted, rel=1e-12)
    constant = OptimizerOptions(lr=2.0, warmup_steps=4, warmup_start=0.5)
    assert [learning_rate(step, constant) for step in (1, 2, 4, 5)] == [1.25, 1.5, 2, 2]


def test_a_cosine_with_a_warm_up_from_0_is_bit_for_bit_that_of_before():
    options = OptimizerOptions(lr=3.7e-4, warmup_steps=7, decay_steps=50, min_lr=1.3e-6)
    assert options.schedule == "cosine"
    for step in range(1, 8):
        assert learning_rate(step, options) == 3.7e-4 * step / 7


def test_what_is_left_to_fall_is_told_of_every_schedule():
    step = OptimizerOptions(schedule="step", milestones=[40, 60])
    said = "the learning rate ends at 10% of its peak: training.steps is 60, optimizer.milestones [40, 60]"
    assert unfinished_decay(60, step) == said
    assert unfinished_decay(61, step) == ""
    poly = OptimizerOptions(schedule="poly", decay_steps=200)
    assert unfinished_decay(50, poly).startswith("the learning rate ends at 75% of its peak")
    assert unfinished_decay(200, poly) == ""


def test_a_run_may_not_pass_the_end_of_poly_but_its_last_milestone(tmp_path):
    class Config:
        seed, run = 0, RunOptions(dir=str(tmp_path))
        training = TrainingOptions(steps=90)
        optimizer = OptimizerOptions(schedule="poly", decay_steps=80)

    with pytest.raises(ValueError, match=r"must not pass optimizer\.decay_steps, .* got 90 and 80"):
        check_run(Config)
    Config.optimizer = OptimizerOptions(schedule="step", milestones=[80])
    check_run(Config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "steps"}, r"unknown optimizer\.schedule 'steps'; did you mean 'step'"),
        ({"warmup_start": 1.5}, r"optimizer\.warmup_start must be from 0 to 1, got 1\.5"),
        (
            {"schedule": "step"},
            r"milestones must be given with .*, and with it alone, got \[\] with step",
        ),
        ({"milestones": [3]}, r"milestones must be given with .* got \[3\] with cosine"),
        ({"schedule": "step", "milestones": [5, 5]}, r"each later than the one before, got \[5, 5\]"),
        ({"schedule": "step", "milestones": [0, 5]}, r"must be steps from 1, .* got \[0, 5\]"),
        (
            {"schedule": "step", "milestones": [5], "decay_steps": 9},
            r"decay_steps must be null with .*=step, which has milestones, got 9",
        ),
        ({"decay_steps": -5, "min_lr": 1e-3}, r"decay_steps must be at least 1, got -5"),
        ({"schedule": "poly"}, r"schedule=poly requires optimizer\.decay_steps of at least 1, got None"),
        ({"milestone_factor": 1.0}, r"milestone_factor must be above 0 and below 1, got 1\.0"),
        ({"decay_power": 0.0}, r"optimizer\.decay_power must be positive, got 0\.0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerOptions(**options)


def test_a_run_of_before_there_were_schedules_goes_on_without_a_word(tiny_overrides, tmp_path, caplog):
    Trainer(config.load(None, [*tiny_overrides, "training.steps=2"])).fit()
    path = next((tmp_path / "run").glob("checkpoints/*/config.yaml"))
    stored = yaml.safe_load(path.read_text())
    for name in ("schedule", "warmup_start", "decay_power", "milestones", "milestone_factor"):
        del stored["optimizer"][name]
    path.write_text(yaml.safe_dump(stored))
    caplog.set_level("INFO")
    Trainer(config.load(None, [*tiny_overrides, "training.steps=3"])).fit()
    assert "resumed with another training.steps" in caplog.text
    assert "resumed with another optimizer" not in caplog.text
