"""Autoencoders of every class of diffusers that fits, by folder, pipeline, variant and hub name."""

import json
import logging
import shutil
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers.models.auto_model import AutoModel
from diffusers.utils.import_utils import is_transformers_available
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from torch import nn

import encode_latents
import sample
import train
from flashdit.data import autoencoders
from flashdit.data.autoencoders import Autoencoder, latent_size, load_vae
from flashdit.data.encode import MirrorEncoder, warn_of_lost_colour
from flashdit.data.latents import LatentOptions, LatentSpace

CONVOLUTIONS = {
    "block_out_channels": (4, 4),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 2,
}
BLOCKS = ("ResBlock", "EfficientViTBlock")
HALF = {
    "block_types": BLOCKS,
    "block_out_channels": (8, 8),
    "layers_per_block": (1, 1),
    "qkv_multiscales": ((), (5,)),
}
SIDES = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in HALF.items()}
TINY = {f"{side}_block_out_channels": (4, 4, 4) for side in ("encoder", "decoder")} | {
    f"num_{side}_blocks": (1, 1, 1) for side in ("encoder", "decoder")
}
FITTING = {  # arguments, then channels, factor and whether there is a posterior, worked out by hand
    "AutoencoderKL": (CONVOLUTIONS, 4, 2, True),
    "AutoencoderKLFlux2": (CONVOLUTIONS | {"latent_channels": 6, "sample_size": 32}, 6, 2, True),
    "AutoencoderDC": (SIDES | {"latent_channels": 4, "attention_head_dim": 2}, 4, 2, False),
    "AutoencoderTiny": (TINY | {"latent_channels": 3}, 3, 4, False),
    "VQModel": (CONVOLUTIONS | {"latent_channels": 2}, 2, 2, False),
}


def make(name, **changes):
    """Returns a small random module of a class of diffusers."""
    torch.manual_seed(0)
    return getattr(diffusers, name)(**FITTING[name][0] | changes).eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Returns a folder of eight coloured pictures of side 16 in two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, pixels in enumerate(
        np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    ):
        path = folder / ("cat" if number < 4 else "hen") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.mark.parametrize("name", FITTING)
def test_sizes_and_latents_are_the_modules_own(name):
    module, (_, channels, factor, posterior) = make(name), FITTING[name]
    vae = Autoencoder(module)
    assert (vae.channels, vae.factor, vae.has_posterior) == (channels, factor, posterior)
    images = torch.randint(0, 256, (2, 3, 16, 8), dtype=torch.uint8)
    with torch.no_grad():
        output = module.encode(2 * images.double().div(255).float() - 1, return_dict=False)[0]
        latents = output.mode() if posterior else output
        pixels = module.decode(latents, return_dict=False)[0]
    torch.testing.assert_close(vae.encode(images), latents)
    torch.testing.assert_close(vae.decode(latents), pixels)
    assert latent_size(vae, 16, 8) == latents.shape[1:]


@pytest.mark.parametrize("name", [name for name in FITTING if name != "VQModel"])
def test_a_run_goes_from_pictures_over_shards_to_samples(name, pictures, tmp_path, capsys):
    make(name).save_pretrained(tmp_path / "vae")
    shards, run = tmp_path / "shards", tmp_path / "run"
    encode = f"--images {pictures} --vae {tmp_path / 'vae'} --out {shards} --image-size 16 --workers 0"
    encode_latents.main(encode.split())
    sizes = [f"model.{key}=null" for key in ("in_channels", "sample_size", "num_classes")]
    model = ["model.patch_size=2", "model.hidden_size=8", "model.depth=1", "model.num_heads=1"]
    model += ["model.attention.name=iwin", "model.attention.window=2"]
    loop = ["training.steps=2", "training.global_batch_size=4", "training.preview_every=2"]
    given = [f"run.dir={run}", "data.name=shards", f"data.path={shards}", f"latents.vae={tmp_path / 'vae'}"]
    train.main([*given, *sizes, *model, *loop])
    assert (run / "samples" / "step_00000002.png").is_file()
    sample.main(f"--checkpoint {run} --num-images 2 --steps 2 --output {tmp_path / 'out'}".split())
    with np.load(tmp_path / "out" / "samples.npz") as made:
        assert made["arr_0"].shape == (2, 16, 16, 3)


@pytest.mark.skipif(not is_transformers_available(), reason="AutoencoderRAE requires transformers")
def test_a_representation_autoencoder_takes_images_of_its_own_side():
    sizes = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_input_size": 28}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    module = diffusers.AutoencoderRAE(**sizes, **decoder, decoder_intermediate_size=16, patch_size=8)
    vae = Autoencoder(module.eval())
    assert (vae.image_side, vae.factor, vae.channels) == (16, 8, 64)


