"""The classifier: an Iwin backbone by its timm name, the weights it starts from, and the input it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

import timm
import torch
from timm.data.config import resolve_model_data_config

from flashdit.data.sources import MOST_PIXELS
from flashdit.shared.registry import check_type, unknown
from flashdit.shared.runs import find_average, find_checkpoint
from flashdit.shared.weights import read_model_config, read_tensors
from iwin_core import IwinConfig, IwinTransformer, load_official_checkpoint
from iwin_core.windows import per_axis

NAMES = "iwin_*"
MOST_BLOCKS = 1000
"""Of all stages; more take long to build and do not train."""


@dataclass(frozen=True, kw_only=True)
class InputFormat:
    """What images a model takes."""

    image_size: tuple[int, int]
    """Height and width, in pixels."""
    mean: tuple[float, ...]
    """Of each channel, taken off pixels in 0 to 1."""
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    """Side of the evaluated centre crop by that of the resized image."""


def check_classifier_model(spec: Mapping[str, Any]) -> None:
    """Raises ValueError unless a spec is a registered name and fields of IwinConfig."""
    types = get_type_hints(IwinConfig)
    if "name" not in spec:
        raise ValueError(f"model needs a 'name' such as iwin_tiny_patch4_window7_224, got {dict(spec)}")
    if spec["name"] not in timm.list_models(NAMES):
        raise unknown("model", spec["name"], timm.list_models(NAMES))
    for key, value in spec.items():
        if key != "name" and key not in types:
            raise unknown("configuration key", f"model.{key}", [f"model.{name}" for name in types])
        if key != "name":
            check_type(f"model.{key}", value, types[key])
    if sum(spec.get("depths") or ()) > MOST_BLOCKS:
        raise ValueError(f"model.depths must be {MOST_BLOCKS} blocks at most, got {spec['depths']}")


def check_takes_pictures(spec: Mapping[str, Any]) -> None:
    """Raises ValueError unless a checked spec is that of a classifier of pictures."""
    if spec.get("in_chans", 3) != 3:
        raise ValueError(f"model.in_chans must be 3, as pictures are RGB, got {spec['in_chans']}")
    if spec.get("feature_norms"):
        raise ValueError("model.feature_norms must be false, as a classifier needs its head, got True")
    if spec.get("num_classes", 1) < 1:
        raise ValueError(f"model.num_classes must be at least 1, got {spec['num_classes']}")
    if spec.get("global_pool", "avg") != "avg":
        raise ValueError(f"model.global_pool must be avg for classes, got {spec['global_pool']!r}")
    if max(per_axis(spec.get("img_size", 1), 2, "model.img_size")) > MOST_PIXELS:
        raise ValueError(f"model.img_size must be at most {MOST_PIXELS}, got {spec['img_size']}")


def make_model(spec: Mapping[str, Any]) -> IwinTransformer:
    """Returns the backbone of a spec, freshly initialised.

    Args:
        spec: `{name, **options}`: a timm entry point and fields of IwinConfig that differ from its own.

    Raises:
        ValueError: If the name or an option is invalid.
    """
    check_classifier_model(spec)
    options = {key: value for key, value in spec.items() if key != "name"}
    return cast(IwinTransformer, timm.create_model(spec["name"], **options))


def filled_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a spec as YAML has it with all options, or as it is where it is no longer valid."""
    try:
        with torch.device("meta"):
            options = asdict(make_model(spec).config)
    except ValueError:
        return dict(spec)
    return {"name": spec["name"], **json.loads(json.dumps(options))}  # tuples are lists


def read_spec(run: Path | str) -> dict[str, Any]:
    """Returns the spec of the model that a run or a checkpoint of a classifier holds.

    Raises:
        ValueError: If it is no run of a classifier.
    """
    checkpoint = find_checkpoint(run)
    spec = read_model_config(checkpoint / "ema")
    if not timm.is_model(str(spec.get("name"))):
        raise ValueError(
            f"a classifier must be a run of iwin classify, got {checkpoint} of "
            f"{spec.get('_class_name', 'something else')}"
        )
    return spec


def load_weights(model: IwinTransformer, source: Path | str) -> None:
    """Loads weights to start from, of the same or another input size and number of classes.

    Args:
        model: Changed in place.
        source: A file of weights, the authors' or exported; or a run or a checkpoint, whose average is meant.

    Raises:
        ValueError: If there are none, or they are not this model's.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"weights must be a file of weights or a run, got {path}")
    load_official_checkpoint(model, read_tensors(find_average(path, "weights")) if path.is_dir() else path)


def input_format(
    model: IwinTransformer, interpolation: str | None = None, crop_pct: float | None = None
) -> InputFormat:
    """Returns what images a model takes: its input size, and its timm description's normalisation.

    Args:
        model: As `make_model` returns it.
        interpolation: Instead of the description's.
        crop_pct: Instead of the description's.
    """
    described = resolve_model_data_config(model)
    height, width = per_axis(model.config.img_size, 2, "img_size")
    return InputFormat(
        image_size=(height, width),
        mean=described["mean"],
        std=described["std"],
        interpolation=interpolation or described["interpolation"],
        crop_pct=crop_pct or described["crop_pct"],
    )
