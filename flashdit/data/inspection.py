"""Which images of a folder can be read, and how large are they? One pass, kept beside the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.utils.data import Dataset

from flashdit.data.images import (
    READERS,
    animated_images,
    check_crop,
    enlarged_images,
    report_images,
    transparent_images,
)
from flashdit.data.sources import CroppedImage, ImageFolder
from flashdit.shared.files import read_checked_json, write_atomically
from flashdit.shared.paths import check_outside, printable
from flashdit.shared.progress import progress_bar
from flashdit.shared.runs import list_checkpoints, newest_readable, read_state

RECORD = "images.json"  # in a run's folder
RECORD_FORMAT = 3  # of 2 it is unknown which are animated, of 1 which are transparent
AT_ONCE = 1_000  # images that wait for a reader


@dataclass
class ReadBatch:
    """What became of some rows of a source."""

    rows: list[int]
    """Those that could be read, in order."""
    images: Tensor | None
    """Of these rows, uint8 (B, 3, S, S); None if there is none."""
    short_sides: list[int]
    """Of the files of these rows, in pixels."""
    transparent: int
    """How many of them the background shows through."""
    animated: int
    """Of how many files other frames are left out."""
    unreadable: dict[int, str]
    """Why the others could not be read, by row."""


class ReadableImages(Dataset):
    """Rows → ReadBatch; an item is a batch, so a data loader takes `batch_size=None` and batches as sampler.

    Args:
        source: The images.
    """

    def __init__(self, source: ImageFolder):
        self.source = source

    def __getitem__(self, rows: Sequence[int]) -> ReadBatch:
        """Returns the images of some rows."""
        read: dict[int, CroppedImage] = {}
        unreadable = {}
        for row in rows:
            try:
                read[row] = self.source.read(row)
            except ValueError as error:
                unreadable[row] = str(error.__cause__ or error)
        return ReadBatch(
            rows=list(read),
            images=torch.stack([image.pixels for image in read.values()]) if read else None,
            short_sides=[image.short_side for image in read.values()],
            transparent=sum(image.transparent for image in read.values()),
            animated=sum(image.animated for image in read.values()),
            unreadable=unreadable,
        )


class Seen(NamedTuple):
    """What a pass saw of one file."""

    num_bytes: int
    size: tuple[int, int] | None
    """Width and height; None where it cannot be read."""
    unreadable: str | None = None
    """Why not."""
    transparent: bool = False
    """Whether the background shows through."""
    animated: bool = False
    """Whether other frames are left out."""


class Inspection:
    """What was seen of a run's images: `leave_out_unreadable` fills it, `write` keeps it for the next start.

    Args:
        record: File in the run's folder.
    """

    def __init__(self, record: Path):
        self.record, self.seen = record, _read_record(record)
        self.found = self.seen

    def write(self) -> None:
        """Keeps what was found, on the main process; called once the run may begin."""
        if self.found != self.seen and _rank() == 0:
            _write_record(self.record, self.found)


def leave_out_unreadable(
    source: ImageFolder, inspection: Inspection | None = None, progress: bool = True
) -> ImageFolder:
    """Returns a source without the images that cannot be read, which are named; all are decoded to know.

    The classes keep the order in which a run that is resumed knows them. A file of a name and size that the
    run has seen before is not read a second time. Processes share the reading.

    Args:
        source: The images.
        inspection: Of the run, what was found is put into it; None keeps nothing.
        progress: Whether to show a bar, where somebody watches.

    Raises:
        ValueError: If no image of a class can be read, a resumed run began with other classes, or the run's
            folder lies among the images.
    """
    if inspection is not None:
        run_dir = inspection.record.parent
        check_outside(run_dir, source.found.root, "run.dir", "data.path")
        source = with_classes_of_run(source, run_dir)
    before = _from_main({} if inspection is None else inspection.seen)
    sizes = dict(zip(source.names, source.num_bytes, strict=True))
    known = {name: seen for name, seen in before.items() if sizes.get(name) == seen.num_bytes}
    new = [row for row, name in enumerate(source.names) if name not in known]
    found = known | _decode(source, new, progress)
    found = {name: found[name] for name in source.names}
    if inspection is not None:
        inspection.found = found
    readable = [row for row, seen in enumerate(found.values()) if seen.size]
    try:
        _check_classes(source, readable)
    except ValueError:
        if inspection is not None and not list_checkpoints(inspection.record.parent):
            inspection.write()  # of a run that is yet to begin: mending one file then costs one file
        raise
    unreadable = dict(source.found.unreadable) | {
        name: seen.unreadable for name, seen in found.items() if seen.unreadable is not None
    }
    sides = {name: min(seen.size) for name, seen in found.items() if seen.size}
    transparent = sum(seen.transparent for seen in found.values())
    animated = sum(seen.animated for seen in found.values())
    line = source.found.describe(
        len(unreadable),
        enlarged_images(sides, source.image_size),
        transparent_images(transparent, source.options.background),
        animated_images(animated),
    )
    report_images(line, unreadable)
    return source.subset(readable)


def with_classes_of_run(source: ImageFolder, run_dir: Path) -> ImageFolder:
    """Returns the source with the classes in the order in which a run that has a checkpoint knows them.

    Raises:
        ValueError: If the folder has not the run's classes.
    """
    names = newest_readable(run_dir, lambda checkpoint: read_state(checkpoint).get("class_names"))
    if not names:
        return source
    if names != source.class_names:
        source = ImageFolder(source.options, names)
    if new := source.class_names[len(names) :]:
        raise ValueError(
            f"a resumed run keeps its classes, {printable(source.found.root)} has others too: "
            f"{printable(', '.join(new))}; give another run.dir"
        )
    return source


def _decode(source: ImageFolder, rows: Sequence[int], progress: bool) -> dict[str, Seen]:
    """Returns what is seen of some rows by name; each process decodes its share of them."""
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    mine = rows[_rank() :: ranks]
    seen: dict[str, Seen] = {}
    hidden = not (progress and mine)
    bar = progress_bar(total=len(mine), desc="check", unit="image", leave=False, disable=hidden)
    with bar, ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(mine), AT_ONCE):
            part = mine[start : start + AT_ONCE]
            for row, one in zip(part, readers.map(lambda row: _look(source, row), part), strict=True):
                seen[source.names[row]] = one
                bar.update()
    if ranks == 1:
        return seen
    parts: list[Any] = [None] * ranks
    distributed.all_gather_object(parts, seen)
    return {name: one for part in parts for name, one in part.items()}


def _look(source: ImageFolder, row: int) -> Seen:
    """Returns what is seen of one file."""
    try:
        picture, transparent, animated = source.decode(row)
        check_crop(picture.size, source.image_size)
    except ValueError as error:
        return Seen(source.num_bytes[row], None, str(error.__cause__ or error))
    return Seen(source.num_bytes[row], picture.size, transparent=transparent, animated=animated)


def _check_classes(source: ImageFolder, readable: Sequence[int]) -> None:
    """Raises ValueError unless each class has an image that can be read."""
    left = set(source.labels[torch.tensor(readable, dtype=torch.long)].tolist())
    empty = [name for label, name in enumerate(source.class_names) if label not in left]
    if empty:
        raise ValueError(
            f"every class must have a readable image, {printable(source.found.root)} has none of "
            f"{', '.join(empty)}"
        )


def _read_record(record: Path) -> dict[str, Seen]:
    """Returns what an earlier pass saw, by name; nothing where there is no record of this format."""
    try:
        content = read_checked_json(record)
        if content.get("format") != RECORD_FORMAT:
            return {}
        seen = {
            name: Seen(size, (width, height), transparent=transparent, animated=animated)
            for name, (size, width, height, transparent, animated) in content["images"].items()
        }
        return seen | {name: Seen(size, None, why) for name, (size, why) in content["unreadable"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{record} must be as it was written, delete it to check all images again: {error}"
        ) from error


def _write_record(record: Path, found: dict[str, Seen]) -> None:
    """Writes by name bytes, width, height, transparent, animated, and of the unreadable bytes and reason."""
    content = {
        "format": RECORD_FORMAT,
        "images": {
            name: [seen.num_bytes, *seen.size, seen.transparent, seen.animated]
            for name, seen in found.items()
            if seen.size
        },
        "unreadable": {
            name: [seen.num_bytes, seen.unreadable] for name, seen in found.items() if not seen.size
        },
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    write_atomically(record, lambda temporary: temporary.write_text(text + "\n"))


def _rank() -> int:
    """Returns the number of this process."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def _from_main(content: Any) -> Any:
    """Returns what the main process has of something, on each process."""
    if not distributed.is_initialized():
        return content
    boxed = [content]
    distributed.broadcast_object_list(boxed, src=0)
    return boxed[0]
