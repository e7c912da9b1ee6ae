"""The hierarchical Iwin Transformer: stages of Iwin blocks over an image of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from iwin_core.backbone.config import (
    IwinConfig,
    check_backbone,
    check_img_size,
    drop_path_rates,
    stage_grids,
    stage_kernels,
    stage_windows,
)
from iwin_core.backbone.downsample import DOWNSAMPLES
from iwin_core.backbone.resize import resize_bicubic, resize_block
from iwin_core.backbone.stage import ImagePatchEmbed, Stage
from iwin_core.block import IwinBlock


class IwinTransformer(nn.Module):
    """(B, C, H, W) → logits (B, num_classes): the Iwin classification backbone.

    Any H × W of at least one patch works: what a patch, a window or a downsample does not divide is padded at
    the far ends, and padding is masked out of attention, or with `padding="zeros"` takes part in it.

    Args:
        config: What it is made of; None means Iwin-T.
        **options: Fields of IwinConfig, over those of `config`.

    Raises:
        ValueError: If an option is invalid.

    Source: Iwin paper, section III and Table III; state-dict keys are the released code's.
    """

    def __init__(self, config: IwinConfig | None = None, **options: Any):
        super().__init__()
        self.config = config = replace(config or IwinConfig(), **options)
        if config.feature_norms:
            self.config = config = replace(config, num_classes=0)
        check_backbone(config)
        self.num_classes = config.num_classes
        self.global_pool = config.global_pool
        stages = len(config.depths)
        dim = config.embed_dim
        self.num_features = self.head_hidden_size = dim * 2 ** (stages - 1)
        self.patch_embed = ImagePatchEmbed(config.in_chans, dim, config.patch_size)
        self.absolute_pos_embed = None
        if config.position == "absolute":
            rows, columns = stage_grids(config)[0]
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, rows * columns, dim))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        rates = drop_path_rates(config)
        self.layers = nn.ModuleList(self._make_stage(stage, rates[stage]) for stage in range(stages))
        self.norm = nn.Identity() if config.feature_norms else nn.LayerNorm(self.num_features)
        for stage in range(stages) if config.feature_norms else ():
            self.add_module(f"norm{stage}", nn.LayerNorm(dim * 2**stage))
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = make_head(self.num_features, config.num_classes)
        self.apply(initialise)

    def _make_stage(self, stage: int, drop_path_rates: Sequence[float]) -> Stage:
        """Returns one stage: its blocks, and the downsample after all but the last."""
        config = self.config
        dim = config.embed_dim * 2**stage
        window, kernel = stage_windows(config)[stage], stage_kernels(config)[stage]
        blocks = [
            IwinBlock(
                dim,
                config.num_heads[stage],
                window,
                kernel,
                config.mlp_ratio,
                attention=config.attention,
                structure=config.structure,
                relative_position=config.position == "relative",
                qkv_bias=config.qkv_bias,
                drop_rate=config.drop_rate,
                drop_path_rate=rate,
                padding=config.padding,
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

    def forward_stages(self, x: Tensor, count: int | None = None) -> list[Tensor]:
        """Returns the map (B, H, W, C) of the first `count` stages, None for all, before each downsample."""
        if self.config.strict_img_size:
            check_img_size((x.shape[2], x.shape[3]), self.config)
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            x = x + self._positions((x.shape[1], x.shape[2]))
        maps = []
        stages = self.stages()[:count]
        for stage in stages:
            x = stage(x)
            maps.append(x)
            if stage.downsample is not None and stage is not stages[-1]:
                x = stage.downsample(x)
        return maps

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns the last map computed and those of chosen stages; with `intermediates_only` these alone.

        Args:
            x: Images (B, C, H, W).
            indices: Which stages, in the order wanted, negative from the end; an int means the last so many,
                None all.
            norm: Whether the last stage's map is normed; without `feature_norms` it alone has a norm, with it
                each chosen map is normed by its own in any case.
            stop_early: Whether stages after the last one wanted are left out.
            output_fmt: `NCHW` or `NHWC`, of the chosen maps; the last map is always NHWC.
            intermediates_only: Whether the last map is left out.

        Raises:
            ValueError: If an index is of no stage, or `output_fmt` is unknown.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        stages = len(self.layers)
        wanted = take_indices(indices, stages)
        maps = self.forward_stages(x, max(wanted) + 1 if stop_early else stages)
        last = self.normed(maps[-1], len(maps) - 1) if len(maps) == stages else maps[-1]
        chosen = [last if norm and index == stages - 1 else maps[index] for index in wanted]
        if self.config.feature_norms:
            chosen = [self.normed(maps[index], index) for index in wanted]
        if output_fmt == "NCHW":
            chosen = [m.movedim(-1, 1).contiguous() for m in chosen]
        return chosen if intermediates_only else (last, chosen)

    def normed(self, x: Tensor, stage: int) -> Tensor:
        """Returns a stage's map (B, h, w, C) after its own norm, or after the model's one norm."""
        return getattr(self, f"norm{stage}", self.norm)(x)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Returns the absolute table (1, h, w, C) of a grid, bicubic where it is not the native one."""
        assert self.absolute_pos_embed is not None
        native = stage_grids(self.config)[0]
        table = self.absolute_pos_embed.unflatten(1, native)
        return table if grid == native else resize_bicubic(table, grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last map, normed: (B, h, w, C)."""
        return self.normed(self.forward_stages(x)[-1], len(self.layers) - 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns the logits of a normed map (B, h, w, C), with `pre_logits` the input of the last Linear."""
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Gives the model a fresh head.

        Args:
            num_classes: Classes; 0 leaves the pooled features.
            global_pool: `avg`, or empty for the map itself; None keeps it.
        """
        pool = self.global_pool if global_pool is None else global_pool
        config = replace(self.config, num_classes=num_classes, global_pool=pool)
        check_backbone(config)
        self.config, self.num_classes, self.global_pool = config, num_classes, pool
        self.head = make_head(self.num_features, num_classes).to(self.patch_embed.proj.weight)
        self.head.apply(initialise).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Sets whether training keeps only each block's input and computes the block again backward."""
        for stage in self.stages():
            stage.grad_checkpointing = enable

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
        check_backbone(config)
        if self.absolute_pos_embed is not None:
            table = self._positions(stage_grids(config)[0]).detach().flatten(1, 2)
            self.absolute_pos_embed = nn.Parameter(table, self.absolute_pos_embed.requires_grad)
        self.config = config
        known = set(self.state_dict())
        windows, kernels = stage_windows(config), stage_kernels(config)
        for stage, window, kernel in zip(self.stages(), windows, kernels, strict=True):
            for block in stage.blocks:
                resize_block(cast(IwinBlock, block), window, kernel)
        return sorted(set(self.state_dict()) - known)


def make_head(dim: int, num_classes: int) -> nn.Module:
    """Returns the classifier: a Linear, or with no classes nothing."""
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()


def take_indices(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Returns which of `count` stages are meant, all counted from 0; an int means the last so many."""
    if indices is None or isinstance(indices, int):
        last = count if indices is None else indices
        wanted = list(range(count - last, count)) if 0 < last <= count else []
    else:
        wanted = [index + count if index < 0 else index for index in indices]
    if not wanted or not all(0 <= index < count for index in wanted):
        raise ValueError(
            f"stage indices must be from {-count} to {count - 1}, or how many of the last, got {indices}"
        )
    return wanted


def initialise(module: nn.Module) -> None:
    """Initialises a Linear as the released code does: weights truncated normal with std 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
