"""Muon beside AdamW: which weights it takes, one update against plain lines, resume, memory, refusals."""

import json
import logging

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from flashdit import FlashDiT, config
from flashdit.commands.budget import checkpoint_bytes
from flashdit.memory import count_parameters, memory_bytes
from flashdit.models.costs import Activations
from flashdit.shared.runs import list_checkpoints, step_folder
from flashdit.trainer import Trainer
from flashdit.training import optim
from flashdit.training.optim import MuonOptions, OptimizerOptions, linear_weights, make_optimizer

SIZES = {"sample_size": 8, "in_channels": 3, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2}
MUON = "optimizer.name=muon"


def model_of(**options):
    torch.manual_seed(3)
    model = FlashDiT(**SIZES | {"num_classes": 3} | options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def trainer(overrides, *more):
    return Trainer(config.load(None, [*overrides, MUON, *more]))


def test_muon_takes_the_matrices_of_blocks_and_adamw_every_other_weight():
    attention = [{"name": "iwin", "window": 2, "rope": True}, {"name": "global"}]
    model = model_of(attention=attention, registers=2, position_embedding="sincos", qk_norm=True)
    optimizer = make_optimizer(
        model.parameters(), OptimizerOptions(name="muon"), linear_weights(model.blocks)
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    inside = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "adaLN_modulation.1")
    assert sorted(muon) == sorted(f"blocks.{i}.{name}.weight" for i in (0, 1) for name in inside)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(muon) + len(adamw) == len(trained)
    assert {*muon, *adamw} == trained, "each that trains once; the sin-cos table does not"
    for name in ("y_embedder.embedding_table.weight", "final_layer.linear.weight", "x_embedder.proj.weight"):
        assert name in adamw


def test_a_frozen_matrix_is_left_out():
    model = model_of()
    frozen = model.blocks[0].attn.proj.weight.requires_grad_(False)
    kept = linear_weights(model.blocks)
    assert len(kept) == 9
    assert all(weight is not frozen for weight in kept)


def test_the_name_changes_no_other_key_of_the_optimiser():
    settings = config.load("digits", ["run.dir=x", MUON, "optimizer.muon.momentum=0.9"]).optimizer
    assert (settings.name, settings.lr, settings.decay_steps) == ("muon", 3e-3, 4200)
    assert (settings.muon.momentum, settings.muon.iterations) == (0.9, 5)


def plain_muon(weight, gradient, buffer, lr, decay, momentum):
    """Returns weight and buffer after Muon's update (Jordan et al.; length as AdamW's, Liu et al. eq. 4)."""
    buffer = momentum * buffer + (1 - momentum) * gradient
    x = ((1 - momentum) * gradient + momentum * buffer).bfloat16()
    x = x.T if weight.shape[0] > weight.shape[1] else x
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if weight.shape[0] > weight.shape[1] else x
    return weight * (1 - lr * decay) - lr * 0.2 * max(weight.shape) ** 0.5 * x.float(), buffer


def test_updates_are_those_of_plain_muon_and_of_adamw():
    model, twin = model_of(), model_of()
    options = OptimizerOptions(
        name="muon",
        lr=0.01,
        weight_decay=0.3,
        betas=(0.8, 0.97),
        muon=MuonOptions(momentum=0.9, lr_scale=2.0),
    )
    hidden = linear_weights(model.blocks)
    optimizer = make_optimizer(model.parameters(), options, hidden)
    theirs = [q for p, q in zip(model.parameters(), twin.parameters(), strict=True) if p in set(hidden)]
    others = [q for q in twin.parameters() if not any(q is p for p in theirs)]
    adamw = torch.optim.AdamW(others, lr=0.01, betas=(0.8, 0.97), weight_decay=0.3)
    buffers = [torch.zeros_like(q) for q in theirs]
    draws = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=draws)
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
        with torch.no_grad():
            for place, q in enumerate(theirs):
                weight, buffers[place] = plain_muon(q, q.grad, buffers[place], 0.02, 0.3, 0.9)
                q.copy_(weight)
    mine = {name: p for name, p in model.named_parameters()}
    for name, q in twin.named_parameters():
        exact = not any(q is p for p in theirs)  # Newton–Schulz rounds to bfloat16
        torch.testing.assert_close(mine[name], q, rtol=0, atol=1e-5 if exact else 2e-3, msg=name)


def test_an_update_is_as_long_as_adamws_and_its_singular_values_nearly_equal():
    weight = nn.Parameter(torch.zeros(64, 24))
    weight.grad = torch.randn(64, 24, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -2, 24)
    options = OptimizerOptions(name="muon", lr=1.0)
    make_optimizer([weight], options, [weight]).step()
    values = torch.linalg.svdvals(weight.detach()) / (0.2 * 64**0.5)
    assert 0.5 < values.min() < values.max() < 1.3
    assert weight.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


def test_groups_keep_their_own_decay_and_rates():
    layer, norm = nn.Linear(4, 4), nn.LayerNorm(4)
    groups = [
        {"params": [layer.weight], "weight_decay": 0.5, "lr_scale": 0.1},
        {"params": [layer.bias, *norm.parameters()], "weight_decay": 0.0},
    ]
    options = OptimizerOptions(name="muon", weight_decay=0.2, muon=MuonOptions(lr_scale=3.0))
    muon, adamw = make_optimizer(groups, options, [layer.weight]).param_groups
    assert (muon["weight_decay"], muon["lr_scale"]) == (0.5, pytest.approx(0.3))
    assert (adamw["weight_decay"], len(adamw["params"])) == (0.0, 3)


