"""Checkpoints on disk: one folder per step, written under a temporary name and renamed.

runs/<name>/checkpoints/step_XXXXXXXX/
    model/ ema/           FlashDiT.save_pretrained, so that from_pretrained reads either
    latents.safetensors   mean, std, VAE name and identity
    optimizer.pt rng.pt   loaded with weights_only=True
    state.json            step, images seen, EMA updates, class names, data name, sampling options
    config.yaml           the resolved configuration
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashdit.registry import unknown

FORMAT = 1
PREFIX = "step_"
STATE = "state.json"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary name beside `path` (a file or a folder), then renames.

    A kill leaves what was there before; an existing target is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)
    try:
        write(temporary)
        if path.is_dir():
            old = path.with_name(f".{path.name}.old")
            _remove(old)
            os.replace(path, old)
            os.replace(temporary, path)
            _remove(old)
        else:
            os.replace(temporary, path)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    """Removes a file or a folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically; NaN is refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def step_folder(run_dir: Path, step: int) -> Path:
    """Returns the checkpoint folder of a step."""
    return run_dir / "checkpoints" / f"{PREFIX}{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Returns a run's checkpoint folders, by step."""
    return sorted(path for path in (run_dir / "checkpoints").glob(f"{PREFIX}*") if (path / STATE).is_file())


def newest_run(root: Path = Path("runs")) -> Path:
    """Returns the run below `root` whose latest checkpoint is newest.

    Raises:
        ValueError: If no run has a checkpoint.
    """
    runs = [run for run in root.glob("*") if list_checkpoints(run)]
    if not runs:
        raise ValueError(f"no run with a checkpoint in {root}: train one first (python train.py)")
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
        ValueError: If its format is not one this version reads.
    """
    state = json.loads((checkpoint / STATE).read_text())
    if state.get("format") != FORMAT:
        raise unknown(f"checkpoint format of {checkpoint}", state.get("format"), [FORMAT])
    return state
