"""Runs, checkpoints, exports and reports made by version 0.1 of 21 November 2026 still load and go on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import encode_latents
import eval_fid
import sample
import train
import train_classifier
from flashdit import config
from flashdit.commands import posthoc
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.options import SamplingOptions

OLD = Path(__file__).parent / "made_before"
OVERRIDES = [
    "run.dir=runs/tiny",
    "model.hidden_size=8",
    "model.depth=1",
    "training.save_every=5",
    "training.log_every=5",
    "training.preview_every=0",
    "ema.power_widths=[0.05,0.1]",
    "ema.snapshot_every=5",
    "optimizer.decay_steps=20",
    "training.global_batch_size=4",
]


@pytest.fixture
def old(tmp_path, monkeypatch):
    """Makes a copy of everything the working directory, laid out as it was when it was made."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(OLD / "run", tmp_path / "runs" / "tiny")
    shutil.copytree(OLD / "classifier", tmp_path / "runs" / "classifier")
    for name in ("samples", "exported", "latents", "pictures"):
        shutil.copytree(OLD / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_run_goes_on_as_the_old_code_went_on(old):
    train.main([*OVERRIDES, "training.steps=15"])
    for name in ("ema", "model"):
        new = load_file(next((old / "runs/tiny/checkpoints/step_00000015" / name).glob("*.safetensors")))
        want = load_file(OLD / "continued" / f"{name}.safetensors")
        assert new.keys() == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(new[key], value, rtol=1e-4, atol=1e-6)


def test_samples_are_those_of_the_old_code(old):
    command = "--checkpoint runs/tiny --class seven 3 --num-images 4 --steps 4 --cfg-scale 1.5 --output new"
    sample.main(command.split())
    with np.load("new/samples.npz") as new, np.load(OLD / "samples" / "samples.npz") as want:
        assert np.array_equal(new["arr_1"], want["arr_1"])
        assert np.abs(new["arr_0"].astype(int) - want["arr_0"]).max() <= 1


def test_finished_folder_of_samples_is_known_as_finished(old):
    before = (old / "samples" / "samples.npz").stat().st_mtime_ns
    command = "--checkpoint runs/tiny --class seven 3 --num-images 4 --steps 4 --cfg-scale 1.5"
    sample.main([*command.split(), "--output", "samples"])
    assert (old / "samples" / "samples.npz").stat().st_mtime_ns == before


def test_old_sampling_options_load_under_their_names_of_today(old):
    path = old / "runs/tiny/checkpoints/step_00000010/state.json"
    state = json.loads(path.read_text())
    assert load_generator("runs/tiny").sampling == SamplingOptions(steps=25, cfg_interval=(0.22, 1.0))
    state["sampling"] |= {"sampler": "dopri5", "atol": 1e-3, "dtype": "bf16"}
    path.write_text(json.dumps(state))
    sampling = load_generator("runs/tiny").sampling
    assert sampling.sampler == {"name": "dopri5", "atol": 1e-3, "rtol": 1e-5}
    assert sampling.precision == "bf16"
    loaded = config.load("runs/tiny/config.yaml", ["sampling.sampler=dopri5", "sampling.rtol=1e-2"])
    assert loaded.sampling.sampler == {"name": "dopri5", "atol": 1e-5, "rtol": 1e-2}


def test_old_sweep_is_known_and_nothing_is_scored_again(old, capsys):
    command = "sweep --checkpoint runs/tiny --num-images 20 --steps 4 --cfg-scale 1:2:1"
    eval_fid.main(command.split())
    assert "2 of 2 scales are in" in capsys.readouterr().out


def test_scores_are_those_of_the_old_code(old):
    eval_fid.main(
        [
            "--checkpoint",
            "runs/tiny",
            "--num-images",
            "20",
            "--steps",
            "4",
            "--output",
            "new",
            "--csv",
            "scores.csv",
        ]
    )
    new = json.loads((old / "new" / "metrics.json").read_text())
    want = json.loads((OLD / "run/eval/cfg_1.0/metrics.json").read_text())
    assert new["schema"] == want["schema"]
    assert want["metrics"].pop("is_std") == 0  # of one chunk, for which there is none
    assert new["metrics"].pop("is_std") is None
    assert new["metrics"] == pytest.approx(want["metrics"], rel=1e-3)
    for floor in (new["floor"], want["floor"]):
        floor.pop("is_std", None)
    assert new["floor"] == pytest.approx(want["floor"], rel=1e-4)
    columns = [(file / "scores.csv").read_text().splitlines()[0] for file in (old, OLD)]
    assert columns[0] == columns[1]


def test_old_scores_are_compared_and_stand_in_an_old_table(old, capsys):
    (old / "scores.csv").write_text((OLD / "scores.csv").read_text())
    command = "--checkpoint runs/tiny --num-images 20 --steps 4 --output new --csv scores.csv"
    eval_fid.main(command.split())
    assert len((old / "scores.csv").read_text().splitlines()) == 3
    eval_fid.main(["compare", "runs/tiny/eval/cfg_1.0/metrics.json", "new/metrics.json"])
    assert "FD[digits]" in capsys.readouterr().out


def test_reference_file_scores_its_own_images_as_the_set_does(old):
    command = "--checkpoint runs/tiny --num-images 20 --steps 4 --extractor digits --metrics fid --output new"
    eval_fid.main([*command.split(), "--reference", str(OLD / "reference.npz")])
    new = json.loads((old / "new" / "metrics.json").read_text())
    want = json.loads((OLD / "run/eval/cfg_1.0/metrics.json").read_text())
    assert new["metrics"]["fd_20"] == pytest.approx(want["metrics"]["fd_20"], rel=1e-3)


def test_exported_pipeline_makes_the_old_images(old):
    from flashdit import FlashDiTPipeline

    assets = next(
        Path(train.__file__).parent.joinpath("flashdit").rglob("digits/assets/autoencoder/*.safetensors")
    )
    shutil.copy(assets, old / "exported" / "vae")
    pipe = FlashDiTPipeline.from_pretrained(str(old / "exported"))
    pipe.set_progress_bar_config(disable=True)
    with np.load(OLD / "exported_images.npz") as want:
        made = pipe(
            ["seven", 3],
            latents=torch.from_numpy(want["noise"]),
            num_inference_steps=4,
            guidance_scale=1.5,
            output_type="np",
        )
        assert np.abs((made.images * 255).round() - want["images"]).max() <= 1


def test_snapshots_of_the_old_average_give_new_widths(old):
    posthoc.main(["runs/tiny", "--width", "0.07"])
    made = load_file(next((old / "runs/tiny/checkpoints/step_00000010/ema_0.070").glob("*.safetensors")))
    assert made.keys() == load_file(OLD / "continued" / "ema.safetensors").keys()


def test_classifier_is_scored_and_goes_on(old, capsys):
    overrides = [
        "run.dir=runs/classifier",
        "model.embed_dim=8",
        "model.depths=[1,1]",
        "model.num_heads=[1,2]",
        "training.save_every=4",
        "training.log_every=2",
        "training.preview_every=4",
    ]
    train_classifier.main(["--eval-only", *overrides])
    assert "top-1 8.61%" in capsys.readouterr().out
    train_classifier.main([*overrides, "training.steps=6"])
    assert (old / "runs/classifier/checkpoints/step_00000006").is_dir()


def test_encoded_folder_is_whole_for_its_pictures(old, capsys):
    before = {path: path.stat().st_mtime_ns for path in (old / "latents").rglob("*.safetensors")}
    encode_latents.main(["--images", "pictures", "--vae", "digits", "--out", "latents", "--image-size", "16"])
    assert {path: path.stat().st_mtime_ns for path in (old / "latents").rglob("*.safetensors")} == before
    assert "4 of 4 images" in capsys.readouterr().out