def saved(run_dir, step):
    """Returns every tensor of a checkpoint by file and name."""
    from safetensors.torch import load_file

    folder = step_folder(run_dir, step)
    found = {}
    for part in ("model", "ema"):
        weights = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        found |= {f"{part}/{name}": value for name, value in weights.items()}
    states = torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    return found | {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_one_without_a_pause_bit_for_bit(tiny_overrides, tmp_path, accumulation):
    tiny_overrides = [*tiny_overrides, f"training.accumulation={accumulation}", "optimizer.weight_decay=0.1"]
    trainer(tiny_overrides, f"run.dir={tmp_path / 'whole'}").fit()
    trainer(tiny_overrides, "training.steps=2").fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer(tiny_overrides, "training.steps=6").fit()
    whole, resumed = saved(tmp_path / "whole", 6), saved(tmp_path / "run", 6)
    assert whole.keys() == resumed.keys()
    kinds = {name.rpartition("/")[2] for name in whole if "blocks.0.attn.qkv.weight" in name}
    assert {"momentum_buffer"} < kinds
    assert "exp_avg_sq" not in kinds
    assert all(value.equal(resumed[name]) for name, value in whole.items())


def test_a_run_keeps_its_optimiser_and_one_of_before_goes_on_without_a_word(tiny_overrides, tmp_path, caplog):
    run = [*tiny_overrides, "training.steps=2"]
    Trainer(config.load(None, run)).fit()
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    lines = (checkpoint / "config.yaml").read_text().splitlines(keepends=True)
    start = lines.index("  muon:\n")
    kept = [line for line in (*lines[:start], *lines[start + 4 :]) if line != "  name: adamw\n"]
    (checkpoint / "config.yaml").write_text("".join(kept))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(
        ValueError, match=r"holds a run whose optimizer.name is adamw, not muon: give another"
    ):
        trainer(tiny_overrides)
    AcceleratorState._reset_state(reset_partial_state=True)
    with caplog.at_level(logging.INFO):
        Trainer(config.load(None, tiny_overrides)).fit()
    assert "another optimizer" not in caplog.text


def test_memory_and_checkpoints_count_one_moment_of_muons_weights(tiny_overrides, tmp_path):
    wider = [*tiny_overrides, "model.hidden_size=64", "model.depth=2", "training.steps=2"]
    settings = config.load(None, [*wider, MUON])
    counts = count_parameters(settings)
    model = FlashDiT(**settings.model)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name)
    assert counts.linear == matrices
    rows = memory_bytes(settings, counts, Activations(fixed=0, per_image=0), 1, False)
    assert rows["Muon and AdamW"] == 8 * counts.trained - 4 * matrices
    Trainer(settings).fit()
    state = torch.load(step_folder(tmp_path / "run", 2) / "optimizer.pt", weights_only=True)["optimizer"]
    held = sum(v.nbytes for moments in state["state"].values() for v in moments.values() if v.ndim)
    assert held == rows["Muon and AdamW"]
    size = sum(path.stat().st_size for path in step_folder(tmp_path / "run", 2).rglob("*"))
    assert size == pytest.approx(checkpoint_bytes(settings, counts), rel=0.1)


def test_an_estimate_leaves_out_the_sharding_that_muon_refuses(capsys):
    from flashdit.commands.estimate import main

    for overrides, shown in ([], True), ([MUON], False):
        main(overrides)
        assert ("FSDP2: each holds" in capsys.readouterr().out) == shown


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.name=moun"], "unknown optimizer.name 'moun'; did you mean 'muon'"),
        (["optimizer.muon.lr_scale=0"], r"^optimizer.muon.lr_scale must be positive, got 0"),
        (["optimizer.muon.momentum=1"], r"^optimizer.muon.momentum must be at least 0 and below 1, got 1"),
        (["optimizer.muon.iterations=0"], r"^optimizer.muon.iterations must be 1 to 99, got 0"),
    ],
)
def test_options_that_cannot_be_are_named(tiny_overrides, overrides, message):
    with pytest.raises(ValueError, match=message):
        config.load(None, [*tiny_overrides, *overrides])


def test_a_torch_without_muon_is_named(monkeypatch):
    monkeypatch.delattr(optim.torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"optimizer.name=muon requires PyTorch 2.9 or newer, .*got 2"):
        OptimizerOptions(name="muon")
    OptimizerOptions()


def test_a_model_without_linear_layers_in_blocks_is_refused():
    convolution = nn.Conv2d(3, 3, 3)
    with pytest.raises(ValueError, match="requires linear layers in the model's blocks, got none"):
        make_optimizer(convolution.parameters(), OptimizerOptions(name="muon"), linear_weights([convolution]))


def test_sharded_training_with_muon_is_refused_before_anything_is_written(tiny_overrides, tmp_path):
    import os
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).parents[3]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    script = str(Path(__file__).with_name("sharded_run.py"))
    done = subprocess.run(
        [*command, script, *tiny_overrides, MUON], env=environment, capture_output=True, text=True
    )
    assert done.returncode
    assert "optimizer.name=muon requires whole matrices on every process, got FSDP" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_with_muon_learns(tiny_overrides, tmp_path):
    trainer(tiny_overrides, "training.steps=60", "optimizer.lr=0.01", "training.save_every=60").fit()
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
