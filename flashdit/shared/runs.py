"""The layout of a run's folder: where its files lie, and whether they are whole. Torch is not imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from flashdit.shared.files import file_crc32, read_checked_json, write_checked_json
from flashdit.shared.registry import is_number, unknown

Content = TypeVar("Content")
CHECKPOINT_FORMAT = 1
"""Of a checkpoint, in its state.json."""
PREFIX = "step_"
STATE = "state.json"
LATENTS = "latents.safetensors"
METRICS_FILE = "metrics.jsonl"
PREVIEWS = "samples"
CHECKSUMS = "crc32"
"""Key of a checkpoint's state.json: the CRC-32 of its files by name, but of those that people may edit."""
EDITABLE = ("config.yaml", STATE)
EXPORT_FILE = "checksums.json"
"""In an exported pipeline: the checksums of its other files."""
POSTHOC_FILE = "posthoc.json"
"""In an average made after training: how, and the checksums of its files."""


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be read to its end."""


def step_folder(run_dir: Path, step: int) -> Path:
    """Returns the checkpoint folder of a step."""
    return run_dir / "checkpoints" / f"{PREFIX}{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Returns a run's checkpoint folders, by step; damaged ones are among them."""
    found = [path for path in (run_dir / "checkpoints").glob(f"{PREFIX}*") if step_of(path) >= 0]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns the step that a checkpoint's folder is named after, -1 for anything else."""
    prefix, _, digits = checkpoint.name.partition("_")
    is_one = prefix == PREFIX[:-1] and digits.isdecimal() and checkpoint.is_dir()
    return int(digits) if is_one else -1


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

    def age(run: Path) -> float:
        with suppress(OSError, IndexError):  # training removes old ones meanwhile
            return list_checkpoints(run)[-1].stat().st_mtime
        return 0.0

    return max(runs, key=age)


def find_checkpoint(path: Path | str | None, called: str = "--checkpoint") -> Path:
    """Returns a checkpoint folder.

    Args:
        path: A checkpoint folder, or a run, whose latest step is meant; None means the newest run.
        called: What names it, for messages.

    Raises:
        ValueError: If there is no checkpoint there.
    """
    path = newest_run() if path is None else Path(path)
    if (path / STATE).is_file() or step_of(path) >= 0:
        return path
    checkpoints = list_checkpoints(path)
    if checkpoints:
        return checkpoints[-1]
    if not path.exists():
        raise ValueError(f"{called}: {path} does not exist")
    if any((path / name).exists() for name in ("config.yaml", "checkpoints", METRICS_FILE)):
        raise ValueError(
            f"{called}: {path} holds no checkpoint yet: training writes one every training.save_every steps, "
            "and when it ends"
        )
    raise ValueError(f"{called} must be a run or a folder {PREFIX}XXXXXXXX that holds {STATE}, got {path}")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns a checkpoint's state.json.

    Raises:
        DamagedCheckpoint: If it cannot be read.
        ValueError: If its format is not one this version reads.
    """
    path = checkpoint / STATE
    if not path.is_file():
        raise DamagedCheckpoint(f"{checkpoint} is damaged: it has no {STATE}")
    try:
        state = read_checked_json(path)
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error}") from error
    step, known = state.get("step", 0), state.get(CHECKSUMS, {})
    if not is_count(step):
        raise DamagedCheckpoint(f"{path} is damaged: step must be a whole number, 0 or more, got {step!r}")
    if not isinstance(known, dict):
        raise DamagedCheckpoint(f"{path} is damaged: {CHECKSUMS} must be checksums by name, got {known!r}")
    if "format" not in state:
        raise DamagedCheckpoint(f"{path} is damaged: it has no format")
    if state["format"] != CHECKPOINT_FORMAT:
        raise unknown(f"checkpoint format of {checkpoint}", state.get("format"), [CHECKPOINT_FORMAT])
    return state


def is_count(value: Any) -> bool:
    """Returns whether a value is a whole number, 0 or more."""
    return is_number(value) and isinstance(value, int) and value >= 0


def find_average(path: Path | str, called: str) -> Path:
    """Returns the folder of a checkpoint's averaged weights, which are whole.

    Args:
        path: A checkpoint or a run, as `find_checkpoint` takes it.
        called: What names it, for messages.

    Raises:
        ValueError: If there is no checkpoint, or the average is damaged.
    """
    checkpoint = find_checkpoint(path, called)
    check_whole(checkpoint, "ema")
    return checkpoint / "ema"


def images_of(config: Mapping[str, Any]) -> str | None:
    """Returns the folder of images that a run's plain configuration names; None for other data."""
    data = config.get("data")
    return data.get("path") if isinstance(data, Mapping) and data.get("name") == "images" else None


