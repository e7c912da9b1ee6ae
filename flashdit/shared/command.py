"""Runs a command: a user's mistake is one line on stderr and exit status 2; the device is checked."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from flashdit.shared.registry import nearest_name, unknown

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130  # as shells have it: 128 + SIGINT
UNKNOWN_WORDS = "unrecognized arguments: "
"""Beginning of argparse's message."""
WRONG_NUMBER = re.compile(r"argument (?P<option>\S+): invalid (?P<kind>int|float) value: (?P<value>.*)")
"""How argparse says it."""
NUMBER_WORDS = {"int": "whole number", "float": "number"}
FILE_RULES = {
    errno.EISDIR: "{} must be a file, and is a folder",
    errno.ENOTDIR: "{} must lie in folders, and something above it is a file",
    errno.ENAMETOOLONG: "a path must be one that its file system takes, {} is too long",
}
"""What the user has to know of errors of the system whose own words leave it open."""


def run_script(main: Callable[[], None]) -> None:
    """Runs a command's `main`; what a user can cause ends it with one sentence instead of a traceback.

    A Ctrl-C ends it with exit status 130; commands that can go on later have kept what is finished.
    `FLASHDIT_TRACEBACK=1` shows the traceback, for those who search for a bug of ours.
    """
    _open_closed_streams()
    try:
        _check_words(sys.argv[1:])
        main()
    except BrokenPipeError:  # who reads the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        if is_first_process():
            print(f"\n{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        sentence = _sentence(error)
        if os.environ.get("FLASHDIT_TRACEBACK") or sentence is None:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
        sys.exit(2)


def is_first_process() -> bool:
    """Returns whether this process speaks for all that a launcher has started; torch is not imported."""
    return os.environ.get("RANK", "0") == "0"


def _check_words(words: Sequence[str]) -> None:
    """Refuses an empty word, such as a shell's variable without a value leaves: it would mean the default."""
    for before, word in pairwise(["", *words]):
        if not word or (word.startswith("--") and word.endswith("=")):
            after = f" after {before}" if before else ""
            raise ValueError(f"a word of the command line must not be empty, got {word!r}{after}")


def _sentence(error: Exception) -> str | None:
    """Returns what to print of an error that a user can cause; None for any other, which is a bug of ours."""
    from flashdit.shared.files import lost_worker  # which a command that fails can wait for

    text = " ".join(str(error).split())
    kind = type(error).__name__
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError) or "t allocate memory" in text:
        said = next((part for part in text.split(". ") if "memory" in part), kind)
        return f"out of memory: {said}; use a smaller batch, model or picture"
    if lost := lost_worker(error):
        return (
            f"a process that reads data is gone ({lost}), as when memory is short: run the same command "
            "again, with fewer workers; a run goes on from its last whole checkpoint"
        )
    if isinstance(error, RecursionError):
        return "a file that was read nests lists or mappings too deeply; FLASHDIT_TRACEBACK=1 shows which"
    if kind == "SafetensorError":  # of reading; what cannot be written is an OSError of `write_atomically`
        return f"a file of weights must be readable: {text}"
    if isinstance(error, OSError) and error.errno in FILE_RULES and error.filename is not None:
        return FILE_RULES[error.errno].format(error.filename)
    return text if isinstance(error, ValueError | OSError | FloatingPointError) else None


def _open_closed_streams() -> None:
    """Puts the null device where a shell has closed stdin, stdout or stderr (`2>&-`).

    A file that is opened later would else take the place, and messages of libraries would land in it.
    """
    for place, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(place)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free place, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(place, "w" if place else "r", closefd=False))


class CommandParser(argparse.ArgumentParser):
    """A parser that takes options by their whole names alone, and names the nearest one of an unknown option.

    Args:
        **options: As argparse's own parser has them.
    """

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Ends the command with one sentence, and with where its options are told."""
        unknown_words = message.removeprefix(UNKNOWN_WORDS) if message.startswith(UNKNOWN_WORDS) else ""
        option = next((word for word in unknown_words.split() if word.startswith("-")), "")
        near = nearest_name(option.partition("=")[0], self._option_string_actions)
        if wrong := WRONG_NUMBER.fullmatch(message):
            message = f"{wrong['option']} must be a {NUMBER_WORDS[wrong['kind']]}, got {wrong['value']}"
        self.exit(2, f"{self.prog}: error: {message}{near} ({self.prog} --help lists the options)\n")


class Command(NamedTuple):
    """One command of a console entry: `module.main(argv)`, imported when it is named."""

    module: str
    about: str
    """One line for the list of commands."""


def run_command(entry: str, commands: Mapping[str, Command], argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first word names with the words after it; without one, lists them all.

    Its usage and its errors begin with `ENTRY COMMAND`, which becomes the process's `sys.argv[0]`.

    Args:
        entry: Name of the console entry, such as `flashdit`.
        commands: By name.
        argv: Words after the entry's name; None means those of this process.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    name, *rest = words or ["--help"]
    sys.argv = [f"{entry} {name}", *rest] if name in commands else [entry, *words]

    def main() -> None:
        if name in ("-h", "--help"):
            width = max(map(len, commands))
            print(f"usage: {entry} COMMAND [options]; {entry} COMMAND --help says which\n")
            print("\n".join(f"  {key:{width}}  {command.about}" for key, command in commands.items()))
            sys.stdout.flush()
            return
        if name not in commands:
            raise unknown("command", name, commands)
        import_module(commands[name].module).main(rest)

    run_script(main)


def need_extra(module: str, extra: str) -> ModuleType:
    """Returns a module of a package that only an extra installs.

    Raises:
        ValueError: If it is not installed; says what to install.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"this requires the extra '{extra}': pip install 'flashdit[{extra}]' ({error})"
        ) from error


def open_console() -> Console:
    """Returns rich's console; where its reader has read enough, the command ends as `run_script` has it."""
    from rich.console import Console

    class QuietConsole(Console):
        def on_broken_pipe(self) -> None:
            """Leaves it to `run_script`, where rich would exit with status 1."""
            raise BrokenPipeError

    return QuietConsole()


def add_device(parser: argparse._ActionsContainer) -> None:
    """Adds `--device`, for `resolve_device`; torch is not imported."""
    parser.add_argument("--device", help="where to run (default: cuda where there is one, else cpu)")


def resolve_device(name: str | None) -> str:
    """Returns the name of a device that this machine has.

    Args:
        name: Such as `cuda:1`; None means cuda where there is one, else cpu.

    Raises:
        ValueError: If the machine has none of that name.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        count = 1 if device.type == "cpu" else torch.get_device_module(device).device_count()
    except (RuntimeError, AttributeError):  # torch knows no such kind, or it computes nothing
        count = 0
    if not count or (device.index or 0) >= count:
        raise ValueError(f"--device must be one of this machine, such as cpu, got {name}")
    return name
