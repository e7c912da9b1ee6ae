"""FlashDiT: the class-conditional velocity model, a diffusers ModelMixin, and its sizes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from flashdit.flow.prediction import PREDICTIONS, VELOCITY
from flashdit.models.attention import Attention, AttentionShape, each_attention, make_attention
from flashdit.models.block import FinalLayer, FlashDiTBlock
from flashdit.models.embed import (
    LabelEmbedder,
    PatchEmbed,
    StretchEmbedder,
    TimestepEmbedder,
    sincos_table,
)
from flashdit.models.layers import RMSNorm, mlp_width
from flashdit.models.lightningdit import load_lightningdit
from flashdit.models.sizes import IWIN, SIZES
from flashdit.shared.registry import unknown
from flashdit.shared.runs import EXPORT_FILE, export_changes

MOST_TIME_SCALE = 1_000_000
"""Above which float32 has no phase left of the sinusoids."""
MOST_LABEL_STD = 100
REGISTER_STD = 0.02
"""Standard deviation of new registers."""


class FlashDiT(ModelMixin, ConfigMixin):
    """x (B, C, H, W), t (B,), y (B,) → v of the shape of x: LightningDiT with Iwin attention.

    Args:
        sample_size: Side of the latents it is trained on.
        in_channels: Latent channels C.
        patch_size: Side of a patch in latent pixels; H and W must be multiples of it.
        hidden_size: Width of the transformer.
        depth: Number of blocks.
        num_heads: Attention heads; must divide `hidden_size`.
        num_classes: Classes; the null label is `num_classes`.
        class_dropout_prob: Share of labels that become null in training mode.
        mlp_ratio: Hidden width of the MLP over `hidden_size`.
        qk_norm: Whether queries and keys are normed per head.
        shift_modulation: Whether blocks are shifted as well as scaled by time and class.
        attention: `{"name": "iwin" | "window" | "global", **options}`, or a list of these that repeats over
            the blocks from the first on; its last round ends where the blocks do.
        position_embedding: `none`, or `sincos` for DiT's fixed table.
        norm: `rmsnorm`, or DiT's `layernorm`.
        mlp: `swiglu`, or DiT's `gelu`.
        time_scale: Factor on t before its sinusoids; 1 is LightningDiT's.
        label_init_std: Standard deviation of a new label table; 0.02 is DiT's.
        prediction: What the last layer's output stands for, `velocity` or the `data`; v is returned under
            either.
        registers: Learned tokens n beside the map, which every window reads and writes; the next block gets
            the mean over the windows. They carry across the map what no window does.
        most_guidance: Of a model of average velocities (`flow.mean_flow`), which takes durations and guidance
            scales, the largest scale it is trained on; None is a model of velocities.

    Raises:
        ValueError: If an option is invalid.

    Source: Iwin paper section IV-D and LightningDiT's released code.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["FlashDiTBlock"]  # noqa: RUF012 - diffusers' protocol

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        in_channels: int = 32,
        patch_size: int = 1,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        shift_modulation: bool = True,
        attention: str | Mapping[str, Any] | Sequence[Any] = IWIN,
        position_embedding: str = "none",
        norm: str = "rmsnorm",
        mlp: str = "swiglu",
        time_scale: float = 1.0,
        label_init_std: float = 0.02,
        prediction: str = VELOCITY,
        registers: int = 0,
        most_guidance: float | None = None,
    ):
        super().__init__()
        check_arguments(**self.config)
        self.velocity_from = PREDICTIONS[prediction]
        grid = (sample_size // patch_size, sample_size // patch_size)
        qk_norm_type = None if not qk_norm else RMSNorm if norm == "rmsnorm" else nn.LayerNorm
        shape = AttentionShape(dim=hidden_size, num_heads=num_heads, grid=grid, qk_norm=qk_norm_type)
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.gradient_checkpointing = False
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size, time_scale)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.native_grid = grid
        self.pos_embed = None
        if position_embedding == "sincos":  # a frozen parameter, as in DiT's checkpoints and counts
            self.pos_embed = nn.Parameter(sincos_table(grid, hidden_size), requires_grad=False)
        elif position_embedding != "none":
            raise unknown("position_embedding", position_embedding, ("none", "sincos"))
        self.register_tokens = nn.Parameter(torch.empty(registers, hidden_size)) if registers else None
        attentions = (make_attention(attention, block, shape) for block in range(depth))
        self.blocks = nn.ModuleList(
            FlashDiTBlock(hidden_size, attend, mlp, mlp_ratio, norm, shift_modulation)
            for attend in attentions
        )
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * in_channels, norm)
        self.stretch_embedder = None
        if most_guidance is not None:
            self.stretch_embedder = StretchEmbedder(hidden_size, time_scale)
        self._initialise(label_init_std)

    @classmethod
    def from_size(cls, size: str, **options: Any) -> FlashDiT:
        """Returns a new model of a named size; `options` are further arguments.

        Args:
            size: One of `nano`, `S`, `B`, `L`, `XL`, `1p0B`, `1p6B`.
            **options: Arguments of FlashDiT.
        """
        if size not in SIZES:
            raise unknown("size", size, SIZES)
        arguments: dict[str, Any] = SIZES[size] | options
        return cls(**arguments)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *arguments: Any, **options: Any
    ) -> FlashDiT:
        """Returns the model of a folder or a repository; arguments are those of diffusers.

        Raises:
            ValueError: If a file of it, as a part of an exported pipeline, is not as it was written.
        """
        folder = Path(pretrained_model_name_or_path)
        changed = export_changes(folder.parent, folder.name) if folder.is_dir() else []
        if changed:
            raise ValueError(
                f"an exported model must be as it was written, {folder.parent} has another "
                f"{', '.join(changed)}: damaged, or edited (without {EXPORT_FILE} it is taken as it is)"
            )
        return super().from_pretrained(pretrained_model_name_or_path, *arguments, **options)

    @classmethod
    def from_lightningdit(cls, source: str | Path | Mapping[str, Tensor], **overrides: Any) -> FlashDiT:
        """Returns a model with a LightningDiT checkpoint's weights; see `flashdit.models.lightningdit`."""
        return load_lightningdit(cls, source, overrides)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        drop: Tensor | None = None,
        return_dict: bool = False,
        duration: Tensor | None = None,
        guidance: Tensor | None = None,
        tokens_after: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | Transformer2DModelOutput:
        """Returns the velocity at x_t, whatever the last layer predicts.

        Args:
            x: Noisy latents (B, C, H, W).
            t: Times (B,) in [0, 1], 0 noise and 1 data.
            y: Labels (B,) int64; `num_classes` is the null label, None means null for all.
            drop: Which labels become null, bool (B,); None draws them in training mode, else none.
            return_dict: Whether v comes as the `sample` of diffusers' output class.
            duration: Of a model of average velocities, over how much time from t on (B,); None means 0.
            guidance: Of such a model, under which guidance scale (B,), 1 or more; None means 1.
            tokens_after: The block, from 1 to the depth, whose tokens are returned too; None returns none.

        Returns:
            v, or its average over the duration, (B, C, H, W), in the dtype that the last layer computes in:
            the weights', or autocast's. With `tokens_after`, v and that block's tokens (B, h, w, c).

        Raises:
            ValueError: If the channels or the size of x does not fit, a model of velocities is given a
                duration or a guidance scale, or there is no such block.
        """
        self._check_input(x)
        if y is None:
            y = torch.full((x.shape[0],), self.num_classes, device=x.device)
        if drop is None and self.training and self.class_dropout_prob > 0:
            drop = torch.rand(y.shape, device=y.device) < self.class_dropout_prob
        tokens = self.x_embedder(x)  # (b, h, w, c)
        if self.pos_embed is not None:
            tokens = tokens + self._positions(tokens)
        cond = self.t_embedder(t, x.dtype) + self.y_embedder(y, drop)  # (b, c)
        if self.stretch_embedder is not None:
            cond = cond + self.stretch_embedder(
                torch.zeros_like(t) if duration is None else duration,
                torch.ones_like(t) if guidance is None else guidance,
                x.dtype,
            )
        elif duration is not None or guidance is not None:
            raise ValueError("duration and guidance are for models of average velocities (most_guidance)")
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        checkpoint = self._gradient_checkpointing_func if again else None
        if tokens_after is not None and not 1 <= tokens_after <= len(self.blocks):
            raise ValueError(f"tokens_after must be from 1 to {len(self.blocks)}, got {tokens_after}")
        kept, registers = tokens, []
        if self.register_tokens is not None:
            registers = [self.register_tokens.to(tokens.dtype).repeat(len(x), 1, 1)]  # (b, n, c)
        for number, block in enumerate(self.blocks, 1):
            inputs = (tokens, cond, *registers)
            output = block(*inputs) if checkpoint is None else checkpoint(block, *inputs)
            tokens, *registers = output if registers else [output]
            if number == tokens_after:
                kept = tokens
        patches = self.final_layer(tokens, cond)
        p = self.patch_size
        output = rearrange(patches, "b h w (p q c) -> b c (h p) (w q)", p=p, q=p)
        v = self.velocity_from(output, x, t)
        if tokens_after is not None:
            return v, kept
        return Transformer2DModelOutput(sample=v) if return_dict else v

    def _check_input(self, x: Tensor) -> None:
        """Raises ValueError unless x has this model's channels and a size that patches divide."""
        channels, p = self.config["in_channels"], self.patch_size
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"the model takes latents (B, {channels}, H, W), got {tuple(x.shape)}")
        if x.shape[2] % p or x.shape[3] % p:
            raise ValueError(
                f"height and width must be multiples of the patch size {p}, got {tuple(x.shape)}"
            )

    def _positions(self, tokens: Tensor) -> Tensor:
        """Returns the sin-cos table of this grid (1, h, w, c): the stored one at the native size."""
        assert self.pos_embed is not None
        grid = (tokens.shape[1], tokens.shape[2])
        table = self.pos_embed
        if grid != self.native_grid:
            table = sincos_table(grid, tokens.shape[-1]).to(table)
        return rearrange(table, "1 (h w) c -> 1 h w c", h=grid[0])

    def _initialise(self, label_init_std: float) -> None:
        """Initialises as DiT does: Xavier for every Linear, zeros for each modulation and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # PyTorch has drawn it from U(±1/√in); stretched, that is Xavier's U(±√(6/(in+out))) in a
                # third of the time of drawing again.
                fan_in, fan_out = module.in_features, module.out_features
                with torch.no_grad():
                    module.weight.mul_(math.sqrt(6 * fan_in / (fan_in + fan_out)))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=label_init_std)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or "final_layer.linear" in name or name == "x_embedder.proj.bias":
                nn.init.zeros_(parameter)
            elif name.startswith("t_embedder") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
        if self.stretch_embedder is not None:
            self.stretch_embedder.initialise()
        if self.register_tokens is not None:  # last: one seed draws the other weights alike
            nn.init.normal_(self.register_tokens, std=REGISTER_STD)


def default_arguments() -> dict[str, Any]:
    """Returns the arguments of FlashDiT and their defaults."""
    parameters = inspect.signature(FlashDiT.__init__).parameters.values()
    return {item.name: item.default for item in parameters if item.default is not item.empty}


def check_arguments(
    *,
    sample_size: int,
    in_channels: int,
    patch_size: int,
    hidden_size: int,
    depth: int,
    num_heads: int,
    num_classes: int,
    class_dropout_prob: float,
    mlp_ratio: float,
    mlp: str,
    time_scale: float,
    label_init_std: float,
    attention: Attention,
    registers: int,
    most_guidance: float | None,
    **_others: Any,
) -> None:
    """Raises ValueError for arguments of FlashDiT that no model can be made with; parts check the others."""
    if patch_size < 1 or sample_size < 1 or sample_size % patch_size:
        raise ValueError(f"patch_size must divide sample_size, got {patch_size=} for {sample_size=}")
    for name, value in {"in_channels": in_channels, "hidden_size": hidden_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {name}={value}")
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"num_heads must divide hidden_size, got {num_heads=} for {hidden_size=}")
    if depth < 1 or num_classes < 0:
        raise ValueError(f"depth must be at least 1 and num_classes at least 0, got {depth=}, {num_classes=}")
    if registers < 0:
        raise ValueError(f"registers must be at least 0, got {registers=}")
    if most_guidance is not None and not 1 <= most_guidance < math.inf:
        raise ValueError(f"most_guidance must be at least 1, got {most_guidance=}")
    if not 1 <= (entries := len(each_attention(attention))) <= depth:
        rule = "attention as a list must have an entry, and no more entries than there are blocks"
        raise ValueError(f"{rule}, got {entries} for {depth=}")
    if not 0 <= class_dropout_prob <= 1:
        raise ValueError(f"class_dropout_prob must be between 0 and 1, got {class_dropout_prob=}")
    if not math.isfinite(mlp_ratio) or mlp_width(hidden_size, mlp_ratio, mlp == "swiglu") < 1:
        rule = "mlp_ratio must be finite and leave the MLP one hidden channel or more"
        raise ValueError(f"{rule}, got {mlp_ratio=} for {hidden_size=} and {mlp=}")
    if not (0 < time_scale <= MOST_TIME_SCALE and 0 <= label_init_std <= MOST_LABEL_STD):
        rule = f"time_scale must be above 0 and at most {MOST_TIME_SCALE:,} and label_init_std from 0 to "
        raise ValueError(f"{rule}{MOST_LABEL_STD}, got {time_scale=}, {label_init_std=}")
