"""Serving the page: the port is held, models are loaded, requests are guarded, pictures go at the end."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flashdit.shared.command import need_extra
from flashdit.shared.locks import held
from flashdit.shared.paths import resolved
from flashdit.web.studio import Studio, load_generators

QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when gradio is imported
FOLDER, OWNER = "flashdit-app-", "owner.lock"
EVERYWHERE = ("0.0.0.0", "::")
MAX_WAITING, MAX_CONNECTIONS = 16, 256
LAST_SECONDS = 2
ENDING = ("SIGINT", "SIGTERM", "SIGHUP")


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on a host and a port, so that nobody else can take them.

    Raises:
        ValueError: If it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(
            f"--host and --port must be free to listen on, got {host} {port}: {error}"
        ) from error


@contextmanager
def own_folder() -> Iterator[Path]:
    """Yields a temporary folder that goes with the process; what killed processes left goes first."""
    for owner in Path(tempfile.gettempdir()).glob(f"{FOLDER}*/{OWNER}"):
        with suppress(OSError), held(owner) as free:  # it may be somebody else's
            if free:
                shutil.rmtree(owner.parent)
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder:
        owner = Path(folder, OWNER)
        owner.touch()
        with held(owner):
            yield resolved(folder)


def serve(
    checkpoints: Sequence[str | None],
    host: str,
    port: int,
    device: str,
    vae: str | None,
    weights: str,
    allowed: Sequence[str],
    max_work: float,
) -> None:
    """Serves a page of checkpoints until it is interrupted.

    Args:
        checkpoints: Checkpoint folders or runs; None means the newest run.
        host: Address to listen on.
        port: Likewise.
        device: Where the models run.
        vae: Folder of the VAE, where it is no longer where it was in training.
        weights: Which of the checkpoints' weights.
        allowed: Names under which the page is reached, beside loopback ones and `host`.
        max_work: Millions of images × pixels × model evaluations that a request may take.

    Raises:
        ValueError: If gradio is not installed, the port is taken, or a checkpoint makes no pictures.
    """
    for name in ENDING:  # so that the folder goes with the process
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: sys.exit(0))
    with listen(host, port) as listener:
        generators = load_generators(checkpoints, device, vae, weights)
        with own_folder() as folder:
            os.environ["GRADIO_TEMP_DIR"] = f"{folder}/served"
            studio = Studio(generators, folder, vae=vae, max_work=max_work)
            try:
                launch(studio, listener, host, allowed)
            finally:
                studio.is_closed = True  # a thread that samples ends at its next step


def launch(studio: Studio, listener: socket.socket, host: str, allowed: Sequence[str]) -> None:
    """Serves the page of a studio on a socket that listens."""
    os.environ |= QUIET
    need_extra("gradio", "app")
    import gradio as gr  # pyright: ignore[reportMissingImports]
    import uvicorn
    from fastapi import FastAPI

    from flashdit.web.guard import Guard
    from flashdit.web.page import CSS, THEME, make_page

    page = make_page(studio).queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    gr.set_static_paths(studio.folder)  # served where they are: no copies
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        theme=THEME,
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    functions = page.fns.items()
    inputs = {key: len(made.inputs) for number, made in functions for key in (number, made.api_name)}
    config = uvicorn.Config(
        Guard(app, [host, *allowed], studio.folder, inputs),
        log_level="warning",
        ws="none",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    port = listener.getsockname()[1]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)
    if host in EVERYWHERE and not allowed:
        print("It listens on every address, and answers to loopback names alone: give --allow-host NAME")
    server = uvicorn.Server(config)
    quiet_at_the_end(server)
    server.run(sockets=[listener])


def quiet_at_the_end(server: Any) -> None:
    """Keeps the tracebacks of requests that are cut off when a uvicorn server ends off the terminal."""
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
