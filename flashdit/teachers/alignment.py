"""Tokens of a model beside the features of a frozen extractor: representation alignment (REPA)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flashdit.data.latents import LatentSpace
from flashdit.evaluation.features.extractor import Extractor
from flashdit.evaluation.features.extractors import build_extractor
from flashdit.models.dit import FlashDiT
from flashdit.shared.registry import check_finite, unknown
from flashdit.shared.seeds import generator_for
from flashdit.shared.weights import read_tensors

EXTRACTOR_KEY = "alignment.extractor"
MAP, POOL = "map", "pool"
PROJECTOR = "projector.safetensors"
"""In a checkpoint."""


@dataclass(kw_only=True)
class AlignmentOptions:
    """Options of aligning tokens with an extractor's features; the defaults are REPA's for XL."""

    extractor: str | None = None
    """Whose features of the clean images tokens are aligned with, as `flashdit eval --extractor` has it; None
    leaves it out."""
    extractor_weights: str | None = None
    """The extractor's weights file, where it takes one."""
    features: str = MAP
    """`map`: each token with the extractor's last map at its place; `pool`: the mean token with the pooled
    features."""
    block: int = 8
    """After which block, counted from 1."""
    width: int = 2048
    """Hidden width of the projector."""
    weight: float = 0.5
    """Of 1 − cosine, beside the flow-matching loss."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_finite(self, "alignment.")
        if self.features not in (MAP, POOL):
            raise unknown("alignment.features", self.features, (MAP, POOL))
        for name in ("block", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"alignment.{name} must be at least 1, got {getattr(self, name)}")
        if self.weight < 0:
            raise ValueError(f"alignment.weight must not be negative, got {self.weight}")


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Returns the mean over tokens of 1 − cosine over features: (b, n, d) twice → (b,), in float32."""
    return (1 - F.cosine_similarity(projected.float(), features.float(), dim=-1)).mean(1)


def make_projector(hidden_size: int, width: int, features: int) -> nn.Sequential:
    """Returns a new MLP of three layers, (…, hidden_size) → (…, features), as REPA initialises it."""
    layers = [nn.Linear(*sizes) for sizes in ((hidden_size, width), (width, width), (width, features))]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])


class AlignedModel(nn.Module):
    """x (B, C, H, W), t (B,), y (B,) → v, and features (B, n, d) that its tokens are mapped to.

    Args:
        model: Whose tokens.
        projector: (…, hidden_size) → (…, d).
        options: After which block, and whether all tokens are mapped or their mean, n = 1.
    """

    def __init__(self, model: FlashDiT, projector: nn.Module, options: AlignmentOptions):
        super().__init__()
        self.model, self.projector = model, projector
        self.block, self.pools = options.block, options.features == POOL

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
        """Returns v and the projected tokens; arguments are FlashDiT's."""
        v_t, tokens = self.model(x, t, y, drop=drop, tokens_after=self.block)
        tokens = rearrange(tokens, "b h w c -> b (h w) c")
        return v_t, self.projector(tokens.mean(1, keepdim=True) if self.pools else tokens)


class Alignment:
    """A frozen extractor of clean images, and the model with a projector of its tokens.

    The projector is trained as the model is, and is in no average, no model folder and no export.

    Args:
        extractor: Frozen, in evaluation mode.
        network: The model with the projector.
        space: The run's latent space.
        reads_images: Whether batches hold images, which otherwise are decoded from latents.
        autocast: Gives the context that the model computes in.

    Source: REPA (Yu et al. 2024, arXiv 2410.06940), eq. (8), whose negative cosine is 1 less.
    """

    def __init__(
        self,
        extractor: Extractor,
        network: AlignedModel,
        space: LatentSpace,
        reads_images: bool,
        autocast: Callable[..., AbstractContextManager[Any]],
    ):
        self.extractor, self.network, self.space = extractor, network, space
        self.reads_images, self.autocast = reads_images, autocast

    @cached_property
    def identity(self) -> str:
        """The extractor's class and the SHA-256 of its weights."""
        return self.extractor.fingerprint

    @torch.no_grad()
    def features(self, batch: Mapping[str, Tensor], x_1: Tensor) -> Tensor:
        """Returns the features (B, n, d) of a batch's clean images.

        Args:
            batch: With the images, uint8 (B, 3, H, W), as `image` or, where pixels are trained on, as
                `latent`.
            x_1: The batch's normalised latents (B, C, H, W).
        """
        images = batch.get("image", batch["latent"]) if self.reads_images else self.space.decode(x_1)
        with self.autocast():
            return features_of(self.extractor, images, self.network.pools, self.network.model.native_grid)

    def projector_flops(self) -> int:
        """Returns the FLOPs of one image's tokens through the projector: twice its multiply-adds."""
        tokens = 1 if self.network.pools else math.prod(self.network.model.native_grid)
        return 2 * tokens * sum(p.numel() for p in self.network.projector.parameters() if p.ndim == 2)

    def frozen_flops(self) -> int:
        """Returns the FLOPs of one image's features, and of decoding it first where that is done.

        They are twice the multiply-adds, of matrix products and convolutions alone.
        """
        channels, side = (self.network.model.config[name] for name in ("in_channels", "sample_size"))
        latent = torch.zeros(1, channels, side, side, device=self.space.mean.device)
        batch = {"latent": latent}
        if self.reads_images:
            width = side * self.space.factor
            batch["image"] = torch.zeros(1, 3, width, width, dtype=torch.uint8, device=latent.device)
        with FlopCounterMode(display=False) as counter:
            self.features(batch, latent)
        return counter.get_total_flops()

    def save(self, folder: Path) -> None:
        """Writes the projector into a checkpoint's folder."""
        state = {
            name: value.cpu().contiguous() for name, value in self.network.projector.state_dict().items()
        }
        save_file(state, folder / PROJECTOR)

    def load(self, folder: Path) -> None:
        """Loads the projector of a checkpoint's folder."""
        self.network.projector.load_state_dict(read_tensors(folder / PROJECTOR))


