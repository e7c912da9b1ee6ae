"""The flow-matching loss on held-out images: the same images, noise and times for every model."""

from __future__ import annotations

import torch
from torch import Tensor

from flashdit.data.latents import LatentSpace
from flashdit.flow.examples import Examples, Latents
from flashdit.flow.loss import LossOptions, flow_loss
from flashdit.flow.path import interpolate, velocity
from flashdit.flow.times import TIMES
from flashdit.models.dit import FlashDiT

LOSS_SEED = 0
"""Of noise and times, whatever the run's own seed is: two runs are asked about the same examples."""


@torch.no_grad()
def held_out_loss(
    model: FlashDiT,
    space: LatentSpace,
    data: Latents,
    *,
    times: dict[str, object] | str,
    options: LossOptions,
    num_images: int,
    batch_size: int = 100,
) -> dict[str, Tensor]:
    """Returns the loss of examples and its terms by name, (num_images,) each; no label is dropped.

    An example is an image of the data, noise and a time, all by its number alone. So losses of two models
    differ by the models, if their latents and the distribution of times are the same.

    Args:
        model: In evaluation mode, on the device where it is computed.
        space: Normalises the data's latents; on that device.
        data: Latents and labels, from which the images are drawn epoch by epoch.
        times: Distribution of the times, as `flow.times` has it.
        options: Of the loss.
        num_images: How many examples.
        batch_size: Examples at a time; changes no number beyond rounding.

    Raises:
        ValueError: If there are no examples or no batch, or the data cannot be read.
    """
    for name, value in {"num_images": num_images, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    examples = Examples(data, TIMES.build(times), LOSS_SEED, class_dropout_prob=0.0)
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {}
    for positions in torch.arange(num_images).split(batch_size):
        batch = {name: value.to(device) for name, value in examples.__getitems__(positions.tolist()).items()}
        x_1, x_0, t = space.normalise(batch["latent"]), batch["noise"], batch["time"]
        v_t = model(interpolate(x_0, x_1, t), t, batch["label"])
        loss, terms = flow_loss(v_t, velocity(x_0, x_1), options)
        for name, value in {"loss": loss, **terms}.items():
            found.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values) for name, values in found.items()}
