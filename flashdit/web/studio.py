"""What the web page shows, made: a checked plan → pictures, a filmstrip, the recipe and the commands."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flashdit.flow.guidance import VelocityModel, guide
from flashdit.flow.path import data_prediction
from flashdit.sampling.checkpoint import CheckpointGenerator, load_generator
from flashdit.sampling.folder import GRID, SampleFolder
from flashdit.sampling.generator import SampleBatch
from flashdit.sampling.recipe import make_recipe
from flashdit.shared.pictures import MIN_CELL, panel_grid, png_text, save_png
from flashdit.shared.registry import counted, unknown
from flashdit.web.plan import PagePlan, PageRequest, PageSheet, Work, plan_sheet, sample_command

FRAMES = 8
KEPT_REQUESTS = 16  # requests of one model whose files stay; those of older ones go
Progress = Callable[[float, str], None]


@dataclass(kw_only=True)
class Pictures:
    """What was made, as PNG files with the recipe in their text."""

    images: list[tuple[Path, str]]
    """Each image, and the name of its class, or its place in the grid."""
    commands: list[str]
    """For each image, the command that makes it, and which of its files the image is."""
    film: list[tuple[Path, str]]
    """What the first image was predicted to become, and when."""
    grid: Path
    """All images in one, a row for each class or as the grid was asked for."""
    recipe: dict[str, Any]
    """Of all images; in a grid of the first one."""
    columns: int | None
    """Of a grid; None where there is none."""


def load_generators(
    checkpoints: Sequence[str | None], device: torch.device | str, vae: str | None, weights: str
) -> dict[str, CheckpointGenerator]:
    """Returns the generators of checkpoints by the names that the page shows: the run's and the step.

    Args:
        checkpoints: Checkpoint folders or runs; None means the newest run.
        device: Where to run.
        vae: Folder of the VAE, where it is no longer where it was in training.
        weights: Which of the checkpoints' weights.

    Raises:
        ValueError: If one of them cannot make pictures.
    """
    generators = [load_generator(checkpoint, device, vae, weights) for checkpoint in checkpoints]
    for generator in generators:
        generator.space.need_vae()
    names = [f"{g.run_dir.absolute().name}, step {g.step:,}" for g in generators]
    return {
        name if names.count(name) == 1 else str(generator.checkpoint): generator
        for name, generator in zip(names, generators, strict=True)
    }


class Closed(Exception):
    """Sampling was cut off since the page is closed."""


class Watched:
    """A velocity model that is counted, says how far it is, and keeps what it predicts for the first image.

    (x_t, t, y) → v, as the model itself; x_t has B rows, or 2B where guidance needs both velocities.

    Args:
        model: The velocity model.
        plan: What is sampled with it.
        work: Of the request.
        say: Called with the share of the work that is done, and a text.
    """

    def __init__(self, model: VelocityModel, plan: PagePlan, work: Work, say: Progress):
        self.model, self.plan, self.work, self.say = model, plan, work, say
        self.predictions: dict[float, Tensor] = {}
        self.time, self.started = 1.0, 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, **given: Tensor) -> Tensor:
        """Returns the model's velocity."""
        time, size = float(t[0]), self.plan.first_batch
        if time == 0 and self.time > 0:  # the next batch starts
            if self.started:
                self.work.finish(size)
            self.started += size
        self.time = time
        self.work.add(len(x) * self.plan.pixels)
        done, total = self.work.finished_images, self.work.num_images
        share = min(1.0, (done + size * time) / total)
        self.say(share, f"{done} of {counted(total, 'image')}, t = {time:.2f}")
        v = self.model(x, t, y, **given)
        if self.started == size:
            self._keep(x[:1], time, v[::size].float())
        return v

    def _keep(self, x_t: Tensor, time: float, found: Tensor) -> None:
        """Keeps x̂_1 of the first image, of its v, or of its v_cond and v_uncond."""
        labels, options, null = self.plan.labels[:1], self.plan.options, self.plan.generator.num_classes
        is_guided = len(found) == 2
        both = guide(lambda *_: found, labels, null, options.cfg_scale, channels=options.cfg_channels)
        v_t = both if is_guided else None
        # Where a sampler asks twice at one time (Heun), the later state is the better one.
        self.predictions[time] = data_prediction(x_t, v_t(x_t, time) if v_t else found, time)


def watched_batches(
    plan: PagePlan, work: Work, say: Progress
) -> tuple[list[SampleBatch], dict[float, Tensor]]:
    """Returns the images, and x̂_1 = x_t + (1 − t)·v of the first one by time: (1, C, H, W) latents.

    Args:
        plan: What to make.
        work: Of the request; the images are counted in it.
        say: Called with the share of the work that is done, and a text.

    Raises:
        ValueError: If the request turns out to take more work than it may.
    """
    watching = copy.copy(plan.generator)  # this request alone is watched
    watched = Watched(plan.generator.velocity, plan, work, say)
    watching.velocity = watched
    before = work.finished_images
    batches = list(watching.generate(plan.labels, plan.options))
    work.finished_images = before + len(plan.labels)
    return batches, watched.predictions


def film_times(times: Sequence[float]) -> list[float]:
    """Returns at most FRAMES of these times, in order, evenly chosen, with the first and the last."""
    ordered = sorted(times)
    places = torch.linspace(0, len(ordered) - 1, min(FRAMES, len(ordered))).round().int()
    return [ordered[place] for place in places.tolist()]


