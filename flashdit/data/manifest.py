"""What a folder of shards says of itself: its VAE, counts, checksums, mean and std of each channel."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flashdit.shared.files import file_sha256, read_checked_json

MANIFEST = "manifest.json"
RECORDS = "records"
MANIFEST_FORMAT = 1


def read_json(path: Path) -> dict[str, Any]:
    """Returns the mapping that a JSON file of an encoded folder holds.

    Raises:
        ValueError: If it is not as it was written.
    """
    try:
        return read_checked_json(path)
    except ValueError as error:
        raise ValueError(f"a file of an encoded folder must be as written, {path} is not: {error}") from error


def read_class_names(path: Path) -> list[str]:
    """Returns the names in a `class_names.json`.

    Raises:
        ValueError: If it does not hold a list of texts.
    """
    try:
        names = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"class names must be a JSON list of texts, {path} is not: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class names must be a JSON list of texts, {path} is not")
    return names


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest of a folder of shards; None where there is none, as in LightningDiT's own.

    Raises:
        ValueError: If it cannot be read, or the folder's encoding has not come to its end.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / RECORDS).is_dir():
            raise ValueError(
                f"an encoding must be complete, {folder} has no {MANIFEST}: run encode_latents.py again"
            )
        return None
    manifest = read_json(path)
    if manifest.get("format") != MANIFEST_FORMAT:
        raise ValueError(
            f"a manifest must have format {MANIFEST_FORMAT}, {path} has {manifest.get('format')}"
        )
    wrong = sorted(key for key, is_right in CONTENT.items() if not is_right(manifest.get(key)))
    if wrong:
        raise ValueError(f"a manifest must be as encoding writes it, {path} has others: {', '.join(wrong)}")
    return manifest


def _are_numbers(values: Any) -> bool:
    """Returns whether a value is a list of numbers."""
    return isinstance(values, list) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in values
    )


def _are_shards(records: Any) -> bool:
    """Returns whether a value lists shards with their names, sizes and checksums."""
    kinds = {"file": str, "bytes": int, "sha256": str}
    return isinstance(records, list) and all(
        isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in kinds.items())
        for record in records
    )


CONTENT: dict[str, Callable[[Any], bool]] = {
    "vae_identity": lambda value: isinstance(value, str),
    "mean": _are_numbers,
    "std": _are_numbers,
    "shards": _are_shards,
}
"""Keys of a manifest that reading latents needs, and what their values must be."""


def check_files(folder: Path, manifest: dict[str, Any], found: Iterable[Path]) -> None:
    """Raises ValueError unless the shards are those of the manifest, by name and size."""
    listed = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    for name, size in listed.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"every shard of {MANIFEST} must be there, {path} is missing")
        if path.stat().st_size != size:
            raise ValueError(
                f"a shard must have the {size} bytes of {MANIFEST}, {path} has {path.stat().st_size}"
            )
    for path in found:
        if path.name not in listed:
            raise ValueError(f"every shard must be in {MANIFEST}, {path} is not")


def verify(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a folder all of whose shards have their checksums.

    Raises:
        ValueError: If there is no manifest, or shards differ from it; all of them are named.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"checksums need a {MANIFEST}, got none in {folder}")
    check_files(folder, manifest, folder.glob("*.safetensors"))
    shards = manifest["shards"]
    corrupt = [shard["file"] for shard in shards if file_sha256(folder / shard["file"]) != shard["sha256"]]
    if corrupt:
        raise ValueError(
            f"shards must have the checksums of {MANIFEST}, {', '.join(corrupt)} in {folder} do not"
        )
    return manifest
