"""Configuration of a run, composed of each part's options, read from YAML and key=value, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch

from flashdit.data.encode import data_facts
from flashdit.data.fit import DataFacts
from flashdit.data.latents import LatentOptions
from flashdit.data.sources import DATASETS
from flashdit.evaluation.options import EvaluationOptions
from flashdit.flow.loss import LossOptions
from flashdit.flow.mean_flow import MeanFlowOptions, check_guidance
from flashdit.flow.prediction import PREDICTIONS, VELOCITY
from flashdit.flow.times import TIMES
from flashdit.models.attention import check_attention
from flashdit.models.dit import FlashDiT, check_arguments, default_arguments
from flashdit.sampling.options import SamplingOptions
from flashdit.shared.registry import check_type, unknown
from flashdit.shared.settings import REGISTRY, Key, describe, read_settings
from flashdit.teachers.alignment import AlignmentOptions
from flashdit.teachers.distillation import DistillationOptions
from flashdit.training.ema import EmaOptions
from flashdit.training.optim import OptimizerOptions
from flashdit.training.options import RunOptions, TrainingOptions, check_run
from flashdit.training.tracking import TrackingOptions

DEFAULT_CONFIG = "digits"
"""The shipped configuration of a run that names none."""
SIZES_OF_DATA = ("in_channels", "sample_size", "num_classes")
"""Arguments of the model that may be null: as the data has them."""


@dataclass(kw_only=True)
class FlowOptions:
    """Options of flow matching."""

    times: dict[str, Any] = field(default_factory=lambda: {"name": "logit_normal"})
    """Distribution of training times, `{name, **options}`."""
    loss: LossOptions = field(default_factory=LossOptions)
    prediction: str | None = None
    """What the network predicts: `velocity`, or the `data`, which pays where a patch has many numbers; null
    means velocity."""
    mean_flow: MeanFlowOptions = field(default_factory=MeanFlowOptions)
    """Average velocities instead of the loss above."""

    def __post_init__(self) -> None:
        """Checks the values."""
        PREDICTIONS[self.prediction or VELOCITY]


@dataclass(kw_only=True)
class RunConfig:
    """Everything a run is made from."""

    seed: int = 0
    """Of everything random in training."""
    run: RunOptions = field(default_factory=RunOptions)
    data: dict[str, Any] = field(default_factory=dict, metadata={REGISTRY: DATASETS})
    """`{name, **options}`."""
    latents: LatentOptions = field(default_factory=LatentOptions)
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of FlashDiT; null `in_channels`, `sample_size` and `num_classes` are as the data has them."""
    weights: str | None = None
    """What a new run starts from: a run, a checkpoint, a model folder or a file; None starts fresh."""
    flow: FlowOptions = field(default_factory=FlowOptions)
    distillation: DistillationOptions = field(default_factory=DistillationOptions)
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How previews are sampled, and what `flashdit sample` and `flashdit eval` use by default."""
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Arguments of FlashDiT: `model`, and what `flow` says of what it predicts."""
        arguments = dict(self.model)
        if self.flow.prediction is not None:
            arguments["prediction"] = self.flow.prediction
        if self.flow.mean_flow.enabled:
            arguments["most_guidance"] = self.flow.mean_flow.most_guidance
        return arguments


def configuration_keys() -> list[Key]:
    """Returns every key of a run's configuration, the model's arguments in place of `model`."""
    keys = describe(RunConfig)
    position = next(place for place, key in enumerate(keys) if key.name == "model")
    of_flow = ("model.prediction", "model.most_guidance")
    arguments = [key for key in describe(FlashDiT, "model.") if key.name not in of_flow]
    return [*keys[:position], *arguments, *keys[position + 1 :]]


