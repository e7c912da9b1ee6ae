"""Trains and scores detectors, and draws what one finds. Without arguments a small one on embedded scenes."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from flashdit.commands.arguments import path_text
from flashdit.shared.command import CommandParser

NEED_RUN = (
    "--checkpoint, --images and --out go together: what finds, on which images, and where it is written"
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add(
        "--config",
        type=path_text,
        metavar="YAML|NAME",
        help="a file or a shipped one; with data.path or the authors' --weights the paper's Mask R-CNN, with "
        "detector and backbone of the file (default: iwin/detect_scenes)",
    )
    add("--eval-only", action="store_true", help="print box and mask AP, train nothing")
    add(
        "--weights",
        type=path_text,
        metavar="FILE|RUN",
        help="what is scored or trained from: the authors' .pth, or a run of iwin detect or iwin classify",
    )
    add(
        "--results",
        type=path_text,
        metavar="JSON",
        help="with --eval-only: where the detections are written as COCO's server takes them",
    )
    add("--checkpoint", type=path_text, metavar="RUN", help="a trained run, to find objects on --images")
    add("--images", type=path_text, metavar="DIR", help="folder of images to find objects on")
    add("--out", type=path_text, metavar="DIR", help="where their pictures and detections.json are written")
    add("--threshold", type=float, default=0.5, help="least score of what is drawn (default: 0.5)")
    add("overrides", nargs="*", metavar="key=value", help="such as data.path=COCO")
    found = parser.parse_intermixed_args(argv)
    given = [found.checkpoint, found.images, found.out]
    if any(given) and not all(given):
        parser.error(NEED_RUN)
    if all(given) and (found.overrides or found.config or found.weights or found.eval_only):
        parser.error(
            "--checkpoint has its own configuration and trains nothing: give --images and --out alone"
        )
    if found.results and not found.eval_only:
        parser.error("--results requires --eval-only")
    if not 0 <= found.threshold <= 1:
        parser.error(f"--threshold must be from 0 to 1, got {found.threshold}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, trains, scores or draws, and prints what came of it."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.checkpoint:
        from iwin_tasks.detection.folder import detect_folder

        print(detect_folder(arguments.checkpoint, arguments.images, arguments.out, arguments.threshold))
        return
    from flashdit.shared.process import keep_freed_memory
    from iwin_tasks.detection.config import PAPER_DETECTOR, load_detection_config
    from iwin_tasks.detection.folder import check_results, write_results
    from iwin_tasks.detection.model import options_of_weights
    from iwin_tasks.detection.task import DetectionTrainer, score_only

    config_name, options = arguments.config, {}
    if arguments.weights:
        options = {"weights": arguments.weights}
        if config_name is None and (of_file := options_of_weights(arguments.weights)):
            config_name, options = PAPER_DETECTOR, options | of_file
    config = load_detection_config(config_name, arguments.overrides, options)
    if arguments.eval_only:
        if arguments.results:
            check_results(arguments.results)
        source, found = score_only(config, weights_first=bool(arguments.weights))
        if arguments.results:
            write_results(arguments.results, found.results)
        print(f"{source}\n{found.scores}")
        for name, ap in found.scores.box.per_class.items():
            mask = found.scores.mask.per_class[name]
            print(f"  {name}: box {_share(ap)}, mask {_share(mask)}")
        return
    trainer = DetectionTrainer(config)
    if trainer.device.type == "cpu":
        keep_freed_memory()
    trainer.fit()
    if trainer.main:
        print(trainer.outcome)
        if trainer.task.found is not None and not trainer.stopped_by:
            print(f"EMA {trainer.task.found}")
    trainer.accelerator.end_training()


def _share(ap: float | None) -> str:
    """Returns an average precision as text."""
    return "no object" if ap is None else f"{ap:.1%}"
