"""Pixels ⇄ VAE latents ⇄ normalised latents; the sole owner of mean, std and multiplier."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashdit.data.autoencoders import load_vae, vae_factor, vae_identity
from flashdit.shared.moments import ChannelMoments
from flashdit.shared.pictures import to_uint8
from flashdit.shared.registry import check_finite

DECODED_AT_ONCE = 32
"""Latents that the VAE decodes together: at 256×256 each holds about 200 MB in its last layers."""


@dataclass(kw_only=True)
class LatentOptions:
    """Options of the latent space."""

    vae: str | None = None
    """A data set that brings one, folder or hub name of an AutoencoderKL, or an LDM-layout checkpoint file
    such as LightningDiT's; None leaves pixels out of reach."""
    multiplier: float = 1.0
    """Factor on normalised latents."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_finite(self, "latents.")
        if self.multiplier == 0:
            raise ValueError("latents.multiplier must not be 0, which leaves nothing of a latent, got 0")


def channel_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and standard deviation of each channel: (N, C, H, W) → (1, C, 1, 1) twice.

    Raises:
        ValueError: If a channel is constant, which no standard deviation can normalise.
    """
    moments = ChannelMoments.of(latents)
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (moments.mean, moments.std()))
    return mean, std


class LatentSpace:
    """The model's latents: (z − mean) / std · multiplier of a VAE's latents z, per channel.

    Args:
        mean: (1, C, 1, 1).
        std: (1, C, 1, 1), positive.
        options: The VAE's name and the multiplier.
        vae: The VAE itself; None where only normalisation is needed.
        identity: The VAE's identity where `vae` is None.
    """

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        options: LatentOptions,
        vae: AutoencoderKL | None = None,
        identity: str | None = None,
    ):
        self.mean, self.std = mean, std
        self.options = options
        self.vae, self.stated_identity = vae, identity

    @cached_property
    def identity(self) -> str | None:
        """What tells the VAE apart: SHA-256 of its configuration and weights; None where it is unknown."""
        return self.stated_identity if self.vae is None else vae_identity(self.vae)

    @property
    def factor(self) -> int:
        """Pixels of a side that one latent stands for.

        Raises:
            ValueError: If the space has no VAE.
        """
        return vae_factor(self.need_vae())

    def to(self, device: torch.device | str) -> LatentSpace:
        """Moves the statistics and the VAE to a device and returns the space."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        if self.vae is not None:
            self.vae.to(device)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return self

    def normalise(self, latents: Tensor) -> Tensor:
        """Returns the model's latents of VAE latents (B, C, H, W)."""
        return (latents - self.mean) / self.std * self.options.multiplier

    def denormalise(self, latents: Tensor) -> Tensor:
        """Returns the VAE latents of the model's latents (B, C, H, W)."""
        return latents / self.options.multiplier * self.std + self.mean

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:
        """Returns the images of the model's latents: (B, C, H, W) → float32 (B, 3, H·f, W·f), about −1 to 1.

        Raises:
            ValueError: If the space has no VAE.
        """
        vae = self.need_vae()
        parts = self.denormalise(latents).to(vae.dtype).split(DECODED_AT_ONCE)
        return torch.cat([vae.decode(part).sample for part in parts]).float()  # type: ignore[union-attr]

    def decode(self, latents: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """Returns the images of the model's latents, rounded: (B, C, H, W) → uint8 (B, 3, H·f, W·f).

        Args:
            latents: Normalised.
            ids: The samples' numbers, for messages; None counts them from 0.

        Raises:
            ValueError: If the space has no VAE, or a pixel is not finite.
        """
        return to_uint8(self.pixels(latents), ids)

    def need_vae(self) -> AutoencoderKL:
        """Returns the VAE, or says how to give one."""
        if self.vae is None:
            raise ValueError(
                "pixels need the VAE that these latents come from: give its folder (--vae, latents.vae)"
            )
        return self.vae

    def save(self, path: Path) -> None:
        """Writes mean, std, the VAE's name and identity as one safetensors file."""
        about = json.dumps(asdict(self.options) | {"identity": self.identity})
        save_file({"mean": self.mean.cpu(), "std": self.std.cpu()}, path, metadata={"space": about})

    @classmethod
    def load(cls, path: Path, vae: str | None = None) -> LatentSpace:
        """Returns a saved space with its VAE.

        Args:
            path: A file of `save`.
            vae: Folder of the VAE, where it is no longer where it was in training.

        Raises:
            ValueError: If the VAE is not the one the latents were made with.
        """
        with safe_open(path, "pt") as file:
            mean, std = file.get_tensor("mean"), file.get_tensor("std")
            about = json.loads(file.metadata()["space"])
        identity = about.pop("identity")
        options = LatentOptions(**(about | {"vae": vae or about["vae"]}))
        if options.vae is None:
            return cls(mean, std, options, identity=identity)
        space = cls(mean, std, options, load_vae(options.vae))
        if identity and space.identity != identity:
            raise ValueError(
                f"the VAE must be the one of the training latents ({identity[:12]}), "
                f"got {space.options.vae} ({str(space.identity)[:12]})"
            )
        return space
