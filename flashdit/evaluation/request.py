"""One request for every evaluation: what is scored, how and against what; opened before any image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flashdit.data.sources import MOST_PIXELS, companions_of
from flashdit.evaluation.classes import UNKNOWN_NAMED, names_of
from flashdit.evaluation.evaluate import Plan, check_image_sizes
from flashdit.evaluation.features.cache import FeatureCache
from flashdit.evaluation.features.extractor import Extractor
from flashdit.evaluation.features.extractors import build_extractor
from flashdit.evaluation.features.ranks import Ranks
from flashdit.evaluation.images.sources import GeneratedSource, Source, check_reference, open_source
from flashdit.evaluation.metrics.scoring import check_classes, default_metrics, in_order
from flashdit.evaluation.options import LABEL_MODES
from flashdit.evaluation.reference import Reference
from flashdit.evaluation.stored import extractor_of
from flashdit.sampling.classes import (
    balanced_labels,
    check_labels_fit,
    equal_shares,
    random_labels,
    shuffled,
)
from flashdit.sampling.generator import ImageGenerator
from flashdit.sampling.options import SamplingOptions
from flashdit.shared.registry import unknown


def check_bounds(batch_size: int, image_size: int | None) -> None:
    """Raises ValueError for a batch, or an image size, that is larger than any machine reads."""
    if batch_size >= 2**31:
        raise ValueError(f"the batch size must be below 2^31, got {batch_size}")
    if image_size is not None and image_size > MOST_PIXELS:
        raise ValueError(f"the image size must be at most {MOST_PIXELS}, got {image_size}")


@dataclass(kw_only=True)
class EvaluationRequest:
    """What is scored, how and against what; checked as far as nothing needs to be opened.

    Attributes:
        samples: An npz or a folder of images that exist; None draws them.
        generator: What draws samples.
        sampling: How it draws them.
        data: The data set that the generator was trained on, as `companions_of` takes it, whose own reference
            is the default.
        data_path: Its folder of images, if it is one, which a message names.
        labels: Of drawn samples, in random order: `balanced` in equal shares, `random`, or `reference` in the
            shares that the reference has.
        num_images: How many are scored; None means all that exist, or of drawn ones as many as the
            reference's data set says.
        reference: A data set that brings one, an npz or a folder; None means that of `data`.
        extractor: As `build_extractor` takes it; None means the one that the reference's data set brings or
            its npz names, or else Inception.
        extractor_weights: The extractor's weights file; None means its default.
        metrics: Names of `METRICS`; None means every default one that applies.
        background: What transparent pixels of images in folders show: a colour's name or `#rrggbb`.
        image_size: Side of the square that images of folders are cropped to, as encoding does, and that other
            images must have, in pixels; None takes images as they are.
        batch_size: Images whose features are extracted at a time; changes no number.
        device: Where features are computed.
        cache: Whether features are kept in, and read from, the cache.

    Raises:
        ValueError: If an option is invalid.
    """

    samples: Path | None = None
    generator: ImageGenerator | None = None
    sampling: SamplingOptions | None = None
    data: str | None = None
    data_path: str | None = None
    labels: str = "balanced"
    num_images: int | None = None
    reference: str | None = None
    extractor: str | None = None
    extractor_weights: str | None = None
    metrics: Sequence[str] | None = None
    background: str = "white"
    image_size: int | None = None
    batch_size: int = 100
    device: str = "cpu"
    cache: bool = True

    def __post_init__(self):
        if (self.samples is None) == (self.generator is None) or (self.generator and self.sampling is None):
            raise ValueError(
                "an evaluation requires samples, or a generator and how it samples, "
                f"got samples={self.samples}, generator={self.generator}, sampling={self.sampling}"
            )
        if self.labels not in LABEL_MODES:
            raise unknown("labels", self.labels, LABEL_MODES)
        numbers = {"number of images": self.num_images, "batch size": self.batch_size}
        for name, value in (numbers | {"image size": self.image_size}).items():
            if value is not None and value < 1:
                raise ValueError(f"the {name} must be positive, got {value}")
        check_bounds(self.batch_size, self.image_size)
        check_labels_fit(self.num_images or 0)
        in_order(self.metrics or ())

    @property
    def reference_spec(self) -> str:
        """The reference that is asked for, or that the generator's data set brings.

        Raises:
            ValueError: If there is neither.
        """
        if self.reference is not None:
            return self.reference
        if self.data is not None and companions_of(self.data).reference is not None:
            return self.data
        raise ValueError(
            "an evaluation requires a reference, --reference or evaluation.reference: an npz, a folder of "
            f"images, or a data set that brings one{self._own_reference()}"
        )

    def _own_reference(self) -> str:
        """Returns what to do for the data that the generator was trained on, to end a sentence with."""
        if self.data is None:
            return ""
        none = f"; data set '{self.data}' brings none"
        if self.data_path is None or self.generator is None or self.sampling is None:
            return none
        height, width = self.generator.image_size(self.sampling)
        if height != width:
            return none
        size = f"--image-size {height}"
        return (
            f"{none}: for its images, --reference {self.data_path} {size}, or once "
            f"`flashdit eval make-reference {self.data_path} reference.npz {size}` and then that file"
        )


def open_plan(request: EvaluationRequest, ranks: Ranks) -> Plan:
    """Returns what a request names, opened and checked on every process before the first image.

    Raises:
        ValueError: If something of it is missing or does not fit; every process raises where one does.
    """
    mine = getattr(request.generator, "read_from", None)  # that of a training has none
    first = ranks.broadcast(mine)
    with ranks.agree():
        if mine != first:  # beside a training each may find another one to be the newest of a run
            read = f"{first} and {mine}"
            raise ValueError(f"all processes must read one checkpoint, got {read}: give its folder")
        spec = request.reference_spec
        check_reference(spec)
        extractor = open_extractor(spec, request.extractor, request.extractor_weights).to(request.device)
        reference = Reference(spec, extractor, request.background, request.image_size)
        plan = Plan(
            open_samples(request, reference),
            extractor,
            reference,
            [],
            FeatureCache() if request.cache else None,
            request.batch_size,
            request.device,
        )
        check_image_sizes(plan)
        unknown = plan.classes.unknown
        metrics = list(request.metrics or default_metrics(not unknown))
        check_classes(metrics, unknown)
        return plan._replace(metrics=metrics)


def open_extractor(reference: str, name: str | None, weights: str | None) -> Extractor:
    """Returns the extractor of a name and weights file, None for the one that a reference goes with."""
    if name is None:
        name, own_weights = extractor_of(reference)
        weights = weights or own_weights
    return build_extractor(name, weights)


def open_samples(request: EvaluationRequest, reference: Reference) -> Source:
    """Returns the images that are scored."""
    if request.samples is not None:
        return open_source(request.samples, request.num_images, request.background, request.image_size)
    assert request.generator is not None
    assert request.sampling is not None
    count = request.num_images or companions_of(request.reference_spec).num_images
    num_classes, seed = request.generator.num_classes, request.sampling.seed
    if request.labels == "reference":
        labels = labels_like(reference, request.generator.class_names, count, seed)
    elif request.labels == "random":
        labels = random_labels(count, range(max(1, num_classes)), seed)
    else:
        labels = balanced_labels(count, num_classes, seed)
    return GeneratedSource(request.generator, labels, request.sampling, request.labels)


def labels_like(reference: Reference, class_names: Sequence[str], count: int, seed: int) -> Tensor:
    """Returns the class of every sample, (count,) int64: each in the share (± 1) that the reference has.

    Args:
        reference: Its classes are matched by name, or where it names none by number.
        class_names: The model's, one per class.
        count: Samples.
        seed: Of their order.

    Raises:
        ValueError: If the reference does not tell the model's classes apart.
    """
    source, known = reference.source, dict(enumerate(class_names))
    if source is None or source.labels is None:
        raise ValueError(f"labels=reference requires a reference with labels, {reference.spec} has none")
    numbers, theirs = {name: number for number, name in known.items()}, names_of(source, known) or known
    found: list[int] = source.labels.tolist()
    names = {label: theirs.get(label, str(label)) for label in set(found)}
    if others := sorted(set(names.values()) - numbers.keys()):
        raise ValueError(
            f"labels=reference requires a reference of the model's classes, {reference.spec} has others: "
            f"{', '.join(others[:UNKNOWN_NAMED])}"
        )
    same = {label: label if known.get(label) == name else numbers[name] for label, name in names.items()}
    return shuffled(equal_shares(count, sorted(same[label] for label in found)), seed)
