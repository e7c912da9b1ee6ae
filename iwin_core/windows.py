"""Interleaved windows on grids of any rank: rearrange / restore (paper eqs 1, 5), partition / merge."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange as einops_rearrange
from torch import Tensor

Window = int | Sequence[int]


def per_axis(value: Window, rank: int, name: str) -> tuple[int, ...]:
    """Returns one positive integer per axis; a single number stands for all axes.

    Args:
        value: One integer, or one per axis.
        rank: How many axes the grid has.
        name: What the value is, for the message.

    Raises:
        ValueError: If the count or a value is invalid.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank or not all(isinstance(v, int) and v >= 1 for v in values):
        raise ValueError(f"{name} must be a positive integer, or one for each of {rank} axes, got {value!r}")
    return values


def check_divides(grid: Sequence[int], window: Sequence[int]) -> None:
    """Raises ValueError unless the window divides the grid along every axis."""
    if any(side % m for side, m in zip(grid, window, strict=True)):
        raise ValueError(
            f"window must divide the grid along every axis, got window={tuple(window)} for grid={tuple(grid)}"
        )


def _axes(rank: int, pattern: str) -> str:
    """Returns the pattern once per axis, `*` standing for the axis number."""
    return " ".join(pattern.replace("*", str(axis)) for axis in range(rank))


def _places(window: Sequence[int]) -> dict[str, int]:
    """Returns the einops sizes `m0, m1, …`: places in a window along each axis."""
    return {f"m{axis}": m for axis, m in enumerate(window)}


def rearrange(x: Tensor, window: Window) -> Tensor:
    """Returns the map with the tokens of each interleaved window side by side.

    With Hg = H / M, the token at row i goes to row (i mod Hg)·M + ⌊i / Hg⌋; likewise along every other axis.

    Args:
        x: Map (B, *grid, C).
        window: Window side M, or one per axis; must divide the grid.

    Returns:
        The permuted map, of the same shape.

    Raises:
        ValueError: If the window does not divide the grid.

    Source: Iwin paper (arXiv 2507.18405), eq. (1) and Algorithm 1.
    """
    grid = x.shape[1:-1]
    window = per_axis(window, len(grid), "window")
    check_divides(grid, window)
    rank = len(grid)
    # rank 2: 'b (m0 g0) (m1 g1) c -> b (g0 m0) (g1 m1) c'
    pattern = f"b {_axes(rank, '(m* g*)')} c -> b {_axes(rank, '(g* m*)')} c"
    return einops_rearrange(x, pattern, **_places(window))


def restore(x: Tensor, window: Window) -> Tensor:
    """Returns the map that `rearrange` was given: its inverse.

    Args:
        x: Rearranged map (B, *grid, C).
        window: The window that it was rearranged for.

    Raises:
        ValueError: If the window does not divide the grid.

    Source: Iwin paper, eq. (5).
    """
    grid = x.shape[1:-1]
    window = per_axis(window, len(grid), "window")
    check_divides(grid, window)
    rank = len(grid)
    pattern = f"b {_axes(rank, '(g* m*)')} c -> b {_axes(rank, '(m* g*)')} c"
    return einops_rearrange(x, pattern, **_places(window))


def partition(x: Tensor, window: Window, interleaved: bool = True) -> Tensor:
    """Returns the tokens of every window.

    Interleaved, window (p, q) holds the tokens (a·Hg + p, b·Wg + q), slot (a, b) in row-major order; the same
    grouping as timm's MaxViT `grid_partition`. Otherwise windows are contiguous blocks.

    Args:
        x: Map (B, *grid, C).
        window: Window side M, or one per axis; must divide the grid.
        interleaved: Whether windows take every Hg-th token or M neighbours.

    Returns:
        Windows (B · num_windows, prod(window), C), the windows of one sample side by side.

    Raises:
        ValueError: If the window does not divide the grid.
    """
    grid = x.shape[1:-1]
    window = per_axis(window, len(grid), "window")
    check_divides(grid, window)
    rank = len(grid)
    # rank 2: 'b (m0 g0) (m1 g1) c -> (b g0 g1) (m0 m1) c'
    axis = "(m* g*)" if interleaved else "(g* m*)"
    pattern = f"b {_axes(rank, axis)} c -> (b {_axes(rank, 'g*')}) ({_axes(rank, 'm*')}) c"
    return einops_rearrange(x, pattern, **_places(window))


def merge(windows: Tensor, window: Window, grid: Sequence[int], interleaved: bool = True) -> Tensor:
    """Returns the map that `partition` was given: its inverse.

    Args:
        windows: Windows (B · num_windows, prod(window), C).
        window: The window of the partition.
        grid: The sides of the map.
        interleaved: As in `partition`.

    Returns:
        Map (B, *grid, C).

    Raises:
        ValueError: If the window does not divide the grid.
    """
    rank = len(grid)
    window = per_axis(window, rank, "window")
    check_divides(grid, window)
    axis = "(m* g*)" if interleaved else "(g* m*)"
    pattern = f"(b {_axes(rank, 'g*')}) ({_axes(rank, 'm*')}) c -> b {_axes(rank, axis)} c"
    groups = {f"g{i}": side // m for i, (side, m) in enumerate(zip(grid, window, strict=True))}
    return einops_rearrange(windows, pattern, **groups, **_places(window))
