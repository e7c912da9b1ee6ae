"""The whole configuration of a run: the rooms' options composed, loaded from YAML and key=value, checked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flashdit.data.sources import DATASETS
from flashdit.flow.loss import LossOptions
from flashdit.flow.times import TIMES
from flashdit.generate import SamplingOptions
from flashdit.latents import LatentOptions
from flashdit.models.attention import ATTENTIONS
from flashdit.models.dit import FlashDiT
from flashdit.registry import unknown
from flashdit.training.ema import EmaOptions
from flashdit.training.optim import OptimizerOptions
from flashdit.training.options import LoopConfig, TrainingOptions
from flashdit.training.tracking import TrackingOptions

DEFAULT = Path(__file__).parent.parent / "configs" / "digits.yaml"
Config = TypeVar("Config")


@dataclass(kw_only=True)
class RunOptions:
    """Where a run lies."""

    dir: str = ""
    """The run's folder; the same folder resumes the run."""


@dataclass(kw_only=True)
class FlowOptions:
    """Options of flow matching."""

    times: dict[str, Any] = field(default_factory=lambda: {"name": "logit_normal"})
    """Distribution of training times, `{name, **options}`."""
    loss: LossOptions = field(default_factory=LossOptions)


@dataclass(kw_only=True)
class EvaluationOptions:
    """Options of scoring the EMA's samples while training."""

    every: int = 0
    """Steps between evaluations; 0 makes none."""
    num_images: int = 5_000
    """Samples, shared among all processes; a score compares only with others of the same number."""
    reference: str | None = None
    """An npz of ADM's or of make-reference, or a folder; None means the digits, where they are the data."""
    extractor: str = "inception"
    """As `eval_fid.py --extractor` has it."""
    weights: str | None = None
    """The extractor's weights file."""
    metrics: list[str] = field(default_factory=lambda: ["fid"])


@dataclass(kw_only=True)
class RunConfig:
    """Everything a run is made from."""

    seed: int = 0
    run: RunOptions = field(default_factory=RunOptions)
    data: dict[str, Any] = field(default_factory=dict)
    """`{name, **options}`."""
    latents: LatentOptions = field(default_factory=LatentOptions)
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of FlashDiT."""
    weights: str | None = None
    """What a new run starts from: a run, a checkpoint, a model folder or a file; None starts fresh."""
    flow: FlowOptions = field(default_factory=FlowOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How previews are sampled, and what sample.py and eval_fid.py do unless told otherwise."""
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)


def load(path: Path | str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the checked configuration of a YAML file and what the command line says otherwise.

    Args:
        path: YAML that states what differs from the defaults; None means configs/digits.yaml.
        overrides: `key=value` texts with dotted keys.

    Raises:
        ValueError: If the file, a key or a value cannot be; an unknown key names the nearest known one.
    """
    config = read(path or DEFAULT, overrides, RunConfig)
    check(config)
    return config


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


def check(config: RunConfig) -> None:
    """Raises ValueError for what cannot be within one room or across rooms, before anything is built."""
    check_run(config)
    arguments = list(inspect.signature(FlashDiT.__init__).parameters)[1:]
    for key in config.model:
        if key not in arguments:
            raise unknown("configuration key", f"model.{key}", [f"model.{name}" for name in arguments])
    if "attention" in config.model:
        ATTENTIONS.options(config.model["attention"])
    DATASETS.options(config.data)
    TIMES.options(config.flow.times)
    config.sampling.check()


def check_run(config: LoopConfig) -> None:
    """Raises ValueError for what cannot be in the options that every trainer has."""
    if not config.run.dir:
        raise ValueError("run.dir must name the run's folder: give run.dir=runs/NAME")
    if config.seed < 0:
        raise ValueError(f"seed must not be negative, got {config.seed}")
    config.training.check()
    decay_steps, steps = config.optimizer.decay_steps, config.training.steps
    if decay_steps is not None and steps > decay_steps and config.optimizer.min_lr == 0:
        raise ValueError(
            "training.steps must not pass optimizer.decay_steps, where the learning rate has come to 0, "
            f"got {steps} and {decay_steps}"
        )


def to_yaml(config: Any) -> str:
    """Returns a resolved configuration as YAML, which `read` takes back."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
