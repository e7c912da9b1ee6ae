import functools

import pytest
import torch
from golden_rule import golden_input, golden_tensor, load_json, load_npz
from torch import nn
from torchvision.models.detection.image_list import ImageList

from iwin_core import IwinFeatures, load_official_checkpoint
from iwin_tasks.detection import build_detector

NAMES = {"mask": "mask_rcnn", "cascade": "cascade_mask_rcnn"}
META = load_json("iwin_det_share_meta.json")


class Maps(nn.Module):
    """Four maps of strides 4 to 32, as small as they come."""

    def __init__(self):
        super().__init__()
        sides = (4, 2, 2, 2)
        self.stages = nn.ModuleList(
            nn.Conv2d(3 if i == 0 else 4, 4, side, side) for i, side in enumerate(sides)
        )

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def small_detector(kind, backbone=None, num_classes=3):
    options = {"fpn_channels": 8, "fc_channels": 16, "head_channels": 8}
    return build_detector(NAMES[kind], backbone or Maps(), num_classes, **options)


def golden_weights(kind):
    """Returns the authors' state dict by the golden rule, with the additions of detection."""
    state = {}
    for name, shape in META["shapes"][kind].items():
        value = torch.tensor(0) if name.endswith("num_batches_tracked") else golden_tensor(name, shape)
        if name.endswith("running_var"):
            value = 1 + value.abs()
        for text, gain in META["gains"][kind].items():
            value = value * torch.tensor(gain) if text in name else value
        state[name] = value
    return state


def golden_detector(kind):
    backbone = IwinFeatures(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
    model = build_detector(NAMES[kind], backbone, 5, fpn_channels=64, fc_channels=128, head_channels=64)
    meta = {"CLASSES": ("a", "b"), "epoch": 36, "config": "model = dict()"}
    container = {"meta": meta, "state_dict": golden_weights(kind), "optimizer": {"state": {}}, "amp": {}}
    return model, container


def golden_canvas(seed, size, padded):
    canvas = torch.zeros(1, 3, *padded)
    canvas[..., : size[0], : size[1]] = golden_input(seed, (1, 3, *size))
    return ImageList(canvas, [tuple(size)])


@pytest.fixture(scope="session")
def golden():
    return load_npz("iwin_det_share.npz")


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """Returns the golden detector of a kind in evaluation mode, out of a file as the authors save it."""

    @functools.cache
    def load(kind):
        model, container = golden_detector(kind)
        path = tmp_path_factory.mktemp("weights") / "epoch_36.pth"
        torch.save(container, path)
        load_official_checkpoint(model, path)
        return model.eval()

    return load
