"""Console entry `flashdit`, and `python -m flashdit`: the commands and what each is for."""

from __future__ import annotations

from collections.abc import Sequence

from flashdit.shared.command import Command, run_command

COMMANDS = {
    "new": Command("flashdit.commands.new", "write a configuration for a folder of one's own images"),
    "train": Command("flashdit.commands.train", "train a model; without arguments, a small one on digits"),
    "sample": Command("flashdit.commands.sample", "draw images from a checkpoint"),
    "eval": Command(
        "flashdit.commands.evaluate", "score images or a checkpoint; make-reference, compare, loss"
    ),
    "sweep": Command("flashdit.commands.sweep", "score a checkpoint over guidance scales"),
    "autoencoder": Command("flashdit.commands.autoencoder", "train an autoencoder on one's own images"),
    "encode": Command("flashdit.commands.encode", "encode a folder of images into latent shards"),
    "export": Command("flashdit.commands.export", "write a checkpoint as a diffusers pipeline"),
    "estimate": Command(
        "flashdit.commands.estimate", "memory, time and disk space of a run before it starts"
    ),
    "plot": Command("flashdit.commands.plot", "draw the losses and scores of runs"),
    "posthoc": Command("flashdit.commands.posthoc", "average the weights over any width after training"),
    "app": Command("flashdit.commands.app", "serve a web page that samples from checkpoints"),
    "list": Command("flashdit.commands.list", "list samplers, metrics, data sets and other parts by name"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first word names."""
    run_command("flashdit", COMMANDS, argv)


if __name__ == "__main__":
    main()
