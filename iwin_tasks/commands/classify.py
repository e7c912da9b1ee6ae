"""Trains an Iwin backbone on labelled images. Without arguments a small one, on the embedded digits."""

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
        help="a file or a shipped configuration (default: iwin/digits_32)",
    )
    add("--eval-only", action="store_true", help="print accuracy and throughput, train nothing")
    add("overrides", nargs="*", metavar="key=value", help="such as data.path=IMAGENET")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, trains or evaluates, and prints the accuracy."""
    arguments = parse(argv)
    from flashdit.shared.process import keep_freed_memory
    from iwin_tasks.classification.config import load_classifier_config
    from iwin_tasks.classification.task import ClassifierTrainer, evaluate_only

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_classifier_config(arguments.config, arguments.overrides)
    if arguments.eval_only:
        source, accuracy = evaluate_only(config)
        print(f"{source}: {accuracy}")
        return
    trainer = ClassifierTrainer(config)
    if trainer.device.type == "cpu":
        keep_freed_memory()
    trainer.fit()
    if trainer.main:
        accuracy = trainer.task.accuracy
        print(
            trainer.outcome + (f", EMA {accuracy}" if accuracy is not None and not trainer.stopped_by else "")
        )
    trainer.accelerator.end_training()
