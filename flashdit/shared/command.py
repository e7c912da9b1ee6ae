"""Runs a command: a user's mistake is one line on stderr and exit status 2; the device is checked."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType


def run_script(main: Callable[[], None], name: str = "") -> None:
    """Runs a command's `main`; what a user can cause ends it with one sentence instead of a traceback.

    `FLASHDIT_TRACEBACK=1` shows the traceback, for those who look for a bug of ours.

    Args:
        main: Parses the command line and does the work.
        name: What the sentence begins with; empty means the script's file name.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("FLASHDIT_TRACEBACK"):
            raise
        sentence = " ".join(str(error).split())
        print(f"{name or Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
        sys.exit(2)


def need_extra(module: str, extra: str) -> ModuleType:
    """Returns a module of a package that only an extra installs.

    Raises:
        ValueError: If it is not installed; says what to install.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{extra} must be installed for this: pip install 'flashdit[{extra}]' ({error})"
        ) from error


def add_device(parser: argparse._ActionsContainer) -> None:
    """Adds `--device`, for `resolve_device`; torch is not imported."""
    parser.add_argument("--device", help="where to run (default: cuda where there is one, else cpu)")


def resolve_device(name: str | None) -> str:
    """Returns the name of a device that this machine has.

    Args:
        name: Such as `cuda:1`; None means cuda where there is one, else cpu.

    Raises:
        ValueError: If the machine has none of that name.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        count = 1 if device.type == "cpu" else torch.get_device_module(device).device_count()
    except (RuntimeError, AttributeError):  # torch knows no such kind, or it computes nothing
        count = 0
    if not count or (device.index or 0) >= count:
        raise ValueError(f"--device must be one of this machine, such as cpu, got {name}")
    return name
