"""How much of the map does a token reach in n blocks? Iwin beside Swin, as a table and a picture."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from flashdit.commands.arguments import png_path
from flashdit.shared.command import CommandParser
from flashdit.shared.files import DRAWN
from flashdit.shared.locks import only_writer

MAX_TOKENS = 9_216  # all pairs are held in memory
MAX_BLOCKS = 100  # each is a column of the table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line."""
    parser = CommandParser(description=__doc__)
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
    parser.add_argument(
        "--output", type=png_path, metavar="PNG", help="where the picture goes; none without it"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and what Theorem 3 says; draws the picture where `--output` is given."""
    arguments = parse(argv)
    if arguments.token and not arguments.output:
        raise ValueError(f"--token is for the picture that --output names, got {arguments.token} without it")
    grid = tuple(arguments.size) * (2 if len(arguments.size) == 1 else 1)
    if len(grid) != 2 or min(grid) < 1 or math.prod(grid) > MAX_TOKENS:
        raise ValueError(
            f"size must be one or two positive sides, {MAX_TOKENS:,} tokens at most, got size={grid}"
        )
    if arguments.blocks > MAX_BLOCKS:
        raise ValueError(f"--blocks must be at most {MAX_BLOCKS}, got {arguments.blocks}")
    from iwin_core.analysis.reach import table, verdict

    sizes = (grid, arguments.window, arguments.kernel, arguments.blocks)
    shown = [table(*sizes), verdict(*sizes[:3])]
    if arguments.output:
        tokens = [arguments.token] if arguments.token else [(grid[0] // 2, grid[1] // 2), (0, 0)]
        from iwin_tasks.commands.drawing import draw_reach, save_drawing

        with only_writer(arguments.output, is_file=True, mark=DRAWN):
            save_drawing(draw_reach(*sizes, tokens), arguments.output)
        shown.append(f"wrote {arguments.output}")
    print(*shown, sep="\n\n")
