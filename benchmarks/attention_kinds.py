"""What `benchmarks.attention_study` compares: attention kinds and token counts, and what all share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from flashdit.config import RunConfig, load
from flashdit.models.attention import ATTENTIONS, AttentionShape
from flashdit.shared.files import write_atomically
from iwin_core.attention import DepthwiseConv

BASELINE, PRECISION = "global", "bf16"
RATES = (3e-3, 6e-3, 1.2e-2)
"""Learning rates that every kind is tried with; then twice or half the best one, while that is at an end."""


@dataclass(kw_only=True)
class ConvolutionOptions:
    """Options of the convolution without attention."""

    kernel: int = 3
    """Side of the depthwise kernel, odd."""


def make_convolution(options: ConvolutionOptions, shape: AttentionShape) -> nn.Module:
    """Returns what Iwin attention is without attention: the depthwise convolution alone."""
    return DepthwiseConv(shape.dim, (options.kernel, options.kernel))


def register_convolution() -> None:
    """Makes the convolution alone an attention kind of this process; a control is none of the package's."""
    if CONVOLUTION["name"] not in ATTENTIONS.names():
        ATTENTIONS.register(CONVOLUTION["name"], ConvolutionOptions)(make_convolution)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An attention kind, or a control."""

    label: str
    model: Callable[[int], dict[str, Any]]
    """Side of the token grid → arguments of FlashDiT."""


def _kind(label: str, *attention: dict[str, Any], **model: Any) -> Kind:
    """Returns the kind of one attention, or of several in turn; a window of 0 is the whole grid."""

    def arguments(side: int) -> dict[str, Any]:
        specs = [spec | ({"window": side} if spec.get("window") == 0 else {}) for spec in attention]
        return {"attention": specs[0] if len(specs) == 1 else specs, "position_embedding": "none", **model}

    return Kind(label=label, model=arguments)


IMAGE_SIZE = 64
IWIN = {"name": "iwin", "window": 4, "kernel": 3}
IWIN_8 = IWIN | {"window": 8}
WINDOW = {"name": "window", "window": 4, "kernel": 3}
GLOBAL = {"name": "global", "rope": True}
WHOLE = IWIN | {"window": 0}
CONVOLUTION = {"name": "convolution", "kernel": 3}
SINCOS: dict[str, Any] = {"position_embedding": "sincos"}
# SwiGLU of 256 channels in place of 170: 86 units weigh 16,684, the products of an attention 16,640.
WIDER: dict[str, Any] = {"mlp_ratio": 6.0}

KINDS = {
    BASELINE: _kind("LightningDiT: global, RoPE, sin-cos", GLOBAL, **SINCOS),
    "iwin4": _kind("iwin 4 (the paper's)", IWIN),
    "iwin4_sincos": _kind("iwin 4, sin-cos", IWIN, **SINCOS),
    "iwin8_sincos": _kind("iwin 8, sin-cos", IWIN_8, **SINCOS),
    "turns_sincos": _kind("iwin 4 and windows 4 in turn, sin-cos", IWIN, WINDOW, **SINCOS),
    "convolution_sincos": _kind("convolution alone, sin-cos", CONVOLUTION, **WIDER, **SINCOS),
    "windows_sincos": _kind("windows 4, sin-cos", WINDOW, **SINCOS),
    "global_convolution_sincos": _kind("global + convolution, sin-cos", WHOLE, **SINCOS),
    "three_to_one_sincos": _kind("3 iwin 4 to 1 global, sin-cos", IWIN, IWIN, IWIN, GLOBAL, **SINCOS),
    "iwin8": _kind("iwin 8", IWIN_8),
    "iwin4_rope": _kind("iwin 4, RoPE", IWIN | {"rope": True}),
    "iwin4_registers": _kind("iwin 4, 4 registers", IWIN, registers=4),
    "turns": _kind("iwin 4 and windows 4 in turn", IWIN, WINDOW),
    "three_to_one": _kind("3 iwin 4 to 1 global (RoPE)", IWIN, IWIN, IWIN, GLOBAL),
    "global_convolution": _kind("global + convolution", WHOLE),
    "convolution": _kind("convolution alone", CONVOLUTION, **WIDER),
    "windows": _kind("windows 4", WINDOW),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """One token count, and how long a run of it is."""

    side: int
    """Tokens of a side."""
    batch: int
    """Images of a step."""
    steps: int
    """Budget in steps. The budget in time is what LightningDiT takes for as many."""
    kinds: tuple[str, ...]
    rounds: int
    """Of the timing."""

    @property
    def patch_size(self) -> int:
        """Pixels of a patch's side."""
        return IMAGE_SIZE // self.side


SIZES = {
    16: Size(side=16, batch=16, steps=1536, kinds=tuple(KINDS), rounds=9),
    32: Size(
        side=32,
        batch=16,
        steps=512,
        kinds=(
            BASELINE,
            "iwin4",
            "iwin4_sincos",
            "iwin8",
            "iwin8_sincos",
            "turns_sincos",
            "three_to_one_sincos",
            "convolution_sincos",
            "windows_sincos",
            "global_convolution_sincos",
        ),
        rounds=5,
    ),
    64: Size(side=64, batch=4, steps=384, kinds=(BASELINE, "iwin8_sincos"), rounds=3),
}
SEEDS = (0, 1)
SAVES = 12
"""Checkpoints over the budget of steps, which are what a run goes on from when it was killed."""
RECIPE: dict[str, Any] = {
    "data": {"name": "glyphs", "image_size": IMAGE_SIZE},
    "latents": {"space": "pixels"},
    "flow": {
        "prediction": "data",
        "times": {"name": "logit_normal", "mean": -1.5, "std": 1.0},
        "loss": {"cosine_weight": 0.0},
    },
    "optimizer": {"weight_decay": 0.01, "warmup_steps": 50},  # then the rate is constant
    "ema": {"decay": 0.995},
    "sampling": {"sampler": "unipc", "steps": 10, "shift": 0.5, "precision": PRECISION},
}
"""`configs/glyphs.yaml` with a constant rate, in bfloat16 and without guidance. 10 steps of UniPC stand for
25 of Euler: the model of docs/glyphs.md has a Fréchet distance of 5.89 by either."""
MODEL: dict[str, Any] = {
    "sample_size": IMAGE_SIZE,
    "in_channels": 3,
    "num_classes": 26,
    "hidden_size": 64,
    "depth": 4,
    "num_heads": 2,
    "class_dropout_prob": 0.15,
    "time_scale": 1000.0,
    "label_init_std": 1.0,
}


def model_arguments(size: Size, kind: str) -> dict[str, Any]:
    """Returns the arguments of FlashDiT of a kind, as `model` of a configuration has them."""
    return MODEL | {"patch_size": size.patch_size} | KINDS[kind].model(size.side)


def run_config(folder: Path, size: Size, kind: str, seed: int, rate: float, steps: int) -> RunConfig:
    """Returns the configuration of a run, written to FOLDER.yaml as `flashdit train --config` takes it."""
    content = RECIPE | {
        "run": {"dir": str(folder)},
        "seed": seed,
        "model": model_arguments(size, kind),
        "optimizer": RECIPE["optimizer"] | {"lr": rate},
        "training": {
            "steps": steps,
            "global_batch_size": size.batch,
            "save_every": max(1, size.steps // SAVES),
            "keep_last": 1,
            "preview_every": 0,
            "precision": PRECISION,
        },
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}.yaml"
    write_atomically(path, lambda temporary: temporary.write_text(yaml.safe_dump(content, sort_keys=False)))
    return load(path)
