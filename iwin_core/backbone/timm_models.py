"""The Iwin backbones as timm models: their names, their configurations, and what timm asks of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    adapt_input_conv,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from iwin_core.backbone.backbone import IwinTransformer, take_indices
from iwin_core.backbone.config import BACKBONE_SIZES, SMALL_1K_HEADS, dense_kernels, per_stage
from iwin_core.backbone.weights import load_official_checkpoint, read_file, unwrap_checkpoint

INPUTS = {
    "window7_224": (7, 224),
    "window12_384": (12, 384),
    "window16_512": (16, 512),
    "window16_1024": (16, 1024),
}
CLASSES = {"": 1000, "_22k": 21841, "_22kto1k": 1000}
RELEASED = {  # the release has NAME.pth for these
    "": {"tiny": (224,), "small": (224, 384, 512, 1024), "base": (224, 384, 512, 1024)},
    "_22k": {"base": (224, 384, 512, 1024), "large": (224, 384)},
    "_22kto1k": {"base": (224, 384, 512, 1024), "large": (224, 384)},
}
NEVER_DECAYED = ("absolute_pos_embed", "relative_position_bias_table")
OWN_GROUP = 99998.0  # sorts a downsample after its stage's blocks
PREVIOUS_GROUP = 99999.0  # timm's mark for "with the group before"


class TimmIwin(IwinTransformer):
    """An Iwin Transformer with the attributes and methods that timm's tools call.

    Args:
        device: Where it is put; None leaves it where torch makes it.
        dtype: Of its weights; None means torch's default.
        **options: Fields of IwinConfig.
    """

    output_fmt = "NHWC"

    def __init__(self, device: Any = None, dtype: torch.dtype | None = None, **options: Any):
        super().__init__(**options)
        config = self.config
        self.in_chans = config.in_chans
        self.feature_info = [
            {
                "num_chs": config.embed_dim * 2**stage,
                "reduction": config.patch_size * 2**stage,
                "module": f"layers.{stage}",
            }
            for stage in range(len(config.depths))
        ]
        self.to(device=device, dtype=dtype)

    def get_classifier(self) -> nn.Module:
        """Returns the head."""
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Returns the names of the position tables."""
        return {name for name, _ in self.named_parameters() if name.endswith(NEVER_DECAYED)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns patterns that order the parameters by depth, for layer-wise learning rates.

        Args:
            coarse: Whether a stage is one group, or each block and each downsample its own.
        """
        blocks = (
            [(r"^layers\.(\d+)", None)]
            if coarse
            else [
                (r"^layers\.(\d+)\.blocks\.(\d+)", None),
                (r"^layers\.(\d+)\.downsample", (OWN_GROUP,)),
            ]
        )
        return {
            "stem": r"^(?:patch_embed|absolute_pos_embed)",
            "blocks": [*blocks, (r"^norm\d*\.", (PREVIOUS_GROUP,))],
            "head": r"^head",
        }

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the chosen stages do not need: later stages, and with them the norm and the head.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Whether the norm of the last stage goes too.
            prune_head: Whether the head goes too.

        Returns:
            The chosen stages counted from 0.
        """
        wanted = take_indices(indices, len(self.layers))
        count = max(wanted) + 1
        ends_early = count < len(self.layers)
        if ends_early:
            config = self.config
            kernels = (
                dense_kernels(config) if config.feature_norms else per_stage(config.kernel_sizes, config)
            )
            self.config = replace(
                config,
                depths=config.depths[:count],
                num_heads=config.num_heads[:count],
                kernel_sizes=kernels[:count],
            )
            self.layers = self.layers[:count]
            self.stages()[-1].downsample = None
            self.num_features = self.head_hidden_size = config.embed_dim * 2 ** (count - 1)
        if prune_norm or ends_early:
            self.norm = nn.Identity()
        for name in [name for name, _ in self.named_children() if re.fullmatch(r"norm\d+", name)]:
            if int(name.removeprefix("norm")) not in wanted:
                delattr(self, name)
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return wanted

    def load_pretrained(self, path: str) -> None:
        """Loads a local file as `load_official_checkpoint` does, its stem adapted to other input channels."""
        state = unwrap_checkpoint(read_file(Path(path)))
        name = "patch_embed.proj.weight"
        if name in state and state[name].shape[1:2] == (3,) and self.in_chans != 3:
            state[name] = adapt_input_conv(self.in_chans, state[name])
        load_official_checkpoint(self, state)


def variants() -> dict[str, dict[str, Any]]:
    """Returns each entry point's name and what it is: size, window, input side, training suffix."""
    return {
        f"iwin_{size}_patch4_{which}{suffix}": {
            "size": size,
            "window": window,
            "side": side,
            "suffix": suffix,
        }
        for suffix in CLASSES
        for size in BACKBONE_SIZES
        for which, (window, side) in INPUTS.items()
        if not suffix or size in RELEASED[suffix]
    }


def pretrained_cfg(name: str, size: str, side: int, suffix: str) -> dict[str, Any]:
    """Returns timm's description of a variant; the released file's name, if there is one, under `notes`."""
    return {
        "num_classes": CLASSES[suffix],
        "input_size": (3, side, side),
        "pool_size": (side // 32, side // 32),
        "crop_pct": 0.9 if side == 224 else 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2507.18405",
        "notes": (f"{name}.pth",) if side in RELEASED[suffix].get(size, ()) else None,
    }


def create(variant: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Returns a model as timm builds it, with weights from a local file where `pretrained`."""
    overlay = options.pop("pretrained_cfg_overlay", None) or {}
    cfg = resolve_pretrained_cfg(variant, options.get("pretrained_cfg"), overlay)
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        released = f"the release's {cfg.notes[0]}" if cfg.notes else "weights that fit, as none were released"
        raise ValueError(
            f"pretrained={pretrained} needs a local file with {released}, got none: give it as "
            "pretrained_cfg_overlay=dict(file=PATH), or to iwin_core.load_official_checkpoint(model, PATH)"
        )
    if cfg.file and not cfg.source:
        overlay = {**overlay, "custom_load": True}  # timm then calls load_pretrained
    feature_cls = options.pop("feature_cls", "getter")
    if feature_cls != "getter":
        raise ValueError(f"feature_cls must be 'getter', which gives NCHW maps, got {feature_cls!r}")
    out_indices = options.pop("out_indices", range(len(options["depths"])))
    feature_cfg = {"feature_cls": feature_cls, "out_indices": out_indices}
    return build_model_with_cfg(
        TimmIwin, variant, pretrained, pretrained_cfg_overlay=overlay, feature_cfg=feature_cfg, **options
    )


def entry_point(name: str, size: str, window: int, side: int, suffix: str) -> Callable[..., nn.Module]:
    """Returns the function by which timm builds a variant."""
    defaults = {**BACKBONE_SIZES[size], "img_size": side, "window_size": window}
    if size == "small" and not suffix:
        defaults["num_heads"] = SMALL_1K_HEADS

    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        return create(name, pretrained, {**defaults, **options})

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"Iwin-{size[0].upper()} at {side} with window {window}, {CLASSES[suffix]} classes."
    return entry


default_cfgs = generate_default_cfgs(
    {name: pretrained_cfg(name, v["size"], v["side"], v["suffix"]) for name, v in variants().items()}
)
for _name, _variant in variants().items():
    register_model(entry_point(_name, **_variant))
