"""What the web page asks for, made: a request → checked options → pictures, a filmstrip, the recipe."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flashdit.flow.guidance import VelocityModel, guide
from flashdit.flow.path import data_prediction
from flashdit.sampling.checkpoint import CheckpointGenerator, load_generator, sampling_options
from flashdit.sampling.classes import FIRST_CLASSES, choose_labels
from flashdit.sampling.folder import GRID, SampleFolder, make_recipe
from flashdit.sampling.generator import SampleBatch
from flashdit.sampling.options import SamplingOptions
from flashdit.shared.pictures import save_png

FRAMES = 8
MAX_IMAGES = 64
MAX_PAGE_STEPS = 1000
MAX_SIDE = 1024  # a page that anybody may ask must not be kept busy for hours
KEPT_REQUESTS = 8  # requests whose files stay, beside what the page itself keeps


@dataclass(kw_only=True)
class PageRequest:
    """What somebody wants to see; None leaves an option as the checkpoint's configuration has it."""

    classes: Sequence[str]
    """Ids or names; none are the first ten, as in `flashdit sample`."""
    num_images: int
    """In all, shared among the classes in order, as `flashdit sample` shares them."""
    sampler: str | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    cfg_low: float | None = None
    """Guidance acts from this time on."""
    cfg_high: float | None = None
    """Guidance acts until this time."""
    seed: int | None = None
    height: int | None = None
    width: int | None = None


@dataclass(kw_only=True)
class PagePlan:
    """A checked request to one model."""

    generator: CheckpointGenerator
    labels: Tensor
    """(N,) int64."""
    options: SamplingOptions


@dataclass(kw_only=True)
class Pictures:
    """What was made, as PNG files with the recipe in their text."""

    images: list[tuple[Path, str]]
    """Each image, and the name of its class."""
    film: list[tuple[Path, str]]
    """What the first image was predicted to become, and when."""
    grid: Path
    """All images in one, a row for each class."""
    recipe: dict[str, Any]


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


def class_choices(class_names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (what is shown, what `class_ids` takes) of each class; classes that share a name go by id."""
    counts = Counter(class_names)
    return [
        (name, name) if counts[name] == 1 else (f"{name} ({i})", str(i)) for i, name in enumerate(class_names)
    ]


def plan_page(generator: CheckpointGenerator, request: PageRequest) -> PagePlan:
    """Returns the labels and the sampling options of a request to a model.

    Raises:
        ValueError: If an option is invalid, with the message of `flashdit sample`, or too large for a page.
    """
    _check_at_most("num_images", request.num_images, MAX_IMAGES)
    names = generator.class_names
    classes = request.classes or list(range(min(FIRST_CLASSES, len(names))))
    labels = choose_labels(names, classes, request.num_images)
    low, high = generator.sampling.cfg_interval
    given = asdict(request) | {
        "cfg_interval": (
            low if request.cfg_low is None else request.cfg_low,
            high if request.cfg_high is None else request.cfg_high,
        )
    }
    # First, since even the time grid of too many steps fills the memory.
    for name, most in (("steps", MAX_PAGE_STEPS), ("height", MAX_SIDE), ("width", MAX_SIDE)):
        _check_at_most(name, getattr(request, name), most)
    known = {field.name for field in fields(SamplingOptions)}
    options = sampling_options(generator, {name: value for name, value in given.items() if name in known})
    return PagePlan(generator=generator, labels=labels, options=options)


def _check_at_most(name: str, value: int | None, most: int) -> None:
    """Refuses what would keep the page busy for too long."""
    if value is not None and value > most:
        raise ValueError(f"{name} must be at most {most} on this page, got {value}")


class Watched:
    """A velocity model that keeps what it predicts of the data, for the first image of a batch.

    (x_t, t, y) → v, as the model itself; x_t has B rows, or 2B where guidance needs both velocities.

    Args:
        model: The velocity model.
        labels: Labels (B,) of the batch.
        null_label: The label of no class.
        scale: Guidance scale.
    """

    def __init__(self, model: VelocityModel, labels: Tensor, null_label: int, scale: float):
        self.model, self.labels, self.null_label, self.scale = model, labels, null_label, scale
        self.predictions: dict[float, Tensor] = {}

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Returns the model's velocity."""
        v = self.model(x, t, y)
        x_t, time = x[:1], float(t[0])
        found = v[:: len(self.labels)].float()  # of the first image: v, or v_cond and v_uncond
        is_guided = len(found) == 2
        v_t = guide(lambda *_: found, self.labels[:1], self.null_label, self.scale) if is_guided else None
        # Where a sampler asks twice at one time (Heun), the later state is the better one.
        self.predictions[time] = data_prediction(x_t, v_t(x_t, time) if v_t else found, time)
        return v


def watched_batches(plan: PagePlan) -> tuple[list[SampleBatch], dict[float, Tensor]]:
    """Returns the images, and x̂_1 = x_t + (1 − t)·v of the first one by time: (1, C, H, W) latents."""
    generator, labels, options = plan.generator, plan.labels, plan.options
    ids = torch.arange(len(labels))
    first = 1 if options.is_adaptive else options.batch_size  # an adaptive one takes them singly
    head, rest = ids[:first], ids[first:]
    watching = copy.copy(generator)  # this request alone is watched
    watched = Watched(generator.velocity, labels[head], generator.num_classes, options.cfg_scale)
    watching.velocity = watched
    batches = [*watching.generate(labels, options, head), *generator.generate(labels, options, rest)]
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
    """

    def __init__(self, generators: Mapping[str, CheckpointGenerator], folder: Path):
        self.generators, self.folder = dict(generators), folder
        self.made: list[Path] = []

    def plans(self, names: Sequence[str], request: PageRequest) -> list[PagePlan]:
        """Returns the request's plan for each model, all checked before anything is drawn."""
        return [plan_page(self.generators[name], request) for name in names]

    def make(self, plan: PagePlan) -> Pictures:
        """Returns the pictures of a plan; the images are those of `flashdit sample`, pixel for pixel."""
        batches, predictions = watched_batches(plan)
        generator, labels = plan.generator, plan.labels
        path = self._new_folder()
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
        times = film_times(list(predictions))
        frames = generator.space.decode(torch.cat([predictions[t] for t in times])).cpu()
        film = []
        for number, (t, frame) in enumerate(zip(times, frames, strict=True)):
            film.append((path / f"film-{number}.png", f"{t:.2f}"))
            save_png(frame, film[-1][0], about | {"sample": "0", "t": f"{t:g}"})
        return Pictures(images=images, film=film, grid=grid, recipe=recipe)

    def _new_folder(self) -> Path:
        """Returns a folder for one request, and removes the oldest."""
        self.made.append(Path(tempfile.mkdtemp(dir=self.folder)))
        while len(self.made) > KEPT_REQUESTS:
            shutil.rmtree(self.made.pop(0), ignore_errors=True)
        return self.made[-1]
