"""The loop and a task that is not ours: what it is asked for, how often it waits, what it leaves behind."""

import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from flashdit.shared.runs import list_checkpoints, read_state
from flashdit.training.accelerator import blocks_compiled_whole, gradient_strides_ignored, start_run
from flashdit.training.batches import StepBatches
from flashdit.training.ema import EmaOptions
from flashdit.training.guard import StopSignals
from flashdit.training.loop import TrainingLoop
from flashdit.training.optim import OptimizerOptions
from flashdit.training.options import RunOptions, TrainingOptions
from flashdit.training.task import PeriodicAction, Task
from flashdit.training.tracking import TrackingOptions


@dataclass(kw_only=True)
class LineConfig:
    seed: int = 0
    run: RunOptions = field(default_factory=RunOptions)
    optimizer: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(lr=0.01))
    ema: EmaOptions = field(default_factory=EmaOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)


class Points(Dataset):
    def __getitem__(self, position):
        x = torch.tensor([position % 7 / 7.0])
        return {"x": x, "y": 3 * x + 1}


class Line(Task):
    """Fits y = 3x + 1; the least that the loop asks for."""

    def __init__(self, *actions):
        self.model = nn.Linear(1, 1)
        self.examples, self.images_per_epoch, self.actions = Points(), 7, actions
        self.seen = []

    def loss(self, network, batch):
        y = network(batch["x"])
        self.seen.append((y.dtype, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return (y.float() - batch["y"]).square().mean(), {}

    def write_models(self, folder, weights, average):
        for name, tensors in (("model", weights), ("ema", average)):
            (folder / name).mkdir(parents=True)
            save_file(tensors, folder / name / "line.safetensors")


def line(tmp_path, *actions, **training):
    options = {"steps": 6, "global_batch_size": 8, "save_every": 100, "log_every": 3} | training
    config = LineConfig(run=RunOptions(dir=str(tmp_path / "line")), training=TrainingOptions(**options))
    accelerator = start_run(config, Line)
    return TrainingLoop(config, Line(*actions), accelerator)


def test_a_task_that_is_not_ours_trains_and_resumes(tmp_path):
    line(tmp_path, steps=4).fit()
    run = line(tmp_path)
    assert run.step == 4
    run.fit()
    whole = line(tmp_path / "other")
    whole.fit()
    assert whole.model.weight.equal(run.model.weight)
    assert [path.name for path in list_checkpoints(tmp_path / "line")] == ["step_00000004", "step_00000006"]
    assert read_state(list_checkpoints(tmp_path / "line")[-1])["images_seen"] == 48


@pytest.mark.parametrize(("every", "steps"), [(0, []), (4, [4, 6]), (2, [2, 4, 6])])
def test_an_action_gets_the_average_every_so_many_steps_and_after_the_last(tmp_path, every, steps):
    found = []

    def note(step, average):
        found.append((step, {name: value.clone() for name, value in average.items()}))
        return {"height": 7.0}

    run = line(tmp_path, PeriodicAction(every=every, run=note))
    run.fit()
    assert [step for step, _ in found] == steps
    if steps:
        assert all(value.equal(run.ema.average[name]) for name, value in found[-1][1].items())
        assert not found[-1][1]["weight"].equal(run.model.weight)
        logged = (tmp_path / "line" / "metrics.jsonl").read_text()
        assert logged.count('"height": 7.0') == len(steps)


class Waits(TorchDispatchMode):
    """Counts how often a value is read off the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("accumulation", "limit"), [(1, 1.0), (4, None)])
def test_a_step_waits_for_the_device_once(tmp_path, accumulation, limit):
    run = line(tmp_path, accumulation=accumulation)
    run.config.optimizer.max_grad_norm = limit
    run.batches = StepBatches(run._batches(), accumulation)
    run.meter.start_clock(0)
    run._read()
    with StopSignals() as stop, Waits() as waits:
        for step in range(1, 4):
            assert run._make_step(stop) is False
            assert waits.count == step


@pytest.mark.parametrize("tf32", [False, True])
def test_a_run_computes_as_it_is_configured_and_leaves_the_switches_as_they_were(tmp_path, tf32):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    others = "highest" if tf32 else "high", not tf32
    torch.set_float32_matmul_precision(others[0])
    torch.backends.cudnn.allow_tf32 = others[1]
    try:
        run = line(tmp_path, tf32=tf32, precision="bf16")
        filters = list(warnings.filters)
        run.fit()
        assert set(run.task.seen) == {(torch.float32, "high" if tf32 else "highest", tf32)}
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == others
        assert warnings.filters == filters
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_blocks_are_compiled_whole_only_where_blocks_are_compiled_and_only_for_a_while():
    before = torch._dynamo.config.optimize_ddp
    for compiled in ("none", "model", "block"):
        with blocks_compiled_whole(compiled):
            assert torch._dynamo.config.optimize_ddp == (False if compiled == "block" else before)
        assert torch._dynamo.config.optimize_ddp == before


def test_the_warning_about_strides_is_ignored_and_no_other():
    with gradient_strides_ignored():
        warnings.warn("Grad strides do not match bucket view strides. This may indicate ...", stacklevel=1)
        with pytest.warns(UserWarning, match="something else"):
            warnings.warn("something else", stacklevel=1)


def test_importing_the_trainer_changes_no_filter_and_no_switch():
    code = """
import warnings, torch, diffusers, accelerate
before = list(warnings.filters), torch._dynamo.config.optimize_ddp, torch.get_float32_matmul_precision()
import flashdit.trainer
own = [f for f in warnings.filters if f not in before[0]]
assert not any("stride" in str(f[1]) for f in own), own
assert before[1:] == (torch._dynamo.config.optimize_ddp, torch.get_float32_matmul_precision())
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]


def test_training_knows_no_diffusion():
    words = ("latent", "noise", "velocity", "flashdit.flow", "flashdit.models", "flashdit.data")
    for path in (Path(__file__).parents[3] / "flashdit" / "training").glob("*.py"):
        text = path.read_text().lower()
        assert [word for word in words if word in text] == [], path.name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingOptions(steps=0), r"training\.steps must be at least 1, got 0"),
        (lambda: TrainingOptions(keep_last=0), r"training\.keep_last must be at least 1, got 0"),
        (lambda: TrainingOptions(precision="fp8"), r"unknown training\.precision 'fp8'"),
        (
            lambda: TrainingOptions(compile="blocks"),
            r"unknown training\.compile 'blocks'; did you mean 'block'",
        ),
        (lambda: TrainingOptions(keep_matmuls=True), r"keep_matmuls requires gradient_checkpointing"),
        (lambda: OptimizerOptions(lr=-1.0), r"optimizer\.lr must be positive, got -1"),
        (lambda: OptimizerOptions(max_grad_norm=0.0), r"optimizer\.max_grad_norm must be positive, got 0"),
        (lambda: EmaOptions(decay=1.0), r"ema\.decay must be at least 0 and below 1, got 1"),
        (lambda: EmaOptions(decay=-0.1), r"ema\.decay must be at least 0 and below 1, got -0\.1"),
        (lambda: EmaOptions(snapshot_every=0), r"ema\.snapshot_every must be at least 1, got 0"),
    ],
)
def test_options_are_checked_where_they_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()
