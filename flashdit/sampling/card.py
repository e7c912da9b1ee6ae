"""What an exported pipeline says of itself: its model card, and the code by which diffusers loads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from flashdit.models.attention import describe_attention
from flashdit.sampling.classes import class_ids
from flashdit.sampling.imagenet import shown_names
from flashdit.sampling.options import SamplingOptions
from flashdit.sampling.records import sampler_name
from flashdit.shared.registry import counted

HUB_TASK = "unconditional-image-generation"
TAGS = ("flashdit", "class-conditional", "flow-matching", "iwin-attention")
NAMED_CLASSES = 20
CODE = "pipeline.py"
"""The file in a pipeline's folder that `custom_pipeline` runs."""
CODE_TEXT = '''"""Loads this folder where diffusers alone is imported; requires the package flashdit.

    DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
"""

from flashdit import FlashDiTPipeline

__all__ = ["FlashDiTPipeline"]
'''


def model_card(
    config: Mapping[str, Any], class_names: Sequence[str], recipe: Mapping[str, Any], space: str
) -> str:
    """Returns a README.md for the hub, which reads the scores from its front matter.

    Args:
        config: The transformer's configuration.
        class_names: One per class.
        recipe: What is known of checkpoint, sampling and metrics; what is missing is left out.
        space: What the model makes, `pixels` or latents of a `vae`.
    """
    name, metrics = recipe.get("name", "FlashDiT"), recipe.get("metrics")
    scored = {"model_name": name, "eval_results": _results(metrics)} if metrics else {}
    data = ModelCardData(library_name="diffusers", pipeline_tag=HUB_TASK, tags=list(TAGS), **scored)
    parts = [f"# {name}", _about(config, class_names, space), _usage(class_names, recipe)]
    parts += [_metrics(metrics, recipe.get("sampling", {}))] if metrics else []
    parts += [_facts(recipe)]
    text = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}\n").content


def _results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    """Returns the scores as the hub's metadata has them, the number of images in each one's name."""
    data, count, types = PurePath(metrics["reference"]).stem, metrics["num_images"], metrics.get("types", {})
    return [
        EvalResult(
            task_type=HUB_TASK,
            dataset_type=data,
            dataset_name=data,
            metric_type=re.sub(r"_\d+$", "", types.get(label, label)),
            metric_name=f"{label}, {counted(count, 'image')}",
            metric_value=value,
        )
        for label, value in metrics["values"].items()
        if value is not None
    ]


def _about(config: Mapping[str, Any], class_names: Sequence[str], space: str) -> str:
    """Returns what kind of model this is."""
    size, channels = config["sample_size"], config["in_channels"]
    attention = describe_attention(config["attention"], config["depth"])
    if config.get("registers"):
        attention += f", {config['registers']} registers"
    words = shown_names(class_names)
    names = ", ".join(words[:NAMED_CLASSES]) + (" …" if len(words) > NAMED_CLASSES else "")
    model = f"depth {config['depth']}, width {config['hidden_size']}, patch {config['patch_size']}"
    kind, made = ("diffusion", "pixels") if space == "pixels" else ("latent diffusion", "latents")
    what = f"class-conditional {kind}" if class_names else f"unconditional {kind}"
    known = counted(len(words), "class", "classes")
    classes = f"It knows {known}: {names}." if words else "It has no classes."
    return (
        f"A{'n' if not class_names else ''} {what} transformer trained by flow matching: {model}, attention: "
        f"{attention}; {made} {channels}×{size}×{size}, predicted: {config['prediction']}. {classes}"
    )


def _example(class_names: Sequence[str]) -> str:
    """Returns how Python names the first class: by a word, or by its number where no word is its own."""
    if not class_names:
        return "0"
    word = shown_names(class_names)[0]
    try:
        return repr(word) if class_ids([word], class_names) == [0] else "0"
    except ValueError:  # a word of several classes
        return "0"


def _usage(class_names: Sequence[str], recipe: Mapping[str, Any]) -> str:
    """Returns a call that works as it stands."""
    sampling = recipe.get("sampling", {})
    steps, scale = sampling.get("steps", 50), sampling.get("cfg_scale", 1.0)
    low, high = sampling.get("cfg_interval", (0.0, 1.0))
    guidance = f"guidance_scale={scale}, guidance_interval=({low}, {high})"
    if sampling.get("cfg_channels") is not None:
        guidance += f", guidance_channels={sampling['cfg_channels']}"
    call = f"""image = pipe(
    {_example(class_names)}, {guidance}, num_inference_steps={steps}
).images[0]"""
    return f"""The package `flashdit` must be installed.

```python
from flashdit import FlashDiTPipeline

pipe = FlashDiTPipeline.from_pretrained("PATH_OR_REPOSITORY")
{call}
```

Programs that import diffusers alone load it by the `pipeline.py` in this folder, which imports `flashdit`:

```python
from diffusers import DiffusionPipeline

folder = "PATH_OR_REPOSITORY"
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
{call}
```{_native(sampling)}{_guided(recipe)}"""


def _native(sampling: Mapping[str, Any]) -> str:
    """Returns what is to be known where the run itself samples in another way than by Euler steps."""
    name = sampler_name(sampling.get("sampler", "euler"))
    if name == "euler":
        return ""
    return f"\n\nThe run samples by {name}; this pipeline takes Euler steps unless its scheduler is changed."


def _guided(recipe: Mapping[str, Any]) -> str:
    """Returns what guidance leads away from where a model in `guide/` takes the place of the null label."""
    if "guide_step" not in recipe:
        return ""
    return (
        "\n\nGuidance is autoguidance (arXiv 2406.02507): it leads away from the model in `guide/`, where "
        "`guidance_scale` is not 1."
    )


def _metrics(metrics: Mapping[str, Any], sampling: Mapping[str, Any]) -> str:
    """Returns the scores as a table, how they came about, and whether the card's own call samples so."""
    rows = [f"| {name} | {value:.4g} |" for name, value in metrics["values"].items() if value is not None]
    images = counted(metrics["num_images"], "image")
    origin = f"{images} against {metrics['reference']}; {metrics['sampling']}."
    taken = ("steps", "cfg_scale", "cfg_interval", "cfg_channels")
    given = {key: sampling[key] for key in taken if key in sampling}
    call = str(SamplingOptions(**given))
    if not f"{metrics['sampling']},".startswith(f"{call},"):
        origin += f" The call above samples otherwise: {call}."
    return "\n".join(["## Scores", "", "| metric | value |", "|---|---|", *rows, "", origin])


def _facts(recipe: Mapping[str, Any]) -> str:
    """Returns what identifies the weights."""
    names = {
        "step": "training step",
        "weights": "weights",
        "weights_sha256": "SHA-256",
        "guide_step": "training step of the guide",
        "guide_weights": "weights of the guide",
        "guide_weights_sha256": "SHA-256 of the guide",
        "vae_identity": "VAE",
    }
    rows = [f"- {text}: {recipe[key]}" for key, text in names.items() if recipe.get(key) is not None]
    return "\n".join(["## Provenance", "", *rows]) if rows else ""
