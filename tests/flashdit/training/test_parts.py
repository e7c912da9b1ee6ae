import json
import logging

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from flashdit import config
from flashdit.flow.examples import Examples
from flashdit.trainer import Trainer
from flashdit.training.batches import positions
from flashdit.training.ema import Ema, EmaOptions
from flashdit.training.optim import OptimizerOptions, learning_rate, make_optimizer, unfinished_decay
from flashdit.training.tracking import Tracker, TrackingOptions


def test_learning_rate_warms_up_holds_and_decays():
    options = OptimizerOptions(lr=1.0, warmup_steps=10, decay_steps=110, min_lr=0.1)
    assert [learning_rate(step, options) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]
    assert learning_rate(60, options) == pytest.approx(0.55)
    assert learning_rate(110, options) == learning_rate(500, options) == pytest.approx(0.1)
    assert learning_rate(10**6, OptimizerOptions(lr=1.0, warmup_steps=10)) == 1.0
    said = "the learning rate ends at 55% of its peak: training.steps is 60, optimizer.decay_steps 110"
    assert unfinished_decay(60, options) == said
    assert unfinished_decay(110, options) == unfinished_decay(60, OptimizerOptions()) == ""


def test_a_run_that_ends_before_its_learning_rate_has_fallen_says_so(tiny_overrides, caplog):
    caplog.set_level(logging.INFO)
    Trainer(config.load(None, [*tiny_overrides, "optimizer.decay_steps=400"])).fit()
    assert caplog.text.count("of its peak: training.steps is 6, optimizer.decay_steps 400") == 1


def test_frozen_parameters_are_left_out_and_bad_rates_named():
    frozen, trained = nn.Parameter(torch.zeros(1), requires_grad=False), nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer([frozen, trained], OptimizerOptions())
    assert optimizer.param_groups[0]["params"] == [trained]
    with pytest.raises(ValueError, match=r"optimizer\.lr must be positive, got 0"):
        make_optimizer([trained], OptimizerOptions(lr=0))


def test_ema_equals_diffusers():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ours = Ema(model, EmaOptions(decay=0.9))
    theirs = EMAModel(model.parameters(), decay=0.9)
    for _ in range(30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update(model)
        theirs.step(model.parameters())
    # diffusers counts its first step as 0 and copies there; the two meet once warm-up is over
    assert ours.updates == theirs.optimization_step == 30
    follow(ours, theirs, model)


def follow(ours, theirs, model):
    """Asserts that from equal averages both take the same further steps."""
    for mine, other in zip(ours.average.values(), theirs.shadow_params, strict=True):
        mine.copy_(other)
    ours.updates = 100
    theirs.optimization_step = 100
    for _ in range(3):
        ours.update(model)
        theirs.step(model.parameters())
    for mine, other in zip(ours.average.values(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(mine, other)


def test_ema_round_trips_and_leaves_the_model_alone():
    torch.manual_seed(0)
    model, other = nn.Linear(3, 2).to(torch.bfloat16), nn.Linear(3, 2)
    ema = Ema(model, EmaOptions(decay=0.5, warmup=False))
    weight = model.weight.clone()
    ema.update(model)
    assert model.weight.equal(weight)
    assert ema.average["weight"].dtype == torch.float32
    again = Ema(other, EmaOptions())
    again.load(ema.average, 7)
    assert again.updates == 7
    assert again.state()["weight"].equal(ema.average["weight"])
    with pytest.raises(ValueError, match=r"ema.decay must be at least 0 and below 1, got 1"):
        Ema(model, EmaOptions(decay=1))


class Numbers:
    """Latents that say which image they are; mirrored ones are negative."""

    def __init__(self, size, mirrors=True):
        self.labels, self.mirrors, self.shape = torch.arange(size), mirrors, (1, 2, 2)

    def read(self, indices, mirrored):
        values = torch.where(mirrored, -indices - 1, indices + 1).float()
        return values.reshape(-1, 1, 1, 1).expand(-1, *self.shape)


def examples(size=10, **options):
    return Examples(Numbers(size, **options), lambda uniform: uniform, seed=3, class_dropout_prob=0.5)


def test_every_epoch_shows_every_image_once_in_another_order():
    data = examples()
    epochs = [[data.order(10 * epoch + place) for place in range(10)] for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_an_example_depends_on_seed_and_position_alone():
    forwards, backwards = examples(), examples()
    first = [forwards[position] for position in range(25)]
    second = [backwards[position] for position in reversed(range(25))][::-1]
    for one, other in zip(first, second, strict=True):
        assert all(one[name].equal(other[name]) for name in one)
    assert len({float(example["time"]) for example in first}) == 25
    assert len({float(example["noise"].sum()) for example in first}) == 25


def test_an_example_is_the_same_alone_and_in_a_batch():
    alone = [examples()[position] for position in range(7, 15)]
    together = examples().__getitems__(range(7, 15))
    for name, values in together.items():
        assert values.equal(torch.stack([example[name] for example in alone]))


def test_mirroring_and_dropping_follow_their_rates():
    drawn = [examples(400)[position] for position in range(400)]
    assert 0.4 < sum(bool(example["drop"]) for example in drawn) / 400 < 0.6
    assert 0.4 < sum(bool(example["latent"][0, 0, 0] < 0) for example in drawn) / 400 < 0.6
    unmirrored = examples(50, mirrors=False)
    assert all(unmirrored[position]["latent"][0, 0, 0] > 0 for position in range(50))


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_every_layout_sees_the_same_global_batches(ranks, accumulation):
    batch_size = 16 // (ranks * accumulation)
    seen = [list(positions(32, 3, batch_size, accumulation, rank, ranks)) for rank in range(ranks)]
    for update in range(3):
        taken = [p for rank in seen for part in rank[update * accumulation :][:accumulation] for p in part]
        assert sorted(taken) == list(range(32 + 16 * update, 48 + 16 * update))


def test_records_after_the_step_of_a_resume_are_dropped(tmp_path):
    tracker = Tracker(tmp_path, TrackingOptions(), {}, 0)
    for step in (1, 2, 3):
        tracker.log({"step": step, "loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    Tracker(tmp_path, TrackingOptions(), {}, 2).log({"step": 3, "loss": 9})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 9)]
