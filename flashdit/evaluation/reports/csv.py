"""Results side by side in a CSV that only grows: a row per evaluation, columns that keep their order."""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flashdit.evaluation.metrics.metric import ScoreName
from flashdit.evaluation.reports.report import EvalResult

LONGEST_HEADER = 2**16  # characters
GUIDANCE_COLUMNS = ("cfg_channels", "guide")  # of a file that begins with such a row, at its end
SAMPLING_COLUMNS = ("sampler", "steps", "cfg_scale", "cfg_interval", "shift", "seed")
CSV_COLUMNS = (  # of every such file; a metric with another column adds it at the end
    "created",
    "samples",
    "step",
    "num_images",
    "label_mode",
    *SAMPLING_COLUMNS,
    "nfe",
    "extractor",
    "fingerprint",
    "reference",
    "reference_images",
    "reference_sha256",
    *("frechet", "spatial_frechet"),  # the extractor's column says whose distances these are
    *("is_mean", "is_std", "precision", "recall", "kernel_distance", "kernel_distance_std", "accuracy"),
    "image_size",
    "device",
    "processes",
    "seconds",
)


def row_of(result: EvalResult) -> dict[str, Any]:
    """Returns the row of a result; a score that could not be had is empty."""
    samples, reference, extractor = result.samples, result.reference, result.extractor
    sampling = samples.get("sampling", {})
    interval, sampler = sampling.get("cfg_interval"), sampling.get("sampler")
    return {
        "created": result.created,
        "samples": samples.get("checkpoint") or samples.get("path") or samples["source"],
        "step": samples.get("step"),
        "num_images": result.num_images,
        "label_mode": samples.get("labels"),
        **{name: sampling.get(name) for name in SAMPLING_COLUMNS},
        "sampler": sampler["name"] if isinstance(sampler, dict) else sampler,
        "cfg_interval": f"{interval[0]:g}-{interval[1]:g}" if interval else None,
        "nfe": samples.get("nfe"),
        "extractor": extractor["name"],
        "fingerprint": extractor["fingerprint"],
        "reference": reference["name"],
        "reference_images": reference["num_images"],
        "reference_sha256": reference["sha256"],
        **{result.names[key].column: value for key, value in result.scores.values.items()},
        "image_size": "×".join(map(str, result.image_size)),
        "device": result.device,
        "processes": result.processes,
        "seconds": round(sum(result.timings_s.values()), 3),
        **guidance_of(samples),
    }


def guidance_of(samples: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the GUIDANCE_COLUMNS of samples that have values, of what a report says of them."""
    guide, channels = samples.get("guide_checkpoint"), samples.get("sampling", {}).get("cfg_channels")
    values = channels, None if guide is None else f"{guide}/{samples['guide_weights']}"
    return {name: value for name, value in zip(GUIDANCE_COLUMNS, values, strict=True) if value is not None}


def read_columns(path: Path, names: Iterable[ScoreName], samples: Mapping[str, Any]) -> list[str]:
    """Returns the columns of a file, those of a new one where there is none.

    Args:
        path: The file.
        names: Of the scores that its next row holds.
        samples: What a report says of that row's samples.

    Raises:
        ValueError: If the file is no such CSV, or has no column for a score or for how samples were guided.
    """
    needed = list(dict.fromkeys([*CSV_COLUMNS, *(name.column for name in names), *guidance_of(samples)]))
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return needed
    if path.is_dir():
        raise ValueError(f"--csv must be a file, got the folder {path}")
    with path.open(newline="", errors="replace") as file:
        first = file.readline(LONGEST_HEADER)
    header = next(csv.reader([first]), [])
    if header[: len(CSV_COLUMNS)] != list(CSV_COLUMNS):
        raise ValueError(
            f"--csv must be a new file or have the columns {','.join(CSV_COLUMNS)}, {path} begins with "
            f"{first[:40]!r}"
        )
    lacks = [column for column in needed if column not in header]
    if lacks:
        raise ValueError(
            f"--csv must be a new file or have a column for every value, {path} has none for "
            f"{', '.join(lacks)}"
        )
    return header


def append_csv(result: EvalResult, path: Path) -> None:
    """Appends the row of a result, and to a new file the header before it, as one write under a lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another evaluation may write its header now
        writer = csv.DictWriter(
            text, read_columns(path, result.names.values(), result.samples), lineterminator="\n"
        )
        if not os.fstat(file.fileno()).st_size:
            writer.writeheader()
        writer.writerow(row_of(result))
        file.write(text.getvalue().encode())
