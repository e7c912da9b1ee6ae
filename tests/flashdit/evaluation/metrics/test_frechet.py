import numpy as np
import pytest
import torch
from metric_oracles import CASES, normal_rows, rows, statistics
from numpy.testing import assert_allclose
from scipy.linalg import sqrtm

from flashdit.evaluation.metrics import frechet_distance
from flashdit.evaluation.metrics.frechet import distance_of_rows


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


@pytest.mark.parametrize("n_fake", [14, 300])
def test_frechet_distance_agrees_with_scipy_where_covariances_are_singular(n_fake):
    (mu1, sigma1), (mu2, sigma2) = statistics(rows(3, 20, 40)), statistics(rows(4, n_fake, 40) + 0.2)
    ridge = 1e-12 * np.eye(40)  # without it scipy warns, which is an error here
    root = np.trace(sqrtm((sigma1 + ridge) @ (sigma2 + ridge))).real
    theirs = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * root
    assert_allclose(frechet_distance(mu1, sigma1, mu2, sigma2, 20, n_fake), theirs, atol=1e-4)


@pytest.mark.parametrize(("scale", "offset"), [(0.01, 1000.0), (300.0, 0.0)])
def test_frechet_distance_of_badly_centred_or_large_features_is_exact(scale, offset):
    real, fake = ((rows(seed, 200, 24) * scale + offset).astype(np.float32) for seed in (7, 8))
    assert_allclose(distance(real, fake), exact_distance(real, fake), rtol=1e-9, atol=1e-9)
    far = fake + np.float32(100 * scale)
    assert_allclose(distance(real, far), exact_distance(real, far), rtol=1e-9)


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


@pytest.mark.parametrize(("n", "m"), [(5, 7), (30, 4), (40, 33)])
def test_distance_of_rows_equals_that_of_their_moments(n, m):
    u, v = normal_rows(n, 12, 0).double(), normal_rows(m, 12, 1, mean=0.3).double() * 1.7
    expected = frechet_distance(u.mean(0), u.T.cov(), v.mean(0), v.T.cov(), n, m)
    assert distance_of_rows(u, v) == pytest.approx(expected, rel=1e-9)
    assert distance_of_rows(u, u) == pytest.approx(0, abs=1e-9)
