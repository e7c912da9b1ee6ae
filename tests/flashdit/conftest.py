import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Returns a checkpoint of three classes: the digits' VAE behind two small models far from zero."""
    from flashdit import FlashDiT
    from flashdit.data.autoencoders import load_vae
    from flashdit.data.latents import LatentOptions, LatentSpace
    from flashdit.sampling.options import SamplingOptions

    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000007"
    vae = load_vae("digits")
    channels = vae.channels
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


def random_inception_tensor(key: str, shape: torch.Size, draws: np.random.RandomState) -> torch.Tensor:
    x = draws.standard_normal(tuple(shape))
    if key.endswith("conv.weight"):
        x = x * np.sqrt(2 / np.prod(shape[1:]))
    elif key == "fc.weight":
        x = x * 4 / np.sqrt(2048)
    elif key.endswith("bn.weight"):
        x = 1 + 0.1 * x
    elif key.endswith("running_mean"):
        x = 0.05 * x
    elif key.endswith("running_var"):
        x = 1 + 0.2 * np.abs(x)
    else:
        x = 0.1 * x
    return torch.from_numpy(x.astype(np.float32))


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torch-fidelity's 472 tensors, random by the recipe of golden/eval/values.json (96 MB)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            """Loads nothing: the shapes are all that is wanted."""

    empty = tmp_path_factory.mktemp("inception") / "empty.pth"
    torch.save({}, empty)
    network = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(empty))
    shapes = {key: value.shape for key, value in network.state_dict().items() if "num_batches" not in key}
    draws = np.random.RandomState(2024)
    weights = {key: random_inception_tensor(key, shapes[key], draws) for key in sorted(shapes)}
    path = empty.with_name("random.pth")
    torch.save(weights, path)
    return path
