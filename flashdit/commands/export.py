"""`flashdit export RUN OUT`: a run becomes a diffusers pipeline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flashdit.commands.arguments import add_weights
from flashdit.shared.command import run_script


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Exports a run or checkpoint to a folder that `FlashDiTPipeline.from_pretrained` reads."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("run", help="a run, or one of its checkpoint folders")
    parser.add_argument("out", type=Path, help="folder of the pipeline: new, or an earlier export")
    add_weights(parser)
    parser.add_argument("--name", help="title of the model card (default: the run's name)")
    arguments = parser.parse_args(argv)
    export(arguments)


def export(arguments: argparse.Namespace) -> None:
    """Writes the pipeline and prints how it is loaded."""
    from flashdit.sampling.checkpoint import load_generator
    from flashdit.sampling.export import check_out, write_pipeline

    check_out(arguments.out)
    generator = load_generator(arguments.run, "cpu", arguments.vae, arguments.ema)
    write_pipeline(generator, arguments.out, arguments.name)
    print(f'{arguments.out}: FlashDiTPipeline.from_pretrained("{arguments.out}")')


if __name__ == "__main__":
    run_script(main)
