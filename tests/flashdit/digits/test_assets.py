"""Are the committed digits weights small, faithful and reproducible by their scripts?"""

from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from tools import digits_autoencoder as train_autoencoder
from tools.digits_autoencoder import OUTPUT, main, pixels, psnr, reconstruct

PSNR_DB = 38.5  # measured 39.2; the margin is for other machines' convolutions


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(OUTPUT).eval().requires_grad_(False)


def test_the_autoencoder_is_small(autoencoder: AutoencoderKL):
    assert autoencoder.num_parameters() <= 200_000
    assert sum(path.stat().st_size for path in OUTPUT.glob("*.safetensors")) <= 700_000


def test_latents_are_half_the_side_and_finite(autoencoder: AutoencoderKL):
    latents = autoencoder.encode(pixels("held-out"), return_dict=False)[0].mode()
    assert latents.shape == (360, autoencoder.config["latent_channels"], 16, 16)
    assert latents.isfinite().all()
    assert (latents.std((0, 2, 3)) > 0.1).all(), "a collapsed channel would be normalised into noise"


def test_held_out_digits_are_reconstructed(autoencoder: AutoencoderKL):
    images = pixels("held-out")
    assert psnr(images, reconstruct(autoencoder, images)) >= PSNR_DB


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 3, 4, 5)
    assert psnr(images, images + 0.2) == pytest.approx(20.0, abs=1e-4)  # 0.2 of a range of 2


def test_the_script_trains_and_saves_what_diffusers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(train_autoencoder, "BATCH_SIZE", 4)
    main(["--steps", "3", "--output", str(tmp_path)])
    assert "PSNR held-out" in capsys.readouterr().out
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert {**loaded.config, "_name_or_path": ""} == {
        **AutoencoderKL.from_pretrained(OUTPUT).config,
        "_name_or_path": "",
    }
