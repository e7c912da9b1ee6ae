"""What a run goes on from: its newest whole checkpoint, with the same configuration and the same data."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from flashdit.shared.files import mend
from flashdit.shared.locks import check_no_writer
from flashdit.shared.paths import check_replaceable, check_writable, printable
from flashdit.shared.process import AUTO
from flashdit.shared.runs import (
    METRICS_FILE,
    PREVIEWS,
    DamagedCheckpoint,
    check_whole,
    list_checkpoints,
    step_of,
)
from flashdit.training.checkpoint import Saved, read_checkpoint, stored_config
from flashdit.training.contents import CONTENTS, value_at
from flashdit.training.optim import ADAMW, MuonOptions, OptimizerOptions
from flashdit.training.snapshots import SNAPSHOTS
from flashdit.training.task import Task
from iwin_core.kernels.cpu_attention import FUSED

logger = logging.getLogger(__name__)
DAMAGED = "damaged_"
OF_BEFORE = {
    "training.cpu_attention": FUSED,
    "optimizer.name": ADAMW,
    "optimizer.muon": asdict(MuonOptions()),
    **{
        f"optimizer.{name}": getattr(OptimizerOptions(), name)
        for name in ("schedule", "warmup_start", "decay_power", "milestones", "milestone_factor")
    },
}
"""What keys stood for before there were such."""
CONFIG_MARK = "\n  max_skips: "
"""Text that the resolved configuration of every run holds."""


def main_first(accelerator: Accelerator, work: Callable[[], Any]) -> Any:
    """Runs work on the main process alone and returns what it gives there, None elsewhere.

    What a user can cause ends all processes; the main one tells.
    """
    failure, given = None, None
    if accelerator.is_main_process:
        try:
            given = work()
        except (ValueError, OSError) as error:
            failure = error
    if accelerator.num_processes > 1 and broadcast_object_list([failure is not None])[0] and not failure:
        sys.exit(2)
    if failure is not None:
        raise failure
    return given


def newest_whole(run_dir: Path, accelerator: Accelerator) -> tuple[Path, Saved] | None:
    """Returns the newest checkpoint that can be read to its end; damaged ones after it are named.

    Raises:
        ValueError: If there are checkpoints and none of them is whole.
    """

    def search() -> tuple[Path, Saved] | None:
        reasons = []
        for folder in reversed(list_checkpoints(run_dir)):
            try:
                saved = read_checkpoint(folder)
                check_whole(folder)
            except DamagedCheckpoint as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                logger.warning("%s; the run goes on from %s", reason, folder.name)
            return folder, saved
        if reasons:
            raise ValueError(
                f"a run must have a whole checkpoint to go on from: {'; '.join(reasons)}; bring one back, or "
                "give another run.dir"
            )
        return None

    found = main_first(accelerator, search)
    if accelerator.num_processes > 1:
        folder = broadcast_object_list([found and found[0]])[0]
        found = found or (folder and (folder, read_checkpoint(folder)))
    return found


def check_run_folder(run_dir: Path) -> None:
    """Refuses a folder that cannot be written, that is being written, or holds another's files.

    Those are a config.yaml or metrics of another kind and, before the first step of a run, pictures.

    Raises:
        ValueError: Likewise.
    """
    check_writable(run_dir, "run.dir")
    for names, is_kind, kind in (
        (("checkpoints", PREVIEWS, SNAPSHOTS), Path.is_dir, "a folder"),
        ((METRICS_FILE, "config.yaml", CONTENTS), Path.is_file, "a file"),
    ):
        for path in (run_dir / name for name in names):
            if path.exists() and not is_kind(path):
                raise ValueError(f"training must find {kind} or nothing at {path}, there is something else")
    check_replaceable(run_dir / "config.yaml", CONFIG_MARK, "the config.yaml in run.dir")
    check_replaceable(run_dir / METRICS_FILE, '"step": ', f"the {METRICS_FILE} in run.dir")
    pictures = run_dir / PREVIEWS
    is_new = not (run_dir / "config.yaml").exists() and not list_checkpoints(run_dir)
    if is_new and pictures.is_dir() and any(pictures.iterdir()):
        raise ValueError(f"a new run must find no pictures at {pictures}, which it would replace")
    check_no_writer(run_dir)


def open_run_folder(run_dir: Path, step: int) -> None:
    """Mends what kills left in a run's folder, and renames the damaged checkpoints after a step."""
    for folder in (run_dir, *(path for path in run_dir.glob("*") if path.is_dir())):
        mend(folder)
    for folder in list_checkpoints(run_dir):
        if step_of(folder) > step:
            names = (f"{DAMAGED}{folder.name}{f'_{n}' if n else ''}" for n in count())
            aside = next(path for path in map(folder.with_name, names) if not path.exists())
            folder.rename(aside)
            logger.warning("%s is now called %s; remove it when it is of no use", folder, aside.name)


