import copy

import pytest
import torch
from torch.testing import assert_close

from flashdit import FlashDiT, config
from flashdit.flow.loss import LossOptions, flow_loss
from flashdit.flow.path import interpolate, velocity
from flashdit.flow.prediction import PREDICTIONS
from flashdit.flow.samplers import SAMPLERS, time_grid
from flashdit.sampling.checkpoint import load_generator
from flashdit.trainer import Trainer

TINY = {"sample_size": 4, "in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 2}
TIMES = torch.tensor([0.0, 0.5, 0.95, 0.99, 1.0])


def twins():
    """Returns models of one set of random weights, which predict the velocity and the data."""
    torch.manual_seed(0)
    models = [FlashDiT(**TINY, prediction=name).eval() for name in ("velocity", "data")]
    for parameter in models[0].parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    models[1].load_state_dict(models[0].state_dict())
    return models


def test_forward_returns_the_velocity_of_the_predicted_data():
    plain, model = twins()
    x_t, y = torch.randn(5, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    x_1 = plain(x_t, TIMES, y)  # the same layers: the output itself
    expected = [(x_1[i] - x_t[i]) / max(1 - t, 0.05) for i, t in enumerate(TIMES.tolist())]
    assert_close(model(x_t, TIMES, y), torch.stack(expected))
    assert model(x_t, TIMES, y, return_dict=True).sample.equal(model(x_t, TIMES, y))


def test_a_perfect_prediction_gives_the_true_velocity_and_the_samplers_arrive():
    x_0, x_1 = torch.randn(2, 2, 3, 4, 4)
    t = torch.tensor([0.2, 0.9])
    v = PREDICTIONS["data"](x_1, interpolate(x_0, x_1, t), t)
    assert_close(v, velocity(x_0, x_1), rtol=1e-4, atol=1e-5)

    def towards(x, time):
        return PREDICTIONS["data"](x_1, x, torch.full((2,), time))

    for name in ("euler", "dpm++2m"):
        end = SAMPLERS.build(name, lambda step: x_0)(towards, x_0, time_grid(20))
        assert_close(end, x_1, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_near_the_end_half_precision_is_finite_and_divides_in_float32(dtype):
    output, x_t = torch.randn(5, 3, 4, 4).to(dtype), torch.randn(5, 3, 4, 4)
    v = PREDICTIONS["data"](output, x_t, TIMES)
    exact = (output.double() - x_t.double()) / (1 - TIMES.double()).clamp(min=0.05)[:, None, None, None]
    assert v.dtype == dtype
    assert v.isfinite().all()
    assert_close(v.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    _, model = twins()
    half = copy.deepcopy(model).to(dtype)
    assert half(x_t.to(dtype), TIMES.to(dtype), torch.tensor([0, 1, 2, 0, 1])).dtype == dtype
    with torch.autocast("cpu", dtype):
        v = model(x_t, TIMES, torch.tensor([0, 1, 2, 0, 1]))
    assert v.dtype == dtype
    assert v.isfinite().all()


def test_data_prediction_learns_two_pictures():
    torch.manual_seed(0)
    model = FlashDiT(**{**TINY, "sample_size": 2}, prediction="data", attention={"name": "global"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    pictures, y = torch.randn(2, 3, 2, 2), torch.arange(2).repeat(32)
    losses = []
    for _ in range(300):
        x_1, x_0, t = pictures[y], torch.randn(64, 3, 2, 2), torch.rand(64)
        v_t = model(interpolate(x_0, x_1, t), t, y)
        loss = flow_loss(v_t, velocity(x_0, x_1), LossOptions(cosine_weight=0.0))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])

    def v(x, t):
        return model(x, torch.full((2,), t), torch.arange(2))

    with torch.no_grad():
        end = SAMPLERS.build("euler", lambda step: x_0)(v, torch.randn(2, 3, 2, 2), time_grid(10))
    assert torch.cdist(end.flatten(1), pictures.flatten(1)).argmin(1).tolist() == [0, 1]


def test_a_run_stores_what_its_model_predicts(tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, f"run.dir={tmp_path / 'run'}", "training.steps=2", "flow.prediction=data"]
    settings = config.load(None, overrides)
    assert settings.model.get("prediction") is None
    Trainer(settings).fit()
    assert load_generator(tmp_path / "run").model.config["prediction"] == "data"
    with pytest.raises(ValueError, match=r"whose flow\.prediction is data, not velocity"):
        Trainer(config.load(None, overrides[:-1]))


def test_null_is_the_velocity():
    settings = config.load(None, ["flow.prediction=null"])
    assert FlashDiT(**settings.model_arguments).config["prediction"] == "velocity"
