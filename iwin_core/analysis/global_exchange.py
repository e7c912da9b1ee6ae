"""When does every token reach every other? Theorem 3 as the paper prints it, and for a centred kernel.

Three readings of "a block of interleaved attention and K × K convolution reaches everything", G = ⌈H / M⌉:

- As printed, the convolution reaches K tokens (Lemma 2) and follows the attention: K·M ≥ max(H, W) suffices,
  but is not necessary; exact is (K + 1)·M ≥ max(H, W).
- A centred kernel reaches ⌊K/2⌋: exact is (⌊K/2⌋ + 1)·M ≥ max(H, W). The printed condition does not suffice.
- In the paper's own block (S1) attention and convolution stand side by side, so one after the other takes two
  blocks; how many blocks reach everything is `parallel_blocks`.

tests/iwin_core/analysis/test_reach.py proves each by exhaustive search over small maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from iwin_core.windows import Window, per_axis


def kernel_radius(kernel: Window, rank: int) -> tuple[int, ...]:
    """Returns how far a centred kernel reaches along each axis: ⌊K/2⌋.

    Raises:
        ValueError: If the kernel is not odd.
    """
    sides = per_axis(kernel, rank, "kernel")
    if not all(k % 2 for k in sides):
        raise ValueError(f"kernel must be odd along every axis, got kernel={sides}")
    return tuple(k // 2 for k in sides)


def theorem_3_as_printed(grid: Sequence[int], window: Window, kernel: Window) -> bool:
    """Returns whether K·M ≥ the side along every axis.

    Source: Iwin paper (arXiv 2507.18405), Theorem 3. It rests on Lemma 2, by which a convolution reaches K
    tokens; a centred one reaches ⌊K/2⌋, so this is not what a block does: see `one_step_reaches_all`.
    """
    rank = len(grid)
    sizes = zip(grid, per_axis(window, rank, "window"), per_axis(kernel, rank, "kernel"), strict=True)
    return all(k * m >= side for side, m, k in sizes)


def one_step_reaches_all(grid: Sequence[int], window: Window, radius: Window) -> bool:
    """Returns whether attention and convolution, one after the other, take every token to every other.

    This is exact. Attention leads to every G-th token, G = ⌈side / M⌉; the convolution must cover what lies
    between. Inside the map ⌊G/2⌋ would do, but token 0 is G − 1 away from the first token of the last window:
    radius ≥ G − 1, that is (radius + 1)·M ≥ side, along every axis. The order of the two does not matter, nor
    whether M divides the side.

    Args:
        grid: Sides of the map, of any rank.
        window: Window side M, or one per axis.
        radius: How far the convolution reaches, or one per axis: ⌊K/2⌋ if centred, K as Lemma 2 has it.

    Source: Iwin paper, Theorem 3. Differs from it: the printed K·M ≥ max(H, W) is replaced by what is exact.
    """
    rank = len(grid)
    windows = per_axis(window, rank, "window")
    radii = (radius,) * rank if isinstance(radius, int) else tuple(radius)
    return all((r + 1) * m >= side for side, m, r in zip(grid, windows, radii, strict=True))


def parallel_blocks(grid: Sequence[int], window: Window, kernel: Window) -> int | None:
    """Returns how many parallel blocks (S1) are enough for each token to reach every other; None if none are.

    The best of three routes, A for attention, C for convolution, r = ⌊K/2⌋, the worst axis deciding each:
    C alone, ⌈(side − 1)/r⌉ blocks; A then C, 1 + ⌈(G − 1)/r⌉; and A, C, A, where C only goes from one place
    modulo G to another, the shorter way round, 2 + ⌈⌊G/2⌋/r⌉. Exact where M divides a square map. Elsewhere
    routes can share the pairs of tokens between them, and one block less may do.

    Args:
        grid: Sides of the map, of any rank.
        window: Window side M, or one per axis.
        kernel: Kernel side K, odd, or one per axis.

    Source: ours; the paper's Theorem 3 counts A then C as one block, which holds for its serial structure S3.
    """
    rank = len(grid)
    windows = [min(m, side) for m, side in zip(per_axis(window, rank, "window"), grid, strict=True)]
    axes = list(zip(grid, windows, kernel_radius(kernel, rank), strict=True))
    conv = max(_steps(side - 1, r) for side, _, r in axes)
    attention_conv = 1 + max(_steps(math.ceil(side / m) - 1, r) for side, m, r in axes)
    both_ends = 2 + max(_steps(math.ceil(side / m) // 2 if m > 1 else side - 1, r) for side, m, r in axes)
    fewest = min(max(conv, 1), attention_conv, both_ends)
    return None if fewest == math.inf else int(fewest)


def _steps(distance: int, radius: int) -> float:
    """Returns how many steps of a radius cover a distance; infinity if none do."""
    if radius:
        return math.ceil(distance / radius)
    return math.inf if distance else 0
