"""Training in bfloat16 follows training in float32, whichever way attention is computed."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState

from flashdit import config
from flashdit.trainer import Trainer
from iwin_core.kernels import cpu_attention

STEPS, EVERY = 200, 10


def losses(overrides, tmp_path, name):
    """Returns the mean losses of every so many of 200 steps on the digits."""
    run = tmp_path / name
    given = [
        f"run.dir={run}",
        "model.depth=2",
        "model.hidden_size=64",
        "model.num_heads=2",
        f"training.steps={STEPS}",
        "training.global_batch_size=16",
        f"training.log_every={EVERY}",
        "training.save_every=1000",
        "training.preview_every=0",
    ]
    Trainer(config.load(None, [*given, *overrides])).fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    return torch.tensor(
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    )


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The losses of float32."""
    return losses([], tmp_path_factory.mktemp("exact"), "float32")


@pytest.mark.parametrize("way", [cpu_attention.FUSED, cpu_attention.PRODUCTS])
def test_losses_of_bfloat16_stay_within_hundredths_of_float32s(tmp_path, monkeypatch, exact, way):
    asked = []
    monkeypatch.setattr(cpu_attention, "cpu_attention", lambda *case: asked.append(case) or way)
    rounded = losses(["training.precision=bf16"], tmp_path, "bfloat16")
    assert (16, 32, torch.bfloat16, True) == asked[0][:4]
    assert exact[-1] < 0.9 * exact[0], "it learns"
    assert not torch.equal(exact, rounded)
    apart = ((rounded - exact) / exact).abs()
    # A learning rate that is 0.1 % larger moves single values by 0.02.
    assert apart.max() < 0.06, apart.tolist()
    assert apart.mean() < 0.015, apart.tolist()
