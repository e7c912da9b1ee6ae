"""Which images go into which shard of an encoded folder, and which shards stay as they are?"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashdit.data.manifest import MANIFEST, RECORDS, read_class_names, read_json, read_manifest
from flashdit.data.shards import CLASS_NAMES_FILE, shard_name
from flashdit.shared.files import write_checked_json
from flashdit.shared.locks import LOCK

logger = logging.getLogger(__name__)
PLAN = f"{RECORDS}/plan.json"
RECORD_KEYS = ("file", "rows", "bytes", "sha256", "unreadable", "moments")
"""What the record of a shard says, since the first version."""
Listing = Mapping[str, int]
"""Bytes of each image by its path below the folder, in the order of its rows."""


def record_file(out: Path, shard: int) -> Path:
    """Returns where the record of a shard lies."""
    return out / RECORDS / f"shard{shard:03d}.json"


def record_files(out: Path) -> list[Path]:
    """Returns the files of a folder that have a record's name."""
    return sorted(path for path in (out / RECORDS).glob("shard*.json") if path.stem[5:].isdecimal())


def shard_of(path: Path) -> int:
    """Returns the number of the shard of a record's file."""
    return int(path.stem.removeprefix("shard"))


def read_records(out: Path) -> dict[int, dict[str, Any]]:
    """Returns the records of the shards that were written, by shard; a damaged one is named and is none."""
    records = {}
    for path in record_files(out):
        try:
            record = read_json(path)
            missing = [key for key in RECORD_KEYS if key not in record]
            if missing:
                raise ValueError(f"a record of a shard must have {', '.join(missing)}, {path} has not")
            if record["file"] != shard_name(0, shard_of(path)):
                raise ValueError(f"a record must be of the shard of its name, {path} is of {record['file']}")
        except ValueError as error:
            logger.warning("%s: its images are encoded again", error)
            continue
        records[shard_of(path)] = record
    return dict(sorted(records.items()))


def known_classes(out: Path, plan: Mapping[str, Any]) -> list[str]:
    """Returns the class names that an encoding was begun with; none where it does not say them."""
    names = out / CLASS_NAMES_FILE
    return plan.get("class_names") or (read_class_names(names) if names.is_file() else [])


def listing_sha256(listing: Listing) -> str:
    """Returns the SHA-256 of the names and sizes of all images, in order."""
    digest = hashlib.sha256()
    for name, size in listing.items():
        digest.update(f"{name}\0{size}\n".encode())
    return digest.hexdigest()


def read_plan(out: Path) -> dict[str, Any]:
    """Returns the plan of an earlier encoding, empty for a new folder.

    Raises:
        ValueError: If the folder holds anything else.
    """
    plan = out / PLAN
    if plan.exists():
        return read_json(plan)
    if (out / MANIFEST).exists() or (out / RECORDS).exists():
        raise ValueError(
            f"{out} holds latents, but no {PLAN} that tells how they were made: give another --out"
        )
    if out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
        raise ValueError(f"--out must be a new folder or one of an earlier encoding, got {out}")
    return {}


