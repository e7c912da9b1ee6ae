"""The diffusers pipeline of a checkpoint, and the scores that its model card shows."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path, PurePath
from typing import Any

from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from flashdit.sampling.card import CODE
from flashdit.sampling.checkpoint import CheckpointGenerator, load_generator
from flashdit.sampling.options import SamplingOptions
from flashdit.sampling.pipeline import FlashDiTPipeline
from flashdit.sampling.recipe import FOLDERS
from flashdit.sampling.records import current_sampling, weights_of
from flashdit.shared.files import read_checked_json, write_atomically
from flashdit.shared.locks import only_writer
from flashdit.shared.paths import check_outside, resolved
from flashdit.shared.registry import check_type
from flashdit.shared.runs import (
    EXPORT_FILE,
    export_changes,
    file_names,
    read_export_checksums,
    write_export_checksums,
)

logger = logging.getLogger(__name__)
INDEX = "model_index.json"
PARTS = (INDEX, "README.md", CODE, EXPORT_FILE, "scheduler", "transformer", "guide", "vae")
"""All that an export holds."""


def make_pipeline(generator: CheckpointGenerator, name: str = "FlashDiT") -> FlashDiTPipeline:
    """Returns the pipeline of a checkpoint, its card filled with the recipe and the run's scores.

    Args:
        generator: What `load_generator` returns.
        name: The title of the model card.
    """
    options, space = generator.sampling, generator.space
    # Ours is t = s·u / (1 + (s − 1)·u); for σ = 1 − t that is the same formula with 1/s.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / options.shift)
    if options.sampler_name != "euler":
        logger.warning("the run samples by %s, its pipeline by Euler steps", options.sampler_name)
    recipe = generator.recipe() | {"name": name, "sampling": asdict(options)}
    for path in FOLDERS:  # of no use to anybody else
        recipe.pop(path, None)
    metrics = read_metrics(generator.run_dir, recipe)
    channels = {} if options.cfg_channels is None else {"guidance_channels": options.cfg_channels}
    return FlashDiTPipeline(
        transformer=generator.model,
        vae=space.need_vae().module,
        scheduler=scheduler,
        id2label={str(i): name for i, name in enumerate(generator.class_names)},
        latents_mean=space.mean.flatten().tolist(),
        latents_std=space.std.flatten().tolist(),
        latents_multiplier=space.options.multiplier,
        latents_space=space.options.space,
        recipe=recipe | ({"metrics": metrics} if metrics else {}),
        call_defaults={
            "num_inference_steps": options.steps,
            "guidance_scale": options.cfg_scale,
            "guidance_interval": list(options.cfg_interval),
            **channels,
        },
        guide=None if generator.guide is None else generator.guide.model,
    )


def read_metrics(run_dir: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the newest scores of these weights, and of this guide or of none, in a run's eval folder.

    Args:
        run_dir: The run.
        recipe: What the scored weights and their guide must be.
    """
    files = sorted(run_dir.glob("eval/**/metrics.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(files):
        try:
            content = read_checked_json(path)
            samples, labels = content.get("samples", {}), content.get("labels", {})
            if weights_of(samples) != weights_of(recipe):
                continue
            check_type("num_images", content["num_images"], int)
            return {
                "values": {labels.get(key, key): value for key, value in content["metrics"].items()},
                "types": {labels.get(key, key): key for key in content["metrics"]},
                "num_images": content["num_images"],
                "reference": PurePath(content["reference"]["name"]).name,  # no folders of this machine
                "sampling": samples.get("summary") or _summary(samples["sampling"]),
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("scores must be readable as JSON, %s is left out: %s", path, error)
    return None


def _summary(sampling: dict[str, Any]) -> str:
    """Returns a recorded sampling in a few words."""
    known = {field.name for field in fields(SamplingOptions)}
    found = current_sampling(sampling)
    return str(SamplingOptions(**{key: value for key, value in found.items() if key in known}))


def read_export(folder: Path) -> dict[str, Any] | None:
    """Returns the index of an earlier export; None where there is nothing of this name.

    Raises:
        ValueError: If there is something else, something beside the export, or a file of it was changed.
    """
    if not folder.exists():
        return None
    path = folder / INDEX
    try:
        index = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        index = {}
    if not isinstance(index, dict) or index.get("_class_name") != FlashDiTPipeline.__name__:
        raise ValueError(f"OUT must be a new folder or an earlier export, got {folder}")
    others = {entry.name for entry in folder.iterdir()} - {*PARTS}
    known = read_export_checksums(folder)
    if known:
        others |= {*file_names(folder)} - known.keys() - {EXPORT_FILE}
    for found, what in ((sorted(others), "holds {} too"), (export_changes(folder), "was edited since in {}")):
        if found:
            names = f"{', '.join(found[:3])}{' …' if len(found) > 3 else ''}"
            raise ValueError(
                "OUT must be a new folder or an earlier export alone, which is replaced, "
                f"{folder} {what.format(names)}"
            )
    return index


def _write(pipeline: FlashDiTPipeline, folder: Path) -> None:
    """Writes a pipeline, and the checksums of its files."""
    pipeline.save_pretrained(folder)
    write_export_checksums(folder)


def export_run(
    run: Path | str,
    out: Path,
    name: str | None = None,
    vae: str | None = None,
    weights: str = "ema",
    guide: str | None = None,
    guide_weights: str = "ema",
) -> str | None:
    """Writes the pipeline of a checkpoint, whole or not at all.

    Args:
        run: A run, or one of its checkpoint folders.
        out: A new folder, or an earlier export of whichever run, which is replaced.
        name: The title of the model card; None means the run's name.
        vae: Folder of the VAE, where it is no longer where it was in training.
        weights: Which of the checkpoint's weights.
        guide: A run, or one of its checkpoint folders, that the pipeline's guidance leads away from; None is
            classifier-free guidance.
        guide_weights: Which of its weights.

    Returns:
        What was replaced, in words; None where there was nothing.

    Raises:
        ValueError: If the folder holds something else, another process writes it, or the checkpoint or its
            VAE is missing.
    """
    read_export(out)
    generator = load_generator(run, "cpu", vae, weights, called="RUN")
    if guide is not None:
        generator.guide_by(load_generator(guide, "cpu", vae, guide_weights, called="--guide"))
    check_outside(out, generator.images_path, "OUT", f"the run {generator.run_dir}")
    pipeline = make_pipeline(generator, name or f"FlashDiT {generator.run_dir.absolute().name}")
    target = resolved(out)
    # Its lock lies beside it, since the folder itself is replaced.
    with only_writer(target, is_file=True, called="OUT"):
        before = read_export(out)
        write_atomically(target, lambda folder: _write(pipeline, folder))
    if before is None:
        return None
    recipe = before.get("recipe") or {}
    return f"{recipe.get('name', 'an export')}, step {recipe.get('step', 'unknown')}"
