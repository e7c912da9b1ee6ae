"""Trains a FlashDiT: config → Trainer(config).fit(). No argument trains the embedded digits default."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from flashdit import config
from flashdit.shared.command import run_script
from flashdit.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, trains, and says where the run lies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", help="YAML file (default: configs/digits.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.steps=100")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    loaded = config.load(arguments.config, arguments.overrides)
    trainer = Trainer(loaded)
    run_dir = trainer.fit()
    if trainer.accelerator.is_main_process:
        print(f"trained to step {trainer.step}: {run_dir}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
