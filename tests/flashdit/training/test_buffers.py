"""BatchNorm's buffers in averages, checkpoints, skipped steps and on several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from timm.utils import ModelEmaV3
from torch import nn
from unequal_task import Finder, make_unequal

from flashdit.shared.runs import list_checkpoints, step_folder
from flashdit.training.buffers import StepBuffers, join_batch_norms, saved_buffers
from flashdit.training.ema import Ema, EmaOptions
from flashdit.training.posthoc import reconstruct, usable_snapshots
from flashdit.training.task import PeriodicAction

ROOT = Path(__file__).parents[3]
STATISTICS = ("norm.running_mean", "norm.running_var")
COUNTER = "norm.num_batches_tracked"


def saved(run_dir, part, step=6):
    return load_file(step_folder(run_dir, step) / part / "finder.safetensors")


def differences(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not one[name].equal(other[name])]


def test_an_average_with_buffers_is_timms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    ours, theirs = Ema(model, EmaOptions(decay=0.8, warmup=False)), ModelEmaV3(model, decay=0.8)
    for _ in range(5):
        model(torch.randn(2, 3, 5, 4)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
        ours.update(model)
        theirs.update(model)
    found, wanted = ours.state(), theirs.module.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value)
    assert found["1.num_batches_tracked"] == 5
    assert not found["1.running_mean"].equal(model[1].running_mean)


def test_a_buffer_that_no_checkpoint_holds_is_not_averaged():
    assert saved_buffers(Finder()).keys() == {*STATISTICS, COUNTER}
    assert "grid" not in Ema(Finder(), EmaOptions()).state()


def test_an_evaluation_and_ema_have_the_buffers_and_a_model_takes_them(tmp_path):
    found = []

    def note(step, average):
        found.append({name: value.clone() for name, value in average.items()})
        return {}

    run = make_unequal(tmp_path, PeriodicAction(every=6, run=note))
    run.fit()
    average, raw = saved(tmp_path, "ema"), saved(tmp_path, "model")
    assert differences(found[0], average) == []
    assert differences(raw, run.model.state_dict()) == []
    Finder().load_state_dict(average, strict=True)
    assert raw[COUNTER] == average[COUNTER] == 6
    assert all(not raw[name].equal(average[name]) for name in STATISTICS)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_paused_run_has_the_buffers_of_an_uninterrupted_one(tmp_path, accumulation):
    options = {"ema": EmaOptions(decay=0.5, power_widths=[0.1]), "accumulation": accumulation}
    make_unequal(tmp_path / "whole", **options).fit()
    make_unequal(tmp_path / "paused", steps=3, **options).fit()
    make_unequal(tmp_path / "paused", **options).fit()
    for part in ("model", "ema"):
        assert differences(saved(tmp_path / "whole", part), saved(tmp_path / "paused", part)) == []
    tracks = [
        load_file(next((step_folder(tmp_path / name, 6) / "ema_tracks").glob("*.safetensors")))
        for name in ("whole", "paused")
    ]
    assert differences(*tracks) == []
    assert tracks[0][COUNTER] == 6 * accumulation


def test_an_average_made_after_training_has_the_buffers(tmp_path):
    options = EmaOptions(decay=0.5, power_widths=[0.1, 0.2], snapshot_every=2)
    make_unequal(tmp_path, ema=options, steps=8).fit()
    checkpoint = list_checkpoints(tmp_path)[-1]
    reconstruct(checkpoint, usable_snapshots(tmp_path, checkpoint), 0.1, checkpoint / "ema_0.100")
    made = load_file(checkpoint / "ema_0.100" / "finder.safetensors")
    track = load_file(next((checkpoint / "ema_tracks").glob("*std0.100*")))
    assert made[COUNTER].equal(torch.tensor(8))
    for name in STATISTICS:
        torch.testing.assert_close(made[name], track[name], rtol=1e-3, atol=1e-4)


def test_a_skipped_step_leaves_the_buffers_as_they_were(tmp_path):
    run = make_unequal(tmp_path, save_every=1, steps=3)
    loss = run.task.loss

    def poisoned(network, batch):
        images = [image * (float("nan") if run.step == 2 else 1) for image in batch["images"]]
        return loss(network, {**batch, "images": images})

    run.task.loss = poisoned
    run.fit()
    for part in ("model", "ema"):
        assert differences(saved(tmp_path, part, 1), saved(tmp_path, part, 2)) == []
    assert all(value.isfinite().all() for value in saved(tmp_path, "model", 3).values())
    assert saved(tmp_path, "model", 3)[COUNTER] == 2


def test_several_processes_on_gpus_normalise_over_all_images():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), BatchNormAct2d(4))
    names, weight = model.state_dict().keys(), model[1].weight
    x = torch.randn(2, 3, 5, 4)
    expected = model.eval()(x)
    said = join_batch_norms(model, torch.device("cuda"), 2)
    assert said == "BatchNorm: the 2 processes normalise by the images of all (SyncBatchNorm)"
    assert all(isinstance(part, nn.SyncBatchNorm) for part in model[1:])
    assert model.eval()(x).equal(expected), "timm's norm has its activation within"
    assert model.state_dict().keys() == names
    assert model[1].weight is weight


@pytest.mark.parametrize(
    ("part", "device", "processes"), [("norm", "cuda", 1), ("none", "cuda", 2), ("norm", "cpu", 2)]
)
def test_other_models_keep_their_norms(part, device, processes):
    norm = nn.BatchNorm2d(3) if part == "norm" else nn.GroupNorm(1, 3)
    model = nn.Sequential(norm)
    said = join_batch_norms(model, torch.device(device), processes)
    assert model[0] is norm
    assert ("normalises by its own images, since SyncBatchNorm requires GPUs, got cpu" in said) == (
        device == "cpu"
    )
    assert bool(said) == (device == "cpu")


def test_two_processes_have_one_set_of_buffers_and_say_what_they_normalise_by(tmp_path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    script = [str(ROOT / "tests" / "unequal_task.py"), str(tmp_path / "run")]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *script,
    ]
    for steps in ("2", "4"):
        done = subprocess.run([*command, steps], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    told = "BatchNorm: each of the 2 processes normalises by its own images"
    assert done.stderr.count(told) == 1
    averages = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("run_average_*.json"))]
    assert len(averages) == 2
    assert averages[0] == averages[1], "each process evaluates the same average"
    raw, average = saved(tmp_path / "run", "model", 4), saved(tmp_path / "run", "ema", 4)
    assert raw[COUNTER] == average[COUNTER] == 4
    assert averages[0]["norm.running_mean"] == average["norm.running_mean"].tolist()


def test_buffers_are_given_back_and_shared_by_type():
    model = nn.BatchNorm2d(3)
    buffers = StepBuffers(model)
    buffers.keep()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(2, 3, 4, 5))
    changed = {name: value.clone() for name, value in model.state_dict().items()}
    buffers.share()
    assert differences(changed, dict(model.state_dict())) == []
    buffers.restore()
    assert differences(before, dict(model.state_dict())) == []
