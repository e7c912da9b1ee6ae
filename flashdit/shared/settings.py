"""Settings: YAML and key=value texts become checked dataclasses of options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flashdit.shared.registry import unknown

Config = TypeVar("Config")


def read(path: Path | str, overrides: Sequence[str], config_type: type[Config]) -> Config:
    """Returns a configuration of any type from a YAML file and `key=value` texts, its keys and types checked.

    Args:
        path: YAML that states what differs from the defaults.
        overrides: `key=value` texts with dotted keys.
        config_type: A dataclass of options, which may be dataclasses themselves.

    Raises:
        ValueError: If the file, a key or the type of a value cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--config must be a YAML file, got {path}")
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"an override must be key=value, got '{override}'")
    try:
        stated = _plain(OmegaConf.load(path))
        merged = merge(stated, _plain(OmegaConf.from_dotlist(list(overrides))))
        check_keys(merged, config_type)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_type), merged))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} and the overrides must be YAML: {error}") from error
    except OmegaConfBaseException as error:
        sentence = str(error.msg or error).partition("\n")[0]
        raise ValueError(f"{error.full_key}: {sentence}") from error
    return cast(Config, config)


def _plain(config: Any) -> dict[str, Any]:
    """Returns an OmegaConf mapping as plain dictionaries and lists."""
    plain = OmegaConf.to_container(config, resolve=True)
    if not isinstance(plain, dict):
        raise ValueError(f"a configuration must be a mapping of keys, got {type(plain).__name__}")
    return cast(dict[str, Any], plain)


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Returns base with the changes; a part that gets another `name` loses the old one's options."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = merge(old, value) if value.get("name", old.get("name")) == old.get("name") else value
        merged[key] = value
    return merged


def check_keys(given: Mapping[str, Any], options_type: type, prefix: str = "") -> None:
    """Raises ValueError for a key that no options dataclass has, naming the nearest one."""
    known = {f.name: f for f in fields(options_type)}
    for key, value in given.items():
        if key not in known:
            raise unknown("configuration key", prefix + str(key), [prefix + name for name in known])
        default = known[key].default_factory
        if isinstance(default, type) and is_dataclass(default):
            if not isinstance(value, Mapping):
                raise ValueError(f"{prefix}{key} must be a mapping of keys, got {value!r}")
            check_keys(value, default, f"{prefix}{key}.")


def to_yaml(config: Any) -> str:
    """Returns a resolved configuration as YAML, which `read` takes back."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
