"""The guards of the training loop: signals, steps that are not finite, full disks, pruned checkpoints."""

import errno
import json
import math
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from flashdit import config
from flashdit.models.costs import forward_flops
from flashdit.sampling import checkpoint
from flashdit.shared.runs import list_checkpoints, read_state
from flashdit.trainer import Trainer
from flashdit.training import loop, meter
from flashdit.training.meter import TIMINGS, Meter, matmul_peak
from flashdit.training.snapshots import list_snapshots


def trainer(overrides, *more):
    return Trainer(config.load(None, [*overrides, *more]))


def poisoned(overrides, *more, steps):
    """Returns a trainer whose loss is not a number at some steps."""
    run = trainer(overrides, *more)
    loss = run.task.loss

    def poisoned_loss(network, batch):
        value, terms = loss(network, batch)
        return (value * math.nan if run.step in steps else value), terms

    run.task.loss = poisoned_loss
    return run


def weights(run_dir, step, part="model"):
    return load_file(run_dir / f"checkpoints/step_{step:08d}/{part}/diffusion_pytorch_model.safetensors")


def moments(run_dir, step):
    saved = torch.load(run_dir / f"checkpoints/step_{step:08d}/optimizer.pt", weights_only=True)
    return {
        f"{name}/{key}": value
        for name, state in saved["optimizer"]["state"].items()
        for key, value in state.items()
    }


def records(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not one[name].equal(other[name])] == []


def assert_same_end(one, other, step=6):
    for part in ("model", "ema"):
        assert_equal(weights(one, step, part), weights(other, step, part))
    assert_equal(moments(one, step), moments(other, step))
    assert records(one) == records(other)


def test_sigterm_saves_within_the_step_and_the_next_start_goes_on(tiny_overrides, tmp_path):
    trainer(tiny_overrides, "training.log_every=4").fit()
    ended = [*tiny_overrides, f"run.dir={tmp_path / 'ended'}", "training.save_every=100"]
    ended = [*ended, "training.log_every=4"]  # so that it is ended within an interval of the log
    run = trainer(ended)
    update = run.ema.update

    def update_and_terminate(model):
        update(model)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    run.ema.update = update_and_terminate
    before = signal.getsignal(signal.SIGTERM)
    run.fit()
    assert run.step == 3
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in list_checkpoints(tmp_path / "ended")] == ["step_00000003"]
    trainer(ended).fit()
    assert_same_end(tmp_path / "run", tmp_path / "ended")


def test_a_step_that_is_not_finite_is_skipped_counted_and_leaves_everything_untouched(
    tiny_overrides, tmp_path
):
    run = poisoned(tiny_overrides, "training.save_every=1", steps=(4,))
    run.fit()
    run_dir = tmp_path / "run"
    for part in ("model", "ema"):
        assert_equal(weights(run_dir, 3, part), weights(run_dir, 4, part))
        after = weights(run_dir, 5, part)
        assert any(not value.equal(after[name]) for name, value in weights(run_dir, 4, part).items())
    assert_equal(moments(run_dir, 3), moments(run_dir, 4))
    state = read_state(run_dir / "checkpoints" / "step_00000006")
    assert (state["skipped"], state["skipped_in_a_row"], state["ema_updates"]) == (1, 0, 5)
    logged = {record["step"]: record for record in records(run_dir)}
    assert "loss" not in logged[4]
    assert [logged[step].get("skipped") for step in (3, 4, 5)] == [None, 1, 1]
    assert all(math.isfinite(value) for record in logged.values() for value in record.values())


def test_a_skipped_step_is_the_same_after_a_resume(tiny_overrides, tmp_path):
    for name, stops in (("run", (6,)), ("paused", (4, 6))):
        for stop in stops:
            more = (f"run.dir={tmp_path / name}", f"training.steps={stop}")
            run = poisoned(tiny_overrides, *more, steps=(4,))
            run.fit()
    assert_same_end(tmp_path / "run", tmp_path / "paused")


POWER = ("ema.power_widths=[0.05,0.1]", "ema.snapshot_every=2")


