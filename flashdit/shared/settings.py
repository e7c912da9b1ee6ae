"""Settings: YAML and key=value texts become checked dataclasses of options."""

from __future__ import annotations

import ast
import inspect
import logging
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import KeyValidationError, OmegaConfBaseException

from flashdit.shared.command import is_first_process
from flashdit.shared.overrides import check_numbers, nested, parse_value, split_override
from flashdit.shared.paths import expanded, is_utf8, printable
from flashdit.shared.registry import check_type, is_number, is_text, nearest_name, type_name, unknown

logger = logging.getLogger(__name__)
Config = TypeVar("Config")
REGISTRY = "registry"
"""Key of a field's metadata."""
MISSING_MARK = "???"
"""What OmegaConf has where a value is still to be given."""
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
    path = Path(name)
    if path.exists() and not path.is_dir():  # a pipe too, as of a shell's <(...)
        return path
    shipped = str(name).removesuffix(".yaml")
    known = shipped_configs()
    if shipped not in known:
        lacks = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(
            f"--config: {name} {lacks}, and is no shipped configuration{nearest_name(shipped, known)} "
            f"(shipped: {', '.join(known)})"
        )
    return SHIPPED_CONFIGS / f"{shipped}.yaml"


def read_settings(
    path: Path | str,
    overrides: Sequence[str],
    config_type: type[Config],
    options: Mapping[str, Any] | None = None,
) -> Config:
    """Returns a configuration of any type from a YAML file and `key=value` texts, its keys and types checked.

    Args:
        path: YAML that states what differs from the defaults: a file or the name of a shipped one.
        overrides: `key=value` texts with dotted keys, as `parse_value` reads them.
        config_type: A dataclass of options, which may be dataclasses themselves. A field that is
            `{name, **options}` names its registry in its metadata, under `REGISTRY`.
        options: Values by dotted key that options of a command gave, before the overrides.

    Raises:
        ValueError: If the file, a key or a value is invalid.
    """
    path = find_config(path)
    merged: dict[str, Any] = {}
    try:
        stated = merge_settings(_stated(path), nested((options or {}).items()), config_type)
        changed = merge_settings(stated, _parsed(overrides, stated, config_type), config_type)
        _check_not_empty(changed)
        defaults = _plain(OmegaConf.structured(config_type))
        merged = _expanded(_resolved(merge_settings(defaults, current(changed, config_type), config_type)))
        check_keys(merged, config_type)
        values = _plain(OmegaConf.merge(OmegaConf.structured(config_type), merged))
    except OmegaConfBaseException as error:
        raise ValueError(_type_sentence(error, merged, config_type)) from error
    except RecursionError as error:
        raise ValueError(f"{path} and the overrides must be nested less deeply") from error
    return build(values, config_type)


def _stated(path: Path) -> dict[str, Any]:
    """Returns what a YAML file states; raises ValueError if it is none, or no mapping of keys."""
    try:
        text = path.read_text(encoding="utf-8")
        stated = _plain(OmegaConf.load(StringIO(text)))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be YAML: {error}") from error
    except KeyValidationError as error:
        where = f" of {error.full_key}" if error.full_key else ""
        raise ValueError(f"every key{where} in {path} must be text, got null") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path} must be a mapping of keys: {error}") from error  # a number alone
    check_numbers(text, str(path))
    return stated


def _parsed(overrides: Sequence[str], stated: Mapping[str, Any], config_type: type) -> dict[str, Any]:
    """Returns overrides as nested mappings; names of parts are read first, for the types of their options."""

    def values(pairs: Iterable[tuple[str, str]], given: Mapping[str, Any]) -> dict[str, Any]:
        return nested((key, parse_value(key, text, _type_of(key, given, config_type))) for key, text in pairs)

    pairs = [split_override(override) for override in overrides]
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1 and is_first_process():
            logger.warning("%s is given %d times, the last one counts: %s", key, times, dict(pairs)[key])
    names = [(key, text) for key, text in pairs if "." not in key or key.endswith(".name")]
    return values(pairs, merge_settings(stated, values(names, stated), config_type))


