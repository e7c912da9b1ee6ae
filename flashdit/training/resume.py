"""What a run goes on from: its newest whole checkpoint, with the same configuration and the same data."""

from __future__ import annotations

import gzip
import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from flashdit.shared.files import discard, mend, write_atomically
from flashdit.shared.runs import PREFIX, DamagedCheckpoint, list_checkpoints
from flashdit.training.checkpoint import Saved, read_checkpoint
from flashdit.training.task import Task

logger = logging.getLogger(__name__)
CONTENTS = "contents.json.gz"
"""In a run's folder: what its data are by content, `Task.contents`."""
DAMAGED = "damaged_"
SHOWN = 3  # names of files in a message


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
            except DamagedCheckpoint as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                logger.warning("%s; the run goes on from %s", reason, folder.name)
            return folder, saved
        if reasons:
            raise ValueError(f"a run must have a whole checkpoint to go on from: {'; '.join(reasons)}")
        return None

    found = main_first(accelerator, search)
    if accelerator.num_processes > 1:
        folder = broadcast_object_list([found and found[0]])[0]
        found = found or (folder and (folder, read_checkpoint(folder)))
    return found


def open_run_folder(run_dir: Path, step: int) -> None:
    """Mends what kills left in a run's folder, and renames the damaged checkpoints after a step."""
    for folder in (run_dir, *(path for path in run_dir.glob("*") if path.is_dir())):
        mend(folder)
    for folder in list_checkpoints(run_dir):
        if int(folder.name.removeprefix(PREFIX)) > step:
            aside = folder.with_name(DAMAGED + folder.name)
            discard(aside)
            folder.rename(aside)
            logger.warning("%s is now called %s; remove it when it is of no use", folder, aside.name)


def stored_config(checkpoint: Path) -> dict[str, Any]:
    """Returns the configuration that a checkpoint or else its run holds; empty where neither does."""
    for path in (checkpoint / "config.yaml", checkpoint.parent.parent / "config.yaml"):
        try:
            stored = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(stored, dict):
            return stored
    return {}


def check_unchanged(checkpoint: Path, config_text: str, task: type[Task]) -> list[str]:
    """Refuses to resume with another model or other options of the data.

    Args:
        checkpoint: What is resumed.
        config_text: The new configuration as YAML.
        task: What is trained: says which keys may not change, and which are compared by content later.

    Returns:
        A line for every other key that has changed.

    Raises:
        ValueError: If one of the fixed keys has another value.
    """
    old, new = task.filled(stored_config(checkpoint)), task.filled(yaml.safe_load(config_text))
    lines = []
    for key, (before, after) in changes(old, new).items():
        if key in task.by_content or key == "run.dir":
            continue
        if old and key.startswith(task.fixed_on_resume):
            rule = f"{checkpoint.parent.parent} holds a run whose {key} is {before}, not {after}"
            raise ValueError(f"{rule}: give another run.dir")
        lines.append(f"resumed with another {key}: {after}, was {before}")
    return lines if old else []


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


def check_contents(checkpoint: Path, config_text: str, task: Task) -> None:
    """Refuses to resume with other data, whatever they are called and wherever they lie.

    A run of an earlier version has kept no contents: equal paths are the same, and else what its checkpoint
    tells of them.

    Raises:
        ValueError: If they differ; says in what.
    """
    run_dir = checkpoint.parent.parent
    stored, known = read_contents(run_dir), task.known_contents(checkpoint)
    old, new = stored_config(checkpoint), yaml.safe_load(config_text)
    for key, now in task.contents().items():
        before, texts = stored.get(key), (value_at(old, key), value_at(new, key))
        if before is None and (same_path(*texts) or texts[0] is None):
            continue
        kept = known.get(key) if before is None else before
        if kept is None or now is None:
            difference = f"it is {texts[1]}, was {texts[0]}"
        else:
            difference = difference_in_words(kept, now)
        if difference:
            rule = f"{run_dir} holds a run on another {key}"
            raise ValueError(f"{rule}: {difference}; give another run.dir, or what it was")
        if texts[0] != texts[1]:
            logger.info("%s is %s, was %s: its content is the same", key, texts[1], texts[0])


def read_contents(run_dir: Path) -> dict[str, Any]:
    """Returns what a run's data were by content; empty where nothing is kept."""
    path = run_dir / CONTENTS
    try:
        return json.loads(gzip.decompress(path.read_bytes())) if path.is_file() else {}
    except (OSError, EOFError, ValueError) as error:
        logger.warning(
            "%s is damaged, so the data are compared by what the checkpoint tells: %s", path, error
        )
        return {}


def write_contents(run_dir: Path, contents: Mapping[str, Any]) -> None:
    """Keeps what a run's data are by content, unless that is kept already."""
    if read_contents(run_dir) != contents:
        text = gzip.compress(json.dumps(contents).encode(), mtime=0)
        write_atomically(run_dir / CONTENTS, lambda path: path.write_bytes(text))


def difference_in_words(before: Any, now: Any) -> str:
    """Returns in words how contents differ, empty where they do not.

    Args:
        before: The identity of one thing as text, or `{"classes": names, "files": {name: size or hash}}`;
            what is missing is not compared.
        now: Likewise.
    """
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return "" if before == now else "its configuration or weights are others"
    found = []
    old_classes, new_classes = (part.get("classes") or [] for part in (before, now))
    for text, names in (
        ("gone", [name for name in old_classes if name not in new_classes]),
        ("new", [name for name in new_classes if name not in old_classes]),
    ):
        if names and old_classes:
            kind = "class" if len(names) == 1 else "classes"
            shown = ", ".join(f"'{name}'" for name in names[:SHOWN])
            found.append(
                f"{kind} {shown}{', …' if names[SHOWN:] else ''} {'is' if len(names) == 1 else 'are'} {text}"
            )
    if not found and old_classes and old_classes != new_classes:
        found.append("its classes have another order")
    if "files" in before and "files" in now:
        found += _file_differences(before["files"], now["files"])
    return ", ".join(found)


def _file_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns in words which files are more, fewer or changed."""
    kinds = {
        "more": [name for name in now if name not in before],
        "fewer": [name for name in before if name not in now],
        "changed": [name for name in now if name in before and before[name] != now[name]],
    }
    names = [name for found in kinds.values() for name in found]
    if not names:
        return []
    counts = [f"{len(found):,} {kind}" for kind, found in kinds.items() if found]
    first = [found[0] for found in kinds.values() if found]
    return [f"files {', '.join(counts)}, such as {', '.join(first)}"]


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """Returns the value of a dotted key, None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def same_path(one: Any, other: Any) -> bool:
    """Returns whether two texts are equal or name one file or folder."""
    return one == other or (
        isinstance(one, str) and isinstance(other, str) and Path(one).resolve() == Path(other).resolve()
    )
