"""The hierarchical Iwin Transformer: stages of Iwin blocks over an image of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iwin_core.attention import DepthwiseConv
from iwin_core.block import IwinBlock
from iwin_core.config import (
    IwinConfig,
    check,
    check_img_size,
    drop_path_rates,
    stage_grids,
    stage_kernels,
    stage_windows,
)
from iwin_core.downsample import DOWNSAMPLES


class PatchEmbed(nn.Module):
    """(B, C, H, W) → (B, ⌈H/p⌉, ⌈W/p⌉, dim): zeros at the far ends, convolution with stride p, LN."""

    def __init__(self, in_chans: int, dim: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the tokens in a channels-last grid."""
        p = self.patch_size
        rows, columns = -x.shape[2] % p, -x.shape[3] % p
        if rows or columns:
            x = F.pad(x, (0, columns, 0, rows))
        return self.norm(self.proj(x).movedim(1, -1))


class Stage(nn.Module):
    """Blocks at one resolution, and the downsample after them, None in the last stage."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map (B, H, W, C) after the blocks, before the downsample."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class IwinTransformer(nn.Module):
    """(B, C, H, W) → logits (B, num_classes): the Iwin classification backbone.

    Any H × W of at least one patch works: what a patch, a window or a downsample does not divide is padded at
    the far ends, and padding is masked out of attention.

    Args:
        config: What it is made of; None means Iwin-T.
        **options: Fields of IwinConfig, over those of `config`.

    Raises:
        ValueError: If an option cannot be.

    Source: Iwin paper, section III and Table III; state-dict keys are the released code's.
    """

    def __init__(self, config: IwinConfig | None = None, **options: Any):
        super().__init__()
        self.config = config = replace(config or IwinConfig(), **options)
        check(config)
        self.num_classes = config.num_classes
        self.global_pool = config.global_pool
        stages = len(config.depths)
        dim = config.embed_dim
        self.num_features = self.head_hidden_size = dim * 2 ** (stages - 1)
        self.patch_embed = PatchEmbed(config.in_chans, dim, config.patch_size)
        self.absolute_pos_embed = None
        if config.position == "absolute":
            rows, columns = stage_grids(config)[0]
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, rows * columns, dim))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        rates = drop_path_rates(config)
        self.layers = nn.ModuleList(self._make_stage(stage, rates[stage]) for stage in range(stages))
        self.norm = nn.LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()
        self.apply(initialise)

    def _make_stage(self, stage: int, drop_path_rates: Sequence[float]) -> Stage:
        """Returns one stage: its blocks, and the downsample after all but the last."""
        config = self.config
        dim = config.embed_dim * 2**stage
        blocks = [
            IwinBlock(
                dim,
                config.num_heads[stage],
                stage_windows(config)[stage],
                stage_kernels(config)[stage],
                config.mlp_ratio,
                attention=config.attention,
                structure=config.structure,
                relative_position=config.position == "relative",
                qkv_bias=config.qkv_bias,
                drop_rate=config.drop_rate,
                drop_path_rate=rate,
            )
            for rate in drop_path_rates
        ]
        last = stage == len(config.depths) - 1
        return Stage(blocks, None if last else DOWNSAMPLES[config.downsample](dim))

    def stages(self) -> list[Stage]:
        """Returns the stages, as what they are."""
        return cast(list[Stage], list(self.layers))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (B, num_classes), or with `num_classes=0` the pooled features (B, C)."""
        return self.forward_head(self.forward_features(x))

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Returns each stage's map (B, H, W, C) after its blocks, before its downsample."""
        if self.config.strict_img_size:
            check_img_size((x.shape[2], x.shape[3]), self.config)
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            x = x + self._positions((x.shape[1], x.shape[2]))
        maps = []
        for stage in self.stages():
            x = stage(x)
            maps.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Returns the absolute table (1, h, w, C) of a grid, bicubic where it is not the native one."""
        assert self.absolute_pos_embed is not None
        native = stage_grids(self.config)[0]
        table = self.absolute_pos_embed.unflatten(1, native)
        return table if grid == native else resize_bicubic(table, grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last map, normed: (B, h, w, C)."""
        return self.norm(self.forward_stages(x)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns the logits of a normed map (B, h, w, C), with `pre_logits` the input of the last Linear."""
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, window_size: int | None = None
    ) -> list[str]:
        """Sets the size it is built for: windows follow; stages that now need one get a zero convolution.

        A zero convolution is the identity, so weights are kept and none is made up. Absolute and relative
        tables are resized (bicubic).

        Args:
            img_size: New input size; None keeps it.
            window_size: New window side; None keeps it.

        Returns:
            The names of the parameters that are new.
        """
        config = replace(
            self.config,
            img_size=self.config.img_size if img_size is None else img_size,
            window_size=self.config.window_size if window_size is None else window_size,
        )
        check(config)
        if self.absolute_pos_embed is not None:
            table = self._positions(stage_grids(config)[0]).detach().flatten(1, 2)
            self.absolute_pos_embed = nn.Parameter(table)
        self.config = config
        known = set(self.state_dict())
        windows, kernels = stage_windows(config), stage_kernels(config)
        for stage, window, kernel in zip(self.stages(), windows, kernels, strict=True):
            for block in stage.blocks:
                resize_block(cast(IwinBlock, block), window, kernel)
        return sorted(set(self.state_dict()) - known)


def initialise(module: nn.Module) -> None:
    """Initialises a Linear as the released code does: weights truncated normal with std 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def resize_bicubic(table: Tensor, grid: Sequence[int]) -> Tensor:
    """Returns a table (1, h, w, C) at another grid."""
    size = [int(side) for side in grid]
    resized = F.interpolate(table.movedim(-1, 1), size=size, mode="bicubic", align_corners=False)
    return resized.movedim(1, -1)


def resize_block(block: IwinBlock, window: int, kernel: int) -> None:
    """Gives a block another window, and where it now needs a convolution, one of zeros: the identity."""
    if block.attn is not None and block.attn.window != (window, window):
        table = block.attn.relative_position_bias_table
        if table is not None:
            sides = [2 * m - 1 for m in block.attn.window]
            resized = resize_bicubic(table.detach().unflatten(0, sides)[None], (2 * window - 1,) * 2)
            block.attn.relative_position_bias_table = nn.Parameter(resized[0].flatten(0, 1))
        block.attn.window = (window, window)
    if kernel and block.dwconv is None:
        weight = block.norm1.weight
        block.dwconv = DepthwiseConv(len(weight), (kernel, kernel)).to(weight)
        for parameter in block.dwconv.parameters():
            nn.init.zeros_(parameter)
        if block.structure == "S3":
            block.norm0 = nn.LayerNorm(len(weight)).to(weight)
