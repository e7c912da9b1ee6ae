"""What an Iwin Transformer is made of, and the geometry that follows: grids, windows, kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iwin_core.attention import PADDINGS
from iwin_core.backbone.downsample import DOWNSAMPLES
from iwin_core.block import BLOCK_ATTENTIONS, STRUCTURES
from iwin_core.windows import per_axis

POSITIONS = ("none", "absolute", "relative")
POOLS = ("avg", "")


@dataclass(kw_only=True)
class IwinConfig:
    """What an Iwin Transformer is made of; the defaults are Iwin-T at 224.

    Raises:
        ValueError: From `IwinTransformer`, for invalid options.
    """

    img_size: int | Sequence[int] = 224
    """Input size it is built for, in pixels: one side, or height and width."""
    patch_size: int = 4
    """Side of the stem's kernel and stride, in pixels."""
    in_chans: int = 3
    """Channels of the input."""
    num_classes: int = 1000
    """0 gives pooled features instead of logits."""
    global_pool: str = "avg"
    """`avg`, or empty for the map itself."""
    embed_dim: int = 96
    """Channels of the first stage; each further stage has twice as many."""
    depths: Sequence[int] = (2, 2, 6, 2)
    """Blocks per stage."""
    num_heads: Sequence[int] = (3, 6, 12, 24)
    """Attention heads per stage."""
    window_size: int = 7
    """Window side M; with `mask`, a stage whose map is smaller takes the map's shorter side."""
    padding: str = "mask"
    """What attention does past the map's far ends: `mask` leaves it out; `zeros` lets zero tokens take part
    in windows of full size, as the authors' detection and segmentation code has it."""
    kernel_sizes: int | Sequence[int] = 3
    """Depthwise kernel for all stages or for each; 0 leaves the convolution out. A stage whose map is one
    window has none; with `feature_norms` one number means all stages but the last, whatever their maps."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over the channels."""
    attention: str = "interleaved"
    """`interleaved` (IW-MSA), `window` (W-MSA) or `none`."""
    downsample: str = "conv"
    """`conv`, `dwconv`, `pool` or `merge`."""
    position: str = "none"
    """`none`, `absolute` (a learned table before stage 1) or `relative` (a learned bias in each window)."""
    structure: str = "S1"
    """`S1`, `S2` or `S3`: see `IwinBlock`."""
    qkv_bias: bool = True
    """Whether the q, k, v projections have a bias."""
    drop_rate: float = 0.0
    """Dropout before the head and in the MLPs."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0."""
    feature_norms: bool = False
    """Whether it is for dense tasks: each stage's map has a LayerNorm `norm{i}`; no `norm`, no head."""
    strict_img_size: bool = False
    """Whether inputs that would need padding are refused instead, naming the nearest sizes that do not."""


BACKBONE_SIZES: dict[str, dict[str, Any]] = {  # paper Table III
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.3},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.5},
}


SMALL_1K_HEADS = (3, 4, 8, 16)
"""Of the released Iwin-S 1K classification weights; the released dense weights have Table III's."""


def per_stage(value: int | Sequence[int], config: IwinConfig) -> tuple[int, ...]:
    """Returns one number for each stage; a single one stands for all."""
    return tuple(value) if isinstance(value, Sequence) else (value,) * len(config.depths)


