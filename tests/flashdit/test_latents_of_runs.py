"""Sizes of the model that are null, and runs that go on with a new, moved or other autoencoder."""

import json
from typing import Any

import pytest
import torch
import yaml
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from safetensors.torch import load_file

from flashdit import config
from flashdit.data.manifest import MANIFEST
from flashdit.sampling.checkpoint import load_generator
from flashdit.trainer import Trainer

OPEN = [f"model.{key}=null" for key in ("in_channels", "sample_size", "num_classes")]
SHORT = ["training.steps=2", "training.preview_every=0"]
SIZES = {"in_channels": 3, "sample_size": 8, "num_classes": 3}


def train(*overrides):
    Trainer(config.load(None, [*overrides])).fit()


def weights(run, step):
    (path,) = (run / "checkpoints" / f"step_{step:08d}" / "model").glob("*.safetensors")
    return load_file(path)


def make_vae(folder, channels=3, seed=0):
    """Saves an autoencoder of factor 1 and returns its folder."""
    torch.manual_seed(seed)
    blocks: dict[str, Any] = {f"num_{side}_blocks": (1,) for side in ("encoder", "decoder")}
    widths: dict[str, Any] = {f"{side}_block_out_channels": (4,) for side in ("encoder", "decoder")}
    AutoencoderTiny(**blocks, **widths, latent_channels=channels).save_pretrained(folder)
    return folder


def test_open_sizes_are_those_of_the_data_and_written_down(tiny_overrides, tmp_path):
    train(*tiny_overrides, *SHORT)
    train(*tiny_overrides, *SHORT, *OPEN, f"run.dir={tmp_path / 'open'}")
    for stored in (tmp_path / "open").rglob("config.yaml"):
        model = yaml.safe_load(stored.read_text())["model"]
        assert {key: model[key] for key in SIZES} == SIZES
    for key, value in weights(tmp_path / "run", 2).items():
        assert weights(tmp_path / "open", 2)[key].equal(value)


@pytest.mark.parametrize("begun_open", [True, False])
def test_a_run_goes_on_with_open_or_stated_sizes(tiny_overrides, tmp_path, begun_open):
    train(*tiny_overrides, *SHORT, *(OPEN if begun_open else ()))
    train(*tiny_overrides, "training.steps=3", *(() if begun_open else OPEN))
    assert (tmp_path / "run" / "checkpoints" / "step_00000003").is_dir()


def test_only_these_sizes_may_be_open(tiny_overrides):
    with pytest.raises(ValueError, match=r"model.depth must be a whole number, got None"):
        config.load(None, [*tiny_overrides, "model.depth=null"])
    assert config.with_sizes_of_data(config.load(None, tiny_overrides)).model["num_classes"] == 3
    one = config.with_sizes_of_data(config.load(None, [*tiny_overrides, "model.sample_size=4", OPEN[2]]))
    assert {key: one.model[key] for key in SIZES} == SIZES | {"sample_size": 4}


def test_open_sizes_of_encoded_images_follow_their_size_and_the_factor():
    spec = ["data.name=digits", "latents.vae=digits", "run.dir=none", *OPEN]
    found = config.with_sizes_of_data(config.load(None, spec)).model
    assert {key: found[key] for key in SIZES} == {"in_channels": 1, "sample_size": 16, "num_classes": 10}


def test_a_size_that_differs_names_the_size_of_the_images(tmp_path):
    with pytest.raises(
        ValueError, match=r"sample_size=8, got 1 × 16 × 16 \(images of data.image_size=32, factor 2\)"
    ):
        Trainer(config.load(None, ["model.sample_size=8", f"run.dir={tmp_path / 'run'}"]))


def test_a_run_that_began_without_an_autoencoder_takes_one_that_fits(tiny_overrides, tmp_path):
    train(*tiny_overrides, *SHORT)
    vae = make_vae(tmp_path / "vae")
    train(*tiny_overrides, "training.steps=4", "training.preview_every=2", f"latents.vae={vae}")
    assert (tmp_path / "run" / "samples" / "step_00000004.png").is_file()
    assert load_generator(tmp_path / "run").space.factor == 1
    moved = vae.rename(tmp_path / "moved")
    train(*tiny_overrides, "training.steps=5", "training.preview_every=0", f"latents.vae={moved}")
    assert load_generator(tmp_path / "run").space.options.vae == str(moved)
    other = make_vae(tmp_path / "other", seed=1)
    with pytest.raises(
        ValueError, match=r"the VAE must be the one of the run in .*run \(.*, [0-9a-f]{12}\), got .*other"
    ):
        train(*tiny_overrides, "training.steps=6", f"latents.vae={other}")


def test_an_autoencoder_that_does_not_fit_the_shards_is_refused(tiny_overrides, tiny_shards, tmp_path):
    vae = make_vae(tmp_path / "vae", channels=4)
    with pytest.raises(ValueError, match=r"latents.vae must have the 3 channels of the latents in .* with 4"):
        train(*tiny_overrides, *SHORT, f"latents.vae={vae}")
    shards = sorted(tiny_shards.glob("*.safetensors"))
    about = {
        "format": 1,
        "vae_identity": "0" * 64,
        "image_size": 16,
        "mean": [2.0] * 3,
        "std": [3.0] * 3,
        "shards": [{"file": path.name, "bytes": path.stat().st_size, "sha256": "0"} for path in shards],
    }
    (tiny_shards / MANIFEST).write_text(json.dumps(about))
    vae = make_vae(tmp_path / "fitting")
    with pytest.raises(
        ValueError, match=r"latents.vae must be the VAE of the latents in .* \(000000000000\)"
    ):
        train(*tiny_overrides, *SHORT, f"latents.vae={vae}")


def test_a_run_goes_on_in_the_space_that_it_began_in(tmp_path):
    tiny = ["model.depth=1", "model.hidden_size=8", *SHORT, f"run.dir={tmp_path / 'run'}", *OPEN]
    train(*tiny)
    with pytest.raises(ValueError, match=r"holds a run"):
        train(*tiny, "latents.space=pixels", "latents.vae=null")
