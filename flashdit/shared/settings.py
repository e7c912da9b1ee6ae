"""Settings: YAML and key=value texts become checked dataclasses of options."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flashdit.shared.paths import expanded
from flashdit.shared.registry import check_type, nearest_name, type_name, unknown

Config = TypeVar("Config")
CHECKOUT, PACKAGE = (Path(__file__).parents[up] / "configs" for up in (2, 1))
SHIPPED_CONFIGS = CHECKOUT if CHECKOUT.is_dir() else PACKAGE
"""Folder of the shipped configurations: the checkout's, or the installed package's."""


def shipped_configs() -> list[str]:
    """Returns the names of the shipped run configurations, such as `flashdit_xl` and `iwin/tiny_224`."""
    found = (
        path.relative_to(SHIPPED_CONFIGS).with_suffix("").as_posix()
        for path in SHIPPED_CONFIGS.rglob("*.yaml")
    )
    return sorted(name for name in found if not name.startswith("accelerate/"))


def find_config(name: Path | str) -> Path:
    """Returns the file of a configuration.

    Args:
        name: A file, or the name of a shipped configuration with or without `.yaml`.

    Raises:
        ValueError: If it is neither; the nearest shipped name is given.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = str(name).removesuffix(".yaml")
    known = shipped_configs()
    if shipped not in known:
        lacks = "is a folder" if Path(name).is_dir() else "does not exist"
        raise ValueError(
            f"--config: {name} {lacks}, and is no shipped configuration{nearest_name(shipped, known)} "
            f"(shipped: {', '.join(known)})"
        )
    return SHIPPED_CONFIGS / f"{shipped}.yaml"


def read_settings(path: Path | str, overrides: Sequence[str], config_type: type[Config]) -> Config:
    """Returns a configuration of any type from a YAML file and `key=value` texts, its keys and types checked.

    Args:
        path: YAML that states what differs from the defaults: a file or the name of a shipped one.
        overrides: `key=value` texts with dotted keys.
        config_type: A dataclass of options, which may be dataclasses themselves.

    Raises:
        ValueError: If the file, a key or a value is invalid.
    """
    path = find_config(path)
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"an override must be key=value, got '{override}'")
    merged: dict[str, Any] = {}
    try:
        stated = _plain(OmegaConf.load(path))
        merged = merge_settings(stated, _plain(OmegaConf.from_dotlist(list(overrides))))
        merged = current(_expanded(merged), config_type)
        check_keys(merged, config_type)
        values = _plain(OmegaConf.merge(OmegaConf.structured(config_type), merged))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} and the overrides must be YAML: {error}") from error
    except OmegaConfBaseException as error:
        raise ValueError(_type_sentence(error, merged, config_type)) from error
    return build(values, config_type)


def _type_sentence(error: OmegaConfBaseException, given: Mapping[str, Any], config_type: type) -> str:
    """Returns what is wrong with a value, by its key, the type it must have and itself."""
    value: Any = given
    *parts, last = (error.full_key or "").split(".")
    try:
        for part in parts:
            config_type, value = sections(config_type)[part], value[part]
        return f"{error.full_key} must be {type_name(get_type_hints(config_type)[last])}, got {value[last]!r}"
    except (KeyError, TypeError):  # no value of a key is to blame
        return f"{error.full_key}: {str(error.msg or error).partition(chr(10))[0]}"