def snapshot_files(run_dir):
    files = [*run_dir.glob("ema_snapshots/*"), *run_dir.glob("checkpoints/*/ema_tracks/*")]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


def test_snapshots_of_the_power_averages_are_the_same_after_a_resume(tiny_overrides, tmp_path):
    trainer(tiny_overrides, *POWER).fit()
    paused = (*POWER, f"run.dir={tmp_path / 'paused'}")
    trainer(tiny_overrides, *paused).fit()
    shutil.rmtree(tmp_path / "paused" / "checkpoints" / "step_00000006")  # as after a kill at step 5
    (tmp_path / "paused" / "ema_snapshots" / "step_00000005_std0.050.safetensors").write_bytes(b"stale")
    run = trainer(tiny_overrides, *paused)
    assert run.ema.updates == run.step == 4
    run.fit()
    expected = snapshot_files(tmp_path / "run")
    assert snapshot_files(tmp_path / "paused") == expected
    assert len(expected) == 2 * (3 + 3)


def test_a_skipped_step_is_no_update_of_the_power_averages(tiny_overrides, tmp_path):
    run = poisoned(tiny_overrides, *POWER, steps=(4,))
    run.fit()
    found = [(s.step, s.profile.updates) for s in list_snapshots(tmp_path / "run" / "ema_snapshots")]
    assert found == [(2, 2), (2, 2), (4, 3), (4, 3), (6, 5), (6, 5)]


def test_a_power_average_cannot_begin_within_a_run(tiny_overrides, tmp_path):
    trainer(tiny_overrides, "training.steps=2").fit()
    with pytest.raises(ValueError, match=r"must be tracked from a run's first step, got 0\.05 for a run"):
        trainer(tiny_overrides, *POWER)


def test_too_many_such_steps_in_a_row_end_the_run_with_its_last_checkpoint(tiny_overrides, tmp_path):
    run = poisoned(tiny_overrides, "training.max_skips=2", steps=(3, 4, 5))
    with pytest.raises(FloatingPointError, match=r"got 2 steps in a row up to step 4 where it was not"):
        run.fit()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000002"]


def test_gradients_are_clipped_to_the_limit_and_their_norm_is_logged(tiny_overrides, tmp_path):
    fixed = ("training.steps=1", "optimizer.warmup_steps=0")
    trainer(tiny_overrides, *fixed, "optimizer.max_grad_norm=null").fit()
    free = records(tmp_path / "run")[0]["grad_norm"]
    trainer(
        tiny_overrides, *fixed, f"optimizer.max_grad_norm={free / 100}", f"run.dir={tmp_path / 'clipped'}"
    ).fit()
    assert records(tmp_path / "clipped")[0]["grad_norm"] == pytest.approx(free, rel=1e-6)
    first, clipped = moments(tmp_path / "run", 1), moments(tmp_path / "clipped", 1)
    for name, value in first.items():
        if name.endswith("/exp_avg"):
            torch.testing.assert_close(clipped[name], value / 100, rtol=1e-3, atol=1e-9)


def test_the_last_checkpoints_and_every_so_manyth_are_kept(tiny_overrides, tmp_path):
    trainer(tiny_overrides, "training.save_every=1", "training.keep_last=2", "training.keep_every=3").fit()
    kept = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert kept == ["step_00000003", "step_00000005", "step_00000006"]


def test_a_checkpoint_to_which_something_was_added_is_kept_and_that_is_said_once(
    tiny_overrides, tmp_path, caplog
):
    trainer(tiny_overrides, "training.steps=1").fit()
    (first,) = list_checkpoints(tmp_path / "run")
    (first / "ema_0.100").mkdir()
    (first / "notes.txt").touch()
    trainer(tiny_overrides, "training.save_every=1", "training.keep_last=1").fit()
    kept = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert kept == ["step_00000001", "step_00000006"]
    said = [message for message in caplog.messages if "stays" in message]
    assert said == [f"{first} stays: it holds ema_0.100, notes.txt besides what training wrote"]


