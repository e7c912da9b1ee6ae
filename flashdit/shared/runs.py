"""The layout of a run's folder: where its files lie. Torch is not imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from flashdit.shared.registry import unknown

Content = TypeVar("Content")
CHECKPOINT_FORMAT = 1
"""Of a checkpoint, in its state.json."""
PREFIX = "step_"
STATE = "state.json"
LATENTS = "latents.safetensors"
METRICS_FILE = "metrics.jsonl"


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be read to its end."""


def step_folder(run_dir: Path, step: int) -> Path:
    """Returns the checkpoint folder of a step."""
    return run_dir / "checkpoints" / f"{PREFIX}{step:08d}"


def step_folders(run_dir: Path) -> list[Path]:
    """Returns the folders that are called like a run's checkpoints, by step; one may lack files."""
    folders = (run_dir / "checkpoints").glob(f"{PREFIX}*")
    return sorted(path for path in folders if path.name.removeprefix(PREFIX).isdecimal() and path.is_dir())


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Returns a run's checkpoint folders, by step."""
    return [path for path in step_folders(run_dir) if (path / STATE).is_file()]


def newest_readable(run_dir: Path, read: Callable[[Path], Content]) -> Content | None:
    """Returns what a function reads of the newest checkpoint where it can; None where it cannot of any.

    Damaged ones after it are passed over: where the run goes on they are named.

    Args:
        run_dir: The run's folder.
        read: Of a checkpoint's folder; raises DamagedCheckpoint.
    """
    for checkpoint in reversed(list_checkpoints(run_dir)):
        with suppress(DamagedCheckpoint):
            return read(checkpoint)
    return None


def newest_run(root: Path = Path("runs"), holding: str = STATE) -> Path:
    """Returns the run below `root` whose latest checkpoint is newest.

    Args:
        root: Folder of the runs.
        holding: A file that the latest checkpoint must hold, such as a generative model's `LATENTS`.

    Raises:
        ValueError: If no run has a checkpoint.
    """
    runs = [
        run for run in root.glob("*") for last in list_checkpoints(run)[-1:] if (last / holding).is_file()
    ]
    if not runs:
        raise ValueError(f"no run with a checkpoint in {root}: train one first (flashdit train)")
    return max(runs, key=lambda run: list_checkpoints(run)[-1].stat().st_mtime)


def find_checkpoint(path: Path | str | None) -> Path:
    """Returns a checkpoint folder.

    Args:
        path: A checkpoint folder, or a run, whose latest step is meant; None means the newest run.

    Raises:
        ValueError: If there is no checkpoint there.
    """
    path = newest_run() if path is None else Path(path)
    if (path / STATE).is_file():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise ValueError(
            f"checkpoint must be a run or a folder {PREFIX}XXXXXXXX that holds {STATE}, got {path}"
        )
    return checkpoints[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns a checkpoint's state.json.

    Raises:
        DamagedCheckpoint: If it cannot be read.
        ValueError: If its format is not one this version reads.
    """
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{path} is damaged: it must hold a mapping")
    if state.get("format") != CHECKPOINT_FORMAT:
        raise unknown(f"checkpoint format of {checkpoint}", state.get("format"), [CHECKPOINT_FORMAT])
    return state
