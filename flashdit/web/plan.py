"""What a request to the page asks for, checked: labels, options, cost, the command for the same images."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_type_hints

from torch import Tensor

from flashdit.sampling.checkpoint import CheckpointGenerator, sampling_options
from flashdit.sampling.classes import FIRST_CLASSES, choose_labels
from flashdit.sampling.imagenet import shown_names
from flashdit.sampling.options import SamplingOptions
from flashdit.shared.registry import check_type, unknown

MAX_IMAGES = 64
MAX_PAGE_STEPS = 1000
MAX_SIDE = 1024  # a page that anybody may ask must not be kept busy for hours
MAX_TEXT = 200  # characters of a name
MAX_NUMBER = 2**53  # whole numbers above it are inexact in JSON
MILLION = 1_000_000
AXES = {"guidance": "cfg_scale", "steps": "steps", "class": "classes", "seed": "seed", "sampler": "sampler"}
"""What a grid of pictures can compare, and the field of `PageRequest`."""


@dataclass(kw_only=True)
class PageRequest:
    """What somebody wants to see; None leaves an option as the checkpoint's configuration has it."""

    classes: Sequence[str | int] | None
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
    across: str | None = None
    """One of AXES for a grid of single pictures, its values from left to right; None for no grid."""
    across_values: str | None = None
    """With commas between them."""
    down: str | None = None
    """Another one of AXES, its values from top to bottom; None for a grid of one row."""
    down_values: str | None = None

    def __post_init__(self):
        types = get_type_hints(PageRequest)
        for field in fields(self):
            value = getattr(self, field.name)
            _check_size(field.name, value)
            check_type(field.name, value, types[field.name])


def _check_size(name: str, value: Any) -> None:
    """Refuses numbers that are not finite or huge, and texts and lists that are too long to be meant."""
    if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:  # NaN, too
        size = "NaN" if value != value else "a larger one"
        raise ValueError(f"{name} must be a number within ±{MAX_NUMBER:,}, got {size}")
    if isinstance(value, str | list) and len(value) > MAX_TEXT:
        kind = "characters" if isinstance(value, str) else "entries"
        raise ValueError(f"{name} must have at most {MAX_TEXT} {kind}, got {len(value):,}")
    for part in value if isinstance(value, list) else ():
        _check_size(name, part)


@dataclass(kw_only=True)
class PagePlan:
    """A checked request to one model."""

    generator: CheckpointGenerator
    labels: Tensor
    """(N,) int64."""
    options: SamplingOptions

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return math.prod(self.generator.image_size(self.options))

    @property
    def evaluations(self) -> int | None:
        """Model evaluations of an image; None where they differ by image."""
        return self.generator.evaluations(self.options)

    @property
    def first_batch(self) -> int:
        """How many images are sampled together; an adaptive sampler takes them singly."""
        return 1 if self.options.is_adaptive else min(len(self.labels), self.options.batch_size)


@dataclass(kw_only=True)
class PageSheet:
    """What one model is asked for: one plan, or a grid of plans of one image each."""

    plans: list[PagePlan]
    """In a grid row by row."""
    heads: list[str]
    """What stands above each column of a grid; empty where there is none."""
    rows: list[str]
    """What stands before each row of it."""


