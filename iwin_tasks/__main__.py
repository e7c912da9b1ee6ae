"""Console entry `iwin`, and `python -m iwin_tasks`: the commands and what each is for."""

from __future__ import annotations

from collections.abc import Sequence

from flashdit.shared.command import Command, run_command

COMMANDS = {
    "classify": Command("iwin_tasks.commands.classify", "train or evaluate a classifier"),
    "detect": Command("iwin_tasks.commands.detect", "train or score a detector, or draw what it finds"),
    "segment": Command("iwin_tasks.commands.segment", "train, evaluate or use a segmenter"),
    "reach": Command("iwin_tasks.commands.reach", "which tokens a token reaches in n blocks, Iwin and Swin"),
    "visualise": Command("iwin_tasks.commands.visualise", "receptive fields and Grad-CAM of a timm model"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first word names."""
    run_command("iwin", COMMANDS, argv)


if __name__ == "__main__":
    main()
