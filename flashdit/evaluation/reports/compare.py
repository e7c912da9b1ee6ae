"""Results side by side: their numbers, and which of them may be compared at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashdit.evaluation.reports.report import RESULT_SCHEMA, shown
from flashdit.shared.files import read_checked_json
from flashdit.shared.registry import check_type

Result = dict[str, Any]
COMPARISON_MARK = "\n| samples | "
"""Text that every table written by `flashdit eval compare` holds."""

LIKE_THE_DATA = {"reference": "not balanced"}  # drawn in the shares that real images have
CONDITIONS: dict[str, Callable[[Result], Any]] = {  # what must be equal, and where metrics.json has it
    "number of samples": lambda result: result["num_images"],
    "extractor": lambda result: result["extractor"]["fingerprint"],
    "resize": lambda result: result["extractor"]["resize"],
    "reference": lambda result: result["reference"]["sha256"],
    "number of reference images": lambda result: result["reference"]["num_images"],
    "image size": lambda result: result["image_size"],
    "label mode": lambda result: LIKE_THE_DATA.get(result["samples"]["labels"], result["samples"]["labels"]),
    "settings": lambda result: result["settings"],
}


def read_result(path: Path) -> Result:
    """Returns the content of a metrics.json.

    Raises:
        ValueError: If it is none, or of another schema.
    """
    try:
        content = read_checked_json(path)
        if (schema := content.get("schema")) != RESULT_SCHEMA:
            raise ValueError(f"schema {schema} and not {RESULT_SCHEMA}")
        for read in CONDITIONS.values():
            read(content)
        check_type("num_images", content["num_images"], int)
        for key, label in content["labels"].items():
            check_type(f"labels.{key}", label, str)
            shown(content["metrics"][key])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"compare reads the metrics.json of evaluations, got {path}: {missing}") from error
    return content


def differences(first: Result, other: Result) -> list[str]:
    """Returns why two results are not comparable; nothing where they are."""
    found = []
    for name, read in CONDITIONS.items():
        values = read(first), read(other)
        if values[0] != values[1]:
            found.append(f"{name}: {brief(values[0])} and {brief(values[1])}")
    return found


def brief(value: Any) -> str:
    """Returns a value as a sentence may hold it: of a hash the first digits."""
    text = "unknown" if value is None else str(value)
    kind, separator, digest = text.rpartition("sha256=")
    is_hash = len(digest) == 64 and not set(digest) - set("0123456789abcdef")
    return f"{kind}{separator}{digest[:12]}" if is_hash else text


def verdicts(names: Sequence[str], results: Sequence[Result]) -> list[str]:
    """Returns a sentence for every pair that is not comparable, or one that says that all are."""
    found = []
    for index, first in enumerate(results):
        for other in range(index + 1, len(results)):
            why = differences(first, results[other])
            if why:
                found.append(f"{names[index]} and {names[other]} are not comparable: {'; '.join(why)}")
    return found or [
        "all of them are comparable: same count, extractor, reference, image size and label mode"
    ]


def comparison_rows(names: Sequence[str], results: Sequence[Result]) -> list[list[str]]:
    """Returns a header and a row per score, by what tables call it; scores that a result lacks are dashes."""
    by_label = [
        {label: result["metrics"][key] for key, label in result["labels"].items()} for result in results
    ]
    labels = list(dict.fromkeys(label for scores in by_label for label in scores))
    rows = [["metric", *names], ["samples", *(f"{result['num_images']:,}" for result in results)]]
    for label in labels:
        rows.append([label, *(shown(scores[label]) if label in scores else "–" for scores in by_label)])
    return rows


def column_names(paths: Sequence[Path]) -> list[str]:
    """Returns what to call each result: the shortest end of its path that no other has."""
    parts = [path.with_suffix("").parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {path}" for number, path in enumerate(paths, 1)]