class AutoencoderRAE(nn.Module):
    """What the class of this name promises: pixels from 0 to 1, images of one side; latents are pixels."""

    dtype, device, decoder_image_size = torch.float32, torch.device("cpu"), 8

    def encode(self, pixels):
        return type("EncoderOutput", (), {"latent": pixels})

    def decode(self, latents):
        return type("DecoderOutput", (), {"sample": latents})


def test_pixels_from_0_to_1_are_given_and_taken_where_the_class_has_them():
    vae, images = (
        Autoencoder(AutoencoderRAE()),
        torch.tensor([0, 51, 255]).to(torch.uint8).reshape(1, 3, 1, 1),
    )
    latents = vae.encode(images)
    torch.testing.assert_close(latents.flatten(), torch.tensor([0, 0.2, 1]))
    torch.testing.assert_close(vae.decode(latents).flatten(), torch.tensor([-1, -0.6, 1]))
    space = LatentSpace(torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1), LatentOptions(), vae)
    assert space.decode(latents).equal(images)
    with pytest.raises(ValueError, match=r"AutoencoderRAE takes images of 8×8 alone, got 16×8"):
        latent_size(vae, 8, 16)


@pytest.mark.parametrize("layout", ["folder", "pipeline", "variant", "pipeline's variant", "named variant"])
def test_an_autoencoder_is_found_in_every_layout(layout, tmp_path):
    module = make("AutoencoderTiny")
    folder = tmp_path / "vae" if "pipeline" in layout else tmp_path
    if "variant" in layout:
        module.half().save_pretrained(folder, variant="fp16")
    if layout == "named variant":
        make("AutoencoderTiny").bfloat16().save_pretrained(folder, variant="bf16")
        with pytest.raises(
            ValueError, match=f"holds the variants bf16, fp16: name one, as in {tmp_path}:bf16"
        ):
            load_vae(str(tmp_path))
    elif "variant" not in layout:
        module.save_pretrained(folder)
    vae = load_vae(f"{tmp_path}:fp16" if layout == "named variant" else str(tmp_path))
    assert vae.module.dtype == torch.float32
    assert vae.identity == Autoencoder(module).identity
    assert not any(parameter.requires_grad for parameter in vae.module.parameters())


@pytest.mark.parametrize("layout", ["autoencoder", "pipeline", "variant"])
def test_a_hub_name_is_an_autoencoder_or_a_pipeline(layout, tmp_path, monkeypatch, caplog):
    """The hub is a folder here: OWNER/NAME lies at `tmp_path`."""
    module = make("AutoencoderTiny")
    folder = tmp_path / "vae" if layout == "pipeline" else tmp_path
    module.half().save_pretrained(folder, variant="fp16" if layout == "variant" else None)

    def download(repository, filename=None, subfolder=None, **options):
        assert repository == "owner/name"
        path = tmp_path / (subfolder or "") / filename
        if not path.is_file():
            raise EntryNotFoundError("404")
        return str(path)

    monkeypatch.setattr(autoencoders, "get_hf_file_metadata", lambda url: None)
    for place in ("configuration_utils", "utils.hub_utils"):
        monkeypatch.setattr(f"diffusers.{place}.hf_hub_download", download)
    monkeypatch.setattr("diffusers.models.modeling_utils._get_checkpoint_shard_files", None)
    caplog.set_level(logging.INFO)
    assert load_vae("owner/name").identity == Autoencoder(module).identity
    assert ("owner/name has no plain weights: its variant fp16 is used" in caplog.text) == (
        layout == "variant"
    )


def test_a_hub_that_gives_no_answer_is_named_at_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # its client asks nobody then
    monkeypatch.setattr(AutoModel, "load_config", None)
    message = r"^the autoencoder 'owner/name' must be a path .* the hub does not answer \(.*\); download it "
    with pytest.raises(ValueError, match=message):
        load_vae("owner/name")


@pytest.mark.parametrize("name", ["nowhere", "./no/such/folder", "/no/such", "a b/c", "nowhere:fp16"])
def test_a_name_that_the_hub_cannot_have_is_refused_without_asking_it(name, monkeypatch):
    monkeypatch.setattr(AutoModel, "load_config", None)
    with pytest.raises(ValueError, match=r"a folder or a hub name OWNER/NAME of one, .* no such path"):
        load_vae(name)


def grey_module():
    return make("AutoencoderKL", in_channels=1, out_channels=1)


def wan_module():
    sizes = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False],
    }
    return diffusers.AutoencoderKLWan(**sizes)


