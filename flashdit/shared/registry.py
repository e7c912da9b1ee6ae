"""Registries: a name and its options become a built part; unknown names list the known ones."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Piece = TypeVar("Piece")
Builder = TypeVar("Builder", bound=Callable[..., Any])


def nearest_name(name: object, known: Iterable[object]) -> str:
    """Returns the hint `; did you mean 'NAME'?` of a message, or nothing where no known name is near."""
    found = difflib.get_close_matches(str(name), sorted(map(str, known)), n=1)
    return f"; did you mean '{found[0]}'?" if found else ""


def counted(number: int, one: str, many: str = "") -> str:
    """Returns a number with its noun, for messages."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def unknown(kind: str, name: object, known: Iterable[object]) -> ValueError:
    """Returns the error for a name that is not known, naming the nearest one and all known ones.

    Args:
        kind: What is being named, such as `"sampler"`.
        name: What came.
        known: Every name there is.
    """
    names = sorted(map(str, known))
    return ValueError(f"unknown {kind} '{name}'{nearest_name(name, names)} (known: {', '.join(names)})")


TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


LISTS = (list, tuple, Sequence)


def check_type(key: str, value: Any, expected: Any) -> None:
    """Raises ValueError unless a value from YAML or the command line is of the annotated type."""
    if not _is_of(value, expected):
        is_scalar = isinstance(value, int | float) and _is_of("", expected)
        hint = ": put it between quotes" if is_scalar else ""
        raise ValueError(f"{key} must be {type_name(expected)}, got {value!r}{hint}")


def is_number(value: Any) -> bool:
    """Returns whether a value is a number; a boolean is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_text(expected: Any) -> bool:
    """Returns whether an annotated type is that of a text, which may be null."""
    return expected in (str, str | None)


def _is_of(value: Any, expected: Any) -> bool:
    """Returns whether a value is of an annotated type; a boolean is no number."""
    if isinstance(expected, UnionType) or get_origin(expected) is Union:
        return any(_is_of(value, kind) for kind in get_args(expected))
    origin, inner = get_origin(expected) or expected, get_args(expected)
    if origin in LISTS:
        if not isinstance(value, list | tuple):
            return False
        kinds = inner if origin is tuple and ... not in inner else inner[:1] * len(value)
        return len(kinds) in (0, len(value)) and all(map(_is_of, value, kinds))
    if origin in (int, float):
        return is_number(value) and isinstance(value, int | origin)
    return origin is Any or not isinstance(origin, type) or isinstance(value, origin)


def type_name(expected: Any) -> str:
    """Returns what a type is called in a message."""
    if isinstance(expected, UnionType) or get_origin(expected) is Union:
        return " or ".join(map(type_name, get_args(expected)))
    origin, inner = get_origin(expected) or expected, get_args(expected)
    if origin is tuple and ... not in inner:
        return f"[{', '.join(map(type_name, inner))}]"
    if origin in LISTS:
        return f"a list, each {type_name(inner[0])}" if inner else "a list"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping of keys"
    return TYPE_NAMES.get(origin, getattr(origin, "__name__", str(origin)))


def check_finite(options: Any, section: str = "") -> None:
    """Raises ValueError for a number among an options dataclass's fields that is not finite.

    Args:
        options: The dataclass, whose `__post_init__` calls this.
        section: Put before the field's name in the message.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ValueError(f"{section}{field.name} must be finite, got {value}")


def make_options(options_type: type, given: Mapping[str, Any], kind: str) -> Any:
    """Returns the options dataclass filled from a mapping; an unknown key is refused with the nearest one.

    Args:
        options_type: A dataclass; its defaults stand for what is not given.
        given: Option names and values.
        kind: What the options belong to, for the message.

    Raises:
        ValueError: If a key is unknown or missing, or a value is of the wrong type or invalid.
    """
    known = [field.name for field in fields(options_type)]
    types = get_type_hints(options_type)
    for key, value in given.items():
        if not known:
            raise ValueError(f"unknown option of {kind} '{key}' (it has none)")
        if key not in known:
            raise unknown(f"option of {kind}", key, known)
        check_type(f"option '{key}' of {kind}", value, types[key])
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

    def register(self, name: str, options_type: type) -> Callable[[Builder], Builder]:
        """Returns a decorator that registers `builder(options, *context)` under `name`."""

        def registered(builder: Builder) -> Builder:
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
            except (Exception, SystemExit) as error:  # a package from outside may fail in any way
                what = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
                raise ValueError(
                    f"{self.kind} '{name}' must import, {known[name]} does not: {what}"
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
        if not isinstance(spec, str | Mapping):
            raise ValueError(f"{self.kind} must be a name or a mapping with 'name', got {spec!r}")
        given = {"name": spec} if isinstance(spec, str) else dict(spec)
        if "name" not in given:
            raise ValueError(f"a {self.kind} needs a 'name' (known: {', '.join(self.names())}), got {given}")
        name = given.pop("name")
        check_type(f"the name of a {self.kind}", name, str)
        options_type = cast(Any, self[name]).options_type
        for key in given.keys() - {field.name for field in fields(options_type)}:
            if owners := self._with_option(key):
                have = "has it" if len(owners) == 1 else "have it"
                names = " and ".join(f"{self.kind}.name={owner}" for owner in owners)
                raise ValueError(f"unknown option of {self.kind} '{name}' '{key}': {names} {have}")
        return name, make_options(options_type, given, f"{self.kind} '{name}'")

    def filled(self, spec: Any) -> Any:
        """Returns a spec as YAML has it with all options, or as it is where it is no longer valid."""
        try:
            name, options = self.options(spec)
        except ValueError:
            return spec
        return {"name": name, **json.loads(json.dumps(asdict(options)))}  # tuples are lists

    def _with_option(self, key: str) -> list[str]:
        """Returns the names of the registered pieces that have an option."""
        types = {name: getattr(piece, "options_type", None) for name, piece in self.entries.items()}
        return sorted(
            name for name, kind in types.items() if kind and key in {field.name for field in fields(kind)}
        )

    def build(self, spec: str | Mapping[str, Any], *context: Any) -> Any:
        """Builds the part that a spec names; `context` is what the builder needs beside its options."""
        name, options = self.options(spec)
        return cast(Any, self[name]).build(options, *context)


def _is_ours(point: EntryPoint) -> bool:
    """Returns whether this package announces an entry point."""
    return point.dist is not None and point.dist.name == "flashdit"


@cache
def announced(group: str) -> dict[str, str]:
    """Returns name → module of the pieces that installed packages announce in an entry-point group.

    In a checkout the pieces of this package are those of its pyproject.toml, whatever is installed: it may be
    older, or nothing at all. They keep their names where an outside package announces one of them too.
    """
    points = entry_points(group=group)
    names = {point.name: point.module for point in points}
    names |= {point.name: point.module for point in points if _is_ours(point)}
    path = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(path.read_text()).get("project", {}) if path.is_file() else {}
    return names | (
        project.get("entry-points", {}).get(group, {}) if project.get("name") == "flashdit" else {}
    )