def stage_grids(config: IwinConfig, img_size: int | Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Returns the sides of each stage's map.

    Args:
        config: What the model is made of.
        img_size: Input size in pixels; None means the one it is built for.
    """
    size = per_axis(config.img_size if img_size is None else img_size, 2, "img_size")
    rows, columns = (-(-side // config.patch_size) for side in size)
    grids = []
    for _ in config.depths:
        grids.append((rows, columns))
        rows, columns = -(-rows // 2), -(-columns // 2)
    return grids


def stage_windows(config: IwinConfig) -> list[int]:
    """Returns the window side of each stage: with masked padding at most the shorter side of its map."""
    if config.padding == "zeros":
        return [config.window_size] * len(config.depths)
    return [min(config.window_size, *grid) for grid in stage_grids(config)]


def dense_kernels(config: IwinConfig) -> tuple[int, ...]:
    """Returns the depthwise kernel of each stage with `feature_norms`: of one for all, none in the last."""
    kernels = per_stage(config.kernel_sizes, config)
    return kernels if isinstance(config.kernel_sizes, Sequence) else (*kernels[:-1], 0)


def stage_kernels(config: IwinConfig) -> list[int]:
    """Returns the depthwise kernel of each stage: 0 where one window covers the map, as in the released code.

    Without attention nothing else mixes tokens, so every stage keeps its convolution. With `feature_norms`
    the size that it is built for changes nothing.
    """
    if config.feature_norms:
        return list(dense_kernels(config))
    kernels = per_stage(config.kernel_sizes, config)
    covered = [max(g) <= m for g, m in zip(stage_grids(config), stage_windows(config), strict=True)]
    keeps = config.attention == "none"
    return [kernel if keeps or not one else 0 for kernel, one in zip(kernels, covered, strict=True)]


def drop_path_rates(config: IwinConfig) -> list[list[float]]:
    """Returns the rate of each block of each stage, growing linearly from 0 over all blocks."""
    steps = max(1, sum(config.depths) - 1)
    rates = iter(config.drop_path_rate * block / steps for block in range(sum(config.depths)))
    return [[next(rates) for _ in range(depth)] for depth in config.depths]


def divides(side: int, config: IwinConfig) -> bool:
    """Returns whether an input side needs padding nowhere: patches, windows and downsamples all divide it."""
    if side < config.patch_size or side % config.patch_size:
        return False
    side //= config.patch_size
    for stage, window in enumerate(stage_windows(config)):
        if side % (min(window, side) if config.padding == "mask" else window) or (
            side % 2 and stage < len(config.depths) - 1
        ):
            return False
        side //= 2
    return True


def nearest_sizes(side: int, config: IwinConfig) -> list[int]:
    """Returns the nearest sides below and above (or equal) that need no padding; there may be none below."""
    step = config.patch_size
    below = next((s for s in range(side - side % step, 0, -step) if divides(s, config)), None)
    above = side + -side % step
    while not divides(above, config):
        above += step
    return sorted({s for s in (below, above) if s is not None})


def check_img_size(size: Sequence[int], config: IwinConfig) -> None:
    """Raises ValueError with the nearest valid sizes unless the input size needs no padding."""
    if not all(divides(side, config) for side in size):
        valid = " and ".join(
            f"{axis} {' or '.join(map(str, nearest_sizes(side, config)))}"
            for axis, side in zip(("height", "width"), size, strict=True)
        )
        raise ValueError(
            f"with strict_img_size the input must divide without padding, got {size[0]}×{size[1]}: "
            f"the nearest valid sizes are {valid}"
        )


def check_backbone(config: IwinConfig) -> None:
    """Raises ValueError for invalid options."""
    named = {
        "attention": BLOCK_ATTENTIONS,
        "structure": STRUCTURES,
        "downsample": tuple(DOWNSAMPLES),
        "position": POSITIONS,
        "global_pool": POOLS,
        "padding": PADDINGS,
    }
    for name, known in named.items():
        if getattr(config, name) not in known:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(config, name)!r}"
            )
    for name in ("patch_size", "in_chans", "embed_dim"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.num_classes < 0:
        raise ValueError(f"num_classes must be at least 0, got {config.num_classes}")
    if not (math.isfinite(config.mlp_ratio) and int(config.mlp_ratio * config.embed_dim) >= 1):
        rule = "mlp_ratio must be finite and leave the MLPs one hidden channel or more"
        raise ValueError(f"{rule}, got {config.mlp_ratio} for embed_dim={config.embed_dim}")
    for name in ("drop_rate", "drop_path_rate"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(config, name)}")
    stages = len(config.depths)
    if len(config.num_heads) != stages or len(per_stage(config.kernel_sizes, config)) != stages:
        raise ValueError(
            "depths, num_heads and kernel_sizes must have one number for each stage, "
            f"got {config.depths}, {config.num_heads}, {config.kernel_sizes}"
        )
    if not stages or min(config.depths) < 1:
        raise ValueError(f"depths must be at least 1 in every stage, got {config.depths}")
    for stage, heads in enumerate(config.num_heads):
        dim = config.embed_dim * 2**stage
        if heads < 1 or dim % heads:
            raise ValueError(f"num_heads must divide the width of each stage, got {heads} for {dim} channels")
    if any(kernel < 0 or (kernel and kernel % 2 == 0) for kernel in per_stage(config.kernel_sizes, config)):
        raise ValueError(f"kernel_sizes must be odd, or 0 for none, got {config.kernel_sizes}")
    per_axis(config.window_size, 1, "window_size")
    if min(per_axis(config.img_size, 2, "img_size")) < config.patch_size:
        raise ValueError(f"img_size must be at least one patch of {config.patch_size}, got {config.img_size}")