def lost_records(out: Path, records: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Returns the shards of a complete encoding that have no record."""
    if not (out / MANIFEST).is_file():
        return []
    known = {record["file"] for record in records.values()}
    try:
        manifest = read_manifest(out) or {}
    except ValueError as error:
        logger.warning("%s: it is written anew", error)
        return []
    return [shard["file"] for shard in manifest["shards"] if shard["file"] not in known]


def check_plan(out: Path, before: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises ValueError for an encoding that was begun with other options.

    An earlier version had no background: what it wrote of pictures that need none is the same.
    """
    for key, now in fixed.items() if before else ():
        was = before.get(key, now if key == "background" else None)
        if was != now:
            was, now = (str(value)[:12] for value in (was, now))
            raise ValueError(f"{out} holds latents whose {key} is {was}, not {now}: give another --out")


def records_of(
    out: Path, before: Mapping[str, Any], listing: Listing, images: str
) -> dict[int, dict[str, Any]]:
    """Returns the records of the shards that were written, each with its images, name → bytes.

    Records of an earlier version lack them; they follow from a listing that is unchanged.

    Raises:
        ValueError: If they are of other images, or the listing of an earlier version has changed.
    """
    records = read_records(out)
    if all("images" in record for record in records.values()):
        names = {name for record in records.values() for name in record["images"]}
        if names and names.isdisjoint(listing):
            raise ValueError(
                f"{out} holds latents of other images, none of which is in {images}: give another --out"
            )
        return records
    if listing_sha256(listing) != before.get("listing_sha256"):
        raise ValueError(
            f"{out} was encoded by a version that did not keep names, and {images} has other images now, or "
            "more of its files are read: give another --out"
        )
    logger.warning(
        "%s was begun by a version that ignored transparency, 16-bit grey and EXIF orientation: for images "
        "that have these give another --out",
        out,
    )
    items, rows = list(listing.items()), before["shard_rows"]
    return {
        shard: {"images": dict(items[shard * rows : (shard + 1) * rows])} | record
        for shard, record in records.items()
    }


def assign(
    listing: Listing, records: Mapping[int, Mapping[str, Any]], shard_rows: int
) -> tuple[dict[int, list[str]], list[int]]:
    """Returns the images of each shard, and those written shards that are as they should be.

    A shard stays if all images that it has latents of are there with the same size; an unreadable one may be
    gone. Of the others those images that are left keep their shard; what is new fills these up and then
    makes new ones. So whoever computes it, and however much of it was written before a kill, finds the same.

    Args:
        listing: Of the folder now.
        records: Of the shards that were written, with their `images`, name → bytes.
        shard_rows: Images of a full shard.
    """
    shards: dict[int, list[str]] = {}
    kept = []
    for shard, record in records.items():
        there = [name for name, size in record["images"].items() if listing.get(name) == size]
        lost = record["images"].keys() - set(there) - record["unreadable"].keys()
        shards[shard] = there
        kept += [] if lost else [shard]
    placed = {name for names in shards.values() for name in names}
    waiting = [name for name in listing if name not in placed]
    shard = 0
    while waiting:
        names = shards.setdefault(shard, [])
        room = 0 if shard in kept else shard_rows - len(names)
        shards[shard] = names + waiting[:room]
        waiting, shard = waiting[room:], shard + 1
    return {shard: shards[shard] for shard in sorted(shards) if shards[shard]}, kept


def describe_update(listing: Listing, records: Mapping[int, Mapping[str, Any]], kept: Sequence[int]) -> str:
    """Returns what changed in a folder since it was encoded, in words; nothing where nothing did."""
    before = {name: size for record in records.values() for name, size in record["images"].items()}
    changes = {
        "gone": len(before.keys() - listing.keys()),
        "changed": sum(listing.get(name, size) != size for name, size in before.items()),
        "new": len(listing.keys() - before.keys()),
    }
    if not any(changes.values()):
        return ""
    words = ", ".join(f"{number:,} {what}" for what, number in changes.items() if number)
    return f"images since the last encoding: {words}; {len(kept)} of {len(records)} shards stay as they are"


def tidy_records(
    out: Path,
    records: Mapping[int, Mapping[str, Any]],
    listing: Listing,
    shards: Mapping[int, Sequence[str]],
    kept: Sequence[int],
) -> None:
    """Removes shards whose images are all gone; takes unreadable images that are gone out of other records.

    Args:
        out: Folder of the shards.
        records: Of the shards that were written.
        listing: Of the folder now.
        shards: Images of each shard, and
        kept: those that stay, as `assign` returns them.
    """
    for path in record_files(out):
        shard = shard_of(path)
        if shard not in shards:  # its images are gone, or its record was damaged
            (out / shard_name(0, shard)).unlink(missing_ok=True)
            path.unlink()
    for shard, record in records.items():
        if shard in shards and shard in kept:
            images = {name: size for name, size in record["images"].items() if listing.get(name) == size}
            unreadable = {name: why for name, why in record["unreadable"].items() if name in images}
            changed = {**record, "images": images, "unreadable": unreadable}
            write_checked_json(record_file(out, shard), changed)
