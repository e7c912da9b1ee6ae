"""Attention kinds by name: interleaved windows, plain windows, and LightningDiT's global attention.

A model has one of them, or a list of them that repeats over its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from flashdit.shared.registry import Registry
from iwin_core import IwinAttention
from iwin_core.attention import MultiHeadAttention
from iwin_core.rotary import Rotary

ATTENTIONS = Registry("attention")
"""A kind is called with a map (b, h, w, c), and registers (b, n, c) where the model has some; it returns the
map, or the pair of both."""
Attention = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
"""A spec, or a list of specs that repeats over the blocks."""


@dataclass(kw_only=True)
class AttentionShape:
    """Sizes that an attention kind is built for, beside its own options."""

    dim: int
    num_heads: int
    grid: tuple[int, int]
    qk_norm: type[nn.Module] | None

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.num_heads


@dataclass(kw_only=True)
class WindowOptions:
    """Options of both window kinds."""

    window: int = 4
    """Window side M in tokens."""
    kernel: int = 3
    """Side of the parallel depthwise kernel, odd; 0 leaves it out."""
    rope: bool = False
    """Whether queries and keys are turned by a 2-D rotary embedding of their coordinates on the map."""


@dataclass(kw_only=True)
class GlobalOptions:
    """Options of global attention."""

    rope: bool = True
    """Whether queries and keys are turned by a 2-D rotary embedding."""


@ATTENTIONS.register("iwin", WindowOptions)
def make_iwin(options: WindowOptions, shape: AttentionShape) -> IwinAttention:
    """Returns Iwin attention: interleaved windows beside a depthwise convolution."""
    return _make_windows(options, shape, interleaved=True)


@ATTENTIONS.register("window", WindowOptions)
def make_window(options: WindowOptions, shape: AttentionShape) -> IwinAttention:
    """Returns contiguous windows beside a depthwise convolution."""
    return _make_windows(options, shape, interleaved=False)


def _make_windows(options: WindowOptions, shape: AttentionShape, interleaved: bool) -> IwinAttention:
    """Returns the window attention after checking that its window fits the training grid."""
    window = options.window
    if not isinstance(window, int) or not 1 <= window <= max(shape.grid):
        raise ValueError(
            f"window must be between 1 and the side of the token grid, got {window=} for grid={shape.grid}"
        )
    rotary = Rotary(shape.grid, shape.head_dim) if options.rope else None
    return IwinAttention(
        shape.dim,
        shape.num_heads,
        window,
        options.kernel,
        interleaved=interleaved,
        qk_norm=shape.qk_norm,
        rotary=rotary,
    )


@ATTENTIONS.register("global", GlobalOptions)
class GlobalAttention(MultiHeadAttention):
    """(b, h, w, c) → the same: every token attends to every token, as in DiT and LightningDiT.

    Args:
        options: Whether to use the rotary embedding.
        shape: Width, heads, the native grid and the norm of queries and keys.
    """

    def __init__(self, options: GlobalOptions, shape: AttentionShape):
        rotary = Rotary(shape.grid, shape.head_dim) if options.rope else None
        super().__init__(shape.dim, shape.num_heads, qk_norm=shape.qk_norm, rotary=rotary)

    def forward(self, x: Tensor, registers: Tensor | None = None) -> Any:
        """Returns the attention of all tokens, and of the registers (b, n, c) if there are any."""
        grid = (x.shape[1], x.shape[2])
        tables = [] if self.rotary is None else self.rotary(grid)
        tables = [rearrange(table, "h w d -> 1 (h w) d") for table in tables]
        tokens, registers = self.attend_all(x.flatten(1, 2), registers, tables=tables)
        attended = rearrange(tokens, "b (h w) c -> b h w c", h=grid[0])
        return attended if registers is None else (attended, registers)


def each_attention(attention: Attention) -> list[Any]:
    """Returns the specs of a list of attention kinds, or the one spec."""
    return list(attention) if isinstance(attention, list | tuple) else [attention]


@contextmanager
def naming_entry(attention: Attention, place: int) -> Iterator[None]:
    """Puts the place in the list, from 0, before what is wrong with one of several attention kinds."""
    try:
        yield
    except ValueError as error:
        if isinstance(attention, list | tuple):
            raise ValueError(f"attention[{place}]: {error}") from error
        raise


def check_attention(attention: Attention) -> None:
    """Raises ValueError unless every attention kind and its options are known."""
    for place, spec in enumerate(each_attention(attention)):
        with naming_entry(attention, place):
            ATTENTIONS.options(spec)


def make_attention(attention: Attention, block: int, shape: AttentionShape) -> nn.Module:
    """Returns the attention of a block: a list of kinds repeats over the blocks.

    Args:
        attention: A spec `{"name": ..., **options}`, or a list of them.
        block: Its number, from 0.
        shape: Sizes of the model.

    Raises:
        ValueError: If the kind or an option is invalid; says which entry of a list it is.
    """
    specs = each_attention(attention)
    place = block % len(specs)
    with naming_entry(attention, place):
        return ATTENTIONS.build(specs[place], shape)


def fill_attention(attention: Attention) -> Any:
    """Returns an attention spec, or a list of them, as YAML has it with all options."""
    if isinstance(attention, list | tuple):
        return [ATTENTIONS.filled(spec) for spec in attention]
    return ATTENTIONS.filled(attention)


def describe_attention(attention: Attention, depth: int) -> str:
    """Returns which attention the blocks have: `3 × iwin (window 4), global; 7 times over 28 blocks`.

    Args:
        attention: A spec or a list of them.
        depth: Blocks.
    """

    def words(spec: Any) -> str:
        given = {"name": spec} if isinstance(spec, str) else spec
        options = ", ".join(f"{key} {value}" for key, value in given.items() if key != "name")
        return given["name"] + (f" ({options})" if options else "")

    specs = each_attention(attention)
    runs = [(len(list(run)), text) for text, run in groupby(map(words, specs))]
    text = ", ".join(f"{count} × {text}" if count > 1 else text for count, text in runs)
    return text if len(specs) == 1 else f"{text}; {depth / len(specs):.3g} times over {depth} blocks"
