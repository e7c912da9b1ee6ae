"""Does an autoencoder learn its images, resume exactly, and come out as diffusers' own?"""

import json
import math

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from flashdit.autoencoder.config import AutoencoderOptions, load_autoencoder_config
from flashdit.autoencoder.task import AutoencoderTrainer
from flashdit.commands import autoencoder, train
from flashdit.commands.autoencoder import main, options_of, parse
from flashdit.data.autoencoders import lasting_name, load_vae
from flashdit.shared.runs import list_checkpoints
from flashdit.shared.weights import read_tensors


@pytest.fixture
def folder(tmp_path):
    """Returns a folder of 24 pictures of two colours in two classes."""
    for number in range(24):
        picture = Image.new("RGB", (16, 16), (10 * number, 80, 200 - 5 * number))
        picture.paste((255, 255, 255), (number % 8, 2, number % 8 + 6, 12))
        path = tmp_path / "pictures" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return tmp_path / "pictures"


@pytest.fixture
def overrides(folder, tmp_path):
    return [
        "data.name=images",
        f"data.path={folder}",
        "data.image_size=16",
        f"run.dir={tmp_path / 'run'}",
        "autoencoder.factor=4",
        "autoencoder.channels=2",
        "autoencoder.width=8",
        "held_out_images=2",
        "optimizer.decay_steps=null",
        "optimizer.warmup_steps=0",
        "training.steps=4",
        "training.save_every=2",
        "training.preview_every=2",
        "training.log_every=1",
        "training.global_batch_size=4",
    ]


def test_a_digits_configuration_has_the_committed_autoencoders_sizes():
    from flashdit.data.sources import companions_of

    config = load_autoencoder_config("autoencoder/digits")
    committed = AutoencoderKL.load_config(companions_of("digits").autoencoder)
    arguments = config.autoencoder.arguments(32)
    assert arguments == {name: committed[name] for name in arguments}


def test_stable_diffusions_sizes_are_a_configuration():
    arguments = AutoencoderOptions(
        factor=8, channels=4, width=128, layers_per_block=2, attention=True
    ).arguments(512)
    assert arguments["block_out_channels"] == [128, 256, 512, 512]
    assert arguments["norm_num_groups"] == 32
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoencoderKL(**arguments).parameters()) == 83_653_863


def test_the_loss_is_that_of_a_posterior_sample(overrides):
    torch.manual_seed(0)
    model = AutoencoderTrainer(load_autoencoder_config(None, overrides)).task.model.eval()
    images, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        reconstruction, mean, log_variance = model(images, noise)
        posterior = model.encode(images).latent_dist
        expected = model.decode(posterior.mean + posterior.std * noise).sample
    torch.testing.assert_close(reconstruction, expected)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(log_variance, posterior.logvar)


