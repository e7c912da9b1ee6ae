"""Are the committed digits weights small and faithful?"""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from flashdit.autoencoder.losses import psnr
from flashdit.data.sources import companions_of
from flashdit.digits.images import digits

OUTPUT = companions_of("digits").autoencoder

PSNR_DB = 38.5  # measured 39.2; the margin is for other machines' convolutions


def pixels(split: str) -> torch.Tensor:
    """Returns the images of a split, (n, 3, 32, 32) in [−1, 1]."""
    return digits(split)[0].float() / 127.5 - 1


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
    latents = autoencoder.encode(images, return_dict=False)[0].mode()
    assert psnr(images, autoencoder.decode(latents, return_dict=False)[0].clamp(-1, 1)) >= PSNR_DB
