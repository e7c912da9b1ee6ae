"""A task on images of unequal sizes with BatchNorm: what a detector asks of the loop, at its smallest.

As a script, for torchrun, it trains one: `unequal_task.py RUN_DIR STEPS`; each process writes the average
that it would evaluate beside the run.
"""

import json
import logging
import os
import sys
from dataclasses import dataclass, field

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset

from flashdit.training.accelerator import start_run
from flashdit.training.ema import EmaOptions
from flashdit.training.loop import TrainingLoop
from flashdit.training.optim import OptimizerOptions
from flashdit.training.options import RunOptions, TrainingOptions
from flashdit.training.task import PeriodicAction, Task
from flashdit.training.tracking import TrackingOptions


@dataclass(kw_only=True)
class UnequalConfig:
    seed: int = 0
    run: RunOptions = field(default_factory=RunOptions)
    optimizer: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(lr=0.01))
    ema: EmaOptions = field(default_factory=lambda: EmaOptions(decay=0.5))
    training: TrainingOptions = field(default_factory=TrainingOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)


class Pictures(Dataset):
    """Position → an image (3, h, w) of its own size and up to two boxes."""

    def __getitem__(self, position):
        draws = torch.Generator().manual_seed(position)
        height, width, count = 3 + position % 3, 4 + position % 2, position % 3
        image = torch.rand(3, height, width, generator=draws) + position % 5
        return {"image": image, "boxes": torch.rand(count, 4, generator=draws), "place": (position, height)}


class Finder(nn.Module):
    """Images and targets → losses by name, as torchvision's detectors have it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 4)
        self.register_buffer("grid", torch.arange(4.0), persistent=False)

    def forward(self, images, targets):
        pixels = torch.cat([self.conv(image[None]).flatten(2) for image in images], dim=2)
        features = self.norm(pixels[..., None])[..., 0].split([i.shape[-2] * i.shape[-1] for i in images], 2)
        found = [self.head(f.mean(2)) + self.grid for f in features]
        errors = [(box - target["boxes"]).square().sum() for box, target in zip(found, targets, strict=True)]
        return {"loss_bbox": torch.stack(errors).mean(), "loss_size": torch.stack(found).square().mean()}


class Unequal(Task):
    """Trains a Finder."""

    def __init__(self, *actions):
        self.model = Finder()
        self.examples, self.images_per_epoch, self.actions = Pictures(), 12, actions
        self.seen = []

    @staticmethod
    def collate(items):
        images = [item["image"] for item in items]
        return {"images": images, "targets": [{"boxes": item["boxes"]} for item in items], "more": (items,)}

    def loss(self, network, batch):
        self.seen.append(batch)
        losses = network(batch["images"], batch["targets"])
        return sum(losses.values()), losses

    def blocks(self):
        return [self.model.conv]

    def write_models(self, folder, weights, average):
        for name, tensors in (("model", weights), ("ema", average)):
            (folder / name).mkdir(parents=True)
            save_file(tensors, folder / name / "finder.safetensors")


def make_unequal(run_dir, *actions, ema=None, optimizer=None, **training):
    options = {"steps": 6, "global_batch_size": 4, "save_every": 100, "log_every": 1} | training
    config = UnequalConfig(run=RunOptions(dir=str(run_dir)), training=TrainingOptions(**options))
    config.ema, config.optimizer = ema or config.ema, optimizer or config.optimizer
    accelerator = start_run(config, Unequal)
    return TrainingLoop(config, Unequal(*actions), accelerator)


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(message)s")
    folder, steps = sys.argv[1], int(sys.argv[2])

    def write_average(step, average):
        with open(f"{folder}_average_{os.environ['RANK']}.json", "w") as file:
            json.dump({name: value.tolist() for name, value in average.items()}, file)
        return {}

    make_unequal(folder, PeriodicAction(every=steps, run=write_average), steps=steps).fit()