def _expanded(value: Any, key: str = "") -> Any:
    """Returns a configuration whose texts have `~` and environment variables expanded, as paths have them.

    Raises:
        ValueError: If a text is empty, or a variable is not set.
    """
    if isinstance(value, dict):
        return {name: _expanded(part, f"{key}.{name}") for name, part in value.items()}
    if isinstance(value, list):
        return [_expanded(part, key) for part in value]
    if value == "":
        raise ValueError(f"{key[1:]} must not be empty, got '': null means none")
    try:
        return expanded(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{key[1:]}: {error}") from error


def _plain(config: Any) -> dict[str, Any]:
    """Returns an OmegaConf mapping as plain dictionaries and lists."""
    plain = OmegaConf.to_container(config, resolve=True)
    if not isinstance(plain, dict):
        raise ValueError(f"a configuration must be a mapping of keys, got {type(plain).__name__}")
    return cast(dict[str, Any], plain)


def merge_settings(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Returns base with the changes; a part that gets another `name` loses the old one's options."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = (
                merge_settings(old, value) if value.get("name", old.get("name")) == old.get("name") else value
            )
        merged[key] = value
    return merged


def sections(options_type: type) -> dict[str, type]:
    """Returns the fields of an options dataclass that are options dataclasses themselves."""
    made = {field.name: field.default_factory for field in fields(options_type)}
    return {name: made for name, made in made.items() if isinstance(made, type) and is_dataclass(made)}


def current(given: Mapping[str, Any], options_type: type) -> dict[str, Any]:
    """Returns a mapping under today's keys; an options type that renamed some has its own `current`."""
    found = getattr(options_type, "current", dict)(given)
    return {
        key: current(value, sections(options_type)[key])
        if key in sections(options_type) and isinstance(value, Mapping)
        else value
        for key, value in found.items()
    }


def build(values: Mapping[str, Any], config_type: type[Config], prefix: str = "") -> Config:
    """Returns an options dataclass and those in it.

    Args:
        values: Every field; a section is a mapping.
        config_type: The dataclass.
        prefix: Dotted key of the section, for messages.

    Raises:
        ValueError: If a dataclass refuses a value; the message begins with the key or the section.
    """
    parts = sections(config_type)
    built = {
        key: build(value, parts[key], f"{prefix}{key}.") if key in parts else value
        for key, value in values.items()
    }
    try:
        return config_type(**built)
    except ValueError as error:
        sentence = str(error)
        if not prefix or sentence.startswith(prefix):
            raise
        where = prefix if sentence.partition(" ")[0] in built else f"{prefix[:-1]}: "
        raise ValueError(where + sentence) from error


def check_keys(given: Mapping[str, Any], options_type: type, prefix: str = "") -> None:
    """Raises ValueError for a key that no options dataclass has, or a list that its type does not allow.

    OmegaConf converts and checks all other values, and names their keys.
    """
    known, types = [prefix + field.name for field in fields(options_type)], get_type_hints(options_type)
    for key, value in given.items():
        if prefix + str(key) not in known:
            raise unknown("configuration key", prefix + str(key), known)
        if key in sections(options_type):
            if not isinstance(value, Mapping):
                raise ValueError(f"{prefix}{key} must be a mapping of keys, got {value!r}")
            check_keys(value, sections(options_type)[key], f"{prefix}{key}.")
        elif isinstance(value, list):
            check_type(f"{prefix}{key}", value, types[key])


class Key(NamedTuple):
    """One key of a configuration, as help and documentation list it."""

    name: str
    """With the sections that it lies in: `training.steps`."""
    type: str
    default: str
    """As Python writes it; empty where the key must be given."""
    doc: str


def describe(options: Any, prefix: str = "") -> list[Key]:
    """Returns every key of an options dataclass and of those in it, or every parameter of a function.

    Args:
        options: A dataclass whose fields are documented by string literals below them, or a function or
            class whose parameters are documented under `Args:` of its docstring.
        prefix: Put before each name.
    """
    if not is_dataclass(options):
        return _describe_parameters(options, prefix)
    texts = _field_texts(options)
    keys = []
    for field in fields(options):
        if field.name in sections(cast(type, options)):
            keys += describe(field.default_factory, f"{prefix}{field.name}.")
        else:
            given = field.default if field.default_factory is MISSING else field.default_factory()
            default = "" if given is MISSING else repr(given)
            kind, doc = texts[field.name]
            keys.append(Key(prefix + field.name, kind, default, doc))
    return keys


def _field_texts(options: Any) -> dict[str, tuple[str, str]]:
    """Returns name → (annotation, docstring) of a dataclass's fields, those of its bases included."""
    texts = {}
    for base in reversed([base for base in inspect.getmro(options) if is_dataclass(base)]):
        body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                literal = after.value if isinstance(after, ast.Expr) else None
                doc = literal.value if isinstance(literal, ast.Constant) else ""
                texts[node.target.id] = ast.unparse(node.annotation), " ".join(str(doc).split())
    return texts


def _describe_parameters(function: Callable[..., Any], prefix: str) -> list[Key]:
    """Returns the parameters of a function or class, their texts from the `Args:` of its docstring."""
    _, _, arguments = (inspect.getdoc(function) or "").partition("Args:\n")
    texts = dict(re.findall(r"^    (\w+): ((?:.|\n {5,})+)", arguments.partition("\n\n")[0], re.MULTILINE))
    return [
        Key(
            prefix + parameter.name,
            ""
            if parameter.annotation is parameter.empty
            else inspect.formatannotation(parameter.annotation).strip("'"),
            "" if parameter.default is parameter.empty else repr(parameter.default),
            " ".join(texts.get(parameter.name, "").split()),
        )
        for parameter in inspect.signature(function).parameters.values()
    ]


def to_yaml(config: Any) -> str:
    """Returns a resolved configuration as YAML, which `read_settings` takes back."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