def load(path: Path | str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the checked configuration of a YAML file and what the command line says otherwise.

    Args:
        path: YAML that states what differs from the defaults, or a shipped one's name; None means the digits.
        overrides: `key=value` texts with dotted keys.

    Raises:
        ValueError: If the file, a key or a value is invalid; an unknown key names the nearest known one.
    """
    config = read_settings(path or DEFAULT_CONFIG, overrides, RunConfig)
    check_run_config(config)
    return config


def check_run_config(config: RunConfig) -> None:
    """Raises ValueError for parts of the configuration that do not fit together, before anything is built."""
    check_run(config)
    arguments = get_type_hints(FlashDiT.__init__)
    for key, value in config.model.items():
        if key not in arguments:
            raise unknown("configuration key", f"model.{key}", [f"model.{name}" for name in arguments])
        if key != "attention" and not (value is None and key in SIZES_OF_DATA):
            check_type(f"model.{key}", value, arguments[key])
    check_model(config)
    if "attention" in config.model:
        check_attention(config.model["attention"])
    predicted = config.flow.prediction or VELOCITY
    if config.model.get("prediction", predicted) != predicted:
        raise ValueError(
            "model.prediction must be what flow.prediction says, which alone needs to be given, "
            f"got {config.model['prediction']} and {predicted}"
        )
    check_mean_flow(config)
    check_alignment(config)
    DATASETS.options(config.data)
    TIMES.options(config.flow.times)


def check_mean_flow(config: RunConfig) -> None:
    """Raises ValueError for options of a run that mean flows have no way to follow."""
    options, training = config.flow.mean_flow, config.training
    if "most_guidance" in config.model:
        raise ValueError("model.most_guidance is flow.mean_flow.most_guidance, which alone is to be given")
    if not options.enabled:
        return
    if config.distillation.teacher is not None:
        raise ValueError(f"a teacher teaches velocities, no mean flows, got {config.distillation.teacher}")
    if config.alignment.extractor is not None:
        rule = "alignment.extractor requires a model of velocities, flow.mean_flow.enabled=false"
        raise ValueError(f"{rule}, got {config.alignment.extractor}")
    check_guidance(config.sampling.cfg_scale, config.sampling.cfg_interval, options.most_guidance)
    if training.gradient_checkpointing or training.compile != "none":
        raise ValueError(
            "flow.mean_flow requires training.gradient_checkpointing=false and training.compile=none, whose "
            "models have no forward derivative"
        )


def check_alignment(config: RunConfig) -> None:
    """Raises ValueError if tokens are to be aligned after a block that the model has not."""
    depth, block = (default_arguments() | config.model_arguments)["depth"], config.alignment.block
    if config.alignment.extractor is not None and block > depth:
        raise ValueError(f"alignment.block must be from 1 to model.depth={depth}, got {block}")


def check_model(config: RunConfig) -> None:
    """Raises ValueError for arguments that no model can be made with, whatever the sizes that data have."""
    arguments = default_arguments() | config.model_arguments
    any_size = {"in_channels": 1, "num_classes": 1, "sample_size": arguments["patch_size"]}
    arguments |= {key: any_size[key] for key in open_sizes(config)}
    try:
        check_arguments(**arguments)
    except ValueError as error:
        raise ValueError(f"model.{error}") from error


def open_sizes(config: RunConfig) -> list[str]:
    """Returns the sizes of the model that are null: as the data has them."""
    return [key for key in SIZES_OF_DATA if key in config.model and config.model[key] is None]


def with_sizes_of_data(config: RunConfig) -> RunConfig:
    """Returns a configuration in which the sizes of the model that were null are those of the data.

    Raises:
        ValueError: If the data, which is read for it, cannot be read.
    """
    return with_sizes(config, facts_of_data(config)) if open_sizes(config) else config


def facts_of_data(config: RunConfig) -> DataFacts:
    """Returns what a model must fit of the run's data; raises ValueError if they cannot be read."""
    with torch.random.fork_rng(devices=[]):  # whatever the loading of an autoencoder draws
        return data_facts(config.data, config.latents)


def with_sizes(config: RunConfig, data: DataFacts) -> RunConfig:
    """Returns a configuration in which the sizes of the model that were null are those of the data."""
    sizes = data.sizes
    return replace(config, model=config.model | {key: sizes[key] for key in open_sizes(config)})
