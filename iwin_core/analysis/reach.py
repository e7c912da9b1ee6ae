"""How much of the map does a token reach in n blocks? Iwin beside Swin, as text."""

from __future__ import annotations

from collections.abc import Sequence

from iwin_core.analysis.global_exchange import (
    kernel_radius,
    one_step_reaches_all,
    parallel_blocks,
    theorem_3_as_printed,
)
from iwin_core.analysis.mixing import KINDS, coverage


def table(grid: Sequence[int], window: int, kernel: int, blocks: int) -> str:
    """Returns the share of the map that a token reaches after 1 … n blocks, one line per kind of block."""
    size = " x ".join(map(str, grid))
    heads = [f"after {n} block{'s' * (n > 1)}" for n in range(1, blocks + 1)]
    lines = [
        f"{size} tokens, window {window}, kernel {kernel}: share of the map a token reaches (least - most)",
        f"{'':<22}" + "".join(f"{head:<25}" for head in heads) + "every pair after",
    ]
    for name, kind in KINDS.items():
        covered = coverage(grid, window, kernel, name, blocks)
        cells = [f"{mean:6.1%} ({low:.1%} - {high:.1%})" for low, mean, high in covered.shares]
        until = covered.blocks_until_all
        last = "never" if until is None else f"{until} block{'s' * (until > 1)}"
        lines.append(f"{kind.label:<22}" + "".join(f"{cell:<25}" for cell in cells) + last)
    return "\n".join(lines)


def verdict(grid: Sequence[int], window: int, kernel: int) -> str:
    """Returns what Theorem 3 says of these sizes, as printed and for a centred kernel."""
    radius, side = kernel // 2, max(grid)
    printed = theorem_3_as_printed(grid, window, kernel)
    lemma_2 = one_step_reaches_all(grid, window, kernel)
    exact = one_step_reaches_all(grid, window, kernel_radius(kernel, len(grid)))
    parallel = parallel_blocks(grid, window, kernel)
    answer = {True: "holds", False: "does not hold"}
    return "\n".join(
        [
            f"Theorem 3 as printed, K*M >= max(H, W): {kernel}*{window} >= {side} {answer[printed]}",
            f"exact if the kernel reached K, (K + 1)*M: {kernel + 1}*{window} >= {side} {answer[lemma_2]}",
            f"exact for a centred kernel in a serial block, (K//2 + 1)*M: "
            f"{radius + 1}*{window} >= {side} {answer[exact]}",
            f"parallel blocks that are enough: {'no number' if parallel is None else parallel}",
        ]
    )
