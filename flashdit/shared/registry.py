"""Registries: a name and its options become a built part; unknown names list the known ones."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any


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


class Registry:
    """Maps a name to (options dataclass, builder). A swappable part is written `{"name": ..., **options}`."""

    def __init__(self, kind: str):
        self.kind = kind
        self.entries: dict[str, tuple[type, Callable[..., Any]]] = {}

    def register(self, name: str, options_type: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Returns a decorator that files `builder(options, *context)` under `name`."""

        def file(builder: Callable[..., Any]) -> Callable[..., Any]:
            self.entries[name] = (options_type, builder)
            return builder

        return file

    def names(self) -> list[str]:
        """Returns every registered name, sorted."""
        return sorted(self.entries)

    def options(self, spec: str | Mapping[str, Any]) -> tuple[str, Any]:
        """Returns (name, options) of a spec, without building anything: what a config check needs."""
        given = {"name": spec} if isinstance(spec, str) else dict(spec)
        if "name" not in given:
            raise ValueError(f"a {self.kind} needs a 'name' (known: {', '.join(self.names())}), got {given}")
        name = given.pop("name")
        if name not in self.entries:
            raise unknown(self.kind, name, self.entries)
        return name, make_options(self.entries[name][0], given, f"{self.kind} '{name}'")

    def build(self, spec: str | Mapping[str, Any], *context: Any) -> Any:
        """Builds the part that a spec names; `context` is what the builder needs beside its options."""
        name, options = self.options(spec)
        return self.entries[name][1](options, *context)
