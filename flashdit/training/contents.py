"""Whether a run's data are those it began with, by what they hold and not by where they lie."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flashdit.shared.files import write_atomically
from flashdit.shared.paths import printable, resolved
from flashdit.training.checkpoint import stored_config
from flashdit.training.task import Task

logger = logging.getLogger(__name__)
CONTENTS = "contents.json.gz"
"""In a run's folder: what its data are by content, `Task.contents`."""
SHOWN = 3  # names of classes in a message


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
        if before is None and isinstance(known.get(key), str):
            before = known[key]  # an identity, which is all there is to compare
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
            logger.info("%s is %s, was %s: %s", key, texts[1], texts[0], equality_in_words(kept, now))


def read_contents(run_dir: Path) -> dict[str, Any]:
    """Returns what a run's data were by content; empty where nothing is kept."""
    path = run_dir / CONTENTS
    try:
        stored = json.loads(gzip.decompress(path.read_bytes())) if path.is_file() else {}
        if not isinstance(stored, dict):
            raise ValueError(f"it must hold a mapping, got {type(stored).__name__}")
        return stored
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
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
            shown = ", ".join(f"'{printable(name)}'" for name in names[:SHOWN])
            found.append(
                f"{kind} {shown}{', …' if names[SHOWN:] else ''} {'is' if len(names) == 1 else 'are'} {text}"
            )
    if not found and old_classes and old_classes != new_classes:
        found.append("its classes have another order")
    if "files" in before and "files" in now:
        found += _file_differences(before["files"], now["files"])
    return ", ".join(found)


def equality_in_words(before: Any, now: Any) -> str:
    """Returns in words what was compared of contents that `difference_in_words` finds equal."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return "its configuration and weights are the same"
    if "files" in before and "files" in now:
        known = all(isinstance(value, str) for value in now["files"].values())
        if known:
            return "its manifest has the same checksums (encode --verify compares the files by them)"
        return "its files have the same names and sizes"
    if before.get("classes") and now.get("classes"):
        return "its classes have the same names, of its files nothing is known"
    return "what it was is not known"


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
    return [f"files {', '.join(counts)}, such as {', '.join(map(printable, first))}"]


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """Returns the value of a dotted key, None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def same_path(one: Any, other: Any) -> bool:
    """Returns whether two texts are equal or name one file or folder."""
    return one == other or (
        isinstance(one, str) and isinstance(other, str) and resolved(one) == resolved(other)
    )
