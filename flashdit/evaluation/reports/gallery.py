"""What a report shows of an evaluation: samples by class, their nearest real images, outliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashdit.evaluation.classes import Classes
from flashdit.evaluation.evaluate import Plan
from flashdit.evaluation.features.statistics import ImageStatistics
from flashdit.evaluation.images.sources import Source, take
from flashdit.evaluation.metrics.distances import mean_row, nearest_rows
from flashdit.evaluation.metrics.manifold import NEIGHBOURS, realism, squared_radii
from flashdit.evaluation.reports.by_class import ClassScore, class_notes, class_scores

GALLERY_PARTS = ("pool", "logits")  # what `collect` must keep of both sides
LARGE = 64  # pixels; a report shows fewer images of more


@dataclass(kw_only=True)
class GalleryOptions:
    """How many images a report shows."""

    classes: int = 10
    """Rows of the sample grid."""
    per_class: int = 10
    """Samples in a row of it."""
    probes: int = 8
    """Samples whose nearest real images are shown."""
    neighbours: int = 5
    """Real images shown of each."""
    outliers: int = 10
    """Of either kind."""

    @classmethod
    def for_size(cls, image_size: tuple[int, int] | None) -> GalleryOptions:
        """Returns the defaults, with fewer images where they are large."""
        if image_size is None or max(image_size) > LARGE:
            return cls(per_class=3, probes=5, outliers=5)
        return cls()


@dataclass(kw_only=True)
class Picture:
    """An image with what stands below it.

    Attributes:
        real: Whether it is the reference's.
        row: Its number in its set.
        caption: Lines below it.
        doubtful: Whether the extractor takes it for another class.
    """

    real: bool
    row: int
    caption: tuple[str, ...] = ()
    doubtful: bool = False


@dataclass(kw_only=True)
class Section:
    """Rows of pictures under one heading, or why there are none.

    Attributes:
        heading: Its title.
        about: What the pictures are, in a sentence or two.
        rows: (label, pictures) of each row.
    """

    heading: str
    about: str
    rows: list[tuple[str, list[Picture]]] = field(default_factory=list)


@dataclass(kw_only=True)
class Gallery:
    """Everything that a report shows beside the numbers.

    Attributes:
        sections: Of pictures, in order.
        images: uint8 (3, h, w) of each picture, by (real, row).
        classes: One per class of the samples, empty where they have no labels.
        class_notes: What to know of the class scores.
    """

    sections: list[Section]
    images: dict[tuple[bool, int], Tensor]
    classes: list[ClassScore]
    class_notes: list[str]

    def image_of(self, picture: Picture) -> Tensor:
        """Returns what a picture shows."""
        return self.images[picture.real, picture.row]


class GallerySide:
    """One of the two sets of images, with what the extractor makes of them.

    Args:
        source: Its images; None where only statistics are known.
        statistics: Its features.
        classes: Of its labels.
        real: Whether it is the reference.
    """

    def __init__(
        self,
        source: Source | None,
        statistics: ImageStatistics,
        classes: Classes,
        real: bool,
    ):
        self.source, self.class_name, self.real = source, classes.name_of, real
        self.statistics, self.pool, self.labels = statistics, statistics.pool, statistics.labels
        logits = None if classes.unknown else statistics.logits
        self.predicted = logits.argmax(dim=1) if logits is not None else None

    def picture(self, row: int, line: str = "") -> Picture:
        """Returns one image under its class, what it is taken for if that differs, and a line of its own."""
        label = None if self.labels is None else int(self.labels[row])
        predicted = label if label is None or self.predicted is None else int(self.predicted[row])
        caption = (
            "" if label is None else self.class_name(label),
            f"taken for {self.class_name(predicted)}" if predicted is not None and predicted != label else "",
            line,
        )
        about = tuple(part for part in caption if part)
        return Picture(real=self.real, row=row, caption=about, doubtful=predicted != label)

    def images(self, sections: Sequence[Section]) -> dict[tuple[bool, int], Tensor]:
        """Returns this side's images of all sections, read in one go."""
        shown = (picture for section in sections for _, pictures in section.rows for picture in pictures)
        rows = sorted({picture.row for picture in shown if picture.real == self.real})
        if not rows:
            return {}
        assert self.source is not None
        images = take(self.source, torch.tensor(rows))
        return {(self.real, row): image for row, image in zip(rows, images, strict=True)}


def first_rows_by_class(
    labels: Tensor | None, count: int, classes: int, per_class: int
) -> list[tuple[int | None, list[int]]]:
    """Returns (class, rows of its first images) for classes spread evenly over those there are.

    Without labels the rows are those of the first images, under no class.
    """
    if labels is None:
        first = torch.arange(min(count, classes * per_class))
        return [(None, rows.tolist()) for rows in first.split(per_class)]
    known = labels.unique()
    places = torch.linspace(0, len(known) - 1, min(classes, len(known))).round().long()
    return [(label, (labels == label).nonzero()[:per_class, 0].tolist()) for label in known[places].tolist()]