class Studio:
    """Models by name, and a folder for what they make.

    Args:
        generators: As `load_generators` returns them.
        folder: Where the pictures go; those of old requests are removed.
        vae: Folder of the VAE where it was given, for the commands.
        max_work: Millions of images × pixels × model evaluations that a request may take.
    """

    def __init__(
        self,
        generators: Mapping[str, CheckpointGenerator],
        folder: Path,
        *,
        vae: str | None,
        max_work: float,
    ):
        self.generators, self.folder = dict(generators), folder
        self.vae, self.max_work = vae, max_work
        self.made: list[Path] = []
        self.is_closed = False

    def sheets(self, names: Sequence[str], request: PageRequest) -> tuple[list[PageSheet], Work]:
        """Returns what each model is asked for and the work of it, all checked before anything is drawn."""
        for name in names:
            if not isinstance(name, str) or name not in self.generators:
                raise unknown("model", str(name)[:80], self.generators)
        sheets = [plan_sheet(self.generators[name], request) for name in names]
        return sheets, Work([plan for sheet in sheets for plan in sheet.plans], self.max_work)

    def make(self, sheet: PageSheet, work: Work, say: Progress = lambda *_: None) -> Pictures:
        """Returns the pictures of a sheet; the images are those of `flashdit sample`, pixel for pixel.

        Args:
            sheet: What one model is asked for.
            work: Of the request.
            say: Called with the share of the work that is done, and a text.

        Raises:
            ValueError: If the request turns out to take more work than it may.
        """

        def watch(share: float, text: str) -> None:
            if self.is_closed:
                raise Closed
            say(share, text)

        path = self._new_folder()
        try:
            parts = [
                self._make(plan, path / str(i), work, watch, film=i == 0)
                for i, plan in enumerate(sheet.plans)
            ]
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return parts[0] if not sheet.heads else join_grid(sheet, parts, path)

    def _make(self, plan: PagePlan, path: Path, work: Work, say: Progress, *, film: bool) -> Pictures:
        """Returns the pictures of a plan, in a folder."""
        batches, predictions = watched_batches(plan, work, say)
        generator, labels = plan.generator, plan.labels
        folder = SampleFolder(
            path / "samples",
            make_recipe(generator, labels, plan.options, form="png"),
            labels,
            generator.class_names,
        )
        folder.open()
        for batch in batches:
            folder.add(batch)
        folder.finish()
        recipe = folder.read_recipe()
        names = generator.class_names or [""]
        images = [(folder.path / f"{i:06d}.png", names[label]) for i, label in enumerate(labels.tolist())]
        about = {"recipe": json.dumps(recipe)}
        grid = path / "flashdit-grid.png"
        with Image.open(folder.path / GRID) as picture:
            save_png(pil_to_tensor(picture), grid, about)
        command = sample_command(plan, self.vae)
        return Pictures(
            images=images,
            commands=[f"{command}\n# this picture: {image.name}" for image, _ in images],
            film=save_film(generator, predictions, path, about) if film else [],
            grid=grid,
            recipe=recipe,
            columns=None,
        )

    def _new_folder(self) -> Path:
        """Returns a folder for one request, and removes the oldest."""
        self.made.append(Path(tempfile.mkdtemp(dir=self.folder)))
        while len(self.made) > KEPT_REQUESTS:
            shutil.rmtree(self.made.pop(0), ignore_errors=True)
        return self.made[-1]


def save_film(
    generator: CheckpointGenerator, predictions: Mapping[float, Tensor], path: Path, about: dict[str, str]
) -> list[tuple[Path, str]]:
    """Writes what the first image was predicted to become, and returns the files and when."""
    times = film_times(list(predictions))
    frames = generator.space.decode(torch.cat([predictions[t] for t in times])).cpu()
    film = []
    for number, (t, frame) in enumerate(zip(times, frames, strict=True)):
        film.append((path / f"film-{number}.png", f"{t:.2f}"))
        save_png(frame, film[-1][0], about | {"sample": "0", "t": f"{t:g}"})
    return film


def join_grid(sheet: PageSheet, parts: Sequence[Pictures], path: Path) -> Pictures:
    """Returns the pictures of a grid, and writes all of them in one, with each one's recipe in its text."""
    panels, captions = [], []
    for number, part in enumerate(parts):
        with Image.open(part.images[0][0]) as picture:
            scale = max(1, -(-MIN_CELL // max(picture.size)))
            panels.append(picture.resize([side * scale for side in picture.size], Image.Resampling.BICUBIC))
        row, column = divmod(number, len(sheet.heads))
        captions.append(", ".join(filter(None, (sheet.rows[row], sheet.heads[column]))))
    width = len(sheet.heads)
    rows = [(name, panels[i * width : (i + 1) * width]) for i, name in enumerate(sheet.rows)]
    grid = path / "flashdit-grid.png"
    about = png_text({"recipe": json.dumps([part.recipe for part in parts])})
    panel_grid(rows, sheet.heads, title=f"step {sheet.plans[0].generator.step}").save(grid, pnginfo=about)
    return Pictures(
        images=[(part.images[0][0], text) for part, text in zip(parts, captions, strict=True)],
        commands=[part.commands[0] for part in parts],
        film=parts[0].film,
        grid=grid,
        recipe=parts[0].recipe,
        columns=width,
    )