def test_a_disk_that_fills_up_keeps_the_last_checkpoint_and_the_run_goes_on(
    tiny_overrides, tmp_path, monkeypatch
):
    trainer(tiny_overrides).fit()
    full = [*tiny_overrides, f"run.dir={tmp_path / 'full'}"]
    save, saves = torch.save, []

    def fail_at_the_third(content, path):
        saves.append(path)
        if len(saves) == 3:  # the optimiser of step 4
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail_at_the_third)
        with pytest.raises(
            OSError,
            match=r"step_00000004 could not be written, the disk is full: .* on device; earlier",
        ):
            trainer(full).fit()
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["step_00000002"]
    trainer(full).fit()
    assert_same_end(tmp_path / "run", tmp_path / "full")


def test_a_disk_without_room_for_two_checkpoints_is_named_before_the_first_step(
    tiny_overrides, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 1000))
    with pytest.raises(
        ValueError, match=r"needs room for two checkpoints, 0\.0\d+ GiB, got 9\.313e-07 GiB free"
    ):
        trainer(tiny_overrides)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made_is_named_before_the_first_step(tiny_overrides, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^run\.dir must be where files .*file/run: Not a directory$"):
        trainer(tiny_overrides, f"run.dir={tmp_path / 'file' / 'run'}").fit()


def test_what_changed_is_said_on_a_resume_and_the_new_options_hold(tiny_overrides, tmp_path, caplog):
    trainer(tiny_overrides, "training.steps=2").fit()
    with caplog.at_level("INFO"):
        run = trainer(tiny_overrides, "optimizer.weight_decay=0.25")
    assert "resumed with another optimizer.weight_decay: 0.25, was 0.01" in caplog.text
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.25}


def test_records_tell_speed_waiting_and_memory(tiny_overrides, tmp_path):
    run = trainer(tiny_overrides, "training.steps=2")
    run.fit()
    assert run.flops_per_image == 3 * forward_flops(run.config.model)  # the backward pass counts twice
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["images_per_s"] > 0
    assert 0 < record["mfu"] < 1
    assert 0 < record["data_wait"] < 1
    assert 0.05 < record["peak_memory_gib"] < 24


@pytest.mark.parametrize(("ratio", "told"), [(0.25, True), (0.9, False), (3.0, False)])
def test_a_precision_that_is_slower_on_this_cpu_is_told_once(monkeypatch, caplog, ratio, told):
    speeds = {torch.float32: 1e9, torch.bfloat16: ratio * 1e9}
    monkeypatch.setattr(meter, "matmul_peak", lambda device, dtype, side: speeds[dtype])
    meter.warn_if_slow.cache_clear()
    for precision in ("fp32", "bf16", "bf16"):
        meter.warn_if_slow(precision, torch.device("cpu"))
    meter.warn_if_slow.cache_clear()
    words = "precision bf16 is slow on this CPU: its matrix products take 4.0 times as long as fp32's"
    assert [record.message for record in caplog.records] == [words] * told


def test_training_and_sampling_ask_whether_their_precision_is_slow(
    tiny_overrides, tiny_checkpoint, monkeypatch
):
    asked = []
    for module in (loop, checkpoint):
        monkeypatch.setattr(module, "warn_if_slow", lambda precision, device: asked.append(precision))
    trainer(tiny_overrides, "training.precision=bf16", "training.steps=1").fit()
    checkpoint.sampling_options(checkpoint.load_generator(tiny_checkpoint), {"precision": "fp16"})
    assert asked == ["bf16", "fp16"]


def test_the_meter_means_over_good_steps_alone():
    meter = Meter(torch.device("cpu"), None)
    meter.start_clock(0)
    for value, counted in ((1.0, True), (math.nan, False), (4.0, True)):
        meter.add("loss", torch.tensor(value))
        meter.end_step(counted)
    names, means = meter.means()
    assert (names, means.tolist()) == (["loss"], [2.5])
    assert "mfu" not in meter.timings(8, 1)


def test_the_measured_peak_is_that_of_a_processor():
    assert 1e9 < matmul_peak(torch.device("cpu"), torch.float32) < 1e14
