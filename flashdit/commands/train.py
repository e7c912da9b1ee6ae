"""Trains a FlashDiT by flow matching. Without arguments it trains a small one on the embedded digits."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from flashdit.commands.arguments import path_text
from flashdit.shared.command import CommandParser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add(
        "--config",
        type=path_text,
        metavar="YAML|NAME",
        help="a file or a shipped configuration (default: digits)",
    )
    add("--help-config", action="store_true", help="print every configuration key and exit")
    add("overrides", nargs="*", metavar="key=value", help="such as training.steps=100")
    return parser.parse_intermixed_args(argv)


def print_keys() -> None:
    """Prints every configuration key with its type, its default and what it means."""
    from flashdit.config import configuration_keys

    for key in configuration_keys():
        given = f" = {key.default}" if key.default else ""
        print(f"{key.name}: {key.type}{given}" + (f"\n    {key.doc}" if key.doc else ""))


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, trains, and says where the run lies."""
    arguments = parse(argv)
    if arguments.help_config:
        print_keys()
        return
    from flashdit import config
    from flashdit.shared.process import keep_freed_memory
    from flashdit.trainer import Trainer

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    trainer = Trainer(config.load(arguments.config, arguments.overrides))
    if trainer.device.type == "cpu":
        keep_freed_memory()
    trainer.fit()
    if trainer.main:
        print(trainer.outcome)
    trainer.accelerator.end_training()