def checksums(checkpoint: Path) -> dict[str, str]:
    """Returns what `check_whole` compares: of each file in a checkpoint's folder its CRC-32, by name."""
    return {name: file_crc32(checkpoint / name) for name in file_names(checkpoint) if name not in EDITABLE}


def file_names(folder: Path) -> list[str]:
    """Returns the names of all files below a folder, with `/` and from there."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def additions(checkpoint: Path) -> list[str]:
    """Returns the names of what lies in a checkpoint's folder beside that which training wrote.

    Of a checkpoint of before checksums were kept, and of a damaged one, none are known.
    """
    with suppress(ValueError):
        known = {PurePosixPath(name).parts[0] for name in read_state(checkpoint).get(CHECKSUMS, {})}
        if known:
            return sorted({path.name for path in checkpoint.iterdir()} - known - {*EDITABLE})
    return []


def posthoc_checksums(about: Path) -> dict[str, str]:
    """Returns the checksums that an average made after training keeps of its files, none in an early one.

    Raises:
        DamagedCheckpoint: If its `POSTHOC_FILE` is damaged.
    """
    try:
        content = read_checked_json(about)
        return {} if content.get(CHECKSUMS) is None else _checksums_in(content)
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{about} is damaged: {error}") from error


def check_whole(checkpoint: Path, part: str = "") -> None:
    """Refuses a checkpoint of which a file is missing, or is not what was written.

    Checkpoints of before checksums were kept have none, and are not compared.

    Args:
        checkpoint: Its folder.
        part: The file or folder in it that is read; empty means all.

    Raises:
        DamagedCheckpoint: If a file is missing or another one; names it.
    """
    known = read_state(checkpoint).get(CHECKSUMS, {})
    about = checkpoint / part / POSTHOC_FILE
    if part and about.is_file():
        known = {f"{part}/{name}": checksum for name, checksum in posthoc_checksums(about).items()}
    changed = next(_changes(checkpoint, known, part), None)
    if changed is None:
        return
    path = checkpoint / changed
    if not path.is_file():
        raise DamagedCheckpoint(f"{checkpoint} is damaged: it has no {changed}")
    raise DamagedCheckpoint(f"{path} is damaged: its checksum is not the one that it was written with")


def _checksums_in(content: Mapping[str, Any]) -> dict[str, str]:
    """Returns the checksums by name that a file of them holds; raises ValueError if there are none."""
    known = content.get(CHECKSUMS)
    if not isinstance(known, dict) or not known:
        raise ValueError(f"{CHECKSUMS} must be checksums by name, got {known!r}")
    return known


def _changes(folder: Path, known: Mapping[str, str], part: str) -> Iterator[str]:
    """Yields the names of the files, in a part of a folder, that are missing or have another checksum."""
    for name, written in known.items():
        path = folder / name
        if PurePosixPath(name).is_relative_to(part) and not (path.is_file() and file_crc32(path) == written):
            yield name


def write_export_checksums(folder: Path) -> None:
    """Writes the checksums of all files of an exported pipeline into its folder."""
    write_checked_json(folder / EXPORT_FILE, {CHECKSUMS: checksums(folder)})


def read_export_checksums(folder: Path) -> dict[str, str]:
    """Returns what `write_export_checksums` wrote; empty where it has not.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / EXPORT_FILE
    if not path.is_file():
        return {}
    try:
        return _checksums_in(read_checked_json(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"the checksums of an export must be as written, {path} is not: {error}") from error


def export_changes(folder: Path, part: str = "") -> list[str]:
    """Returns the names of an exported pipeline's files that are others than were written, or are missing.

    Args:
        folder: Of the export; without checksums of its own no file counts as changed.
        part: The file or folder in it that is compared; empty means all.
    """
    return [*_changes(folder, read_export_checksums(folder), part)]
