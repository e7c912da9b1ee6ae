"""sample.py as a user runs it: what it writes, going on after a kill, several processes, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flashdit.commands import sample
from flashdit.sampling.checkpoint import CheckpointGenerator, load_generator

ROOT = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(tiny_checkpoint, tmp_path):
    """Returns a function that samples from the tiny checkpoint into a folder and returns it."""

    def sampled(name, *options):
        argv = ["--checkpoint", tiny_checkpoint, "--output", tmp_path / name, *options]
        sample.main([str(word) for word in argv])
        return tmp_path / name

    return sampled


def arrays(folder):
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"], file["arr_1"]


def files(folder):
    """Returns the content of each file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pictures_arrays_grid_and_recipe_say_the_same(run, tiny_checkpoint, capsys):
    out = run("out", "--class", "Golden Retriever", 0, "--num-images", 5, "--cfg-interval", 0, 0.4)
    assert f"5 images, 5 model evaluations each: {out / 'grid.png'}" in capsys.readouterr().out
    names = [*(f"{i:06d}.png" for i in range(5)), "grid.png", "recipe.json", "samples.npz"]
    assert sorted(path.name for path in out.iterdir()) == names
    images, labels = arrays(out)
    assert images.shape == (5, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [1, 1, 1, 0, 0]
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["finished"]
    assert (recipe["nfe"], recipe["nfe_max"], recipe["weights"], recipe["step"]) == (5, 5, "ema", 7)
    assert recipe["vae_identity"] == load_generator(tiny_checkpoint).space.identity
    assert recipe["sampling"]["cfg_interval"] == [0, 0.4]
    with Image.open(out / "000003.png") as picture:
        assert np.array_equal(np.asarray(picture), images[3])
        assert picture.text["class"] == "cat"
        assert picture.text["nfe"] == "5"
        assert json.loads(picture.text["recipe"])["weights_sha256"] == recipe["weights_sha256"]


def test_the_recipe_says_that_a_model_was_compiled(run, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    plain, fast = run("plain", "--num-images", 2), run("fast", "--num-images", 2, "--compile")
    assert [json.loads((folder / "recipe.json").read_text())["compile"] for folder in (plain, fast)] == [
        False,
        True,
    ]
    assert len(compiled) == 1
    assert np.array_equal(arrays(plain)[0], arrays(fast)[0])


@pytest.mark.parametrize(
    ("form", "others"), [("png", ["000000.png", "000001.png"]), ("npz", ["samples.npz"])]
)
def test_a_format_alone_writes_the_same_images(run, form, others):
    out, both = run("out", "--num-images", 2, "--format", form), run("both", "--num-images", 2)
    assert sorted(path.name for path in out.iterdir()) == sorted(["grid.png", "recipe.json", *others])
    if form == "npz":
        assert files(out)["samples.npz"] == files(both)["samples.npz"]
    ours, theirs = Image.open(out / "grid.png"), Image.open(both / "grid.png")
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert json.loads(ours.text["recipe"])["format"] == form, "the grid carries its recipe too"
    if form == "png":
        assert np.array_equal(np.asarray(Image.open(out / "000001.png")), arrays(both)[0][1])


def test_all_classes_share_equally_or_at_random(run):
    balanced = arrays(run("a", "--num-images", 7, "--steps", 1))[1]
    assert np.bincount(balanced).tolist() == [3, 2, 2]
    drawn = [
        arrays(run(f"b{n}", "--class", "all", "--labels", "random", "--num-images", n, "--steps", 1))[1]
        for n in (12, 9)
    ]
    assert set(drawn[0]) == {0, 1, 2}
    assert drawn[0].tolist() != sorted(drawn[0])
    assert drawn[0][:9].tolist() == drawn[1].tolist()


def test_images_have_the_wanted_size_and_other_sizes_other_noise(run):
    out = run("out", "--num-images", 2, "--height", 44, "--width", 24)
    assert arrays(out)[0].shape == (2, 44, 24, 3)
    assert json.loads((out / "recipe.json").read_text())["sampling"]["height"] == 44


def test_raw_weights_and_lower_precision_are_other_images(run, tiny_checkpoint):
    one = arrays(run("ema", "--num-images", 2))[0].astype(int)
    raw = arrays(run("raw", "--num-images", 2, "--ema", "model"))[0].astype(int)
    half = arrays(run("half", "--num-images", 2, "--precision", "bf16"))[0].astype(int)
    assert abs(one - raw).max() > 20
    assert 0 < abs(one - half).max() <= 8
    generator = load_generator(tiny_checkpoint, weights="model")
    assert generator.recipe()["weights_sha256"] != load_generator(tiny_checkpoint).recipe()["weights_sha256"]


def test_a_killed_run_goes_on_and_ends_with_the_same_images(run, tiny_checkpoint, tmp_path):
    options = ["--num-images", "24", "--steps", "4", "--batch-size", "1"]
    command = [sys.executable, "sample.py", "--checkpoint", tiny_checkpoint, "--output", tmp_path / "out"]
    process = subprocess.Popen([*command, *options], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out" / ".parts"
    while process.poll() is None and len(list(parts.glob("[0-9]*.npz"))) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("[0-9]*.npz")}
    assert 3 <= len(done) < 24
    first = (tmp_path / "out" / "000000.png").stat().st_mtime_ns
    out, whole = run("out", *options), run("whole", *options)
    assert (out / "000000.png").stat().st_mtime_ns == first, "finished samples are not made again"
    assert files(out) == files(whole)


def test_classes_in_another_order_are_another_recipe(run, exit_message):
    out = run("out", "--class", 1, 0, "--num-images", 4)
    assert json.loads((out / "recipe.json").read_text())["classes"] == [1, 0]
    before = files(out)
    with pytest.raises(ValueError, match="labels_sha256"):
        run("out", "--class", 0, 1, "--num-images", 4)
    assert files(out) == before


def test_a_finished_folder_is_left_as_it_is(run, monkeypatch):
    out = run("out", "--num-images", 3)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(CheckpointGenerator, "latents", None)
    run("out", "--num-images", 3, "--batch-size", 1)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_batch_size_changes_no_image_by_more_than_a_grey_level(run):
    one = arrays(run("one", "--num-images", 7))[0].astype(int)
    for size in (1, 3):
        other = arrays(run(f"batch{size}", "--num-images", 7, "--batch-size", size))[0].astype(int)
        assert abs(one - other).max() <= 1


def test_two_processes_write_what_one_writes(run, tiny_checkpoint, tmp_path):
    options = ["--num-images", "9", "--sampler", "sde-euler", "--batch-size", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "sample.py"]
    command += ["--checkpoint", tiny_checkpoint, "--output", tmp_path / "two", "--device", "cpu", *options]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    two, one = tmp_path / "two", run("one", *options)
    assert files(two).keys() == files(one).keys()
    assert abs(arrays(two)[0].astype(int) - arrays(one)[0]).max() <= 1
    assert np.array_equal(arrays(two)[1], arrays(one)[1])


@pytest.fixture
def foreign(tiny_checkpoint, tmp_path):
    """Returns folders that look like checkpoints and are none of ours."""
    for name in ("half", "other", "vae", "list", "empty"):
        shutil.copytree(tiny_checkpoint, tmp_path / name)
    (tmp_path / "list" / "state.json").write_text("[]")
    (tmp_path / "empty" / "state.json").write_text("")
    (tmp_path / "half" / "latents.safetensors").write_bytes(b"cut")
    (tmp_path / "other" / "ema" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    space = load_generator(tiny_checkpoint).space
    about = json.dumps({"vae": "digits", "multiplier": 1.0, "identity": "0" * 64})
    tensors = {"mean": space.mean, "std": space.std}
    save_file(tensors, tmp_path / "vae" / "latents.safetensors", metadata={"space": about})
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--class", "207"], "class 207 is out of range for this 3-class model (0–2)"),
        (["--class", "-1"], "class -1 is out of range for this 3-class model (0–2)"),
        (
            ["--class", "golden retreiver"],
            "unknown class 'golden retreiver'; did you mean 'golden retriever'",
        ),
        (["--labels", "radnom"], "unknown labels 'radnom'; did you mean 'random'"),
        (["--format", "jpg"], "unknown format 'jpg'"),
        (["--num-images", "0"], "num_images must be at least 1, got 0"),
        (["--width", "33"], "width must be a multiple of 4 pixels (the VAE's factor 2 × the patch size 2)"),
        (["--height", "-4"], "height must be at least 1, got -4"),
        (["--cfg-interval", "0.9", "0.1"], "cfg_interval must be 0 ≤ low ≤ high ≤ 1"),
        (["--cfg-scale", "nan"], "cfg_scale must be finite, got nan"),
        (["--sampler", "dpm"], "unknown sampler 'dpm'; did you mean 'dpm++2m'"),
        (["--precision", "fp8"], "unknown precision 'fp8' (known: auto, bf16, fp16, fp32, tf32)"),
        (["--device", "gpu"], "--device must be one of this machine, such as cpu, got gpu"),
        (["--device", "cuda:99"], "--device must be one of this machine, such as cpu, got cuda:99"),
        (["--steps", "1000000000000000"], "steps must be at most 1,000,000, got 1000000000000000"),
        (["--sampler", "dopri5", "--atol", "nan"], "option 'atol' of sampler 'dopri5' must be a number"),
        (["--checkpoint", "list"], "list/state.json is damaged: it must hold a mapping"),
        (["--checkpoint", "empty"], "empty/state.json is damaged: Expecting value"),
        (["--sampler", "dopri5", "--sampler-option", "atol=0"], "atol and rtol must be positive, got 0 and"),
        (["--sampler-option", "order=2"], "unknown option of sampler 'euler' 'order'"),
        (["--sampler-option", "order"], "--sampler-option must be key=value, got 'order'"),
        (["--sampler-option", "order=["], "--sampler-option order must be YAML, got '['"),
        (["--ema", "emma"], "'emma'; did you mean 'ema'? (known: ema, model)"),
        (["--ema", "/tmp"], "unknown weights of"),
        (["--ema", ".."], "'..' (known: ema, model)"),
        (["--ema", ""], "(known: ema, model)"),
        (["--sampler-option", "name=heun"], "must be an option, --sampler names it, got name=heun"),
        (["--sampler", "dopri5", "--steps", "3"], "samplers that do not choose their steps, as dopri5 does"),
        (["--sampler", "dopri5", "--shift", "0.3"], "as dopri5 does, got 0.3"),
        (["--checkpoint", "absent"], "--checkpoint: absent does not exist"),
        (["--checkpoint", "half"], "half/latents.safetensors is damaged"),
        (["--checkpoint", "other"], "a checkpoint must hold a FlashDiT, got UNet2DModel"),
        (["--checkpoint", "vae"], "the VAE must be the one of the training latents ("),
        (["--vae", "absent"], "must be a data set that brings an autoencoder, a folder or a hub name"),
        (["--output", "kept"], "--output must be a new folder or one of the same samples, got kept"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    argv, message, foreign, tiny_checkpoint, monkeypatch, exit_message
):
    monkeypatch.chdir(foreign)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    given = argv if "--checkpoint" in argv else ["--checkpoint", tiny_checkpoint, *argv]
    given = given if "--output" in argv else [*given, "--output", "out"]
    before = files(foreign) | files(tiny_checkpoint)
    assert message in exit_message(sample, *given)
    assert files(foreign) | files(tiny_checkpoint) == before
    assert not (foreign / "out").exists()


def test_an_option_of_the_sampler_has_two_spellings_and_stands_in_the_recipe(run, capsys):
    options = ["--sampler", "dopri5", "--num-images", 1]
    short = run("short", *options, "--atol", "1e-2", "--rtol", "1e-1")
    generic = run("generic", *options, "--sampler-option", "rtol=1e-1", "atol=1e-2")
    recipe = json.loads((short / "recipe.json").read_text())
    assert recipe["sampling"]["sampler"] == {"name": "dopri5", "atol": 1e-2, "rtol": 1e-1}
    assert files(short) == files(generic)
    tight = json.loads((run("tight", *options) / "recipe.json").read_text())
    assert tight["nfe"] > recipe["nfe"]


def test_tolerances_that_cannot_be_kept_are_named(tiny_checkpoint, tmp_path):
    options = ["--sampler", "dopri5", "--atol", "1e-30", "--rtol", "1e-30", "--num-images", 1]
    argv = ["--checkpoint", tiny_checkpoint, "--output", tmp_path / "out", *options]
    with pytest.raises(ValueError, match="dopri5 must be able to keep its tolerances, got atol=1e-30"):
        sample.main([str(word) for word in argv])


def test_samples_of_another_recipe_are_not_mixed(run, monkeypatch, exit_message, tiny_checkpoint, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    out = run("out", "--num-images", 2)
    before = files(out)
    capsys.readouterr()
    argv = ["--checkpoint", tiny_checkpoint, "--num-images", 2, "--output", out]
    assert "holds samples of another recipe (sampling, title)" in exit_message(
        sample, *argv, "--seed", 1, "--steps", 2
    )
    assert "another recipe (weights, weights_sha256)" in exit_message(sample, *argv, "--ema", "model")
    assert files(out) == before


def test_the_default_folder_names_its_recipe(tiny_checkpoint, tmp_path, capsys):
    shutil.copytree(tiny_checkpoint.parents[1], tmp_path / "run")
    for seed in (0, 0, 1):
        sample.main(["--checkpoint", str(tmp_path / "run"), "--num-images", "1", "--seed", str(seed)])
    folders = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert [name[:-8] for name in folders] == ["cfg_1.5_seed_0_", "cfg_1.5_seed_1_"]


def test_a_model_without_classes_is_sampled_unconditionally(tiny_checkpoint, tmp_path):
    from flashdit import FlashDiT

    folder = tmp_path / "checkpoints" / "step_00000001"
    shutil.copytree(tiny_checkpoint, folder)
    torch.manual_seed(0)
    FlashDiT.from_size(
        "nano", in_channels=1, patch_size=2, hidden_size=16, depth=1, num_classes=0
    ).save_pretrained(folder / "ema")
    state = json.loads((folder / "state.json").read_text()) | {"class_names": []}
    (folder / "state.json").write_text(json.dumps(state))
    sample.main(["--checkpoint", str(folder), "--num-images", "3", "--output", str(tmp_path / "out")])
    assert arrays(tmp_path / "out")[1].tolist() == [0, 0, 0]
