"""Images to features and their statistics, by any number of processes."""

from flashdit.evaluation.features.extractor import EXTRACTORS, Extractor
from flashdit.evaluation.features.extractors import build_extractor
from flashdit.evaluation.features.inception import InceptionExtractor

__all__ = ["EXTRACTORS", "Extractor", "InceptionExtractor", "build_extractor"]
