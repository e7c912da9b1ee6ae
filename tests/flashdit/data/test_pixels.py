"""Pixels without an autoencoder: what is read, trained on, sampled, scored and exported."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import eval_fid
import sample
import train
from flashdit import FlashDiT, FlashDiTPipeline
from flashdit import trainer as trainer_module
from flashdit.commands import estimate, export
from flashdit.data.encode import open_latents
from flashdit.data.latents import LatentOptions, LatentSpace
from flashdit.data.pixels import PixelImages
from flashdit.sampling.checkpoint import load_generator
from flashdit.shared.runs import list_checkpoints, step_of
from flashdit.training.batches import StepBatches
from flashdit.web.studio import load_generators

CPU = torch.device("cpu")
MODEL = [
    *("latents.space=pixels", "latents.vae=null", "model.patch_size=16", "model.hidden_size=8"),
    *("model.depth=1", "model.num_heads=1", "flow.loss.cosine_weight=0"),
    *("model.attention.name=iwin", "model.attention.window=2"),
    *(f"model.{key}=null" for key in ("in_channels", "sample_size", "num_classes")),
    *(
        "training.steps=4",
        "training.global_batch_size=4",
        "training.save_every=2",
        "training.preview_every=4",
    ),
]


@pytest.fixture
def pictures(tmp_path):
    """Returns a folder of nine pictures of side 32 in three classes, and their pixels (9, 3, 32, 32)."""
    folder, pixels = (
        tmp_path / "pictures",
        np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8),
    )
    for number, image in enumerate(pixels):
        path = folder / "abc"[number // 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder, torch.from_numpy(pixels).permute(0, 3, 1, 2)


def spec(folder, **options):
    return {"name": "images", "path": str(folder), "image_size": 32} | options


def test_the_model_sees_pixels_from_minus_1_to_1_and_samples_are_rounded_back(pictures):
    folder, pixels = pictures
    data, space = open_latents(spec(folder), LatentOptions(space="pixels"), CPU)
    rows, mirrored = torch.tensor([7, 0, 4]), torch.tensor([False, True, False])
    read = data.read(rows, mirrored)
    assert read.dtype == torch.uint8
    assert read.equal(torch.stack([pixels[7], pixels[0].flip(-1), pixels[4]]))
    seen = space.normalise(read)
    torch.testing.assert_close(seen, read.double().div(255).mul(2).sub(1).float(), atol=1e-6, rtol=0)
    assert space.decode(seen).equal(read)
    assert (space.factor, space.identity, data.shape) == (1, None, (3, 32, 32))
    halved = LatentSpace.of_pixels(LatentOptions(space="pixels", multiplier=0.5))
    torch.testing.assert_close(halved.normalise(read), seen / 2)
    assert halved.decode(seen / 2).equal(read)


class Counting:
    """Images that are counted as they are read."""

    labels, class_names, mirrors = torch.zeros(1000, dtype=torch.int64), ["one"], None

    def __init__(self):
        self.read = []

    def image(self, index):
        self.read.append(index)
        return torch.full((3, 4 if index != 9 else 5, 4), index % 256)


def test_images_are_read_when_they_are_asked_for_and_not_kept():
    source = Counting()
    images = PixelImages(source)
    assert source.read == [0]
    assert images.read(torch.tensor([3, 700]), torch.zeros(2, dtype=torch.bool))[:, 0, 0, 0].tolist() == [
        3,
        188,
    ]
    assert source.read == [0, 3, 700]
    assert not any(isinstance(value, torch.Tensor) and value.ndim > 1 for value in vars(images).values())
    with pytest.raises(ValueError, match=r"one size, image 9 is \(3, 5, 4\), the first one \(3, 4, 4\)"):
        images.read(torch.tensor([9]), torch.zeros(1, dtype=torch.bool))


@pytest.mark.parametrize(
    ("mirrors", "pixels", "latents"), [(None, False, True), (True, True, True), (False,) * 3]
)
def test_mirrors_are_off_for_pixels_unless_asked_and_on_for_latents(pictures, mirrors, pixels, latents):
    given = spec(pictures[0]) | ({} if mirrors is None else {"mirrors": mirrors})
    assert open_latents(given, LatentOptions(space="pixels"), CPU)[0].mirrors is pixels
    assert open_latents(given, LatentOptions(vae="digits"), CPU, progress=False)[0].mirrors is latents


def run_of(folder, path, *more):
    """Trains a small model of pixels and returns the run's folder."""
    given = [f"run.dir={path}", "data.name=images", f"data.path={folder}", "data.image_size=32"]
    train.main([*given, *MODEL, *more])
    return path


@pytest.fixture
def run(pictures, tmp_path):
    return run_of(pictures[0], tmp_path / "run")


def weights(run, step=4):
    (path,) = (run / "checkpoints" / f"step_{step:08d}" / "model").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_a_run_is_the_same_with_reading_processes_and_after_a_pause(pictures, run, tmp_path):
    others = [run_of(pictures[0], tmp_path / "processes", "training.workers=2"), tmp_path / "pause"]
    run_of(pictures[0], others[1], "training.steps=2")
    run_of(pictures[0], others[1])
    for other in others:
        for key, value in weights(run).items():
            torch.testing.assert_close(weights(other)[key], value, rtol=0, atol=0)
    assert (run / "samples" / "step_00000004.png").is_file()


