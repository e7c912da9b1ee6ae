"""LDM-layout checkpoints against a plain LDM network written here, with random weights."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from flashdit.data.autoencoders import load_vae
from flashdit.data.ldm import diffusers_key, ldm_config

# LightningDiT's f16d32: width 128, multipliers (1, 1, 2, 2, 4), two blocks a level, attention at the last
SMALL = {"width": 32, "multipliers": (1, 2, 2), "blocks": 2, "z": 6, "attend": (2,)}


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, c_in, eps=1e-6), nn.GroupNorm(32, c_out, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(32, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # (b, c, n)
        weights = (torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5).softmax(-1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))


class Level(nn.Module):
    """`blocks` residual blocks with attention after each or none, and `resample` after them."""

    def __init__(self, c_in, c_out, blocks, attends, resample):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(c_out) for _ in range(blocks if attends else 0))
        if resample:
            stride, padding = (2, 0) if resample == "downsample" else (1, 1)
            conv = nn.ModuleDict({"conv": nn.Conv2d(c_out, c_out, 3, stride, padding)})
            setattr(self, resample, conv)

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        if hasattr(self, "downsample"):
            return self.downsample["conv"](F.pad(x, (0, 1, 0, 1)))
        if hasattr(self, "upsample"):
            return self.upsample["conv"](F.interpolate(x, scale_factor=2.0))
        return x


class Coder(nn.Module):
    """The encoder (`down`) or the decoder (`up`): the middle stands after or before the levels."""

    def __init__(self, name, c_in, c_out, width, multipliers, blocks, attend, **_):
        super().__init__()
        widths = [width * multiplier for multiplier in multipliers]
        last, levels = len(widths) - 1, []
        for i, c in enumerate(widths):
            before = widths[max(i - 1, 0)] if name == "down" else widths[min(i + 1, last)]
            resample = {"down": "downsample" if i < last else "", "up": "upsample" if i else ""}[name]
            levels.append(Level(before, c, blocks + (name == "up"), i in attend, resample))
        self.add_module(name, nn.ModuleList(levels))
        self.conv_in = nn.Conv2d(c_in, widths[0] if name == "down" else widths[-1], 3, padding=1)
        c = widths[-1]
        self.mid = nn.ModuleDict(
            {"block_1": ResBlock(c, c), "attn_1": Attention(c), "block_2": ResBlock(c, c)}
        )
        c = c if name == "down" else widths[0]
        self.norm_out, self.conv_out = nn.GroupNorm(32, c, eps=1e-6), nn.Conv2d(c, c_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        if hasattr(self, "down"):
            x = nn.Sequential(*self.down, *self.mid.values())(x)
        else:
            x = nn.Sequential(*self.mid.values(), *reversed(self.up))(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class LdmAutoencoder(nn.Module):
    def __init__(self, z, **sizes):
        super().__init__()
        self.encoder, self.decoder = Coder("down", 3, 2 * z, **sizes), Coder("up", z, 3, **sizes)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)

    def moments(self, pixels):
        return self.quant_conv(self.encoder(pixels)).chunk(2, 1)

    def decode(self, latents):
        return self.decoder(self.post_quant_conv(latents))


def reference(**changes):
    """Returns a network whose norms and biases are random too: nothing that is left out goes unseen."""
    torch.manual_seed(0)
    network = LdmAutoencoder(**(SMALL | changes)).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network


@pytest.mark.parametrize(
    "changes",
    [{}, {"attend": ()}, {"attend": (1, 2), "blocks": 1}, {"multipliers": (1, 1, 2, 2, 4), "attend": (4,)}],
    ids=["attention at the last level", "attention in the middle alone", "at two levels", "five levels"],
)
def test_a_converted_checkpoint_computes_what_ldm_computes(changes, tmp_path):
    theirs = reference(**changes)
    torch.save({"state_dict": theirs.state_dict(), "global_step": 3}, tmp_path / "vae.ckpt")
    ours = load_vae(str(tmp_path / "vae.ckpt")).module
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    ours, theirs = ours.double(), theirs.double()  # a wrong key is then far above rounding
    pixels = torch.rand(2, 3, 48, 32, dtype=torch.float64) * 2 - 1
    posterior = ours.encode(pixels).latent_dist
    mean, logvar = theirs.moments(pixels)
    torch.testing.assert_close(posterior.mean, mean)
    torch.testing.assert_close(posterior.logvar, logvar)
    torch.testing.assert_close(ours.decode(mean).sample, theirs.decode(mean))


def test_what_is_no_part_of_the_autoencoder_is_left_out(tmp_path):
    state = reference().state_dict()
    others = {
        "loss.discriminator.main.0.weight": torch.ones(2),
        "foundation_model.model.cls_token": torch.ones(3),
        "linear_proj.weight": torch.ones(4),
    }
    torch.save({"state_dict": state | others}, tmp_path / "vae.pt")
    save_file(state, tmp_path / "vae.safetensors")
    torch.save({"model": state}, tmp_path / "mar.pt")
    files = [load_vae(str(tmp_path / name)) for name in ("vae.pt", "vae.safetensors", "mar.pt")]
    assert len({vae.identity for vae in files}) == 1


def test_a_converted_vae_saved_by_diffusers_is_the_same_vae(tmp_path):
    save_file(reference().state_dict(), tmp_path / "vae.safetensors")
    converted = load_vae(str(tmp_path / "vae.safetensors"))
    converted.module.save_pretrained(tmp_path / "folder")
    again = load_vae(str(tmp_path / "folder"))
    images = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    assert again.identity == converted.identity
    assert again.encode(images).equal(converted.encode(images))


def test_sizes_of_f16d32_are_read_off_its_tensors():
    with torch.device("meta"):
        state = LdmAutoencoder(
            width=128, multipliers=(1, 1, 2, 2, 4), blocks=2, z=32, attend=(4,)
        ).state_dict()
    config = ldm_config(state)
    assert config["block_out_channels"] == [128, 128, 256, 256, 512]
    assert config["latent_channels"] == 32
    assert config["layers_per_block"] == 2
    assert config["down_block_types"] == ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"]
    assert config["up_block_types"] == ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4
    keys = {diffusers_key(key, 5) for key in state}
    assert len(keys) == len(state)
    assert diffusers_key("decoder.up.4.attn.2.proj_out.bias", 5) in keys
    assert "decoder.up_blocks.0.attentions.2.to_out.0.bias" in keys


def test_files_that_are_no_autoencoder_are_named(tmp_path):
    state = reference().state_dict()
    path = tmp_path / "vae.pt"
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.ones(2)}}, path)
    with pytest.raises(ValueError, match=r"LDM-layout autoencoder must hold .*vae.pt lacks encoder.down.0"):
        load_vae(str(path))
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"must be a readable torch .* file, .*vae.pt is not"):
        load_vae(str(path))
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"must be tensors by name, got a list of others in .*vae.pt"):
        load_vae(str(path))
    del state["decoder.mid.attn_1.q.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"(?s)vae.pt must be an AutoencoderKL in LDM's layout: .*mid_block"):
        load_vae(str(path))
