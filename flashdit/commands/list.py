"""Lists the parts of one kind by name, with their options: `flashdit list samplers`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from flashdit.shared.command import CommandParser
from flashdit.shared.registry import unknown

LISTED_KINDS = {
    "samplers": "flashdit.flow.samplers:SAMPLERS",
    "metrics": "flashdit.evaluation.metrics.metric:METRICS",
    "data": "flashdit.data.sources:DATASETS",
    "extractors": "flashdit.evaluation.features.extractor:EXTRACTORS",
    "attention": "flashdit.models.attention:ATTENTIONS",
    "times": "flashdit.flow.times:TIMES",
    "predictions": "flashdit.flow.prediction:PREDICTIONS",
}
"""Kind → module:registry."""
MAKERS = ("integrate", "compute", "build")  # attributes of a registered piece that may hold what it is


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values, checked."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("kind", metavar="KIND", help=", ".join(LISTED_KINDS))
    arguments = parser.parse_args(argv)
    if arguments.kind not in LISTED_KINDS:
        raise unknown("kind of part", arguments.kind, LISTED_KINDS)
    return arguments


def about(piece: Any) -> str:
    """Returns the first line of the docstring of a registered piece's class or function."""
    made = next((made for name in MAKERS if (made := getattr(piece, name, None))), piece)
    return (inspect.getdoc(made) or "").partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints each name, what it is, and its options with type, default and meaning."""
    arguments = parse(argv)
    from flashdit.shared.settings import describe

    module, _, name = LISTED_KINDS[arguments.kind].partition(":")
    registry = getattr(import_module(module), name)
    for name in registry.names():
        try:
            piece = registry[name]
        except ValueError as error:
            print(f"{name}: unusable: {error}")
            continue
        print(f"{name}: {about(piece)}")
        for key in describe(piece.options_type) if hasattr(piece, "options_type") else ():
            given = f" = {key.default}" if key.default else " (required)"
            print(f"    {key.name}: {key.type}{given}" + (f"  {key.doc}" if key.doc else ""))
