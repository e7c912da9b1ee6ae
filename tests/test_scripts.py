"""The scripts as a user runs them: processes, kills, exit statuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hard_pictures import READABLE, make_hard_pictures
from PIL import Image
from safetensors.torch import load_file

from flashdit.commands import evaluate as eval_fid
from flashdit.commands import sample, train
from flashdit.training.meter import TIMINGS

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
CPU_2 = ROOT / "configs" / "accelerate" / "cpu_2.yaml"
LAUNCH_2 = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CPU_2)]
NANO = [  # a nano model on the embedded digits: the smallest run of the real default
    "training.steps=24",
    "training.save_every=3",
    "training.log_every=1",
    "training.preview_every=24",
    "model.hidden_size=16",
    "model.depth=1",
    "sampling.steps=2",
]


def run(*command, **options):
    """Returns a finished process, which must have succeeded."""
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def last_checkpoint(run_dir):
    return max((run_dir / "checkpoints").glob("step_*"))


def tensors(checkpoint):
    """Returns every tensor of a checkpoint, and its state."""
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        found |= {f"{path.relative_to(checkpoint)}/{name}": value for name, value in load_file(path).items()}
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    for i, state in optimizer.items():
        found |= {f"optimizer/{i}/{name}": value for name, value in state.items()}
    return found, json.loads((checkpoint / "state.json").read_text())


def records(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the folder of an uninterrupted nano run on digits, made by the script."""
    run_dir = tmp_path_factory.mktemp("runs") / "nano"
    run(sys.executable, "train.py", f"run.dir={run_dir}", *NANO)
    return run_dir


def test_a_killed_run_resumes_to_the_same_bits(trained, tmp_path):
    command = [sys.executable, "train.py", f"run.dir={tmp_path}", *NANO]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "checkpoints" / "step_00000003").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert last_checkpoint(tmp_path).name < "step_00000024"
    run(*command)
    mine, theirs = tensors(last_checkpoint(tmp_path)), tensors(last_checkpoint(trained))
    assert mine[1] == theirs[1]
    assert mine[0].keys() == theirs[0].keys()
    assert [name for name in mine[0] if not mine[0][name].equal(theirs[0][name])] == []
    assert records(tmp_path) == records(trained)


def test_two_processes_train_and_one_resumes(trained, tmp_path):
    run(*LAUNCH_2, "-m", "flashdit", "train", f"run.dir={tmp_path}", *NANO, "training.steps=6", timeout=180)
    assert last_checkpoint(tmp_path).name == "step_00000006"
    assert len(torch.load(last_checkpoint(tmp_path) / "processes.pt", weights_only=True)) == 2
    run(sys.executable, "train.py", f"run.dir={tmp_path}", *NANO)
    one, two = tensors(last_checkpoint(trained))[0], tensors(last_checkpoint(tmp_path))[0]
    for name, value in one.items():
        if name.startswith(("model/", "ema/")):
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    assert [record["images_seen"] for record in records(tmp_path)] == [16 * step for step in range(1, 25)]


def test_two_processes_share_the_look_at_pictures_and_tell_it_once(tmp_path):
    folder = make_hard_pictures(tmp_path / "pictures")
    words = [f"data.path={folder}", f"run.dir={tmp_path / 'run'}", *NANO, "training.steps=2"]
    words += ["data.image_size=32", "model.num_heads=2", "training.global_batch_size=4"]
    done = run(*LAUNCH_2, "-m", "flashdit", "train", "--config", "pixels_64", *words, timeout=180)
    assert done.stderr.count(f"pictures: {READABLE} images in 3 classes; left out: ") == 1
    listing = json.loads((tmp_path / "run" / "images.json").read_text())
    assert (len(listing["images"]), len(listing["unreadable"])) == (READABLE, 1)


def test_training_leaves_a_preview_of_ten_classes(trained):
    with Image.open(trained / "samples" / "step_00000024.png") as grid:
        assert grid.width > 4 * 64
        assert grid.height > 10 * 64


