"""Do a model's sizes and the data fit together?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from flashdit.data.autoencoders import Autoencoder
from flashdit.data.pixels import Pixels


class LabelledLatents(Protocol):
    """What a model must fit of its data."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent, (C, H, W)."""
        ...

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        ...

    @property
    def class_names(self) -> list[str] | None:
        """One per class; None where they are unknown."""
        ...


class DataFacts(NamedTuple):
    """What a model must fit of its data, known without encoding them."""

    shape: tuple[int, ...]
    """Of one latent, (C, H, W)."""
    labels: Tensor
    """(N,) int64."""
    class_names: list[str] | None
    """One per class; None where they are unknown."""
    num_classes: int
    vae: Autoencoder | Pixels | None
    """The autoencoder; None where none is named."""

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments of a model that fits."""
        channels, side, _ = self.shape
        return {"in_channels": channels, "sample_size": side, "num_classes": self.num_classes}


def check_fit(arguments: Mapping[str, Any], data: LabelledLatents, vae: Autoencoder | Pixels | None) -> None:
    """Raises ValueError unless a model takes these latents and labels.

    Args:
        arguments: All of FlashDiT's.
        data: What it is trained on.
        vae: The autoencoder, for the message; None where none is named.
    """
    labels, num_classes, shape = data.labels, arguments["num_classes"], tuple(data.shape)
    channels, side = arguments["in_channels"], arguments["sample_size"]
    if shape != (channels, side, side):
        got = " × ".join(map(str, shape))
        if vae is not None:
            got += f" (images of data.image_size={shape[1] * vae.factor}, factor {vae.factor})"
        raise ValueError(
            f"the data's latents must be what the model takes, model.in_channels={channels} and "
            f"model.sample_size={side}, got {got}; null takes them from the data"
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if not num_classes:  # every label is null
        return
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"labels must be from 0 to below model.num_classes={num_classes}, got {lowest} to {highest}"
        )
    if data.class_names and len(data.class_names) != num_classes:
        count = len(data.class_names)
        raise ValueError(
            f"model.num_classes must be the number of the data's classes, {count}, got {num_classes}"
        )
