import json
from dataclasses import asdict

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Returns a checkpoint of three classes: the digits' VAE behind two small models far from zero."""
    from flashdit import FlashDiT
    from flashdit.generate import SamplingOptions
    from flashdit.latents import LatentOptions, LatentSpace, load_vae

    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000007"
    vae = load_vae("digits")
    channels = vae.config["latent_channels"]
    mean, std = torch.full((1, channels, 1, 1), 0.1), torch.full((1, channels, 1, 1), 1.3)
    options = {"in_channels": channels, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_classes": 3}
    for seed, name in enumerate(("ema", "model")):
        torch.manual_seed(seed)
        model = FlashDiT.from_size("nano", **options)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.15)
        model.save_pretrained(folder / name)
    LatentSpace(mean, std, LatentOptions(vae="digits", multiplier=0.9), vae).save(
        folder / "latents.safetensors"
    )
    state = {
        "format": 1,
        "step": 7,
        "class_names": ["cat", "golden retriever", "hen"],
        "data_name": "images",
        "sampling": asdict(SamplingOptions(steps=3, cfg_scale=1.5)),
    }
    (folder / "state.json").write_text(json.dumps(state))
    return folder