def test_samples_need_neither_data_nor_autoencoder(run, pictures, tmp_path):
    pictures[0].rename(tmp_path / "gone")
    sample.main(f"--checkpoint {run} --num-images 3 --steps 2 --output {tmp_path / 'out'}".split())
    with np.load(tmp_path / "out" / "samples.npz") as made:
        images = made["arr_0"]
    assert images.shape == (3, 32, 32, 3)
    generator = load_generator(run)
    (batch,) = generator.generate(
        torch.arange(3), generator.sampling.__class__(steps=2, cfg_interval=(0.22, 1.0))
    )
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), images)
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["vae"] is None
    assert list(load_generators([str(run)], "cpu", None, "ema")) == ["run, step 4"]
    with pytest.raises(ValueError, match=r"space=pixels requires latents.vae=null and no --vae, got digits"):
        load_generator(run, vae="digits")


def test_an_exported_model_of_pixels_makes_the_same_images(run, tmp_path):
    export.main([str(run), str(tmp_path / "exported")])
    assert not (tmp_path / "exported" / "vae").exists()
    pipe = FlashDiTPipeline.from_pretrained(str(tmp_path / "exported"))
    pipe.set_progress_bar_config(disable=True)
    generator = load_generator(run)
    noise = generator.noise(torch.arange(2), seed=0)
    made = pipe([1, 2], latents=noise, num_inference_steps=3, output_type="pt").images
    options = generator.sampling.__class__(steps=3)
    (batch,) = generator.generate(torch.tensor([1, 2]), options)
    assert (made * 255 - batch.images).abs().max() <= 1
    assert pipe([0], num_inference_steps=1, height=64, width=48).images[0].size == (48, 64)


def test_a_run_on_the_pixels_of_digits_is_scored(tmp_path):
    given = ["data.name=digits", "model.class_dropout_prob=0", f"run.dir={tmp_path / 'run'}"]
    train.main(
        [*MODEL, *given, "evaluation.every=4", "evaluation.num_images=20", "evaluation.extractor=digits"]
    )
    command = f"--checkpoint {tmp_path / 'run'} --num-images 20 --steps 2 --output {tmp_path / 'scores'}"
    eval_fid.main(command.split())
    assert json.loads((tmp_path / "scores" / "metrics.json").read_text())["metrics"]["fd_20"] > 0


def test_an_estimate_reads_open_sizes_from_the_data(pictures, capsys):
    estimate.main(
        ["--gpus", "1", *MODEL, "data.name=images", f"data.path={pictures[0]}", "data.image_size=32"]
    )
    sizes = {
        "sample_size": 32,
        "in_channels": 3,
        "num_classes": 3,
        "patch_size": 16,
        "depth": 1,
        "num_heads": 1,
    }
    model = FlashDiT(**sizes, hidden_size=8, attention={"name": "iwin", "window": 2})
    assert f"{sum(p.numel() for p in model.parameters()):,}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"model.in_channels=null is read from the data: give data.path"):
        estimate.main(["--config", "pixels_64"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_later_ends_the_run_by_name(pictures, tmp_path, workers, monkeypatch):
    def broken_meanwhile(*_):  # after the pass that leaves out what cannot be read
        (pictures[0] / "b" / "4.png").write_bytes(b"\x89PNG no more")

    monkeypatch.setattr(trainer_module, "check_fit", broken_meanwhile)
    with pytest.raises(ValueError, match=r"^every image must be readable, .*b/4.png is not") as raised:
        run_of(pictures[0], tmp_path / "run", f"training.workers={workers}", "training.steps=12")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_whose_folder_goes_is_saved_and_goes_on_as_if_it_had_not(
    pictures, tmp_path, workers, monkeypatch
):
    options = [f"training.workers={workers}", "training.steps=12", "training.save_every=12"]
    whole = run_of(pictures[0], tmp_path / "whole", *options)
    aside, read, reads = tmp_path / "aside", StepBatches.read, []

    def moved_meanwhile(batches):
        reads.append(1)
        if len(reads) == 4:
            pictures[0].rename(aside)
        read(batches)

    monkeypatch.setattr(StepBatches, "read", moved_meanwhile)
    said = r"^data.path must stay where it is while .*pictures is gone; the run is saved at step (\d+) of 12"
    with pytest.raises(ValueError, match=said) as raised:
        run_of(pictures[0], tmp_path / "run", *options)
    assert "\n" not in str(raised.value)
    step = int(re.match(said, str(raised.value))[1])
    assert 3 <= step < 12
    assert workers or step == 3
    assert [step] == [step_of(path) for path in list_checkpoints(tmp_path / "run")]
    aside.rename(pictures[0])
    run_of(pictures[0], tmp_path / "run", *options)
    (before,), (*_, after) = list_checkpoints(whole), list_checkpoints(tmp_path / "run")
    name = "model/diffusion_pytorch_model.safetensors"
    assert (before / name).read_bytes() == (after / name).read_bytes()


def test_what_pixels_cannot_be_is_named(tiny_shards, pictures):
    with pytest.raises(ValueError, match=r"latents.space=pixels requires images, got the latents in"):
        open_latents({"name": "shards", "path": str(tiny_shards)}, LatentOptions(space="pixels"), CPU)
    with pytest.raises(
        ValueError, match=r"latents.space=pixels requires latents.vae=null and no --vae, got digits"
    ):
        LatentOptions(space="pixels", vae="digits")
    with pytest.raises(ValueError, match=r"unknown latents.space 'pixel'; did you mean 'pixels'"):
        LatentOptions(space="pixel")
    with pytest.raises(
        ValueError, match=r"images need a VAE: give latents.vae, .* or train .* latents.space=pixels"
    ):
        open_latents(spec(pictures[0]), LatentOptions(), CPU)
    with pytest.raises(ValueError, match=r"data.image_size: .* a multiple of the VAE's factor=2, got 31×31"):
        open_latents(spec(pictures[0], image_size=31), LatentOptions(vae="digits"), CPU)
