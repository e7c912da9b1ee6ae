"""Registries: a name and its options become a built part; unknown names list the known ones."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

Piece = TypeVar("Piece")


def unknown(kind: str, name: object, known: Iterable[object]) -> ValueError:
    """Returns the error for a name that is not known, naming the nearest one and all known ones.

    Args:
        kind: What is being named, such as `"sampler"`.
        name: What came.
        known: Every name there is.
    """
    names = sorted(map(str, known))
    nearest = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return ValueError(f"unknown {kind} '{name}'{hint} (known: {', '.join(names)})")


def make_options(options_type: type, given: Mapping[str, Any], kind: str) -> Any:
    """Returns the options dataclass filled from a mapping; an unknown key is refused with the nearest one.

    Args:
        options_type: A dataclass; its defaults stand for what is not given.
        given: Option names and values.
        kind: What the options belong to, for the message.
    """
    known = [field.name for field in fields(options_type)]
    for key in given:
        if key not in known:
            raise unknown(f"option of {kind}", key, known)
    for field in fields(options_type):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in given:
            raise ValueError(f"{kind} needs the option '{field.name}'")
    return options_type(**given)


@dataclass(frozen=True)
class Buildable:
    """A registered class or function and the dataclass of its options."""

    options_type: type
    build: Callable[..., Any]
    """`build(options, *context)`."""


class Registry(Generic[Piece]):
    """Maps a name to a piece; a swappable part is written `{"name": ..., **options}`.

    Args:
        kind: What its pieces are called in messages, such as `"sampler"`.
        group: Entry-point group by which installed packages announce pieces, this one included. A piece is
            imported when it is named. None: the module that holds the registry registers all of them.
    """

    def __init__(self, kind: str, group: str | None = None):
        self.kind, self.group = kind, group
        self.entries: dict[str, Piece] = {}

    def add(self, name: str, piece: Piece) -> None:
        """Registers a piece under a name."""
        self.entries[name] = piece

    def register(self, name: str, options_type: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Returns a decorator that registers `builder(options, *context)` under `name`."""

        def registered(builder: Callable[..., Any]) -> Callable[..., Any]:
            self.add(name, cast(Piece, Buildable(options_type, builder)))
            return builder

        return registered

    def names(self) -> list[str]:
        """Returns every registered or announced name, sorted; imports nothing."""
        return sorted(self.entries.keys() | (announced(self.group).keys() if self.group else set()))

    def __getitem__(self, name: str) -> Piece:
        """Returns the piece of a name, importing it if it is only announced.

        Raises:
            ValueError: If there is none, or the package that announces it does not register it.
        """
        if name not in self.entries and self.group and name in (known := announced(self.group)):
            try:
                import_module(known[name])
            except ImportError as error:
                raise ValueError(
                    f"{self.kind} '{name}' must import, {known[name]} does not: {error}"
                ) from error
            if name not in self.entries:
                raise ValueError(
                    f"a package that announces {self.kind} '{name}' must register it on import, "
                    f"{known[name]} does not"
                )
        if name not in self.entries:
            raise unknown(self.kind, name, self.names())
        return self.entries[name]

    def options(self, spec: str | Mapping[str, Any]) -> tuple[str, Any]:
        """Returns (name, options) of a spec, without building anything: what a config check needs."""
        given = {"name": spec} if isinstance(spec, str) else dict(spec)
        if "name" not in given:
            raise ValueError(f"a {self.kind} needs a 'name' (known: {', '.join(self.names())}), got {given}")
        name = given.pop("name")
        return name, make_options(cast(Any, self[name]).options_type, given, f"{self.kind} '{name}'")

    def build(self, spec: str | Mapping[str, Any], *context: Any) -> Any:
        """Builds the part that a spec names; `context` is what the builder needs beside its options."""
        name, options = self.options(spec)
        return cast(Any, self[name]).build(options, *context)


@cache
def announced(group: str) -> dict[str, str]:
    """Returns name → module of the pieces that installed packages announce in an entry-point group.

    In a checkout the pieces of this package are those of its pyproject.toml, whatever is installed: it may be
    older, or nothing at all.
    """
    names = {point.name: point.module for point in entry_points(group=group)}
    path = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(path.read_text()).get("project", {}) if path.is_file() else {}
    return names | (
        project.get("entry-points", {}).get(group, {}) if project.get("name") == "flashdit" else {}
    )
