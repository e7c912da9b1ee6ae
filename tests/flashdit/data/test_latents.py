import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from flashdit.data.autoencoders import Autoencoder, load_vae
from flashdit.data.latents import LatentOptions, LatentSpace, channel_statistics


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    ).eval()


def space(model=None, **options):
    mean, std = torch.randn(1, 4, 1, 1), torch.rand(1, 4, 1, 1) + 0.5
    autoencoder = None if model is None else Autoencoder(model)
    return LatentSpace(mean, std, LatentOptions(**options), autoencoder)


def test_normalising_and_back_is_the_identity():
    latents = torch.randn(2, 4, 8, 12)
    ours = space(multiplier=1.7)
    torch.testing.assert_close(ours.denormalise(ours.normalise(latents)), latents)


def test_normalised_latents_have_the_stated_statistics():
    latents = 3 + 2 * torch.randn(50, 4, 8, 8) * torch.arange(1, 5).reshape(1, 4, 1, 1)
    normalised = LatentSpace(*channel_statistics(latents), LatentOptions(multiplier=0.5)).normalise(latents)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.full((4,), 0.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("off", [-0.4, 0.4])
def test_decoding_rounds_to_the_nearest_grey_level(vae, off):
    exact = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16).expand(1, 3, 16, 16) / 127.5 - 1
    vae.decode = lambda latents: type("Out", (), {"sample": exact + off / 127.5})()
    assert space(vae).decode(torch.zeros(1, 4, 8, 8))[0, 0].flatten().tolist() == list(range(256))


def test_encoding_is_the_posterior_mean(vae):
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = vae.encode(images / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(Autoencoder(vae).encode(images), expected.detach())


def test_encoding_with_noise_is_a_sample_of_the_posterior(vae):
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    posterior = vae.encode(images / 127.5 - 1).latent_dist
    noise = torch.randn(posterior.mean.shape)
    expected = posterior.mean + posterior.std * noise
    assert (posterior.std - 1).abs().max() > 0.01
    torch.testing.assert_close(Autoencoder(vae).encode(images, noise), expected.detach())


def test_save_and_load_round_trips_and_finds_the_vae(tmp_path, vae):
    vae.save_pretrained(tmp_path / "vae")
    ours = space(vae, vae=str(tmp_path / "vae"), multiplier=0.3)
    ours.save(tmp_path / "latents.safetensors")
    loaded = LatentSpace.load(tmp_path / "latents.safetensors")
    assert loaded.options == ours.options
    assert loaded.identity == ours.identity
    latents = torch.randn(1, 4, 8, 8)
    assert loaded.normalise(latents).equal(ours.normalise(latents))
    assert loaded.decode(latents).equal(ours.decode(latents))


def test_another_vae_than_in_training_is_refused(tmp_path, vae):
    space(vae, vae="gone").save(tmp_path / "latents.safetensors")
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the VAE must be the one of the training latents"):
        LatentSpace.load(tmp_path / "latents.safetensors", str(tmp_path / "other"))


def test_identity_tells_weights_and_configurations_apart(vae):
    first = Autoencoder(vae).identity
    assert Autoencoder(vae).identity == first
    vae.register_to_config(scaling_factor=0.5)
    second = Autoencoder(vae).identity
    torch.nn.init.ones_(vae.decoder.conv_out.bias)
    assert len({first, second, Autoencoder(vae).identity}) == 3


def test_what_cannot_be_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"pixels need the VAE that these latents come from"):
        space().decode(torch.zeros(1, 4, 8, 8))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"must hold config.json, vae/config.json or a run's checkpoint, .*empty has none"
    ):
        load_vae(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"every latent channel must vary"):
        channel_statistics(torch.ones(3, 4, 2, 2))
