"""Pixels ⇄ latents ⇄ normalised latents; the sole owner of mean, std and multiplier."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashdit.data.autoencoders import Autoencoder, lasting_name, load_vae
from flashdit.data.pixels import Pixels
from flashdit.shared.moments import ChannelMoments
from flashdit.shared.pictures import to_uint8
from flashdit.shared.registry import check_finite, unknown
from flashdit.shared.runs import DamagedCheckpoint

SPACES = ("vae", "pixels")
DECODED_AT_ONCE = 32
"""Latents that the VAE decodes together: at 256×256 each holds about 200 MB in its last layers."""


@dataclass(kw_only=True)
class LatentOptions:
    """Options of the latent space.

    Raises:
        ValueError: If the space is unknown, or pixels come with an autoencoder.
    """

    space: str = field(
        default="vae", repr=False
    )  # the text of older options identifies features kept on disk
    """What is trained on: `vae`, an autoencoder's latents, or `pixels`, the images themselves."""
    vae: str | None = None
    """A data set that brings one, a folder or hub name of an autoencoder of diffusers or of a pipeline, which
    may end in `:VARIANT`, or an LDM-layout checkpoint file such as LightningDiT's; None leaves pixels out of
    reach."""
    multiplier: float = 1.0
    """Factor on normalised latents."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_finite(self, "latents.")
        if self.multiplier == 0:
            raise ValueError("latents.multiplier must not be 0, which leaves nothing of a latent, got 0")
        if self.space not in SPACES:
            raise unknown("latents.space", self.space, SPACES)
        if self.space == "pixels" and self.vae is not None:
            raise ValueError(f"latents.space=pixels requires latents.vae=null and no --vae, got {self.vae}")

    def autoencoder(self) -> Autoencoder | Pixels | None:
        """Returns what turns images into latents; None where no autoencoder is named."""
        if self.space == "pixels":
            return Pixels()
        return None if self.vae is None else load_vae(self.vae)


def channel_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and standard deviation of each channel: (N, C, H, W) → (1, C, 1, 1) twice.

    Raises:
        ValueError: If a channel is constant, which no standard deviation can normalise.
    """
    moments = ChannelMoments.of(latents)
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (moments.mean, moments.std()))
    return mean, std


class LatentSpace:
    """The model's latents: (z − mean) / std · multiplier of an autoencoder's latents z, per channel.

    In the space of pixels z is the images from −1 to 1, mean is 0 and std 1.

    Args:
        mean: (1, C, 1, 1).
        std: (1, C, 1, 1), positive.
        options: The space, the autoencoder's name and the multiplier.
        vae: The autoencoder itself; None where only normalisation is needed.
        identity: The autoencoder's identity where `vae` is None.
    """

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        options: LatentOptions,
        vae: Autoencoder | Pixels | None = None,
        identity: str | None = None,
    ):
        self.mean, self.std = mean, std
        self.options = options
        self.vae, self.stated_identity = vae, identity

    @classmethod
    def of_pixels(cls, options: LatentOptions) -> LatentSpace:
        """Returns the space of pixels, which needs no data: mean 0 and std 1."""
        return cls(torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1), options, Pixels())

    @cached_property
    def identity(self) -> str | None:
        """What tells the autoencoder apart: SHA-256 of its configuration and weights; None if unknown."""
        return self.stated_identity if self.vae is None else self.vae.identity

    @property
    def factor(self) -> int:
        """Pixels of a side that one latent stands for.

        Raises:
            ValueError: If the space has no autoencoder.
        """
        return self.need_vae().factor

    def to(self, device: torch.device | str) -> LatentSpace:
        """Moves the statistics and the autoencoder to a device and returns the space."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        if self.vae is not None:
            self.vae.to(device)
        return self

    def normalise(self, latents: Tensor) -> Tensor:
        """Returns the model's latents of latents (B, C, H, W); uint8 images are encoded first."""
        if latents.dtype == torch.uint8:
            latents = self.need_vae().encode(latents)
        return (latents - self.mean) / self.std * self.options.multiplier

    def denormalise(self, latents: Tensor) -> Tensor:
        """Returns the autoencoder's latents of the model's latents (B, C, H, W)."""
        return latents / self.options.multiplier * self.std + self.mean

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:
        """Returns the images of the model's latents: (B, C, H, W) → float32 (B, 3, H·f, W·f), about −1 to 1.

        Raises:
            ValueError: If the space has no autoencoder.
        """
        vae = self.need_vae()
        return torch.cat([vae.decode(part) for part in self.denormalise(latents).split(DECODED_AT_ONCE)])

    def decode(self, latents: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """Returns the images of the model's latents, rounded: (B, C, H, W) → uint8 (B, 3, H·f, W·f).

        Args:
            latents: Normalised.
            ids: The samples' numbers, for messages; None counts them from 0.

        Raises:
            ValueError: If the space has no VAE, or a pixel is not finite.
        """
        return to_uint8(self.pixels(latents), ids)

    def need_vae(self) -> Autoencoder | Pixels:
        """Returns the autoencoder, or says how to give one."""
        if self.vae is None:
            raise ValueError(
                "pixels need the VAE that these latents come from: give its folder (--vae, latents.vae)"
            )
        return self.vae

    def save(self, path: Path) -> None:
        """Writes mean, std, the autoencoder's name and identity as one safetensors file.

        A relative path is stored as an absolute one, which is found from any folder.
        """
        options = replace(self.options, vae=lasting_name(self.options.vae))
        about = json.dumps(asdict(options) | {"identity": self.identity})
        save_file({"mean": self.mean.cpu(), "std": self.std.cpu()}, path, metadata={"space": about})

    @classmethod
    def read(cls, path: Path) -> LatentSpace:
        """Returns a saved space without its autoencoder.

        Raises:
            DamagedCheckpoint: If the file cannot be read.
        """
        try:
            with safe_open(path, "pt") as file:
                mean, std = file.get_tensor("mean"), file.get_tensor("std")
                about = json.loads(file.metadata()["space"])
            identity = about.pop("identity")
            return cls(mean, std, LatentOptions(**about), identity=identity)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(f"{path} is damaged: {error}") from error

    @classmethod
    def load(cls, path: Path, vae: str | None = None) -> LatentSpace:
        """Returns a saved space with its autoencoder.

        Args:
            path: A file of `save`.
            vae: Name of the autoencoder, where it is no longer where it was in training.

        Raises:
            ValueError: If the autoencoder is missing, or not the one the latents were made with.
        """
        saved = cls.read(path)
        options = replace(saved.options, vae=vae or saved.options.vae)
        try:
            space = cls(saved.mean, saved.std, options, options.autoencoder(), saved.identity)
        except ValueError as error:
            if vae is not None:
                raise
            raise ValueError(f"{error}; where it is elsewhere now, give it by --vae") from error
        space.check_made_by(saved, "the training latents")
        return space

    def check_made_by(self, begun: LatentSpace, whose: str) -> None:
        """Raises ValueError unless the autoencoder is the one of another space, where both are known.

        Args:
            begun: The space whose autoencoder it must be.
            whose: What that one made or makes, for the message.
        """
        identity = begun.identity
        if identity and self.vae is not None and self.identity != identity:
            was = f"{begun.options.vae}, " if begun.options.vae else ""
            raise ValueError(
                f"the VAE must be the one of {whose} ({was}{identity[:12]}), "
                f"got {self.options.vae} ({str(self.identity)[:12]})"
            )
