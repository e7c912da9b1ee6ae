"""How much of the map does a token reach in n blocks? Iwin beside Swin, as a table and a picture."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashdit.shared.command import run_script
from iwin_core.analysis.mixing import KINDS, spread
from iwin_core.analysis.reach import table, verdict

if TYPE_CHECKING:
    from PIL.Image import Image


MAX_TOKENS = 9_216  # all pairs are held in memory


NEVER, BEFORE, NEW, START = (234, 234, 234), (158, 194, 230), (31, 88, 156), (214, 39, 40)


def panel(reached: Tensor, before: Tensor, token: Sequence[int]) -> Tensor:
    """Returns uint8 (h, w, 3): what this block added, what was reached before, what is not, and the start."""
    palette = torch.tensor([NEVER, BEFORE, NEW, START], dtype=torch.uint8)
    index = reached.long() * 2 - (reached & before).long()
    index[tuple(token)] = 3
    return palette[index]


def draw(
    grid: Sequence[int], window: int, kernel: int, blocks: int, tokens: Sequence[Sequence[int]]
) -> Image:
    """Returns the picture: a row per kind of block; for each token a column per number of blocks.

    Args:
        grid: H and W.
        window: Window side M.
        kernel: Kernel side K.
        blocks: Columns for each token.
        tokens: Where to start from, each (row, column).
    """
    from flashdit.shared.pictures import panel_grid
    from iwin_tasks.commands.panels import colour_key, to_picture

    rows = []
    for name, kind in KINDS.items():
        panels = []
        for token in tokens:
            before = torch.zeros(*grid, dtype=torch.bool)
            for reached in itertools.islice(spread(grid, window, kernel, name, token), blocks):
                panels.append(to_picture(panel(reached[0], before, token), height=170))
                before = reached[0]
        rows.append((kind.label, panels))
    heads = [f"({i}, {j}), {n} block{'s' * (n > 1)}" for i, j in tokens for n in range(1, blocks + 1)]
    key = colour_key(
        [(START, "start"), (NEW, "reached in this block"), (BEFORE, "reached before"), (NEVER, "not reached")]
    )
    title = f"What one token reaches: {grid[0]} x {grid[1]} tokens, window {window}, kernel {kernel}"
    return panel_grid(rows, heads, title=title, legend=key)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(prog="python -m iwin_core.analysis.reach", description=__doc__)
    parser.add_argument(
        "--size", type=int, nargs="+", default=[56], metavar="TOKENS", help="H and W, or one side"
    )
    parser.add_argument("--window", type=int, default=7, help="window side M (default: 7)")
    parser.add_argument("--kernel", type=int, default=3, help="kernel side K, odd (default: 3)")
    parser.add_argument("--blocks", type=int, default=3, help="blocks shown one by one (default: 3)")
    parser.add_argument(
        "--token",
        type=int,
        nargs=2,
        metavar=("ROW", "COLUMN"),
        help="where the picture starts (default: centre, corner)",
    )
    parser.add_argument("--output", type=Path, metavar="PNG", help="where the picture goes; none without it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and what Theorem 3 says; draws the picture where `--output` is given."""
    arguments = parse_arguments(argv)
    grid = tuple(arguments.size) * (2 if len(arguments.size) == 1 else 1)
    if len(grid) != 2 or min(grid) < 1 or math.prod(grid) > MAX_TOKENS:
        raise ValueError(
            f"size must be one or two positive sides, {MAX_TOKENS:,} tokens at most, got size={grid}"
        )
    sizes = (grid, arguments.window, arguments.kernel, arguments.blocks)
    print(table(*sizes), verdict(*sizes[:3]), sep="\n\n")
    if arguments.output:
        tokens = [arguments.token] if arguments.token else [(grid[0] // 2, grid[1] // 2), (0, 0)]
        draw(*sizes, tokens).save(arguments.output)
        print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    run_script(main)