def _type_of(key: str, given: Mapping[str, Any], options_type: type) -> Any:
    """Returns the annotated type of a dotted key; Any where only the part that reads it knows."""
    first, _, rest = key.partition(".")
    part = given.get(first)
    part = part if isinstance(part, Mapping) else {}
    if not rest:
        return get_type_hints(options_type).get(first, Any)
    if first in sections(options_type):
        return _type_of(rest, part, sections(options_type)[first])
    registry = next(
        (field.metadata.get(REGISTRY) for field in fields(options_type) if field.name == first), None
    )
    if registry is None or not isinstance(part.get("name"), str):
        return Any
    if rest == "name":
        return str
    return get_type_hints(registry[part["name"]].options_type).get(rest, Any)


def _resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration in which `${key}` and `${oc.env:NAME}` are what they stand for."""
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(tree), resolve=True))
    except OmegaConfBaseException as error:
        said = str(error.msg or error).partition("\n")[0]
        raise ValueError(f"{error.full_key}: {said}" if error.full_key else said) from error


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


def _check_not_empty(value: Any, key: str = "") -> None:
    """Raises ValueError for an empty text, which would mean the default; names its key."""
    if isinstance(value, dict):
        for name, part in value.items():
            _check_not_empty(part, f"{key}.{name}")
    elif value == "":
        raise ValueError(f"{key[1:]} must not be empty, got '': null means none")


def _expanded(value: Any, key: str = "") -> Any:
    """Returns a configuration whose texts have `~` and environment variables expanded, as paths have them.

    Raises:
        ValueError: If a text is no UTF-8 or still to be given, or a variable is not set.
    """
    if isinstance(value, dict):
        return {name: _expanded(part, f"{key}.{name}") for name, part in value.items()}
    if isinstance(value, list):
        return [_expanded(part, key) for part in value]
    if value == MISSING_MARK:
        raise ValueError(f"{key[1:]} must be given a value, got {value}")
    if not isinstance(value, str):
        return value
    if "\0" in value or not is_utf8(value):
        raise ValueError(f"{key[1:]} must be UTF-8 without NUL, got {printable(value)}")
    try:
        return expanded(value)
    except ValueError as error:
        raise ValueError(f"{key[1:]}: {error}") from error


def _plain(config: Any) -> dict[str, Any]:
    """Returns an OmegaConf mapping as plain dictionaries and lists, in which `${…}` stays as it is."""
    plain = OmegaConf.to_container(config)
    if not isinstance(plain, dict):
        raise ValueError(f"a configuration must be a mapping of keys, got {type(plain).__name__}")
    return cast(dict[str, Any], plain)


def merge_settings(
    base: Mapping[str, Any], change: Mapping[str, Any], options_type: type | None = None
) -> dict[str, Any]:
    """Returns base with the changes; a part that gets another `name` loses the old one's options.

    Args:
        base: Values by key.
        change: What replaces them.
        options_type: The dataclass of these keys: the dataclasses in it keep their other keys under any name.
    """
    merged, known = dict(base), {} if options_type is None else sections(options_type)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            same = key in known or value.get("name", old.get("name")) == old.get("name")
            value = merge_settings(old, value, known.get(key)) if same else value
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
        ValueError: If a dataclass refuses a value; the message names the key or the section.
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
        if not prefix or prefix in sentence:
            raise
        where = prefix if sentence.partition(" ")[0] in built else f"{prefix[:-1]}: "
        raise ValueError(where + sentence) from error


def check_keys(given: Mapping[str, Any], options_type: type, prefix: str = "") -> None:
    """Raises ValueError for a key that no options dataclass has, and for a list or text of a wrong type.

    OmegaConf converts and checks all other values, and names their keys; it would turn numbers into text,
    and into true or false.
    """
    known, types = [prefix + field.name for field in fields(options_type)], get_type_hints(options_type)
    for key, value in given.items():
        if prefix + str(key) not in known:
            raise unknown("configuration key", prefix + str(key), known)
        if key in sections(options_type):
            if not isinstance(value, Mapping):
                raise ValueError(f"{prefix}{key} must be a mapping of keys, got {value!r}")
            check_keys(value, sections(options_type)[key], f"{prefix}{key}.")
        elif value == "" and types[key] == str | None:
            raise ValueError(f"{prefix}{key} must not be empty, got '': null leaves it out")
        elif isinstance(value, list) or is_text(types[key]) or (types[key] is bool and is_number(value)):
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