def features_of(extractor: Extractor, images: Tensor, pools: bool, grid: tuple[int, int]) -> Tensor:
    """Returns what tokens of a grid are aligned with, (b, n, d): n is 1 for pooled features, else h·w.

    A map of another size is brought to the grid bilinearly, antialiased where that is smaller.
    """
    # Differs from REPA, which resizes the images until the two grids are one.
    if pools:
        pooled = extractor(images)["pool"]
        return pooled[:, None]
    found = rearrange(_map_of(extractor, images), "b h w d -> b d h w").float()
    if tuple(found.shape[2:]) != tuple(grid):
        found = F.interpolate(found, size=grid, mode="bilinear", align_corners=False, antialias=True)
    return rearrange(found, "b d h w -> b (h w) d")


def _map_of(extractor: Extractor, images: Tensor) -> Tensor:
    """Returns an extractor's map; raises ValueError if it has none, or not that of an extractor."""
    found = extractor.feature_map(images)
    if found is None:
        rule = "alignment.features=map requires an extractor with a feature map"
        raise ValueError(f"{rule}, {extractor.name} has none: take alignment.features=pool")
    if found.ndim != 4 or len(found) != len(images):
        rule = f"extractor '{extractor.name}' must map uint8 (n, 3, height, width) to a map (n, h, w, d)"
        raise ValueError(f"{rule}, got {tuple(found.shape)} for n = {len(images)}")
    return found


def frozen_extractor(options: AlignmentOptions) -> tuple[Extractor, int]:
    """Returns the frozen extractor on the CPU, and how wide the features are that tokens are aligned with.

    Raises:
        ValueError: If there is none of this name, its weights are missing, or it has no such features.
    """
    assert options.extractor is not None
    with torch.random.fork_rng(devices=[]):  # the weights that it is made with are drawn
        try:
            extractor = build_extractor(options.extractor, options.extractor_weights)
        except ValueError as error:
            raise ValueError(f"{EXTRACTOR_KEY}: {error}") from error
        extractor.eval().requires_grad_(False)
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        with torch.no_grad():
            width = features_of(extractor, images, options.features == POOL, (1, 1)).shape[-1]
    return extractor, width


def open_alignment(
    options: AlignmentOptions,
    model: FlashDiT,
    space: LatentSpace,
    reads_images: bool,
    device: torch.device,
    autocast: Callable[..., AbstractContextManager[Any]],
    seed: int,
) -> Alignment:
    """Returns the alignment of a run, its extractor on the device and its projector new.

    Args:
        options: Which extractor, and what of it.
        model: The model that learns.
        space: Its latent space.
        reads_images: Whether the run reads images, which otherwise are decoded from its latents.
        device: Where all compute.
        autocast: Gives the context that the model computes in.
        seed: Of the projector's weights.

    Raises:
        ValueError: If the extractor cannot be had, or there is nothing to decode with.
    """
    if not reads_images and space.vae is None:
        rule = f"{EXTRACTOR_KEY} sees images, and latents in a folder must be decoded for it"
        raise ValueError(f"{rule}: give latents.vae, their autoencoder, got null")
    extractor, width = frozen_extractor(options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(seed, "projector", 0).initial_seed())
        projector = make_projector(model.config["hidden_size"], options.width, width)
    extractor.to(device)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return Alignment(extractor, AlignedModel(model, projector, options), space, reads_images, autocast)


def alignment_parameters(options: AlignmentOptions, hidden_size: int) -> tuple[int, int]:
    """Returns the parameters of the projector and of the extractor; 0 and 0 without one."""
    if options.extractor is None:
        return 0, 0
    extractor, width = frozen_extractor(options)
    with torch.device("meta"):
        projector = make_projector(hidden_size, options.width, width)
    return count_of(projector), count_of(extractor)


def count_of(module: nn.Module) -> int:
    """Returns the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
