"""`flashdit app`: a web page that samples from trained models, side by side if there are two.

It listens on this machine alone unless `--host` says otherwise, loads nothing from elsewhere, reports to
nobody, takes no files, and refuses other sites' pages and requests that would keep it busy for too long.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flashdit.commands.arguments import add_weights, path_text
from flashdit.shared.command import CommandParser, add_device, resolve_device

HOST, PORT = "127.0.0.1", 7860
MAX_WORK = 400  # of the order of 50 images at 256² by 100 model evaluations


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values, checked."""
    parser = CommandParser(description="A web page that samples from trained models.")
    add = parser.add_argument
    add(
        "--checkpoint",
        type=path_text,
        nargs="+",
        default=[None],
        metavar="RUN",
        help="runs or checkpoint folders; several can be shown side by side (default: the newest run)",
    )
    add_weights(parser)
    add("--host", default=HOST, help=f"address to listen on (default: {HOST}, this machine alone)")
    add("--port", type=int, default=PORT, help=f"(default: {PORT})")
    add(
        "--allow-host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names or addresses in a browser's address line that may reach the page, beside this machine's "
        "loopback names and --host",
    )
    add(
        "--max-work",
        type=float,
        default=MAX_WORK,
        metavar="MILLIONS",
        help="the most a request may take, in millions of images × pixels × model evaluations, a guided "
        f"image taking two a step (default: {MAX_WORK})",
    )
    add_device(parser)
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.port <= 65535:
        raise ValueError(f"--port must be from 1 to 65535, got {arguments.port}")
    if not arguments.max_work > 0:
        raise ValueError(f"--max-work must be positive, got {arguments.max_work}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, then serves the page."""
    given = parse(argv)
    device = resolve_device(given.device)

    from flashdit.shared.process import keep_freed_memory
    from flashdit.web.serve import serve

    if device.startswith("cpu"):
        keep_freed_memory()
    serve(
        given.checkpoint,
        given.host,
        given.port,
        device,
        given.vae,
        given.ema,
        allowed=given.allow_host,
        max_work=given.max_work,
    )
