import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashdit import config
from flashdit.commands import posthoc
from flashdit.sampling.checkpoint import load_generator
from flashdit.trainer import Trainer
from flashdit.training.ema import Ema, EmaOptions
from flashdit.training.snapshots import SNAPSHOTS, TRACKS, write_snapshots

STEPS, SNAPSHOT_EVERY = 48, 3


@pytest.fixture
def run(tiny_overrides, tmp_path):
    """Returns a run with snapshots of 0.05 and 0.10, and what was tracked directly of other widths."""
    more = [f"training.steps={STEPS}", "training.save_every=24", "training.log_every=100"]
    trainer = Trainer(config.load(None, [*tiny_overrides, *more]))
    stored = Ema(trainer.model, EmaOptions(power_widths=[0.05, 0.1]))
    direct = Ema(trainer.model, EmaOptions(power_widths=[0.07, 0.12]))
    update = trainer.ema.update

    def update_all(model):
        for average in (update, stored.update, direct.update):
            average(model)
        if trainer.step % SNAPSHOT_EVERY == 0:
            write_snapshots(tmp_path / "run" / SNAPSHOTS, trainer.step, stored.tracks_state())

    trainer.ema.update = update_all
    trainer.fit()
    return tmp_path / "run", direct, stored


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def distance(one, other):
    assert one.keys() == other.keys()
    difference = sum(float((one[name] - value).double().square().sum()) for name, value in other.items())
    return (difference / sum(float(value.double().square().sum()) for value in other.values())) ** 0.5


def test_widths_made_afterwards_are_those_tracked_directly_and_load_as_a_model(run, capsys):
    run_dir, direct, stored = run
    posthoc.main([str(run_dir), "--width", "0.05", "0.07", "0.12"])
    checkpoint = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    for width in (0.07, 0.12):
        made = weights(checkpoint / f"ema_{width:.3f}")
        assert distance(made, direct.tracks[width]) < 1e-3
        assert distance(made, weights(checkpoint / "ema")) > 1e-3, "it is not the average that was there"
    assert distance(weights(checkpoint / "ema_0.050"), stored.tracks[0.05]) < 1e-6
    generator = load_generator(run_dir, weights="ema_0.070")
    assert generator.model.state_dict().keys() == direct.tracks[0.07].keys()
    about = json.loads((checkpoint / "ema_0.070" / "posthoc.json").read_text())
    assert (about["width"], about["updates"], len(about["snapshots"])) == (
        0.07,
        STEPS,
        2 * STEPS // SNAPSHOT_EVERY,
    )
    assert sum(about["snapshots"].values()) == pytest.approx(1)
    assert about["profile_error"] < 0.02
    assert "32 snapshots" in capsys.readouterr().out


def test_nothing_is_made_of_damaged_snapshots_and_nothing_sampled_from_a_damaged_average(run, exit_message):
    def flip(path):
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)

    run_dir, _, _ = run
    posthoc.main([str(run_dir), "--width", "0.07"])
    flip(run_dir / "checkpoints" / f"step_{STEPS:08d}" / "ema_0.070" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"ema_0\.070/diff.* is damaged: its checksum is not the one"):
        load_generator(run_dir, weights="ema_0.070")
    load_generator(run_dir)
    flip(run_dir / SNAPSHOTS / "step_00000006_std0.050.safetensors")
    message = exit_message(posthoc, run_dir, "--width", 0.08)
    assert "step_00000006_std0.050.safetensors is damaged: its checksum" in message


def test_an_earlier_checkpoint_takes_the_snapshots_up_to_it(run, tmp_path, capsys):
    run_dir, _, _ = run
    posthoc.main([str(run_dir), "--width", "0.1", "--step", "24", "--output", str(tmp_path / "out")])
    tracked = load_file(run_dir / SNAPSHOTS / "step_00000024_std0.100.safetensors")
    assert distance(weights(tmp_path / "out" / "ema_0.100"), tracked) < 1e-6
    assert not (run_dir / "checkpoints" / "step_00000024" / "ema_0.100").exists()
    assert "16 snapshots" in capsys.readouterr().out


def test_the_tracks_of_a_checkpoint_are_snapshots_too_and_few_are_said_to_be_coarse(run, capsys):
    run_dir, _, stored = run
    checkpoint = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    shutil.rmtree(run_dir / SNAPSHOTS)
    write_snapshots(checkpoint / TRACKS, STEPS, stored.tracks_state())
    posthoc.main([str(run_dir), "--width", "0.1", "0.2"])
    assert distance(weights(checkpoint / "ema_0.100"), stored.tracks[0.1]) < 1e-6
    printed = capsys.readouterr().out
    assert "2 snapshots" in printed
    coarse = {
        line.split("│")[1].strip(): "wants more snapshots" in line
        for line in printed.splitlines()
        if "│" in line
    }
    assert coarse == {"ema_0.100": False, "ema_0.200": True}


def test_what_cannot_be_made_is_one_sentence(run, exit_message, tmp_path):
    run_dir, _, _ = run
    assert f"RUN: {tmp_path / 'absent'} does not exist" in exit_message(
        posthoc, tmp_path / "absent", "--width", 0.1
    )
    message = exit_message(posthoc, run_dir, "--width", 0.1, "--step", 25)
    assert "unknown checkpoint of" in message
    assert "did you mean 'step_00000024'" in message
    assert "a width must be above 0 and below 0.2887, got 0.3" in exit_message(
        posthoc, run_dir, "--width", 0.3
    )
    message = exit_message(posthoc, run_dir, "--width", 0.1234)
    assert "--width must have three decimals at most" in message
    path = run_dir / SNAPSHOTS / "step_00000003_std0.050.safetensors"
    other = {name: torch.zeros(2, 3) for name in load_file(path)}
    save_file(other, path, {"profile": json.dumps({"step": 3, "width": 0.05, "updates": 3})})
    assert "must hold the model of" in exit_message(posthoc, run_dir, "--width", 0.1)
    checkpoint = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    assert not list(checkpoint.glob("*ema_*")), "nothing half made is left"
    shutil.rmtree(run_dir / SNAPSHOTS)
    message = exit_message(posthoc, run_dir, "--width", 0.1)
    assert "need a run trained with ema.power_widths=[0.05,0.10], got no snapshot for" in message


def test_a_full_disk_is_one_sentence_and_leaves_nothing(run, tmp_path, no_room, exit_message):
    run_dir, _, _ = run
    with no_room():
        said = exit_message(posthoc, run_dir, "--width", "0.07", "--output", tmp_path / "averages")
    assert "File too large" in said
    assert not (tmp_path / "averages").exists()
