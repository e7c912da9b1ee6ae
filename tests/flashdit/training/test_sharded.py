"""FSDP2 on two CPU processes: the same training as one process, and one kind of checkpoint for both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashdit import config
from flashdit.trainer import Trainer

ROOT = Path(__file__).parents[3]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]


def train_sharded(*overrides):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, str(Path(__file__).with_name("sharded_run.py")), *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def tensors(run_dir, step):
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    found = {}
    for part in ("model", "ema"):
        weights = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        found |= {f"{part}/{name}": value for name, value in weights.items()}
    for path in (run_dir / "ema_snapshots").glob(f"step_{step:08d}_*"):
        found |= {f"{path.name}/{name}": value for name, value in load_file(path).items()}
    saved = torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    return found | {f"{name}/{key}": v for name, state in saved.items() for key, v in state.items()}


def test_sharded_training_equals_plain_training_and_each_resumes_the_other(tiny_overrides, tmp_path):
    tiny_overrides = [*tiny_overrides, "ema.power_widths=[0.1]", "ema.snapshot_every=2"]
    tiny_overrides += ["model.attention=[{name: iwin, window: 2, rope: true}, global]"]
    tiny_overrides += ["model.depth=2", "model.registers=3"]
    plain = [*tiny_overrides, f"run.dir={tmp_path / 'plain'}"]
    mixed = [*tiny_overrides, f"run.dir={tmp_path / 'mixed'}"]
    Trainer(config.load(None, plain)).fit()
    Trainer(config.load(None, [*mixed, "training.steps=2"])).fit()
    train_sharded(*mixed, "training.steps=4")
    Trainer(config.load(None, mixed)).fit()
    for step in (4, 6):
        expected, got = tensors(tmp_path / "plain", step), tensors(tmp_path / "mixed", step)
        assert got.keys() == expected.keys()
        assert any("std0.100" in name for name in expected)
        for name, value in expected.items():
            torch.testing.assert_close(
                got[name], value, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_sharded_training_in_bf16_follows_plain_training_in_bf16(tiny_overrides, tmp_path):
    tiny_overrides = [*tiny_overrides, "training.precision=bf16", "training.steps=3", "training.log_every=1"]
    runs = {name: tmp_path / name for name in ("plain", "sharded")}
    Trainer(config.load(None, [*tiny_overrides, f"run.dir={runs['plain']}"])).fit()
    train_sharded(*tiny_overrides, f"run.dir={runs['sharded']}")
    losses = {
        name: [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for name, folder in runs.items()
    }
    assert len(losses["plain"]) == 3
    assert losses["sharded"] == pytest.approx(losses["plain"], rel=5e-3)
