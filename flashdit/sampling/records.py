"""How samplers, sampling options and models are written down, in configurations and beside samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flashdit.shared.overrides import parse_value, split_override
from flashdit.shared.settings import merge_settings

RENAMED = {"dtype": "precision"}
TOLERANCES = ("atol", "rtol")  # formerly beside the sampler, whichever it was


def sampler_spec(sampler: str | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a sampler that is given by name, or already so, as `{name, **options}`."""
    return {"name": sampler} if isinstance(sampler, str) else dict(sampler)


def sampler_name(sampler: str | Mapping[str, Any]) -> str:
    """Returns the name of a sampler that is given by name or as `{name, **options}`."""
    return str(sampler_spec(sampler).get("name"))


def current_sampling(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns recorded sampling options under today's keys.

    `dtype` is now `precision`; `atol` and `rtol` are options of the sampler `dopri5`, and dropped for others.
    `cfg_channels` is left out where it is None, which records of before it lack.
    """
    found = {RENAMED.get(key, key): value for key, value in record.items() if key not in TOLERANCES}
    if found.get("cfg_channels", 0) is None:
        del found["cfg_channels"]
    tolerances = {key: record[key] for key in TOLERANCES if key in record}
    if tolerances and "sampler" in found and sampler_name(found["sampler"]) == "dopri5":
        found["sampler"] = sampler_spec(found["sampler"]) | tolerances
    return found


def change_sampler(
    sampler: str | Mapping[str, Any], name: str | None, texts: Sequence[str]
) -> dict[str, Any]:
    """Returns a sampler as `{name, **options}` with changes; another name drops the options of the old one.

    Args:
        sampler: Before, by name or as `{name, **options}`.
        name: Of the sampler after; None keeps it.
        texts: Its options as `key=value`.

    Raises:
        ValueError: If a text is no `key=value`, a value no YAML, or it names another sampler.
    """
    pairs = [split_override(text, "--sampler-option") for text in texts]
    options = {key: parse_value(f"--sampler-option {key}", text, Any) for key, text in pairs}
    if "name" in options:
        raise ValueError(
            f"--sampler-option must be an option, --sampler names it, got name={options['name']}"
        )
    before = sampler_spec(sampler)
    after = {**options, "name": name or before["name"]}
    return merge_settings({"sampler": before}, {"sampler": after})["sampler"]


def weights_of(recipe: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Returns the hashes of the weights, and of the guide's, that samples were drawn with."""
    return recipe.get("weights_sha256"), recipe.get("guide_weights_sha256")


def reading(recipe: Mapping[str, Any]) -> str:
    """Returns which folders the models of a recipe lie in, for messages."""
    guide = recipe.get("guide_checkpoint")
    return f"{recipe['checkpoint']}{'' if guide is None else f' guided by {guide}'}"


def guided_by(recipe: Mapping[str, Any]) -> str:
    """Returns what a title says of a recipe's guide, empty where there is none; it names no folder."""
    if "guide_step" not in recipe:
        return ""
    return f", guided by step {recipe['guide_step']} ({recipe['guide_weights_sha256'][:8]})"
