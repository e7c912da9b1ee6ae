import numpy as np
import pytest
from metric_oracles import GOLDEN

from flashdit.evaluation.metrics import distances


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "main.npz") as arrays:
        return dict(arrays)


@pytest.fixture(params=[13, 1024], ids=["small tiles", "one tile"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles far smaller than the sets, so that every loop turns more than once, and the usual ones."""
    monkeypatch.setattr(distances, "TILE", request.param)
    monkeypatch.setattr(distances, "PAIRS", 5 * request.param)
    return request.param