def test_sampling_writes_pictures_grid_arrays_and_recipe(trained, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--checkpoint", trained, "--class", "seven", "3", "--num-images", "5", "--cfg-scale", "1.5"]
    sample.main([str(word) for word in [*argv, "--cfg-interval", 0, 1, "--steps", 2, "--output", out]])
    assert f"5 images, 4 model evaluations each: {out / 'grid.png'}" in capsys.readouterr().out
    names = sorted(path.name for path in out.iterdir())
    assert names == [*(f"{i:06d}.png" for i in range(5)), "grid.png", "recipe.json", "samples.npz"]
    with np.load(out / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 32, 32, 3)
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [7, 7, 7, 3, 3]
        with Image.open(out / "000003.png") as picture:
            assert np.array_equal(np.asarray(picture), arrays["arr_0"][3])
            assert json.loads(picture.text["recipe"])["sampling"]["cfg_scale"] == 1.5
    recipe = json.loads((out / "recipe.json").read_text())
    assert {"checkpoint", "step", "weights_sha256", "vae_identity", "sampling", "nfe"} <= recipe.keys()


def test_the_newest_run_is_sampled_and_other_samples_are_never_replaced(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(trained.parent)
    sample.main(["--num-images", "3", "--steps", "1", "--seed", "1", "--output", "out"])
    with pytest.raises(ValueError, match=r"out holds samples of another recipe \(sampling\)"):
        sample.main(["--num-images", "3", "--steps", "1", "--seed", "2", "--output", "out"])
    assert json.loads(Path("out/recipe.json").read_text())["sampling"]["seed"] == 1


def test_scoring_a_checkpoint_writes_scores_beside_their_floor(trained, tmp_path):
    argv = ["--checkpoint", trained, "--num-images", "30", "--steps", "2", "--output", tmp_path]
    eval_fid.main([str(word) for word in argv])
    result = json.loads((tmp_path / "metrics.json").read_text())
    metrics, floor = result["metrics"], result["floor"]
    assert floor["accuracy"] >= 0.98
    assert metrics["fd_30"] > 3 * floor["fd_1437"], "two dozen steps make no digits"


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        (train, ["trainig.steps=3"], "train.py: error: unknown configuration key 'trainig'"),
        (train, ["model.attention.window=99"], "window must be between 1 and the side of the token grid"),
        (train, ["model.in_channels=3"], "the data's latents must be what the model takes"),
        (train, ["data.name=images", "data.path=absent"], "data.path must be a folder of images, got absent"),
        (
            train,
            ["--config", "absent.yaml"],
            "--config: absent.yaml does not exist, and is no shipped configuration",
        ),
        (sample, ["--class", "207"], "class 207 is out of range for this 10-class model (0–9)"),
        (sample, ["--class", "sevn"], "unknown class 'sevn'; did you mean 'seven'"),
        (sample, ["--checkpoint", "absent"], "--checkpoint: absent does not exist"),
        (sample, ["--cfg-interval", "0.9", "0.1"], "cfg_interval must be 0 ≤ low ≤ high ≤ 1"),
        (sample, ["--num-images", "0"], "num_images must be at least 1, got 0"),
        (sample, ["--output", "kept"], "one of the same samples"),
        (eval_fid, ["--checkpoint", "absent"], "--checkpoint: absent does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    script, argv, message, trained, tmp_path, monkeypatch, exit_message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("of the user's")
    if script is sample and "--checkpoint" not in argv:
        argv = ["--checkpoint", trained, *argv]
    before = sorted(trained.rglob("*"))
    if script is train:
        argv = [*argv, f"run.dir={tmp_path / 'run'}"]
    assert message in exit_message(script, *argv)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
    assert sorted(trained.rglob("*")) == before


def test_an_unreadable_image_ends_the_script_with_status_2(tmp_path):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "0.png").write_bytes(b"not a picture")
    overrides = [f"run.dir={tmp_path / 'run'}", "data.name=images", f"data.path={tmp_path / 'images'}"]
    command = [sys.executable, "train.py", *overrides, "model.num_classes=1"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: error: every class must have a readable image")
    assert done.stderr.count("\n") == 1
    left = [path.name for path in (tmp_path / "run").iterdir()]
    assert left == ["images.json"], "what was read is kept, so that mending one file costs one file"