def class_choices(class_names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (what is shown, what `class_ids` takes) of each class; classes that share a name go by id."""
    names = shown_names(class_names)
    counts = Counter(names)
    return [
        (f"{name} ({i})", str(i)) if counts[name] > 1 else (name, name if name == own else str(i))
        for i, (name, own) in enumerate(zip(names, class_names, strict=True))
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
    if options.is_adaptive:  # the page's form always gives steps, which `sample_command` leaves out
        options = replace(options, steps=generator.sampling.steps)
    return PagePlan(generator=generator, labels=labels, options=options)


def _check_at_most(name: str, value: int | None, most: int) -> None:
    """Refuses what would keep the page busy for too long."""
    if value is not None and value > most:
        raise ValueError(f"{name} must be at most {most} on this page, got {value}")


def plan_sheet(generator: CheckpointGenerator, request: PageRequest) -> PageSheet:
    """Returns a request's plan, or the plans of its grid.

    Raises:
        ValueError: As `plan_page`, or if the grid's options or values are invalid.
    """
    if request.across is None:
        if request.down is not None:
            raise ValueError(f"a grid's rows require its columns, got down={request.down!r} without across")
        return PageSheet(plans=[plan_page(generator, request)], heads=[], rows=[])
    if request.across == request.down:
        raise ValueError(f"a grid's columns and rows must be two options, got {request.across!r} for both")
    columns = _axis(request.across, request.across_values)
    rows = [("", {})] if request.down is None else _axis(request.down, request.down_values)
    _check_at_most("the number of a grid's pictures", len(columns) * len(rows), MAX_IMAGES)
    cells = [replace(request, num_images=1, **row | column) for _, row in rows for _, column in columns]
    plans = [plan_page(generator, cell) for cell in cells]
    adaptive = [plan.options.sampler_name for plan in plans if plan.options.is_adaptive]
    if adaptive and "steps" in (request.across, request.down):
        raise ValueError(f"a grid over steps requires samplers that do not choose them, got {adaptive[0]}")
    return PageSheet(
        plans=plans,
        heads=[head for head, _ in columns],
        rows=[row for row, _ in rows],
    )


def _axis(axis: str, values: str | None) -> list[tuple[str, dict[str, Any]]]:
    """Returns a label and the change to the request for each value of a grid's option."""
    if axis not in AXES:
        raise unknown("option of a grid", axis, AXES)
    field, found = AXES[axis], []
    for text in filter(None, (part.strip() for part in (values or "").split(","))):
        value: Any = text
        if field == "classes":
            value = [text]
        elif field != "sampler":
            try:
                value = float(text) if field == "cfg_scale" else int(text)
            except ValueError:
                kind = "numbers" if field == "cfg_scale" else "whole numbers"
                raise ValueError(
                    f"the values of {axis} must be {kind} with commas between them, got {text!r}"
                ) from None
        found.append((text if field in ("classes", "sampler") else f"{axis} {text}", {field: value}))
    if not found:
        raise ValueError(f"a grid over {axis} requires its values, with commas between them")
    return found


class Work:
    """What a request takes, in images × pixels × model evaluations, and how far it has come.

    Args:
        plans: All that the request asks for.
        most: Millions that it may take.

    Raises:
        ValueError: If it takes more; with an adaptive sampler this is known only after some images.
    """

    def __init__(self, plans: Sequence[PagePlan], most: float):
        self.most, self.done, self.finished_images = most, 0, 0
        self.num_images = sum(len(plan.labels) for plan in plans)
        self.pixels = sum(plan.pixels * len(plan.labels) for plan in plans) / self.num_images
        self.check(sum(plan.pixels * len(plan.labels) * (plan.evaluations or 0) for plan in plans))

    def check(self, total: float) -> None:
        """Raises ValueError if the request takes more in total than it may."""
        if total > self.most * MILLION:
            evaluations = total / self.num_images / self.pixels
            raise ValueError(
                f"images × pixels × model evaluations must be at most {self.most:g} million on this page "
                f"(--max-work), got {self.num_images} × {self.pixels:,.0f} × {evaluations:,.0f} = "
                f"{total / MILLION:,.0f} million"
            )

    def add(self, evaluated: int) -> None:
        """Counts pixels that a model has evaluated; more than may be, or on the way to it, is refused."""
        self.done += evaluated
        self.check(self.done)

    def finish(self, images: int) -> None:
        """Counts images that are done; at this rate all of them must remain within the bound."""
        self.finished_images += images
        self.check(self.done / self.finished_images * self.num_images)


def sample_command(plan: PagePlan, vae: str | None = None) -> str:
    """Returns the command that makes the images of a plan.

    Args:
        plan: What is made.
        vae: Folder of the VAE, where it was given.
    """
    generator, options = plan.generator, plan.options
    ids = list(dict.fromkeys(plan.labels.tolist()))
    shown = dict((str(i), value) for i, (_, value) in enumerate(class_choices(generator.class_names)))
    height, width = generator.image_size(options)
    words: list[Any] = ["flashdit", "sample", "--checkpoint", generator.checkpoint.absolute()]
    words += [] if generator.weights == "ema" else ["--ema", generator.weights]
    words += [] if vae is None else ["--vae", vae]
    if shown:
        words += ["--class", *(shown[str(i)] for i in ids)]
    words += ["--num-images", len(plan.labels), "--sampler", options.sampler_name]
    words += [] if options.is_adaptive else ["--steps", options.steps]
    words += ["--cfg-scale", options.cfg_scale, "--cfg-interval", *options.cfg_interval]
    words += ["--seed", options.seed, "--height", height, "--width", width, "--format", "png"]
    return shlex.join(map(str, words))
