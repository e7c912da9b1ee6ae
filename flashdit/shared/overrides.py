"""key=value texts of a command line: a value is text where its key is text, and YAML elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flashdit.shared.registry import is_text

QUOTES = "'\""
GUESSED = re.compile(r"[-+]?(0[0-7_]+|\d[\d_]*(:[0-5]?\d)+(\.\d*)?)")
"""Numbers that YAML 1.1 reads in base 8 and 60."""


def check_numbers(text: str, called: str) -> None:
    """Refuses YAML with numbers in base 8 or 60, such as `017`: who writes them means others.

    Raises:
        ValueError: If there is one.
    """
    for event in yaml.parse(text):
        is_plain = isinstance(event, yaml.ScalarEvent) and event.style is None
        if is_plain and GUESSED.fullmatch(event.value):
            raise ValueError(
                f"{called}: a number must be decimal, and a text of digits in quotes, got {event.value}"
            )


def split_override(text: str, called: str = "an override") -> tuple[str, str]:
    """Returns key and value of a `key=value` text; raises ValueError if it is none."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{called} must be key=value, got '{text}'")
    return key, value


def nested(values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns values by dotted keys as nested mappings; of a key that comes twice the last one counts."""
    tree: dict[str, Any] = {}
    for key, value in values:
        *parts, last = key.split(".")
        place = tree
        for part in parts:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[last] = value
    return tree


def parse_value(key: str, text: str, expected: Any) -> Any:
    """Returns the value of an override.

    Where text is expected it is the text as it stands, so that a path needs no quotes but the shell's. Three
    texts are YAML there too: nothing and, where the key may be null, `null`; and what is between quotes.

    Args:
        key: Before the `=`, for messages.
        text: After it.
        expected: The annotated type of the key; Any where it is unknown.

    Raises:
        ValueError: If it must be YAML and is none.
    """
    is_null = not text or (text == "null" and expected is not str)
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in QUOTES
    if is_text(expected) and not is_null and not is_quoted:
        return text
    try:
        plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        said = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ValueError(f"{key} must be YAML, got '{text}': {said}") from error
    check_numbers(text, key)
    return cast(dict[str, Any], plain)["value"]
