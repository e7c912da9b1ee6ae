"""Writes a run's checkpoint as a diffusers pipeline, with its card: `flashdit export RUN OUT`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flashdit.commands.arguments import add_guide, add_weights, guide_of, path, path_text
from flashdit.shared.command import CommandParser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("run", type=path_text, help="a run, or one of its checkpoint folders")
    add("out", type=path, help="folder of the pipeline: new, or an earlier export, which is replaced")
    add_weights(parser)
    add_guide(parser)
    add("--name", help="title of the model card (default: the run's name)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Exports a run or checkpoint to a folder that `FlashDiTPipeline.from_pretrained` reads."""
    arguments = parse(argv)
    from flashdit.sampling.export import export_run

    guide = guide_of(arguments)
    replaced = export_run(arguments.run, arguments.out, arguments.name, arguments.vae, arguments.ema, *guide)
    if replaced:
        print(f"{arguments.out}: replaced the earlier export ({replaced})")
    print(f'{arguments.out}: FlashDiTPipeline.from_pretrained("{arguments.out}")')