def sample_grid(samples: GallerySide, options: GalleryOptions) -> Section:
    """Returns the first samples of each class."""
    assert samples.source is not None
    grid = first_rows_by_class(samples.labels, samples.source.count, options.classes, options.per_class)
    about = "The first samples; they have no labels."
    if samples.labels is not None:
        known = len(samples.labels.unique())
        which = "the" if len(grid) == known else f"{len(grid)} of the"
        about = f"The first of each of {which} {known:,} classes."
    if samples.predicted is not None and samples.labels is not None:
        about += " A red border marks those that the extractor takes for another class."
    section = Section(heading="Samples", about=about)
    for label, rows in grid:
        name = "" if label is None else samples.class_name(label)
        section.rows.append((name, [samples.picture(row) for row in rows]))
    return section


def nearest_real(samples: GallerySide, real: GallerySide, options: GalleryOptions) -> Section:
    """Returns a few samples, each of another class as far as that goes, with their nearest real images."""
    section = Section(heading="Nearest real images", about=why_nothing(real))
    if section.about:
        return section
    assert samples.source is not None
    assert samples.pool is not None
    assert real.pool is not None
    grid = first_rows_by_class(samples.labels, samples.source.count, options.probes, 1)
    probes = [row for _, rows in grid for row in rows]
    distances, found = nearest_rows(samples.pool[probes], real.pool, options.neighbours)
    section.about = (
        f"A sample, then the {found.shape[1]} images of '{real.statistics.name}' nearest to it in feature "
        "space with their distances; a copy is at 0."
    )
    for probe, values, rows in zip(probes, distances.tolist(), found.tolist(), strict=True):
        neighbours = [real.picture(row, f"{value:.2f}") for row, value in zip(rows, values, strict=True)]
        section.rows.append(("", [samples.picture(probe, "sample"), *neighbours]))
    return section


def outliers(samples: GallerySide, real: GallerySide, options: GalleryOptions) -> list[Section]:
    """Returns the samples farthest outside the real images' manifold, and the real images least covered."""
    why = why_nothing(real)
    sections = [Section(heading=heading, about=why) for heading in ("Precision outliers", "Recall outliers")]
    if why:
        return sections
    assert samples.pool is not None
    assert real.pool is not None
    if min(len(samples.pool), len(real.pool)) <= NEIGHBOURS:
        for section in sections:
            section.about = f"They need more than {NEIGHBOURS} images on each side."
        return sections
    origin = mean_row(real.pool)
    pairs = [(samples, real, "samples", "real image"), (real, samples, "real images", "sample")]
    for section, (points, centres, many, one) in zip(sections, pairs, strict=True):
        assert points.pool is not None
        assert centres.pool is not None
        scores = realism(points.pool, centres.pool, squared_radii(centres.pool, origin, NEIGHBOURS), origin)
        outside = int((scores < 1).sum())
        worst = scores.argsort(stable=True)[: min(outside, options.outliers)].tolist()
        section.about = (
            f"{outside:,} of {len(scores):,} {many} lie in no ball around a {one} that reaches to its "
            f"neighbour {NEIGHBOURS}. The farthest come first; below each is the largest ratio of a radius "
            "to the distance from its centre, which is 1 at a border."
        )
        if worst:
            section.rows.append(("", [points.picture(row, f"{scores[row]:.3f}") for row in worst]))
    return sections


def why_nothing(real: GallerySide) -> str:
    """Returns why no image of the reference can be shown, empty where one can."""
    if real.source is None or real.pool is None:
        return f"'{real.statistics.name}' has no images, only statistics."
    return ""


def make_gallery(
    plan: Plan,
    samples: ImageStatistics,
    reference: ImageStatistics,
    options: GalleryOptions | None = None,
) -> Gallery:
    """Returns what a report of an evaluation shows. Images are read, or drawn, again by their numbers.

    It costs about twice what precision and recall do; memory is the features, a few tiles and what is shown.

    Args:
        plan: What was evaluated.
        samples: Its samples' statistics, as `evaluate_fully` returns them, with `GALLERY_PARTS`.
        reference: Its reference's, likewise, with `GALLERY_PARTS` as far as it has images.
        options: How many images to show; None means as many as their size allows.
    """
    classes = plan.classes
    options = options or GalleryOptions.for_size(plan.samples.image_size)
    ours = GallerySide(plan.samples, samples, classes, real=False)
    real = GallerySide(plan.reference.source, reference, classes, real=True)
    sections = [sample_grid(ours, options), nearest_real(ours, real, options), *outliers(ours, real, options)]
    scores = class_scores(samples, reference, classes.name_of, not classes.unknown)
    return Gallery(
        sections=sections,
        images=ours.images(sections) | real.images(sections),
        classes=scores,
        class_notes=class_notes(scores, samples, reference, classes.unknown),
    )
