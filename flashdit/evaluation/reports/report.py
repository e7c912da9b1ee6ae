"""How an evaluation is reported: metrics.json with its whole recipe, a Markdown and a console table."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashdit.evaluation.metrics.metric import ScoreName
from flashdit.evaluation.metrics.scoring import Scores
from flashdit.shared.files import write_atomically, write_json
from flashdit.shared.registry import counted

RESULT_SCHEMA = 2
JSON_MARK, MARKDOWN_MARK = '"timings_s": {', "| metric | samples ("
"""Texts that every metrics.json, and every table beside one, holds."""
HALVES = (
    "two halves of the reference's images give the floor of a distance: "
    "docs/evaluation.md, 'Scoring your own pictures'"
)
PACKAGES = ("flashdit", "torch", "torch-fidelity", "numpy")


def installed_version(package: str) -> str | None:
    """Returns the version of a package; None for ours in a checkout that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def now() -> str:
    """Returns the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(kw_only=True)
class EvalResult:
    """Everything that a reader needs to believe, repeat or compare them.

    Attributes:
        scores: Of the samples; keys are those of the metrics, whatever the extractor.
        floor: The same scores of real training images; None where no such images are at hand.
        names: What each key of the scores is called.
        num_images: Samples scored.
        samples: Where they came from: checkpoint and sampling options, or a path; and their label mode.
        image_size: (h, w) in pixels.
        reference: Name, number of images (None: its author knows) and hash.
        extractor: Name, fingerprint, hash of the weights file, resize.
        settings: k of precision and recall, rows per chunk of the inception score and subset of the kernel's.
        device: Where features were computed.
        processes: How many shared the work.
        timings_s: Seconds per stage.
        warnings: What makes these numbers hard to compare.
        created: When, in UTC.
    """

    scores: Scores
    floor: Scores | None
    names: dict[str, ScoreName]
    num_images: int
    samples: dict[str, Any]
    image_size: tuple[int, int]
    reference: dict[str, Any]
    extractor: dict[str, Any]
    settings: dict[str, int]
    device: str
    processes: int = 1
    timings_s: dict[str, float]
    warnings: list[str] = field(default_factory=list)
    created: str = field(default_factory=now)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of metrics.json."""
        content = asdict(self)
        for part in ("scores", "floor", "names"):
            content.pop(part)
        count = self.scores.count
        return {
            "schema": RESULT_SCHEMA,
            "created": content.pop("created"),
            "metrics": self._keyed(self.scores.values, count),
            "reasons": self._keyed(self.scores.reasons, count),
            "floor": self._keyed(self.floor.values, self.floor.count) if self.floor else None,
            "labels": self._keyed({key: name.label for key, name in self.names.items()}, count),
            **content,
            "versions": {
                "python": platform.python_version(),
                **{name: installed_version(name) for name in PACKAGES},
            },
        }

    def _keyed(self, values: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Returns the values under their keys in metrics.json."""
        names = {key: self.names[key] for key in values}
        return {
            count_key(names[key].stem, count) if names[key].counted else names[key].stem: value
            for key, value in values.items()
        }


def count_key(stem: str, count: int) -> str:
    """Returns a score's key with its number of images: `fid_50k`, or `fid_1234` where thousands do not do."""
    return f"{stem}_{count // 1000}k" if count % 1000 == 0 else f"{stem}_{count}"


def table_rows(result: EvalResult) -> list[list[str]]:
    """Returns the header and a row per score."""
    rows = [["metric", f"samples ({result.num_images:,})", *(["floor: real train"] if result.floor else [])]]
    for key, name in result.names.items():
        columns = [scores.values.get(key) for scores in (result.scores, result.floor) if scores]
        rows.append([name.label, *map(shown, columns)])
    return rows


def shown(value: float | None) -> str:
    """Returns a score as tables show it: in four decimals, a small one in six; rounding's -1e-9 is zero."""
    if value is None:
        return "n/a"
    return f"{value:.6f}" if 5e-7 <= abs(value) < 0.01 else f"{value:.4f}".replace("-0.0000", "0.0000")


def footnotes(result: EvalResult) -> list[str]:
    """Returns the lines under a table: the reference, what is missing and why, what to beware of."""
    count = result.reference["num_images"]
    images = "count unknown" if count is None else counted(count, "image")
    against = f"reference {result.reference['name']} ({images})"
    missing = [f"{result.names[key].label}: {reason}" for key, reason in result.scores.reasons.items()]
    sampling = [f"samples: {result.samples['summary']}"] if "summary" in result.samples else []
    return [*sampling, f"{against}, extractor {result.extractor['name']}", *missing, *result.warnings]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a header and rows as a Markdown table, numbers to the right."""
    header, *rest = rows
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_markdown(result: EvalResult) -> str:
    """Returns the table and its footnotes as Markdown."""
    return "\n".join(
        [markdown_table(table_rows(result)), "", *(f"- {note}" for note in footnotes(result)), ""]
    )


def print_rows(rows: Sequence[Sequence[str]], notes: Sequence[str], console: Console) -> None:
    """Prints a header, rows and notes under them."""
    header, *rest = rows
    table = Table()
    for column, title in enumerate(header):
        table.add_column(escape(title), justify="right" if column else "left")
    for row in rest:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    for note in notes:
        console.print(escape(note), style="dim", soft_wrap=True)


def print_table(result: EvalResult, console: Console) -> None:
    """Prints the table and its footnotes, and where a floor comes from if none is known."""
    lacks_floor = result.floor is None and result.scores.values.get("fid") is not None
    notes = footnotes(result) + [HALVES] * lacks_floor
    print_rows(table_rows(result), notes, console)


def write_report(result: EvalResult, path: Path) -> None:
    """Writes the JSON to `path` and the table beside it as Markdown, each whole or not at all."""
    write_json(path, result.to_dict())
    write_atomically(path.with_suffix(".md"), lambda temporary: temporary.write_text(to_markdown(result)))
