"""Trains a segmenter, scores one, or draws what one sees. Without arguments trains a small one on scenes.

`iwin segment --eval-only --weights AUTHORS.pth data.path=ADE20K` prints the mIoU of the authors' UPerNet.
`iwin segment --checkpoint RUN --images DIR --out DIR` draws label maps over pictures and writes the maps.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from flashdit.commands.arguments import path, path_text
from flashdit.shared.command import CommandParser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add(
        "--config",
        type=path_text,
        metavar="YAML|NAME",
        help="a file or a shipped one (default: iwin/segment_scenes, with data.path iwin/upernet_tiny)",
    )
    add("--eval-only", action="store_true", help="print mIoU and accuracies, train nothing")
    add("--weights", type=path, metavar="PATH", help="what --eval-only scores (default: the run)")
    add("--checkpoint", type=path, metavar="RUN", help="a run whose average is used on --images")
    add("--images", type=path, metavar="DIR", help="pictures to segment")
    add("--out", type=path, metavar="DIR", help="new folder for pictures/ and labels/")
    add("overrides", nargs="*", metavar="key=value", help="such as data.path=ADE20K inference.flip=true")
    arguments = parser.parse_intermixed_args(argv)
    use = {name: getattr(arguments, name) for name in ("checkpoint", "images", "out")}
    missing = [f"--{name}" for name, value in use.items() if value is None]
    if len(missing) in (1, 2):
        raise ValueError(f"--checkpoint, --images and --out go together, got none of {', '.join(missing)}")
    if not missing and (arguments.eval_only or arguments.config or arguments.weights):
        raise ValueError("--checkpoint has its own configuration, got --config, --weights or --eval-only too")
    if arguments.weights and not arguments.eval_only:
        raise ValueError("--weights is for --eval-only; training starts from weights=PATH")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line; trains, evaluates or segments, and prints what came of it."""
    arguments = parse(argv)
    from flashdit.shared.process import keep_freed_memory
    from iwin_tasks.segmentation.config import load_segmentation_config
    from iwin_tasks.segmentation.task import SegmentationTrainer, evaluate_run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.checkpoint:
        from iwin_tasks.segmentation.use import segment_folder

        count = segment_folder(arguments.checkpoint, arguments.images, arguments.out, arguments.overrides)
        print(f"{count:,} pictures segmented: {arguments.out}")
        return
    config = load_segmentation_config(arguments.config, arguments.overrides)
    if arguments.eval_only:
        source, result = evaluate_run(config, arguments.weights)
        print(f"{source}: {result}")
        return
    trainer = SegmentationTrainer(config)
    if trainer.device.type == "cpu":
        keep_freed_memory()
    trainer.fit()
    if trainer.main:
        result = trainer.task.result
        scores = f", EMA {result}" if result is not None and not trainer.stopped_by else ""
        print(trainer.outcome + scores)
    trainer.accelerator.end_training()
