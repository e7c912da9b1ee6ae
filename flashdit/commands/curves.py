"""Curves of a run: read from metrics.jsonl, smoothed, thinned; and those that ship with presets."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from flashdit.shared.files import write_atomically
from flashdit.shared.paths import resolved
from flashdit.shared.registry import announced
from flashdit.shared.runs import METRICS_FILE

logger = logging.getLogger(__name__)
SHIPPED_CURVES = Path("assets", "curves")  # beside the module that announces a data set
TASK_SECTIONS = ("data", "latents", "flow", "augmentation")  # the sections that say what a loss is of
OLDER_SCORES = (
    *("fid", "fd", "sfid", "sfd", "kid", "kd", "is_mean"),
    *("precision", "recall", "accuracy", "ema_top"),
)
"""Beginnings of the scores' names, for runs whose records do not list their `scores`."""
REFERENCE_POINTS = 100
CURVES_MARK = '"curves": {'
"""Text that every file of --write-reference holds."""
Curve = list[tuple[float, float]]
"""(images seen, value), by rising images."""


@dataclass(frozen=True, kw_only=True)
class RunCurves:
    """What a run recorded, or a thinned copy of it."""

    name: str
    task: dict[str, Any]
    """Its configuration as far as it says what a loss is of."""
    curves: dict[str, Curve]
    """By metric."""
    scores: list[str] = field(default_factory=list)
    """The metrics that are scores of evaluations within training."""


def list_scores(curves: Iterable[str], listed: Iterable[str]) -> list[str]:
    """Returns which metrics are scores: those that records list, or by their names where no record does."""
    scores = set(listed) or {name for name in curves if name.startswith(OLDER_SCORES)}
    return [name for name in curves if name in scores]


def read_run(run: Path) -> RunCurves:
    """Returns the curves of a run's folder.

    Raises:
        ValueError: If it is no run or has no record; a line that is none is named and left out.
    """
    path = run / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"a run must be a folder that holds {METRICS_FILE}, got {run}")
    curves: dict[str, Curve] = {}
    listed: set[str] = set()
    for number, line in enumerate(path.read_text(errors="replace").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):  # a running or killed process is within it
            break
        try:
            points, scores = _read_record(line)
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: line %d is no record with images_seen and is left out", path, number)
            continue
        listed |= scores
        for name, point in points.items():
            curves.setdefault(name, []).append(point)
    if not curves:
        raise ValueError(f"a run must have logged before it can be drawn, {path} is empty")
    config = run / "config.yaml"
    stated = yaml.safe_load(config.read_text()) if config.is_file() else {}
    return RunCurves(
        name=resolved(run).name,
        task={key: stated[key] for key in TASK_SECTIONS if key in stated},
        curves=curves,
        scores=list_scores(curves, listed),
    )


def _read_record(line: str) -> tuple[dict[str, tuple[float, float]], set[str]]:
    """Returns the finite numbers of a record with its images seen, and which of them it lists as scores."""
    record = json.loads(line)
    images, scores = float(record["images_seen"]), set(record.get("scores", ()))
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
    points = {name: (images, float(value)) for name, value in numbers.items() if math.isfinite(value)}
    return points, scores


def smooth(curve: Curve, share: float) -> Curve:
    """Returns the means of a curve under a kernel that falls off exponentially to both sides.

    It is never longer than a tenth of the images seen, so that a steep beginning stays as it is.

    Args:
        curve: By rising images.
        share: Length over which the kernel falls to 1/e, as a share of the whole length; 0 leaves the curve.
    """
    if share <= 0 or len(curve) < 3:
        return curve
    length = share * (curve[-1][0] - curve[0][0])
    before, after = _running_sums(curve, length), _running_sums(curve[::-1], length)[::-1]
    return [
        (images, (sum_b + sum_a - value) / (weight_b + weight_a - 1))
        for (images, value), (sum_b, weight_b), (sum_a, weight_a) in zip(curve, before, after, strict=True)
    ]


def _running_sums(curve: Curve, length: float) -> list[tuple[float, float]]:
    """Returns at each point the weighted sum of all up to it, and the sum of the weights."""
    sums, total, weight, last = [], 0.0, 0.0, curve[0][0]
    for images, value in curve:
        local = min(length, 0.1 * min(images, last))
        kept = math.exp(-abs(images - last) / local) if local > 0 else 0.0
        total, weight, last = kept * total + value, kept * weight + 1, images
        sums.append((total, weight))
    return sums


def thin(curve: Curve, points: int) -> Curve:
    """Returns at most so many points of a curve: the means of equal runs of neighbours, to 5 digits."""
    size = -(-len(curve) // points)
    groups = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [
        (
            sum(images for images, _ in group) / len(group),
            float(f"{sum(v for _, v in group) / len(group):.5g}"),
        )
        for group in groups
    ]


def write_reference_curve(run: RunCurves, metrics: Sequence[str], path: Path) -> None:
    """Writes a thinned copy of a run, as it ships with its preset."""
    curves = {name: thin(run.curves[name], REFERENCE_POINTS) for name in metrics}
    thinned = replace(run, curves=curves, scores=[name for name in run.scores if name in curves])
    text = json.dumps(asdict(thinned)) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_reference(path: Path) -> RunCurves:
    """Returns the curves that `write_reference_curve` wrote.

    Raises:
        ValueError: If the file is none of these.
    """
    try:
        content = json.loads(path.read_text())
        curves = {
            name: [(float(x), float(y)) for x, y in points] for name, points in content["curves"].items()
        }
        scores = list_scores(curves, content.get("scores", ()))
        return RunCurves(name=content["name"], task=content["task"], curves=curves, scores=scores)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"a reference must be a file of --write-reference, {path} is not: {error}"
        ) from error


def shipped_references(runs: Sequence[RunCurves]) -> list[RunCurves]:
    """Returns the shipped references whose task is that of one of the runs: their losses can be compared."""
    names = dict.fromkeys(run.task.get("data", {}).get("name") for run in runs)
    modules = [announced("flashdit.data")[name] for name in names if name in announced("flashdit.data")]
    folders = [
        Path(spec.origin).parent / SHIPPED_CURVES for spec in map(find_spec, modules) if spec and spec.origin
    ]
    known = [read_reference(path) for folder in folders for path in sorted(folder.glob("*.json"))]
    return [reference for reference in known if any(holds(run.task, reference.task) for run in runs)]


def holds(config: Any, part: Any) -> bool:
    """Returns whether a configuration has every key of another one with the same value."""
    if isinstance(config, Mapping) and isinstance(part, Mapping):
        return all(key in config and holds(config[key], value) for key, value in part.items())
    return config == part
