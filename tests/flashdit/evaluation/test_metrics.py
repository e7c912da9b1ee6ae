import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.linalg import sqrtm

from flashdit.evaluation import metrics
from flashdit.evaluation.metrics import frechet_distance, inception_score, precision_recall

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"
CASES = json.loads((GOLDEN / "values.json").read_text())["cases"]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "main.npz") as arrays:
        return dict(arrays)


def statistics(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = rows.astype(np.float64)
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


def distance(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(*statistics(x), *statistics(y), len(x), len(y))


def exact_distance(x: np.ndarray, y: np.ndarray) -> float:
    """tr (Σx Σy)^½ as the nuclear norm of Xc Ycᵀ: no covariance, no square root."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    centred = [rows - rows.mean(axis=0) for rows in (x, y)]
    scale = np.sqrt((len(x) - 1) * (len(y) - 1))
    cross = np.linalg.norm(centred[0] @ centred[1].T, ord="nuc") / scale
    traces = sum((rows**2).sum() / (len(rows) - 1) for rows in centred)
    return ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + traces - 2 * cross


def exact_precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Distances by direct differences in float64: exact ties stay ties."""

    def squared(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return ((u[:, None].astype(np.float64) - v[None]) ** 2).sum(axis=-1)

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        radii = np.sort(squared(centres, centres), axis=1)[:, k]
        return float((squared(points, centres) <= radii).any(axis=1).mean())

    return covered(fake, real), covered(real, fake)


def rows(seed: int, n: int, d: int) -> np.ndarray:
    mixing = np.random.default_rng(99).standard_normal((d, d)) / d**0.5
    return (np.random.default_rng(seed).standard_normal((n, d)) @ mixing).astype(np.float32)


@pytest.mark.parametrize(("metric", "features"), [("fid", "pool"), ("sfid", "spatial")])
def test_frechet_distance_equals_golden_and_both_evaluators(golden, metric, features):
    ours = distance(golden[f"real_{features}"], golden[f"fake_{features}"])
    case = CASES["main"]
    assert_allclose(ours, case["exact_float64"][metric], rtol=1e-9, atol=1e-9)
    assert_allclose(ours, case["adm_tf"][metric], rtol=1e-6)
    assert_allclose(ours, case["torch_fidelity"][metric], rtol=1e-6)


@pytest.mark.parametrize("features", ["real_pool", "real_spatial"])
def test_frechet_distance_of_a_set_to_itself_is_zero(golden, features):
    assert abs(distance(golden[features], golden[features])) <= 1e-9


def test_frechet_distance_equals_scipy_and_torch_fidelity():
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    (mu1, sigma1), (mu2, sigma2) = statistics(rows(1, 300, 24)), statistics(rows(2, 200, 24) * 1.3 + 0.1)
    ours = frechet_distance(mu1, sigma1, mu2, sigma2)
    root = np.trace(sqrtm(sigma1 @ sigma2)).real
    assert_allclose(ours, ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * root, atol=1e-9)
    sides = ({"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2})
    theirs = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize(("n_real", "n_fake"), [(20, 14), (300, 14), (14, 300)])
def test_frechet_distance_of_fewer_rows_than_dimensions_is_exact(n_real, n_fake):
    real, fake = rows(3, n_real, 40), rows(4, n_fake, 40) + 0.2
    assert_allclose(distance(real, fake), exact_distance(real, fake), atol=1e-9)
    unknown_reference = frechet_distance(*statistics(real), *statistics(fake), None, n_fake)
    assert_allclose(unknown_reference, exact_distance(real, fake), atol=1e-5)


def test_frechet_distance_of_duplicated_rows_is_exact():
    real, fake = rows(5, 60, 40), np.repeat(rows(6, 12, 40), 5, axis=0)
    assert_allclose(distance(real, fake), exact_distance(real, fake), atol=1e-5)


def test_frechet_distance_takes_tensors_and_float32(golden):
    mu, sigma = (torch.from_numpy(part).float() for part in statistics(golden["real_pool"]))
    ours = frechet_distance(mu, sigma, *statistics(golden["fake_pool"]))
    assert_allclose(ours, CASES["main"]["exact_float64"]["fid"], rtol=1e-5)


def test_frechet_distance_names_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"with one d, got shapes \[\(3,\), \(3, 3\), \(2,\), \(2, 2\)\]"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))


def test_frechet_distance_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="sigma2 must be finite, got 1 entries that are not"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.array([[1, np.nan], [0, 1]]))


@pytest.mark.parametrize("order", ["logits", "logits_sorted_by_class"])
@pytest.mark.parametrize("split_size", [5000, 250, 200, 125, 100, 50])
def test_inception_score_equals_golden_with_a_short_last_chunk_too(golden, order, split_size):
    key = (
        "inception_score_by_split_size" if order == "logits" else f"inception_score_{order[7:]}_by_split_size"
    )
    mean, std = inception_score(golden[order], split_size)
    exact = CASES["main"]["exact_float64"][key][str(split_size)]
    assert_allclose(mean, exact[0], rtol=1e-9)
    assert_allclose(std, exact[1], atol=1e-9)
    assert_allclose(mean, CASES["main"]["adm_tf"][key][str(split_size)], rtol=1e-6)


def test_inception_score_of_extreme_logits_is_finite_and_right():
    logits = np.full((6, 5), -1e4, dtype=np.float32)
    logits[np.arange(6), np.arange(6) % 3] = 1e4  # three classes certain, two impossible
    assert_allclose(inception_score(logits), (3.0, 0.0), rtol=1e-12)


def test_inception_score_names_what_it_was_given():
    with pytest.raises(ValueError, match="logits must be finite, got 1 entries"):
        inception_score(np.array([[0.0, np.inf]]))
    with pytest.raises(ValueError, match=r"split_size ≥ 1, got shape=\(2, 3\), split_size=0"):
        inception_score(np.zeros((2, 3)), split_size=0)


def test_precision_recall_equal_golden_counts_and_notice_swapped_arguments(golden):
    real, fake = golden["real_pool"], golden["fake_pool"]
    exact = CASES["main"]["exact_float64"]
    precision, recall = precision_recall(real, fake)
    assert (precision, recall) == (exact["precision"], exact["recall"])
    assert precision_recall(fake, real) == (recall, precision)
    assert precision != recall
    assert precision_recall(real, real) == (1.0, 1.0)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_precision_recall_equal_golden_for_other_neighbours(golden, k):
    exact = CASES["main"]["exact_float64"][f"precision_recall_k{k}"]
    assert list(precision_recall(golden["real_pool"], golden["fake_pool"], k)) == exact


def test_precision_recall_equal_torch_fidelity(golden):
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = torch.from_numpy(golden["real_pool"]), torch.from_numpy(golden["fake_pool"])
    options = {"prc_neighborhood": 3, "prc_batch_size": 200, "save_cpu_ram": False, "verbose": False}
    theirs = prc_features_to_metric(fake, real, **options)
    assert_allclose(precision_recall(real, fake), (theirs["precision"], theirs["recall"]), rtol=1e-6)


@pytest.mark.parametrize(("point_rows", "centre_rows"), [(7, 11), (500, 3), (1, 600)])
def test_precision_recall_do_not_depend_on_tiles(golden, monkeypatch, point_rows, centre_rows):
    real, fake = golden["real_pool"][:130], golden["fake_pool"][:90]
    expected = exact_precision_recall(real, fake)
    monkeypatch.setattr(metrics, "POINT_ROWS", point_rows)
    monkeypatch.setattr(metrics, "CENTRE_ROWS", centre_rows)
    assert precision_recall(real, fake) == expected


def test_precision_recall_survive_any_offset_and_scale():
    real, fake = rows(7, 150, 16), rows(8, 120, 16) * 0.8
    for scale, offset in [(0.01, 1000), (4096, 0), (1e-6, 0), (1.0, -50)]:
        moved = [(rows * scale + offset).astype(np.float32) for rows in (real, fake)]
        assert precision_recall(*moved) == exact_precision_recall(*moved)
    far = fake + 1e6
    assert precision_recall(real, far) == exact_precision_recall(real, far) == (0.0, 0.0)


def test_precision_recall_count_ties_of_duplicates_as_inside():
    real = np.concatenate([np.repeat(rows(9, 12, 16), 5, axis=0), rows(10, 40, 16)])
    fake = np.concatenate([real[::3], rows(11, 30, 16) * 1.5])
    assert precision_recall(real, fake) == exact_precision_recall(real, fake)


def test_precision_recall_of_float16_and_read_only_arrays():
    real, fake = rows(12, 50, 8).astype(np.float16), rows(13, 40, 8).astype(np.float16)
    real.setflags(write=False)
    assert precision_recall(real, fake) == exact_precision_recall(real, fake)


def test_precision_recall_of_too_few_images_names_them():
    with pytest.raises(ValueError, match="more than k images in each set, got k=3, real=3, fake=9"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))


def test_precision_recall_refuse_other_dimensions_and_nan():
    with pytest.raises(ValueError, match=r"with one d, got shapes \(\(9, 2\), \(9, 3\)\)"):
        precision_recall(np.zeros((9, 2)), np.zeros((9, 3)))
    with pytest.raises(ValueError, match="finite features"):
        precision_recall(np.zeros((9, 2)), np.full((9, 2), np.nan))
