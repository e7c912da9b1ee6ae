"""Results side by side in a CSV that only grows: one row per evaluation, columns that never change."""

from __future__ import annotations

import csv
import fcntl
import io
import os
from pathlib import Path
from typing import Any

from flashdit.evaluation.reports.report import EvalResult

SCORES = {  # column → key of a score; the extractor's column says whose distance it is
    "frechet": "fid",
    "spatial_frechet": "sfid",
    "is_mean": "is_mean",
    "is_std": "is_std",
    "precision": "precision",
    "recall": "recall",
    "kernel_distance": "kid",
    "kernel_distance_std": "kid_std",
    "accuracy": "accuracy",
}
SAMPLING = ("sampler", "steps", "cfg_scale", "cfg_interval", "shift", "seed")
COLUMNS = (
    "created",
    "samples",
    "step",
    "num_images",
    "label_mode",
    *SAMPLING,
    "nfe",
    "extractor",
    "fingerprint",
    "reference",
    "reference_images",
    "reference_sha256",
    *SCORES,
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
        **{name: sampling.get(name) for name in SAMPLING},
        "sampler": sampler["name"] if isinstance(sampler, dict) else sampler,
        "cfg_interval": f"{interval[0]:g}-{interval[1]:g}" if interval else None,
        "nfe": samples.get("nfe"),
        "extractor": extractor["name"],
        "fingerprint": extractor["fingerprint"],
        "reference": reference["name"],
        "reference_images": reference["num_images"],
        "reference_sha256": reference["sha256"],
        **{column: result.scores.values.get(key) for column, key in SCORES.items()},
        "image_size": "×".join(map(str, result.image_size)),
        "device": result.device,
        "processes": result.processes,
        "seconds": round(sum(result.timings_s.values()), 3),
    }


def check_csv(path: Path) -> None:
    """Refuses a file whose first line is not the header of such a CSV."""
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if header != list(COLUMNS):
        raise ValueError(
            f"--csv must be a new file or have the columns {','.join(COLUMNS)}, got {path}: {header}"
        )


def append_csv(result: EvalResult, path: Path) -> None:
    """Appends the row of a result, and to a new file the header before it, as one write under a lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another evaluation may write its header now
        check_csv(path)
        if not os.fstat(file.fileno()).st_size:
            writer.writeheader()
        writer.writerow(row_of(result))
        file.write(text.getvalue().encode())
