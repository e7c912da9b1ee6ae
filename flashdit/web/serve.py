"""Serving the page: the port is checked, models are loaded, pictures go with the process."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flashdit.shared.command import need_extra
from flashdit.web.studio import Studio, load_generators

QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when gradio is imported


def check_free(host: str, port: int) -> None:
    """Raises ValueError unless this host and port can be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ValueError(
            f"--host and --port must be free to listen on, got {host} {port}: {error}"
        ) from error


def serve(
    checkpoints: Sequence[str | None], host: str, port: int, device: str, vae: str | None, weights: str
) -> None:
    """Serves a page of checkpoints until it is interrupted.

    Args:
        checkpoints: Checkpoint folders or runs; None means the newest run.
        host: Address to listen on.
        port: Likewise.
        device: Where the models run.
        vae: Folder of the VAE, where it is no longer where it was in training.
        weights: Which of the checkpoints' weights.

    Raises:
        ValueError: If gradio is not installed, the port is taken, or a checkpoint makes no pictures.
    """
    check_free(host, port)
    generators = load_generators(checkpoints, device, vae, weights)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes with the process
    with tempfile.TemporaryDirectory(prefix="flashdit-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = f"{folder}/served"
        launch(Studio(generators, Path(folder)), host, port)


def launch(studio: Studio, host: str, port: int) -> None:
    """Serves the page of a studio."""
    os.environ |= QUIET
    need_extra("gradio", "app")
    from flashdit.web.page import CSS, THEME, make_page  # imports gradio

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
