"""Averages of weights and buffers, float32: an exponential one, and power-function ones of given widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flashdit.shared.registry import check_finite
from flashdit.training.buffers import saved_buffers
from flashdit.training.profiles import Profile, gamma_of_width, kept_share
from flashdit.training.state import copy_whole, whole


@dataclass(kw_only=True)
class EmaOptions:
    """Options of the averages.

    Raises:
        ValueError: If a decay, a width or an interval is invalid.
    """

    decay: float = 0.9999
    """Share of the old average that an update keeps."""
    warmup: bool = True
    """Whether early updates keep only (1 + n) / (10 + n), so that the initial weights are soon forgotten."""
    power_widths: list[float] = field(default_factory=list)
    """Relative widths of power-function averages to track as well, such as 0.05 and 0.10; from their
    snapshots `flashdit posthoc` makes averages of any width. An empty list tracks nothing."""
    snapshot_every: int = 5_000
    """Steps between those snapshots, which are all kept; 16 in a run give widths of 0.03 to 0.20."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_finite(self, "ema.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay must be at least 0 and below 1, got {self.decay}")
        for width in self.power_widths:
            gamma_of_width(width)
        if len({f"{width:.3f}" for width in self.power_widths}) < len(self.power_widths):
            rule = "ema.power_widths must differ in their first three decimals"
            raise ValueError(f"{rule}, got {self.power_widths}")
        if self.snapshot_every < 1:
            raise ValueError(f"ema.snapshot_every must be at least 1, got {self.snapshot_every}")


class Ema:
    """The averaged parameters and saved buffers by name, float32; the model's own are never touched.

    Buffers with fractions, such as BatchNorm's running statistics, are averaged as the weights are, so that
    both are of the same steps; others, such as its counter, are the latest. timm's ModelEmaV3 does so by
    default, torch's AveragedModel with `use_buffers=True`.

    Args:
        model: Whose parameters and buffers are averaged; every average starts as their copy.
        options: Decay and warm-up of the exponential average, and the widths of the others.

    Attributes:
        updates: How many updates they have seen.
        average: The exponential average by name.
        tracks: Width → the power-function average by name.
    """

    def __init__(self, model: nn.Module, options: EmaOptions):
        self.options = options
        self.updates = 0
        self.buffers = list(saved_buffers(model))
        self.average = _copy(model)
        self.tracks = {width: _copy(model) for width in options.power_widths}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves every average to the model's parameters; power-function ones take the first as they are."""
        self.updates += 1
        averages = [(self._kept(), self.average)]
        averages += [(kept_share(gamma_of_width(w), self.updates), track) for w, track in self.tracks.items()]
        buffers = dict(model.named_buffers())
        fractions = {name: buffers[name] for name in self.buffers if buffers[name].is_floating_point()}
        counters = [name for name in self.buffers if name not in fractions]
        # Apart, since FSDP has parameters in shards and buffers whole.
        groups = [group for group in (dict(model.named_parameters()), fractions) if group]
        for kept, average in averages:
            for group in groups:
                current = [value.detach().float() for value in group.values()]
                torch._foreach_lerp_([average[name] for name in group], current, 1 - kept)  # pyright: ignore[reportPrivateImportUsage]
            for name in counters:
                average[name].copy_(buffers[name])

    def _kept(self) -> float:
        """Returns what the latest update keeps of the exponential average."""
        warm = (1 + self.updates) / (10 + self.updates) if self.options.warmup else 1.0
        return min(self.options.decay, warm)

    def state(self) -> dict[str, Tensor]:
        """Returns the whole exponential average by name, on the CPU; all processes call it."""
        return _whole(self.average)

    def tracks_state(self) -> dict[Profile, dict[str, Tensor]]:
        """Returns the whole power-function averages by profile, on the CPU, none before the first update.

        All processes call it.
        """
        tracks = self.tracks if self.updates else {}
        return {Profile(width=w, updates=self.updates): _whole(track) for w, track in tracks.items()}

    @torch.no_grad()
    def load(
        self,
        average: Mapping[str, Tensor],
        updates: int,
        tracks: Mapping[Profile, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Continues from saved averages.

        Args:
            average: As `state` returned it.
            updates: How many updates the run has made.
            tracks: As `tracks_state` returned them.

        Raises:
            ValueError: If one of the widths has not been tracked from the beginning.
        """
        saved = dict(tracks or {})
        _load(self.average, average)
        for width, track in self.tracks.items() if updates else ():
            profile = Profile(width=width, updates=updates)
            if profile not in saved:
                known = [profile.width for profile in saved]
                rule = "ema.power_widths must be tracked from a run's first step"
                raise ValueError(f"{rule}, got {width} for a run that tracks {known}")
            _load(track, saved[profile])
        self.updates = updates


def _copy(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of a model's parameters and saved buffers by name, float32 where they have fractions."""
    tensors = dict(model.named_parameters()) | saved_buffers(model)
    return {
        name: (value.float() if value.is_floating_point() else value).detach().clone()
        for name, value in tensors.items()
    }


def _whole(average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns an average's whole tensors on the CPU."""
    return {name: whole(value) for name, value in average.items()}


def _load(average: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copies a saved average into one that may lie in shards."""
    for name, value in average.items():
        copy_whole(value, saved[name])
