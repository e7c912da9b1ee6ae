"""Images to features and their statistics, by any number of processes."""

from flashdit.evaluation.features.extractors import build_extractor
from flashdit.evaluation.features.features import EXTRACTORS, Extractor, InceptionExtractor

__all__ = ["EXTRACTORS", "Extractor", "InceptionExtractor", "build_extractor"]
