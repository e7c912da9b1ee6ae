import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.linalg import sqrtm

from flashdit.evaluation.metrics import (
    distances,
    frechet_distance,
    inception_score,
    kernel_distance,
    manifold,
    precision,
    precision_recall,
    recall,
)
from flashdit.evaluation.metrics.distances import mean_row
from flashdit.evaluation.metrics.manifold import squared_radii

GOLDEN = Path(__file__).parents[3] / "golden" / "eval"
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


@pytest.mark.parametrize("order", ["logits", "logits_sorted_by_class"])
@pytest.mark.parametrize("split_size", [5000, 250, 200, 125, 100, 50])
def test_inception_score_equals_golden_with_a_short_last_chunk_too(golden, order, split_size):
    key = f"inception_score{order[6:]}_by_split_size"
    mean, std = inception_score(golden[order], split_size)
    exact = CASES["main"]["exact_float64"][key][str(split_size)]
    assert_allclose(mean, exact[0], rtol=1e-9)
    assert_allclose(std, exact[1], atol=1e-9)
    assert_allclose(mean, CASES["main"]["adm_tf"][key][str(split_size)], rtol=1e-6)


def test_inception_score_of_extreme_logits_is_finite_and_right():
    logits = np.full((6, 5), -1e4, dtype=np.float32)
    logits[np.arange(6), np.arange(6) % 3] = 1e4  # three classes certain, two impossible
    assert_allclose(inception_score(logits), (3.0, 0.0), rtol=1e-12)


@pytest.mark.parametrize("scale", [1, 100, 700, 1e4, 1e30])
def test_inception_score_equals_slow_sums_however_unlikely_a_class(scale):
    logits = (np.random.default_rng(3).standard_normal((60, 7)) * scale).astype(np.float32)
    logits[:, 2] -= np.float32(800 * scale)  # probability exactly zero
    logits[5, 3] = logits[5].max() - np.float32(745)  # the smallest number above zero, where scale allows

    def slow(chunk: np.ndarray) -> float:
        shifted = chunk.astype(np.float64) - chunk.max(axis=1, keepdims=True)
        p = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
        q = p.mean(axis=0)
        terms = [
            p[i, c] * (np.log(p[i, c]) - np.log(q[c]))
            for i, c in np.ndindex(*p.shape)
            if p[i, c] > 0 and q[c] > 0
        ]
        return float(np.exp(sum(terms) / len(p)))

    scores = [slow(logits[start : start + 25]) for start in (0, 25, 50)]
    assert_allclose(inception_score(logits, 25), (np.mean(scores), np.std(scores)), rtol=1e-9, atol=1e-12)


def test_inception_score_names_what_it_was_given():
    with pytest.raises(ValueError, match="logits must be finite, got 1 entries"):
        inception_score(np.array([[0.0, np.inf]]))
    with pytest.raises(ValueError, match=r"split_size ≥ 1, got shape=\(2, 3\), split_size=0"):
        inception_score(np.zeros((2, 3)), split_size=0)
    for empty in (np.zeros((0, 3)), np.zeros(3)):
        with pytest.raises(ValueError, match=r"needs logits \(n, classes\)"):
            inception_score(empty)
    with pytest.raises(ValueError, match="logits must be real floats, got int64"):
        inception_score(np.zeros((2, 3), int))


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


