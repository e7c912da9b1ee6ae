"""One request for every evaluation: what is scored, how and against what; opened before any image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flashdit.data.sources import companions_of
from flashdit.evaluation.evaluate import Plan
from flashdit.evaluation.features.cache import FeatureCache
from flashdit.evaluation.features.extractor import Extractor
from flashdit.evaluation.features.extractors import build_extractor
from flashdit.evaluation.features.ranks import Ranks
from flashdit.evaluation.images.sources import GeneratedSource, Source, check_reference, open_source
from flashdit.evaluation.metrics.scoring import check_classes, default_metrics, in_order
from flashdit.evaluation.reference import Reference
from flashdit.sampling.classes import balanced_labels, random_labels
from flashdit.sampling.generator import ImageGenerator
from flashdit.sampling.options import SamplingOptions
from flashdit.shared.registry import unknown

LABEL_MODES = ("balanced", "random")
DEFAULT_EXTRACTOR = "inception"


@dataclass(kw_only=True)
class EvaluationRequest:
    """What is scored, how and against what; checked as far as nothing needs to be opened.

    Attributes:
        samples: An npz or a folder of images that exist; None draws them.
        generator: What draws samples.
        sampling: How it draws them.
        data: The data set that the generator was trained on, whose own reference is the default.
        labels: Of drawn samples: `balanced`, equal shares in random order, or `random`.
        num_images: How many are scored; None means all that exist, or of drawn ones as many as the
            reference's data set says.
        reference: A data set that brings one, an npz or a folder; None means that of `data`.
        extractor: As `build_extractor` takes it; None means the one that the reference's data set brings,
            or else Inception.
        extractor_weights: The extractor's weights file; None means its default.
        metrics: Names of `METRICS`; None means every default one that applies.
        background: What transparent pixels of images in folders show: a colour's name or `#rrggbb`.
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
    labels: str = "balanced"
    num_images: int | None = None
    reference: str | None = None
    extractor: str | None = None
    extractor_weights: str | None = None
    metrics: Sequence[str] | None = None
    background: str = "white"
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
        for name, value in (("number of images", self.num_images), ("batch size", self.batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"the {name} must be positive, got {value}")
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
        own = "" if self.data is None else f"; data set '{self.data}' brings none"
        raise ValueError(
            "an evaluation requires a reference, --reference or evaluation.reference: an npz, a folder of "
            f"images, or a data set that brings one{own}"
        )

    @property
    def extractor_name(self) -> str:
        """The extractor that is asked for, or that the reference's data set brings, or Inception."""
        return self.extractor or default_extractor(self.reference_spec)


def default_extractor(reference: str) -> str:
    """Returns the extractor that a reference's data set brings, or else Inception."""
    return companions_of(reference).extractor or DEFAULT_EXTRACTOR


def open_plan(request: EvaluationRequest, ranks: Ranks) -> Plan:
    """Returns what a request names, opened and checked on every process before the first image.

    Raises:
        ValueError: If something of it is missing or does not fit; every process raises where one does.
    """
    with ranks.agree():
        spec = request.reference_spec
        check_reference(spec)
        extractor = build_extractor(request.extractor_name, request.extractor_weights).to(request.device)
        generator = request.generator
        classes = extractor.class_names if generator is None else generator.class_names
        metrics = list(request.metrics or default_metrics(extractor, classes))
        check_classes(metrics, extractor, classes)
        return Plan(
            open_samples(request, extractor),
            extractor,
            Reference(spec, extractor, request.background),
            metrics,
            FeatureCache() if request.cache else None,
            request.batch_size,
            request.device,
        )


def open_samples(request: EvaluationRequest, extractor: Extractor) -> Source:
    """Returns the images that are scored; those of folders by class get the extractor's class numbers."""
    if request.samples is not None:
        classes = extractor.class_names or ()
        return open_source(request.samples, request.num_images, classes, request.background)
    assert request.generator is not None
    assert request.sampling is not None
    count = request.num_images or companions_of(request.reference_spec).num_images
    labels = sample_labels(request, count, request.generator.num_classes, request.sampling.seed)
    return GeneratedSource(request.generator, labels, request.sampling)


def sample_labels(request: EvaluationRequest, count: int, num_classes: int, seed: int) -> Tensor:
    """Returns the class of every drawn sample, (count,) int64."""
    if request.labels == "random":
        return random_labels(count, range(max(1, num_classes)), seed)
    return balanced_labels(count, num_classes, seed)
