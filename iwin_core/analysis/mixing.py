"""Where does what a token holds get to in n blocks, as sets of tokens: Iwin, Swin, plain windows.

A block is x + attention(LN x) + conv(LN x): what a token holds gets to the tokens of its window and to those
under a kernel centred on it. Lemma 2 of the paper (arXiv 2507.18405) prints a distance of K for the latter; a
centred kernel reaches ⌊K/2⌋. Norms and the MLP mix no tokens. A union of window and kernel is no product of
axes, so the sets are those of the whole map.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iwin_core.analysis.global_exchange import kernel_radius
from iwin_core.windows import Window, per_axis

Relation = tuple[Tensor, ...]  # bool (side, side) per axis: a token moves where every axis lets it


@dataclass(kw_only=True, frozen=True)
class Kind:
    """How a kind of block mixes tokens.

    Args:
        label: What tables call it.
        groupings: Which windows successive blocks attend in, in turn: interleaved, plain or shifted.
        conv: Where the convolution stands: "parallel" to the attention, "serial" before it, or None.
    """

    label: str
    groupings: tuple[str, ...]
    conv: str | None = None


KINDS = {
    "iwin": Kind(label="Iwin, parallel (S1)", groupings=("interleaved",), conv="parallel"),
    "iwin_serial": Kind(label="Iwin, serial (S3)", groupings=("interleaved",), conv="serial"),
    "iwin_no_conv": Kind(label="Iwin without conv", groupings=("interleaved",)),
    "swin": Kind(label="Swin", groupings=("plain", "shifted")),
    "plain_conv": Kind(label="plain windows + conv", groupings=("plain",), conv="parallel"),
    "plain": Kind(label="plain windows", groupings=("plain",)),
}


def groups(side: int, window: int, grouping: str) -> Tensor:
    """Returns which window each token of an axis is in: int (side,).

    Shifted windows begin M // 2 later and do not wrap, as Swin's mask has it; one window over the whole axis
    is not shifted. Where M does not divide the side, windows at its end hold padding, which reaches nothing.
    """
    window = min(window, side)
    place = torch.arange(side)
    if grouping == "interleaved":
        return place % math.ceil(side / window)
    shift = window // 2 if grouping == "shifted" and window < side else 0
    return (place - shift).div(window, rounding_mode="floor")


def same_window(grid: Sequence[int], window: Window, grouping: str) -> Relation:
    """Returns which places share a window, bool (side, side) per axis: Lemma 1 for interleaved windows."""
    windows = per_axis(window, len(grid), "window")
    places = [groups(side, m, grouping) for side, m in zip(grid, windows, strict=True)]
    return tuple(group[:, None] == group for group in places)


def under_kernel(grid: Sequence[int], kernel: Window) -> Relation:
    """Returns which places a centred kernel connects, bool (side, side) per axis: Lemma 2 with ⌊K/2⌋."""
    radii = kernel_radius(kernel, len(grid))
    return tuple(
        (torch.arange(side)[:, None] - torch.arange(side)).abs() <= r
        for side, r in zip(grid, radii, strict=True)
    )


def follow(reached: Tensor, relation: Relation) -> Tensor:
    """Returns the tokens one move away from those reached: bool (s, *grid) → the same."""
    for axis, allowed in enumerate(relation, start=1):
        moved = reached.movedim(axis, -1).float() @ allowed.float()
        reached = (moved > 0).movedim(-1, axis)
    return reached


def every_token(grid: Sequence[int]) -> Tensor:
    """Returns each token by itself, in row-major order: bool (N, *grid)."""
    num_tokens = math.prod(grid)
    return torch.eye(num_tokens, dtype=torch.bool).reshape(num_tokens, *grid)


def one_token(grid: Sequence[int], token: Sequence[int]) -> Tensor:
    """Returns a single token: bool (1, *grid)."""
    if len(token) != len(grid) or not all(0 <= i < side for i, side in zip(token, grid, strict=True)):
        raise ValueError(f"token must lie inside the map, got token={tuple(token)} for size={tuple(grid)}")
    start = torch.zeros(1, *grid, dtype=torch.bool)
    start[(0, *token)] = True
    return start


def spread(
    grid: Sequence[int], window: Window, kernel: Window, kind: str, token: Sequence[int] | None = None
) -> Iterator[Tensor]:
    """Returns an endless iterator over what is reached after 1, 2, 3, … blocks: bool (s, *grid) each.

    Args:
        grid: Sides of the map, of any rank; the window need not divide them.
        window: Window side M, or one per axis.
        kernel: Kernel side K, odd, or one per axis; kinds without a convolution leave it aside.
        kind: One of `KINDS`.
        token: Where to start from, s = 1; None starts from each token in row-major order, s = N.

    Raises:
        ValueError: If a size, window, kernel, kind or token is invalid.
    """
    grid = per_axis(tuple(grid), len(grid), "size")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind=}")
    start = every_token(grid) if token is None else one_token(grid, token)
    attentions = [same_window(grid, window, grouping) for grouping in KINDS[kind].groupings]
    return _blocks(start, attentions, under_kernel(grid, kernel), KINDS[kind].conv)


def _blocks(reached: Tensor, attentions: Sequence[Relation], conv: Relation, order: str | None) -> Iterator:
    """Yields what is reached after each block; a window holds its own token, so the residual adds nothing."""
    for attention in itertools.cycle(attentions):
        if order == "serial":
            reached = follow(follow(reached, conv), attention)
        elif order == "parallel":
            reached = follow(reached, attention) | follow(reached, conv)
        else:
            reached = follow(reached, attention)
        yield reached


def reach(
    grid: Sequence[int],
    window: Window,
    kernel: Window,
    kind: str,
    blocks: int = 1,
    token: Sequence[int] | None = None,
) -> Tensor:
    """Returns what is reached after n blocks: bool (s, *grid), entry s the tokens that start s gets to.

    Args:
        grid: Sides of the map, of any rank.
        window: Window side M, or one per axis.
        kernel: Kernel side K, odd, or one per axis.
        kind: One of `KINDS`.
        blocks: Number of blocks, at least 1.
        token: Where to start from; None starts from each token.

    Raises:
        ValueError: If an argument is invalid.
    """
    if blocks < 1:
        raise ValueError(f"blocks must be positive, got {blocks=}")
    return next(itertools.islice(spread(grid, window, kernel, kind, token), blocks - 1, None))


@dataclass(kw_only=True, frozen=True)
class Coverage:
    """How much of the map is reached.

    Args:
        shares: The part of the map that a token reaches after 1, 2, … blocks: least, mean, most over tokens.
        blocks_until_all: Blocks until every token reaches every other; None if it never does.
    """

    shares: tuple[tuple[float, float, float], ...]
    blocks_until_all: int | None


def coverage(grid: Sequence[int], window: Window, kernel: Window, kind: str, blocks: int) -> Coverage:
    """Returns how much is reached after 1 … n blocks, and how many blocks reach everything.

    Args:
        grid: Sides of the map, of any rank.
        window: Window side M, or one per axis.
        kernel: Kernel side K, odd, or one per axis.
        kind: One of `KINDS`.
        blocks: Number of blocks n that shares are given for, at least 1.

    Raises:
        ValueError: If an argument is invalid.
    """
    if blocks < 1:
        raise ValueError(f"blocks must be positive, got {blocks=}")
    shares, until_all, idle, before = [], None, 0, torch.empty(0)
    for number, reached in enumerate(spread(grid, window, kernel, kind), start=1):
        counts = reached.flatten(1).sum(1) / math.prod(grid)
        shares.append((counts.min().item(), counts.mean().item(), counts.max().item()))
        until_all = number if until_all is None and bool(reached.all()) else until_all
        # Alternating windows are stuck only when each of them has added nothing.
        idle = idle + 1 if torch.equal(reached, before) else 0
        if number >= blocks and (until_all is not None or idle >= len(KINDS[kind].groupings)):
            break
        before = reached
    return Coverage(shares=tuple(shares[:blocks]), blocks_until_all=until_all)