@pytest.fixture(params=[7, 1024], ids=["small tiles", "one tile"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles far smaller than the sets, so that every loop turns more than once, and the usual ones."""
    monkeypatch.setattr(distances, "TILE", request.param)
    monkeypatch.setattr(distances, "PAIRS", max(2, request.param // 3))
    return request.param


@pytest.mark.parametrize(("size", "pairs"), [(17, 11), (64, 1), (9, 128), (1000, 5)])
def test_precision_recall_do_not_depend_on_tiles(golden, monkeypatch, size, pairs):
    real, fake = golden["real_pool"][:50], golden["fake_pool"][:40]
    expected = exact_precision_recall(real, fake)
    monkeypatch.setattr(distances, "TILE", size)
    monkeypatch.setattr(distances, "PAIRS", pairs)
    assert precision_recall(real, fake) == expected
    assert (precision(real, fake), recall(real, fake)) == expected


def test_distances_are_within_their_rounding_of_every_direct_difference():
    real, fake = (torch.from_numpy(rows(seed, 40, 600) + 3) for seed in (21, 22))
    fake[:9] = real[:9] + 1e-4
    u, v = real - mean_row(real), fake - mean_row(real)
    exact = (real[:, None].double() - fake[None].double()).square().sum(dim=-1)
    squares, rounding = distances.squared_distances(u, v)
    assert squares.dtype == rounding.dtype == torch.float64
    assert ((squares - exact).abs() <= rounding).all()
    assert (rounding < 1e-12 * (u.square().sum(1)[:, None] + v.square().sum(1))).all()


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("spread", [1e-5, 1e-9])
def test_radii_are_exact_where_products_cannot_order_neighbours(spread):
    noise = spread * np.random.default_rng(23).standard_normal((150, 12))
    features = torch.from_numpy(np.repeat(rows(24, 3, 12), 50, axis=0) + noise)  # three tight heaps
    squares = (features[:, None] - features[None]).square().sum(dim=-1).sort(dim=1).values
    for k in (1, 3):
        assert_allclose(squared_radii(features, mean_row(features), k), squares[:, k], rtol=1e-13)


@pytest.mark.usefixtures("tile")
def test_precision_recall_of_tied_radii_equal_the_slow_count():
    real, fake = (np.random.default_rng(seed).integers(0, 3, (150 - seed, 4)) / 3 for seed in (1, 12))
    for k in (1, 3, 5):
        assert precision_recall(real, fake, k) == exact_precision_recall(real, fake, k)
    assert 0 < precision_recall(real, fake, 1)[0] < 1


@pytest.mark.usefixtures("tile")
def test_precision_recall_are_exact_beside_an_outlier_that_takes_the_digits_of_every_product():
    real, fake = rows(7, 90, 16).astype(np.float64), rows(8, 70, 16) * 0.8
    real[4] = 1e12
    assert precision_recall(real, fake) == exact_precision_recall(real, fake)


def test_precision_and_recall_together_meet_each_pair_of_images_once(monkeypatch):
    real, fake = rows(7, 40, 8), rows(8, 30, 8)
    pairs = []
    monkeypatch.setattr(
        manifold,
        "squared_distances",
        lambda u, v: pairs.append(len(u) * len(v)) or distances.squared_distances(u, v),
    )
    monkeypatch.setattr(distances, "TILE", 10)
    precision_recall(real, fake)
    within = [10 * 10 * tiles * (tiles + 1) // 2 for tiles in (4, 3)]  # the tiles of a set with themselves
    assert sum(pairs) == sum(within) + 40 * 30


@pytest.mark.usefixtures("tile")
def test_precision_recall_survive_any_offset_and_scale():
    real, fake = rows(7, 150, 16), rows(8, 120, 16) * 0.8
    for scale, offset in [(0.01, 1000), (4096, 0), (1e-6, 0), (1.0, -50), (1e-22, 0), (1e17, 0)]:
        moved = [(rows * scale + offset).astype(np.float32) for rows in (real, fake)]
        assert precision_recall(*moved) == exact_precision_recall(*moved)
    for far in (fake + 1e6, fake + 30):
        assert precision_recall(real, far) == exact_precision_recall(real, far) == (0.0, 0.0)
    huge = fake.astype(np.float64) * 1e18
    assert precision_recall(real, huge) == exact_precision_recall(real, huge)


@pytest.mark.usefixtures("tile")
def test_precision_recall_count_ties_of_duplicates_as_inside():
    real = np.concatenate([np.repeat(rows(9, 12, 16), 5, axis=0), rows(10, 40, 16)])
    fake = np.concatenate([real[::3], rows(11, 30, 16) * 1.5])
    assert precision_recall(real, fake) == exact_precision_recall(real, fake)
    same = np.ones((9, 4), np.float32)
    assert precision_recall(same, same[:7]) == (1.0, 1.0)
    assert precision_recall(same, same[:7] + 1) == (0.0, 0.0)


@pytest.mark.usefixtures("tile")
def test_precision_recall_count_points_on_the_very_border_as_inside():
    corners = np.array(np.meshgrid(*[[0, 4]] * 3)).reshape(3, -1).T.astype(np.float32)  # k = 3: radius 4
    on_border = corners + np.array([-4, 0, 0], np.float32)
    beyond = np.nextafter(on_border[on_border[:, 0] < 0], -9)[:, :1] * [1, 0, 0] + corners[:4] * [0, 1, 1]
    assert precision_recall(corners, on_border) == exact_precision_recall(corners, on_border) == (1.0, 1.0)
    assert precision_recall(corners, beyond) == exact_precision_recall(corners, beyond)
    assert precision_recall(corners, beyond)[0] == 0


@pytest.mark.usefixtures("tile")
def test_precision_recall_of_collapsed_samples_equal_the_slow_count():
    real = np.repeat(rows(14, 20, 24), 6, axis=0) + 0.003 * rows(15, 120, 24)
    fake = np.repeat(rows(14, 20, 24)[:9], 11, axis=0) + 0.003 * rows(16, 99, 24)
    counts = exact_precision_recall(real, fake)
    assert precision_recall(real, fake) == counts
    assert 0 < min(counts) < 1


def test_precision_recall_of_float16_whose_squares_overflow():
    real, fake = (rows(seed, 90, 16) for seed in (17, 18))
    large = [(part * 9000).clip(-65000, 65000).astype(np.float16) for part in (real, fake)]
    assert precision_recall(*large) == exact_precision_recall(*large)
    assert 0 < precision_recall(*large)[1] < 1


def layouts(values: np.ndarray) -> dict[str, object]:
    """The same numbers as users hold them."""
    read_only = values.copy()
    read_only.setflags(write=False)
    return {
        "float64": values.astype(np.float64),
        "read-only": read_only,
        "Fortran": np.asfortranarray(values),
        "strided": np.repeat(values, 2, axis=0)[::2],
        "reversed": values[::-1].copy()[::-1],
        "big-endian": values.astype(">f4"),
        "tensor": torch.from_numpy(values.copy()),
        "Fortran tensor": torch.from_numpy(np.asfortranarray(values)),
        "with gradient": torch.from_numpy(values.copy()).requires_grad_(),
    }


def test_scores_do_not_depend_on_the_layout_of_their_input():
    x, y = rows(12, 50, 8), rows(13, 40, 8) * 0.9 + 0.1
    for name in layouts(x):
        real, fake = layouts(x)[name], layouts(y)[name]
        assert precision_recall(real, fake) == exact_precision_recall(x, y), name
        assert inception_score(fake) == inception_score(y), name
        assert kernel_distance(real, fake, 3, 20) == kernel_distance(x, y, 3, 20), name
        parts = [part.astype(np.float32) for part in (*statistics(x), *statistics(y))]
        given = [layouts(part)[name] for part in parts]
        assert_allclose(frechet_distance(*given), frechet_distance(*parts), rtol=1e-12)


def test_scores_take_float16():
    x, y = (rows(seed, 50, 8).astype(np.float16) for seed in (12, 13))
    assert precision_recall(x, y) == exact_precision_recall(x, y)
    assert inception_score(x) == inception_score(x.astype(np.float64))
    assert kernel_distance(x, y, 3, 20) == kernel_distance(x.astype(np.float64), y.astype(np.float64), 3, 20)


def test_precision_recall_of_too_few_images_names_them():
    with pytest.raises(ValueError, match="more than k images in each set, got k=3, real=3, fake=9"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))


@pytest.mark.parametrize("score", [precision_recall, kernel_distance])
def test_scores_of_two_sets_name_what_they_cannot_read(score):
    good = np.zeros((9, 2))
    for bad, message in [
        (
            np.zeros((9, 3)),
            r"features must be \(n, d\) and \(m, d\) with one d, got shapes \(\(9, 2\), \(9, 3\)\)",
        ),
        (np.zeros(9), r"with one d, got shapes \(\(9, 2\), \(9,\)\)"),
        (np.full((9, 2), np.nan), "fake features must be finite, got 18 entries that are not"),
        (np.zeros((9, 2), int), "fake features must be real floats, got int64"),
        (torch.zeros(9, 2, dtype=torch.uint8), "fake features must be real floats, got torch.uint8"),
        (np.zeros((0, 2)), "fake=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            score(good, bad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_precision_recall_on_the_gpu_equal_the_cpu(golden):
    real, fake = (torch.from_numpy(golden[key]) for key in ("real_pool", "fake_pool"))
    assert precision_recall(real.cuda(), fake.cuda()) == precision_recall(real, fake)


def test_kernel_distance_equals_golden(golden):
    case = CASES["main"]["torch_fidelity"]["kid_subset100x20_poly"]
    mean, std = kernel_distance(golden["real_pool"], golden["fake_pool"], subsets=20, subset_size=100)
    assert_allclose(mean, case["kernel_inception_distance_mean"], rtol=1e-5)
    assert_allclose(std, case["kernel_inception_distance_std"], rtol=1e-5)


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate():
    x, y = rows(31, 14, 6).astype(np.float64), rows(32, 14, 6).astype(np.float64) * 1.2
    total = 0.0
    for sign, u, v in ((1, x, x), (1, y, y), (-2, x, y)):
        for i in range(14):
            for j in range(14):
                if u is not v:
                    total += sign * (u[i] @ v[j] / 6 + 1) ** 3 / 14**2
                elif i != j:
                    total += sign * (u[i] @ v[j] / 6 + 1) ** 3 / (14 * 13)
    assert_allclose(kernel_distance(x, y, subsets=2, subset_size=14), (total, 0), rtol=1e-9, atol=1e-12)


def test_kernel_distance_leaves_the_global_generators_alone():
    x, y = rows(33, 30, 6), rows(34, 25, 6)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = kernel_distance(x, y, 5, 10)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert first == kernel_distance(x, y, 5, 10) != kernel_distance(x, y, 5, 10, seed=1)


def test_kernel_distance_of_fewer_images_than_a_subset_names_both():
    with pytest.raises(ValueError, match="subset_size=1000, real=30, fake=1200"):
        kernel_distance(np.zeros((30, 2)), np.zeros((1200, 2)))
    with pytest.raises(ValueError, match="got subsets=0"):
        kernel_distance(np.zeros((30, 2)), np.zeros((30, 2)), subsets=0, subset_size=10)