def settle(config: Any, task: type[Task], device: str) -> None:
    """Puts what the start of a run decides in the place of `auto`, in the configuration itself.

    Args:
        config: Of the run: its folder's newest checkpoint says what was decided before.
        task: What is trained.
        device: That a new run decides by.
    """
    stored = [stored_config(checkpoint) for checkpoint in list_checkpoints(Path(config.run.dir))[-1:]]
    for key, meaning in task.automatic.items():
        part, name = key.split(".")
        options = getattr(config, part)
        if getattr(options, name) != AUTO:
            continue
        kept = value_at(stored[0], key) or OF_BEFORE.get(key) if stored and stored[0] else None
        setattr(options, name, meaning(device) if kept in (None, AUTO) else kept)


def check_unchanged(checkpoint: Path, config_text: str, task: type[Task]) -> list[str]:
    """Refuses to resume with another model or other options of the data.

    Args:
        checkpoint: What is resumed.
        config_text: The new configuration as YAML.
        task: What is trained: says which keys may not change, and which are compared by content later.

    Returns:
        A line for every other key that has changed.

    Raises:
        ValueError: If one of the fixed keys has another value, or nothing tells which they had.
    """
    stored, run_dir = stored_config(checkpoint), checkpoint.parent.parent
    if not stored:
        raise ValueError(
            f"a run must have its configuration to go on, neither {checkpoint} nor {run_dir} has a readable "
            f"config.yaml: bring it back, or start another run.dir with weights={checkpoint}"
        )
    given = yaml.safe_load(config_text)
    for name, value in stored.items():
        if isinstance(given.get(name), dict) and not isinstance(value, dict):
            raise ValueError(
                f"a run's config.yaml must be as training wrote it, that of {checkpoint} has {name}: {value}"
            )
    check_same_task(checkpoint, stored, given)
    old, new = task.filled(stored), task.filled(given)
    lines = []
    changed = changes(old, new)
    for key in sorted(changed, key=lambda key: key != "data.name"):  # by which options of data come and go
        before, after = changed[key]
        if key == "run.dir" or (key in task.by_content and None not in (before, after)):
            continue
        before = OF_BEFORE.get(key) if before is None else before
        if before == after:
            continue
        if key.startswith((*task.fixed_on_resume, "optimizer.name")):
            rule = f"{run_dir} holds a run whose {key} is {before}, not {after}"
            raise ValueError(f"{rule}: give another run.dir")
        lines.append(f"resumed with another {key}: {after}, was {before}")
    return lines


def check_same_task(checkpoint: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuses a run of another task, by the parts that its configuration has and that of this one has not.

    Args:
        checkpoint: Of the run.
        stored: The configuration that lies there.
        given: The one to go on with, of which every part is present.

    Raises:
        ValueError: If it is of another task.
    """
    others = sorted(stored.keys() - given.keys())
    if others:
        raise ValueError(
            f"{checkpoint.parent.parent} holds a run of another task, whose configuration has "
            f"{', '.join(map(printable, others))}: give another run.dir"
        )


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns the dotted keys in which two plain configurations differ, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= changes(before, after, f"{prefix}{key}.")
        elif before != after:
            found[prefix + key] = (before, after)
    return found
