"""`flashdit app`: a web page that samples from trained models, side by side if there are two.

It listens on this machine alone unless `--host` says otherwise, loads nothing from elsewhere and reports to
nobody.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flashdit.shared.command import add_device, resolve_device
from flashdit.web.studio import Studio, load_generators

HOST, PORT = "127.0.0.1", 7860
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when gradio is imported


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values, checked."""
    parser = argparse.ArgumentParser(
        prog="flashdit app", description="A web page that samples from trained models."
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        nargs="+",
        default=[None],
        metavar="RUN",
        help="runs or checkpoint folders; several can be shown side by side (default: the newest run)",
    )
    add(
        "--ema", default="ema", metavar="WEIGHTS", help="ema (default), model for the raw weights, or another"
    )
    add("--vae", help="folder of the VAE, where it is no longer where it was in training")
    add("--host", default=HOST, help=f"address to listen on (default: {HOST}, this machine alone)")
    add("--port", type=int, default=PORT, help=f"(default: {PORT})")
    add_device(parser)
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.port <= 65535:
        raise ValueError(f"--port must be from 1 to 65535, got {arguments.port}")
    return arguments


def check_free(host: str, port: int) -> None:
    """Raises ValueError unless this host and port can be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ValueError(
            f"--host and --port must be free to listen on, got {host} {port}: {error}"
        ) from error


def serve(studio: Studio, host: str, port: int) -> None:
    """Serves the page until it is interrupted.

    Raises:
        ValueError: If gradio is not installed.
    """
    os.environ |= QUIET
    try:
        from flashdit.web.page import CSS, THEME, make_page
    except ModuleNotFoundError as error:
        raise ValueError(f"the web page needs gradio (pip install 'flashdit[app]'): {error}") from error
    page = make_page(studio)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        theme=THEME,
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )
    print(f"http://{host}:{port} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the models, then serves the page."""
    arguments = parse(argv)
    check_free(arguments.host, arguments.port)
    device = resolve_device(arguments.device)
    generators = load_generators(arguments.checkpoint, device, arguments.vae, arguments.ema)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes with the process
    with tempfile.TemporaryDirectory(prefix="flashdit-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = f"{folder}/served"
        serve(Studio(generators, Path(folder)), arguments.host, arguments.port)
