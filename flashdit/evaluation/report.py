"""How an evaluation is told: metrics.json with its whole recipe, a Markdown table and a console table."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashdit.evaluation.features import Extractor
from flashdit.evaluation.scoring import Scores
from flashdit.files import write_atomically, write_json

SCHEMA = 1
PACKAGES = ("flashdit", "torch", "torch-fidelity", "numpy")


def installed_version(package: str) -> str | None:
    """Returns the version of a package; None for ours in a checkout that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(kw_only=True)
class EvalResult:
    """Everything that a reader needs to believe, repeat or refuse a comparison.

    Attributes:
        scores: Of the samples.
        floor: The same scores of real training images; None where no such images are at hand.
        labels: What each key of the scores is called in tables.
        num_images: Samples scored.
        samples: Where they came from: checkpoint and sampling options, or a path.
        reference: Name and number of images (None: its author knows).
        extractor: Name and fingerprint.
        settings: k of precision and recall, rows per chunk of the inception score.
        device: Where features were computed.
        timings_s: Seconds per stage.
        warnings: What makes these numbers hard to compare.
    """

    scores: Scores
    floor: Scores | None
    labels: dict[str, str]
    num_images: int
    samples: dict[str, Any]
    reference: dict[str, Any]
    extractor: dict[str, str]
    settings: dict[str, int]
    device: str
    timings_s: dict[str, float]
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of metrics.json."""
        content = asdict(self)
        scores, floor = content.pop("scores"), content.pop("floor")
        return {
            "schema": SCHEMA,
            "metrics": scores["values"],
            "reasons": scores["reasons"],
            "floor": floor["values"] if floor else None,
            **content,
            "versions": {
                "python": platform.python_version(),
                **{name: installed_version(name) for name in PACKAGES},
            },
        }


def names_of(extractor: Extractor) -> dict[str, tuple[str, str]]:
    """Returns (key in metrics.json, name in tables) of every score: `fid` and FID are Inception's alone."""
    frechet = extractor.frechet_name
    key, score = ("fid", "IS") if frechet == "FID" else ("fd", f"IS[{extractor.name}]")
    return {
        "fid": (key, frechet),
        "sfid": (f"s{key}", f"s{frechet}"),
        "is_mean": ("is_mean", score),
        "is_std": ("is_std", f"{score} std"),
        **{same: (same, same) for same in ("precision", "recall", "accuracy")},
    }


def table_rows(result: EvalResult) -> list[list[str]]:
    """Returns the header and a row per score; a distance that rounding left below zero is shown as zero."""
    rows = [["metric", f"samples ({result.num_images:,})", *(["floor: real train"] if result.floor else [])]]
    for key, name in result.labels.items():
        columns = [scores.values.get(key) for scores in (result.scores, result.floor) if scores]
        rows.append([name, *("n/a" if value is None else f"{max(value, 0.0):.4f}" for value in columns)])
    return rows


def footnotes(result: EvalResult) -> list[str]:
    """Returns the lines under a table: what it is held against, what is missing and why, what to beware."""
    count = result.reference["num_images"]
    against = (
        f"reference {result.reference['name']} ({'count unknown' if count is None else f'{count:,} images'})"
    )
    missing = [f"{result.labels[key]}: {reason}" for key, reason in result.scores.reasons.items()]
    how = [f"samples: {result.samples['summary']}"] if "summary" in result.samples else []
    return [*how, f"{against}, extractor {result.extractor['name']}", *missing, *result.warnings]


def to_markdown(result: EvalResult) -> str:
    """Returns the table and its footnotes as Markdown."""
    header, *rows = table_rows(result)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([table, "", *(f"- {note}" for note in footnotes(result)), ""])


def print_table(result: EvalResult, console: Console) -> None:
    """Prints the table and its footnotes."""
    header, *rows = table_rows(result)
    table = Table()
    for place, title in enumerate(header):
        table.add_column(title, justify="right" if place else "left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    for note in footnotes(result):
        console.print(escape(note), style="dim", soft_wrap=True)


def write_report(result: EvalResult, path: Path) -> None:
    """Writes the JSON to `path` and the table beside it as Markdown, each whole or not at all."""
    write_json(path, result.to_dict())
    write_atomically(path.with_suffix(".md"), lambda temporary: temporary.write_text(to_markdown(result)))
