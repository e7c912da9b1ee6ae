"""The diffusers pipeline of a checkpoint, and the scores that its model card shows."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from flashdit.sampling.checkpoint import CheckpointGenerator, load_generator
from flashdit.sampling.options import SamplingOptions
from flashdit.sampling.pipeline import FlashDiTPipeline
from flashdit.sampling.records import current_sampling
from flashdit.shared.files import write_atomically

INDEX = "model_index.json"


def make_pipeline(generator: CheckpointGenerator, name: str = "FlashDiT") -> FlashDiTPipeline:
    """Returns the pipeline of a checkpoint, its card filled with the recipe and the run's scores.

    Args:
        generator: What `load_generator` returns.
        name: The title of the model card.
    """
    options, space = generator.sampling, generator.space
    # Ours is t = s·u / (1 + (s − 1)·u); for σ = 1 − t that is the same formula with 1/s.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / options.shift)
    recipe = generator.recipe() | {"name": name, "sampling": asdict(options)}
    for path in ("checkpoint", "vae"):  # of no use to anybody else
        recipe.pop(path)
    metrics = read_metrics(generator.run_dir, recipe["weights_sha256"])
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
    )


def read_metrics(run_dir: Path, weights_sha256: str) -> dict[str, Any] | None:
    """Returns the newest scores of these weights in a run's eval folder, or None.

    Args:
        run_dir: The run.
        weights_sha256: What the scored weights must be.
    """
    files = sorted(run_dir.glob("eval/**/metrics.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(files):
        content = json.loads(path.read_text())
        samples = content.get("samples", {})
        if samples.get("weights_sha256") == weights_sha256:
            labels = content.get("labels", {})
            return {
                "values": {labels.get(key, key): value for key, value in content["metrics"].items()},
                "types": {labels.get(key, key): key for key in content["metrics"]},
                "num_images": content["num_images"],
                "reference": content["reference"]["name"],
                "sampling": samples.get("summary") or _summary(samples["sampling"]),
            }
    return None


def _summary(sampling: dict[str, Any]) -> str:
    """Returns a recorded sampling in a few words."""
    known = {field.name for field in fields(SamplingOptions)}
    found = current_sampling(sampling)
    return str(SamplingOptions(**{key: value for key, value in found.items() if key in known}))


def export_run(
    run: Path | str, out: Path, name: str | None = None, vae: str | None = None, weights: str = "ema"
) -> None:
    """Writes the pipeline of a checkpoint, whole or not at all.

    Args:
        run: A run, or one of its checkpoint folders.
        out: A new folder, or an earlier export, which is replaced.
        name: The title of the model card; None means the run's name.
        vae: Folder of the VAE, where it is no longer where it was in training.
        weights: Which of the checkpoint's weights.

    Raises:
        ValueError: If the folder holds something else, or the checkpoint or its VAE is missing.
    """
    if out.exists() and not (out / INDEX).is_file():
        raise ValueError(f"OUT must be a new folder or an earlier export, got {out}")
    generator = load_generator(run, "cpu", vae, weights)
    pipeline = make_pipeline(generator, name or f"FlashDiT {generator.run_dir.absolute().name}")
    write_atomically(out, pipeline.save_pretrained)
