"""How a command runs: a user's mistake is one line on stderr and exit status 2; the device is checked."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf.errors import OmegaConfBaseException


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what a user can cause ends it with one sentence instead of a traceback.

    `FLASHDIT_TRACEBACK=1` shows the traceback, for those who look for a bug of ours.
    """
    try:
        main()
    except (ValueError, OSError, OmegaConfBaseException) as error:
        if os.environ.get("FLASHDIT_TRACEBACK"):
            raise
        sentence = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
        sys.exit(2)


def check_device(name: str) -> str:
    """Returns the name of a device that this machine has.

    Raises:
        OSError: If it has none of that name; argparse would put its usage before a ValueError.
    """
    try:
        device = torch.device(name)
        count = 1 if device.type == "cpu" else torch.get_device_module(device).device_count()
    except (RuntimeError, AttributeError):  # torch knows no such kind, or it computes nothing
        count = 0
    if not count or (device.index or 0) >= count:
        raise OSError(f"--device must be one of this machine, such as cpu, got {name}")
    return name


def add_device(parser: argparse._ActionsContainer) -> None:
    """Adds `--device`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=check_device, default=device, help=f"where to run (default here: {device})"
    )
