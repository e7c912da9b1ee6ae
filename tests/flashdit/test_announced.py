"""Does every announced piece of this package register itself, and is every registered one announced?"""

import pytest

from flashdit.data.sources import DATASETS
from flashdit.evaluation.features.extractor import EXTRACTORS
from flashdit.evaluation.metrics.metric import METRICS
from flashdit.shared.registry import announced

REGISTRIES = {registry.group: registry for registry in (DATASETS, EXTRACTORS, METRICS)}


@pytest.mark.parametrize("group", REGISTRIES)
def test_pieces_are_announced_and_register_themselves(group):
    registry = REGISTRIES[group]
    known = announced(group)
    for name in known:
        assert registry[name]
    assert registry.entries.keys() == known.keys()


def test_no_two_scores_share_a_key_a_name_or_a_column():
    scores = [score for name in METRICS.names() for score in METRICS[name].scores]
    for field in ("key", "column", "stem", "label"):
        found = [getattr(score, field) or score.key for score in scores]
        assert len(set(found)) == len(found), field
    assert {score.better for score in scores} == {"lower", "higher", None}
