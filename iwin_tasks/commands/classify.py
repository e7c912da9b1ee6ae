"""Trains an Iwin backbone on labelled images. No argument trains a small one on the embedded digits."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from flashdit.shared.command import run_script
from iwin_tasks.classification.config import load
from iwin_tasks.classification.task import ClassifierTrainer, evaluate_only


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, trains or evaluates, and prints the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", help="YAML file (default: configs/iwin/digits_32.yaml)")
    parser.add_argument(
        "--eval-only", action="store_true", help="print accuracy and throughput, train nothing"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.path=IMAGENET")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load(arguments.config, arguments.overrides)
    if arguments.eval_only:
        source, accuracy = evaluate_only(config)
        print(f"{source}: {accuracy}")
        return
    trainer = ClassifierTrainer(config)
    run_dir = trainer.fit()
    if trainer.main and trainer.task.accuracy is not None:
        print(f"trained to step {trainer.step}: {run_dir}, EMA {trainer.task.accuracy}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
