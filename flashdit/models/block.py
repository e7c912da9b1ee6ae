"""The transformer block and the final layer, both modulated by time and class (adaLN-zero)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashdit.models.layers import make_mlp, make_norm, modulate, over_tokens


class FlashDiTBlock(nn.Module):
    """(b, h, w, c), (b, c) → (b, h, w, c): attention, then an MLP, each normed, modulated and gated.

    Registers (b, n, c) go through the same norms, modulation, attention and MLP as the tokens.

    Args:
        dim: Width c.
        attention: Of a map (b, h, w, c), and of registers.
        mlp: `swiglu` or `gelu`.
        mlp_ratio: Hidden width of the MLP over c.
        norm: `rmsnorm` or `layernorm`.
        shift_modulation: Whether the modulation shifts as well as scales.

    Source: DiT's adaLN-zero block as LightningDiT has it; Iwin paper section IV-D for the attention.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp: str,
        mlp_ratio: float,
        norm: str,
        shift_modulation: bool,
    ):
        super().__init__()
        self.norm1 = make_norm(norm, dim)
        self.attn = attention
        self.norm2 = make_norm(norm, dim)
        self.mlp = make_mlp(mlp, dim, mlp_ratio)
        self.shift_modulation = shift_modulation
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (6 if shift_modulation else 4) * dim))

    def forward(self, x: Tensor, cond: Tensor, registers: Tensor | None = None) -> Any:
        """Returns the block's output, and with registers the pair of both."""
        chunks = self.adaLN_modulation(cond)
        if self.shift_modulation:
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = chunks.chunk(6, dim=-1)
        else:
            scale_msa, gate_msa, scale_mlp, gate_mlp = chunks.chunk(4, dim=-1)
            shift_msa = shift_mlp = None
        streams = [x] if registers is None else [x, registers]
        attended = self.attn(*(modulate(self.norm1, s, scale_msa, shift_msa) for s in streams))
        attended = [attended] if registers is None else attended
        streams = [
            torch.addcmul(s, over_tokens(gate_msa, s), a) for s, a in zip(streams, attended, strict=True)
        ]
        projected = [self.mlp(modulate(self.norm2, s, scale_mlp, shift_mlp)) for s in streams]
        streams = [
            torch.addcmul(s, over_tokens(gate_mlp, s), p) for s, p in zip(streams, projected, strict=True)
        ]
        return streams[0] if registers is None else tuple(streams)


class FinalLayer(nn.Module):
    """(b, h, w, c), (b, c) → (b, h, w, out): norm, shift and scale, Linear."""

    def __init__(self, dim: int, out_dim: int, norm: str):
        super().__init__()
        self.norm_final = make_norm(norm, dim)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Returns the prediction for every patch."""
        shift, scale = self.adaLN_modulation(cond).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final, x, scale, shift))
