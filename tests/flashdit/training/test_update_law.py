"""What a run does with the gradient of its objective, against torch.optim.AdamW and plain arithmetic."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from flashdit import FlashDiT
from flashdit.shared.runs import step_folder
from flashdit.training.checkpoint import check_room
from flashdit.training.options import TrainingOptions, share_of_batch

PEAK, LOWEST, WARMUP, END, STEPS = 0.01, 0.002, 3, 7, 8
BETAS, WEIGHT_DECAY = (0.8, 0.97), 0.3
RECIPE = (
    f"optimizer.lr={PEAK}",
    f"optimizer.min_lr={LOWEST}",
    f"optimizer.warmup_steps={WARMUP}",
    f"optimizer.decay_steps={END}",
    f"optimizer.betas=[{BETAS[0]},{BETAS[1]}]",
    f"optimizer.weight_decay={WEIGHT_DECAY}",
    f"training.steps={STEPS}",
    "training.save_every=1",
)


def plain_rate(step):
    """Returns the learning rate of an update: a line up to the peak, half a cosine down, then flat."""
    if step <= WARMUP:
        return PEAK * step / WARMUP
    angle = math.pi * (min(step, END) - WARMUP) / (END - WARMUP)
    return LOWEST + (PEAK - LOWEST) * (1 + math.cos(angle)) / 2


def plain_loss(model, batch, known):
    """Returns the objective of a batch in a few lines of torch."""
    x_1, x_0 = (batch["latent"] - known.mean) / known.std * 0.75, batch["noise"]
    t = batch["time"][:, None, None, None]
    v_t = model(t * x_1 + (1 - t) * x_0, batch["time"], batch["label"].where(~batch["drop"], 3))
    u_t = x_1 - x_0
    norm_v, norm_u = (torch.linalg.vector_norm(x, dim=1) for x in (v_t, u_t))
    least = 0.1 * norm_u.square().mean((1, 2), keepdim=True).sqrt()
    cosine = (v_t * u_t).sum(1) / (norm_v.maximum(least) * norm_u)
    return F.mse_loss(v_t, u_t) + 0.7 * (1 - cosine).mean()


def plain_run(run, known, limit):
    """Returns weights after each step, gradient norms, and the optimiser, from whole batches and AdamW."""
    model = FlashDiT(**run.config.model).eval()
    model.load_state_dict(run.initial)
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY)
    weights, norms = [], []
    for step in range(1, STEPS + 1):
        parts = [part.batch for part in run.parts if part.step == step]
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        optimizer.param_groups[0]["lr"] = plain_rate(step)
        optimizer.zero_grad()
        plain_loss(model, batch, known).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        norms.append(sum(g.double().square().sum().item() for g in gradients) ** 0.5)
        if limit is not None and norms[-1] > limit:
            for gradient in gradients:
                gradient.mul_(limit / norms[-1])
        optimizer.step()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    moments = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    return weights, norms, moments


def saved(run, step, part):
    return load_file(step_folder(run.run_dir, step) / part / "diffusion_pytorch_model.safetensors")


def records(run):
    return [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]


def well_posed(names):
    """Leaves out the keys' bias: softmax cancels it, its gradient is rounding, and Adam makes that large."""
    return [name for name in names if not name.endswith("qkv.bias")]


@pytest.mark.parametrize(("limit", "accumulation"), [(4.5, 1), (4.5, 4), (None, 2)])
def test_updates_are_those_of_adamw_on_the_clipped_gradient_of_the_whole_batch(
    make_recorded, known, limit, accumulation
):
    run = make_recorded(
        *RECIPE,
        f"optimizer.max_grad_norm={'null' if limit is None else limit}",
        f"training.accumulation={accumulation}",
    )
    run.fit()
    weights, norms, moments = plain_run(run, known, limit)
    assert min(norms) < 4.5 < max(norms), "the limit must bind at some steps and not at others"
    logged = records(run)
    assert [record["grad_norm"] for record in logged] == pytest.approx(norms, rel=1e-3)
    assert [record["lr"] for record in logged] == pytest.approx([plain_rate(s + 1) for s in range(STEPS)])
    for step, expected in enumerate(weights, 1):
        found = saved(run, step, "model")
        assert found.keys() == expected.keys()
        for name in well_posed(expected):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=2e-5)
    path = step_folder(run.run_dir, STEPS) / "optimizer.pt"
    state = torch.load(path, weights_only=True)["optimizer"]["state"]
    for name in well_posed(moments):
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[name][moment], moments[name][moment], rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_global_batch_is_shared_evenly_and_every_image_is_taken_once(make_recorded, known, accumulation):
    run = make_recorded(f"training.accumulation={accumulation}", "training.steps=5")
    run.fit()
    assert [part.step for part in run.parts] == [step for step in range(1, 6) for _ in range(accumulation)]
    assert {len(part.batch["label"]) for part in run.parts} == {8 // accumulation}
    rows, _ = known.rows(run.stream("latent"))
    assert sorted(rows[:37].tolist()) == list(range(37))
    state = json.loads((step_folder(run.run_dir, 5) / "state.json").read_text())
    assert (state["step"], state["images_seen"]) == (5, 40)
    assert records(run)[2]["images_seen"] == 24
    losses = [part.loss for part in run.parts if part.step == 3]
    assert records(run)[2]["loss"] == pytest.approx(sum(losses) / accumulation, rel=1e-5)
    assert records(run)[2]["epoch"] == pytest.approx(24 / 37)


def test_the_share_of_a_process_is_the_global_batch_over_processes_and_parts():
    options = TrainingOptions(global_batch_size=24, accumulation=3)
    assert [share_of_batch(options, processes) for processes in (1, 2, 4, 8)] == [8, 4, 2, 1]


def enough(monkeypatch, free):
    """Makes every disk have so many bytes free."""

    def usage(path):
        assert path.exists(), "the real disk_usage raises for a folder that is not there"
        return SimpleNamespace(total=2**40, used=0, free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)


@pytest.mark.parametrize("tracks", [0, 2])
def test_room_for_two_checkpoints_is_asked_for_to_the_byte(tmp_path, monkeypatch, tracks):
    numbers = 3 * 5 + 5
    needed = 2 * (numbers + numbers + 2 * numbers + tracks * numbers) * 4
    enough(monkeypatch, needed)
    check_room(tmp_path / "not" / "yet", nn.Linear(3, 5), tracks)
    enough(monkeypatch, needed - 1)
    with pytest.raises(ValueError, match=r"run.dir needs room for two checkpoints"):
        check_room(tmp_path / "not" / "yet", nn.Linear(3, 5), tracks)


@pytest.mark.parametrize("widths", [[], [0.05, 0.1]])
def test_that_room_is_twice_what_a_checkpoint_of_the_run_takes(make_recorded, monkeypatch, widths):
    more = (f"ema.power_widths={widths}", "training.steps=1")
    run = make_recorded(*more)
    run.fit()
    folder = step_folder(run.run_dir, 1)
    tensors = [
        tensor
        for path in folder.rglob("*.safetensors")
        if path.name != "latents.safetensors"
        for tensor in load_file(path).values()
    ]
    state = torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    tensors += [moments[name] for moments in state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(tensor.nbytes for tensor in tensors) == 4 * (4 + len(widths)) * run.model.num_parameters()
    needed = 2 * sum(tensor.nbytes for tensor in tensors)
    enough(monkeypatch, needed)
    make_recorded(*more)
    enough(monkeypatch, needed - 1)
    with pytest.raises(ValueError, match=r"run.dir needs room for two checkpoints"):
        make_recorded(*more)