class Drawing(AutoencoderRAE):
    def decode(self, latents):
        return type("DecoderOutput", (), {"sample": latents + torch.randn(latents.shape)})


class Sequence(AutoencoderRAE):
    def encode(self, pixels):
        return type("EncoderOutput", (), {"latents": pixels.flatten(2)})


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (grey_module, r"AutoencoderKL does not: .*expected input\[1, 3, 64, 64\] to have 1 channels"),
        (wan_module, r"AutoencoderKLWan does not: "),
        (Drawing, r"Drawing does not: it draws random numbers, so that a seed would not fix an image"),
        (Sequence, r"Sequence does not: an image of side 8 has latents \(1, 3, 64\)"),
    ],
)
def test_what_does_not_fit_is_one_sentence(module, message):
    state = torch.get_rng_state()
    made = module()
    with pytest.raises(ValueError, match=r"must encode images \(B, 3, H, W\) .* " + message) as raised:
        assert Autoencoder(made).factor
    assert "\n" not in str(raised.value)
    assert module is not Drawing or torch.get_rng_state().equal(state)


WRONG_CLASSES = (
    ("AutoencoderRAE", "AutoencoderRAE requires the package transformers"),
    ("UNet2DModel", "an autoencoder must be one of diffusers' classes, got UNet2DModel in .*other"),
    ("NoClass", "got NoClass in .*other"),
)


def test_folders_that_hold_something_else_are_named(tmp_path, monkeypatch):
    folder = tmp_path / "vae"
    make("AutoencoderTiny").save_pretrained(folder)
    (weights,) = folder.glob("*.safetensors")
    monkeypatch.setattr(autoencoders, "is_transformers_available", lambda: False)
    for name, message in WRONG_CLASSES:
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"_class_name": name}))
        with pytest.raises(ValueError, match=message):
            load_vae(str(tmp_path / "other"))
    weights.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=f"{tmp_path}.* must be readable|'{tmp_path}.*must be readable"):
        load_vae(str(folder))
    weights.unlink()
    with pytest.raises(ValueError, match=r"must be readable: .*no file named"):
        load_vae(str(folder))


def test_missing_weights_are_named_instead_of_drawn(tmp_path):
    from safetensors.torch import load_file, save_file

    make("AutoencoderTiny").save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["encoder.layers.0.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as encoder.layers.0.bias"):
        load_vae(str(tmp_path))


def test_a_sample_of_the_posterior_requires_one():
    with pytest.raises(ValueError, match=r"requires an autoencoder with a posterior, AutoencoderDC has none"):
        MirrorEncoder(Autoencoder(make("AutoencoderDC")), torch.device("cpu"), "fp32", "float32", seed=0)


def test_a_relative_folder_is_found_from_any_other_one(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make("AutoencoderTiny").save_pretrained("vae")
    space = LatentSpace(
        torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1), LatentOptions(vae="vae"), load_vae("vae")
    )
    space.save(tmp_path / "latents.safetensors")
    monkeypatch.chdir(tmp_path / "there")
    assert LatentSpace.load(tmp_path / "latents.safetensors").options.vae == str(tmp_path / "here" / "vae")
    shutil.move(tmp_path / "here" / "vae", tmp_path / "moved")
    with pytest.raises(
        ValueError, match=r"here/vae'.* no such path; where it is elsewhere now, give it by --vae"
    ):
        LatentSpace.load(tmp_path / "latents.safetensors")
    assert (
        LatentSpace.load(tmp_path / "latents.safetensors", str(tmp_path / "moved")).identity == space.identity
    )


@pytest.mark.parametrize("path", ["~/vae", "$HOME/vae"])
def test_home_and_variables_are_expanded(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make("AutoencoderTiny").save_pretrained(tmp_path / "vae")
    assert load_vae(path).factor == 4
    assert Path(autoencoders.lasting_name(path)) == tmp_path / "vae"


def test_colours_that_an_autoencoder_turns_grey_are_warned_of(caplog):
    coloured = torch.zeros(5, 3, 16, 16, dtype=torch.uint8)
    coloured[3:, 0] = 240
    grey = coloured[:, :1].expand(-1, 3, -1, -1)
    warn_of_lost_colour(load_vae("digits"), grey)
    assert not caplog.records
    warn_of_lost_colour(load_vae("digits"), coloured)
    (record,) = caplog.records
    assert "the autoencoder turns colours grey: channels of the images are" in record.message
    caplog.clear()

    class Copying(AutoencoderRAE):
        """Keeps the colours; its pixels are from −1 to 1."""

    warn_of_lost_colour(Autoencoder(Copying()), coloured)
    assert not caplog.records
