"""What several evaluation tests share: golden files, and an Inception with random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flashdit.evaluation.features import EXTRACTORS
from flashdit.evaluation.report import EvalResult, names_of
from flashdit.evaluation.scoring import Scores

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"


def random_inception_tensor(key: str, shape: torch.Size, draws: np.random.RandomState) -> torch.Tensor:
    x = draws.standard_normal(tuple(shape))
    if key.endswith("conv.weight"):
        x = x * np.sqrt(2 / np.prod(shape[1:]))
    elif key == "fc.weight":
        x = x * 4 / np.sqrt(2048)
    elif key.endswith("bn.weight"):
        x = 1 + 0.1 * x
    elif key.endswith("running_mean"):
        x = 0.05 * x
    elif key.endswith("running_var"):
        x = 1 + 0.2 * np.abs(x)
    else:
        x = 0.1 * x
    return torch.from_numpy(x.astype(np.float32))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Features are kept in the test's own folder."""
    monkeypatch.setenv("FLASHDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def result_of():
    """Returns a function that makes the result of some scores of 360 images under the digits extractor."""
    extractor = EXTRACTORS.build("digits")
    names = names_of(extractor)

    def make(scores: Scores, **changes) -> EvalResult:
        fields = {
            "scores": scores,
            "floor": None,
            "labels": {key: names[key][1] for key in scores.values},
            "stems": {key: names[key][0] for key in scores.values},
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


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torch-fidelity's 472 tensors, random by the recipe of golden/eval/values.json (96 MB)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            """Loads nothing: the shapes are all that is wanted."""

    empty = tmp_path_factory.mktemp("inception") / "empty.pth"
    torch.save({}, empty)
    network = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(empty))
    shapes = {key: value.shape for key, value in network.state_dict().items() if "num_batches" not in key}
    draws = np.random.RandomState(2024)
    weights = {key: random_inception_tensor(key, shapes[key], draws) for key in sorted(shapes)}
    path = empty.with_name("random.pth")
    torch.save(weights, path)
    return path
