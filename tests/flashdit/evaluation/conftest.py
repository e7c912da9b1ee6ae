"""What several evaluation tests share: golden files, and an Inception with random weights."""

from pathlib import Path

import pytest

from flashdit.evaluation.features.extractor import EXTRACTORS
from flashdit.evaluation.metrics.metric import METRICS
from flashdit.evaluation.metrics.scoring import Scores, score_names
from flashdit.evaluation.reports.report import EvalResult

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Features are kept in the test's own folder."""
    monkeypatch.setenv("FLASHDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def result_of():
    """Returns a function that makes the result of some scores of 360 images under the digits extractor."""
    extractor = EXTRACTORS.build("digits")
    names = score_names(METRICS.names(), extractor)

    def make(scores: Scores, **changes) -> EvalResult:
        fields = {
            "scores": scores,
            "floor": None,
            "names": {key: names[key] for key in scores.values},
            "num_images": 360,
            "samples": {"source": "npz", "path": "[bold]s.npz", "labels": "balanced"},
            "image_size": (32, 32),
            "reference": {"name": "adm.npz", "num_images": None, "sha256": "a" * 64},
            "extractor": {"name": "digits", "fingerprint": extractor.fingerprint},
            "settings": {"neighbours": 3, "split_size": 5000},
            "device": "cpu",
            "timings_s": {"samples": 1.0},
        }
        return EvalResult(**(fields | changes))

    return make