def test_a_resumed_run_ends_with_the_same_weights(overrides, tmp_path):
    AutoencoderTrainer(load_autoencoder_config(None, overrides)).fit()
    other = [*overrides, f"run.dir={tmp_path / 'other'}"]
    AutoencoderTrainer(load_autoencoder_config(None, [*other, "training.steps=2"])).fit()
    AutoencoderTrainer(load_autoencoder_config(None, other)).fit()
    whole, resumed = (list_checkpoints(tmp_path / name)[-1] for name in ("run", "other"))
    for kind in ("model", "ema"):
        first, second = read_tensors(whole / kind), read_tensors(resumed / kind)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_trained_autoencoder_is_diffusers_own_and_a_latent_space(
    overrides, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    main(overrides)
    assert "trained to step 4" in capsys.readouterr().out
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    plain = AutoencoderKL.from_pretrained(checkpoint / "ema")
    assert json.loads((checkpoint / "ema" / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    assert plain.config["latent_channels"] == 2
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [record["psnr"] for record in records if "psnr" in record]
    assert len(measured) == 2
    assert all(3 < value < 60 for value in measured)
    with Image.open(tmp_path / "run" / "samples" / "step_00000004.png") as picture:
        assert picture.size[0] > 2 * 64
    loaded = load_vae(str(tmp_path / "run"))
    assert (loaded.channels, loaded.factor) == (2, 4)
    assert all(
        torch.equal(value, plain.state_dict()[key]) for key, value in loaded.module.state_dict().items()
    )
    trained = [
        f"data.path={folder}",
        "data.image_size=16",
        "data.name=images",
        f"latents.vae={tmp_path / 'run'}",
    ]
    sizes = ["hidden_size=16", "depth=1", "num_heads=2", "in_channels=null", "sample_size=null"]
    sizes = [f"model.{size}" for size in [*sizes, "num_classes=null", "attention.window=2", "patch_size=1"]]
    loop = [f"training.{option}" for option in ("steps=2", "global_batch_size=4", "preview_every=0")]
    train.main([f"run.dir={tmp_path / 'dit'}", *trained, *sizes, *loop, "optimizer.decay_steps=null"])
    assert list_checkpoints(tmp_path / "dit")


def test_a_moved_folder_with_a_broken_picture_resumes_and_another_one_does_not(overrides, folder, tmp_path):
    (folder / "class 1" / "23.png").write_bytes(b"no picture")
    trainer = AutoencoderTrainer(load_autoencoder_config(None, [*overrides, "training.steps=2"]))
    assert trainer.task.images_per_epoch == 21  # 23 that can be read, two of them held out
    trainer.fit()
    moved = folder.rename(tmp_path / "moved")
    AutoencoderTrainer(load_autoencoder_config(None, [*overrides, f"data.path={moved}"])).fit()
    (moved / "class 0" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"another data\.path: files 1 fewer, such as class 0/0\.png"):
        AutoencoderTrainer(
            load_autoencoder_config(None, [*overrides, f"data.path={moved}", "training.steps=6"])
        )


def test_held_out_images_are_not_trained_on(overrides, caplog):
    caplog.set_level("INFO")
    task = AutoencoderTrainer(load_autoencoder_config(None, overrides)).task
    trained = [task.examples[position]["image"] for position in range(22)]
    assert len(task.held_out) == 2
    assert f"2 of {task.images_per_epoch + 2} images are held out" in caplog.text
    for image in task.held_out:
        assert not any(torch.equal(image, other) or torch.equal(image.flip(-1), other) for other in trained)


def test_at_most_a_tenth_of_the_images_is_held_out_and_a_resumed_run_holds_out_the_same(overrides):
    config = load_autoencoder_config(None, [*overrides, "held_out_images=100"])
    trainer = AutoencoderTrainer(config)
    assert (len(trainer.task.held_out), trainer.task.images_per_epoch) == (2, 22)
    trainer.fit()
    with pytest.raises(ValueError, match=r"a run whose held_out_images is 100, not 1: give another run\.dir"):
        AutoencoderTrainer(load_autoencoder_config(None, [*overrides, "held_out_images=1"]))


@pytest.mark.parametrize(("mirrors", "low", "high"), [("false", 0, 0), ("null", 0, 0), ("true", 5, 17)])
def test_images_are_mirrored_half_the_time_where_that_is_asked_for(overrides, mirrors, low, high):
    config = load_autoencoder_config(None, [*overrides, f"data.mirrors={mirrors}"])
    examples = AutoencoderTrainer(config).task.examples
    shown = [examples[position]["image"] for position in range(22)]
    plain = [examples.source.image(examples.rows[examples.order(position)]) for position in range(22)]
    mirrored = [not torch.equal(*pair) for pair in zip(shown, plain, strict=True)]
    assert low <= sum(mirrored) <= high
    for flipped, image, whole in zip(mirrored, shown, plain, strict=True):
        assert torch.equal(image, whole.flip(-1) if flipped else whole)


def test_the_loss_is_the_weighted_sum_of_its_terms(overrides):
    changes = ["loss.pixel=l2", "loss.kl_weight=0.01", "loss.perceptual_weight=0.5"]
    task = AutoencoderTrainer(load_autoencoder_config(None, [*overrides, *changes])).task
    task.perceptual = lambda images, reconstructions: (images - reconstructions).abs().sum()
    image = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    decoded, mean, log_variance = torch.rand(2, 3, 16, 16), torch.rand(2, 2, 4, 4), torch.rand(2, 2, 4, 4)
    loss, terms = task.loss(lambda *_: (decoded, mean, log_variance), {"image": image, "noise": mean})
    difference = image / 127.5 - 1 - decoded
    kl = ((mean**2 + log_variance.exp() - log_variance - 1) / 2).mean()
    torch.testing.assert_close(
        loss, difference.pow(2).mean() + 0.01 * kl + 0.5 * difference.abs().sum(), rtol=1e-5, atol=0
    )
    assert terms.keys() == {"l2", "kl", "perceptual"}


def test_the_psnr_of_held_out_images_is_that_of_the_saved_averages_posterior_means(overrides):
    trainer = AutoencoderTrainer(load_autoencoder_config(None, overrides))
    trainer.fit()
    records = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    average = AutoencoderKL.from_pretrained(list_checkpoints(trainer.run_dir)[-1] / "ema")
    images = trainer.task.held_out / 127.5 - 1
    with torch.no_grad():
        decoded = average.decode(average.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    error = ((images - decoded) / 2).double().pow(2).mean().item()
    assert records[-1]["psnr"] == pytest.approx(-10 * math.log10(error), abs=1e-4)


def test_the_psnr_grows_with_training(overrides):
    steps = ["training.steps=40", "training.preview_every=8", "training.save_every=40", "optimizer.lr=3e-3"]
    trainer = AutoencoderTrainer(load_autoencoder_config(None, [*overrides, *steps, "ema.decay=0.9"]))
    trainer.fit()
    lines = (trainer.run_dir / "metrics.jsonl").read_text().splitlines()
    measured = [record["psnr"] for record in map(json.loads, lines) if "psnr" in record]
    assert measured[-1] > measured[0] + 1


def test_options_are_keys_and_their_paths_no_yaml(monkeypatch, exit_message):
    monkeypatch.setenv("PICS", "my pics #2")
    arguments = parse(["--images", "$PICS", "--image-size", "64", "--factor", "8", "--out", "[x", "seed=7"])
    assert options_of(arguments) == {
        "data.name": "images",
        "data.path": "my pics #2",
        "data.image_size": 64,
        "autoencoder.factor": 8,
        "run.dir": "[x",
    }
    config = load_autoencoder_config(None, arguments.overrides, options_of(arguments))
    assert (config.data["path"], config.run.dir, config.seed) == ("my pics #2", "[x", 7)
    assert options_of(parse(["--factor", "0"])) == {"autoencoder.factor": 0}  # which is refused there
    both = exit_message(autoencoder, "--out", "x", "run.dir=y")
    assert "--out is run.dir: give one of them, got both" in both
    assert "a path with ${ stands for another key" in exit_message(autoencoder, "--out", "a${b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("autoencoder.factor=3", r"autoencoder\.factor must be one of 1, 2, 4, 8, 16, 32, got 3"),
        ("autoencoder.width=6", r"autoencoder\.width must be a positive multiple of 4, got 6"),
        ("loss.pixel=l3", r"loss\.pixel must be l1 or l2, got l3"),
        ("loss.kl_weight=.nan", r"loss\.kl_weight must be finite and not negative, got nan"),
        ("held_out_images=0", "held_out_images must be at least 1, got 0"),
        ("data.image_size=18", r"multiple of autoencoder\.factor=4, got 18"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(overrides, change, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderTrainer(load_autoencoder_config(None, [*overrides, change]))


def test_the_end_of_a_training_is_kept_as_models_may_need_it(overrides, tmp_path):
    last = ["training.keep_last=1", "training.save_every=1"]
    AutoencoderTrainer(load_autoencoder_config(None, [*overrides, *last])).fit()
    named = lasting_name(str(tmp_path / "run"))
    assert named == str(tmp_path / "run" / "checkpoints" / "step_00000004")
    before = load_vae(named).identity
    AutoencoderTrainer(load_autoencoder_config(None, [*overrides, *last, "training.steps=6"])).fit()
    kept = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert kept == ["step_00000004", "step_00000006"]
    assert load_vae(named).identity == before != load_vae(str(tmp_path / "run")).identity
