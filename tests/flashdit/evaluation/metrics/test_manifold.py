import numpy as np
import pytest
import torch
from metric_oracles import CASES, exact_precision_recall, normal_rows, rows
from numpy.testing import assert_allclose

from flashdit.evaluation.metrics import distances, manifold, precision, precision_recall, recall
from flashdit.evaluation.metrics.distances import mean_row
from flashdit.evaluation.metrics.manifold import NEIGHBOURS, realism, squared_radii


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


@pytest.mark.parametrize(("size", "pairs"), [(17, 11), (64, 1), (9, 128), (1000, 5)])
def test_precision_recall_do_not_depend_on_tiles(golden, monkeypatch, size, pairs):
    real, fake = golden["real_pool"][:50], golden["fake_pool"][:40]
    expected = exact_precision_recall(real, fake)
    monkeypatch.setattr(distances, "TILE", size)
    monkeypatch.setattr(distances, "PAIRS", pairs)
    assert precision_recall(real, fake) == expected
    assert (precision(real, fake), recall(real, fake)) == expected


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


def test_precision_recall_of_too_few_images_names_them():
    with pytest.raises(ValueError, match="more than k images in each set, got k=3, real=3, fake=9"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_precision_recall_on_the_gpu_equal_the_cpu(golden):
    real, fake = (torch.from_numpy(golden[key]) for key in ("real_pool", "fake_pool"))
    assert precision_recall(real.cuda(), fake.cuda()) == precision_recall(real, fake)


@pytest.mark.usefixtures("tile")
def test_share_of_rows_with_realism_one_or_more_is_precision():
    real, fake = normal_rows(40, 3, 0), normal_rows(31, 3, 1, mean=0.8)
    fake[5] = real[7]  # a copy is inside
    real[11] = real[12] = real[13] = real[14]  # a ball of radius zero
    fake[6] = real[11]
    origin = real.mean(dim=0, dtype=torch.float64)
    scores = realism(fake, real, squared_radii(real, origin, NEIGHBOURS), origin)
    share = (scores >= 1).double().mean().item()
    assert share == precision(real, fake)
    assert 0 < share < 1
    assert scores[5] >= 1
    assert scores[6] >= 1


def test_realism_of_a_row_is_the_radius_over_the_distance():
    centres = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # radii to neighbour 3: 3, 2, 2, 3
    origin = centres.mean(dim=0, dtype=torch.float64)
    scores = realism(torch.tensor([[9.0], [-6.0]]), centres, squared_radii(centres, origin, 3), origin)
    assert scores.tolist() == pytest.approx([3 / 6, 3 / 6])


def test_realism_of_a_row_on_the_centre_of_a_ball_without_radius_is_one():
    rows_at_origin = torch.zeros(5, 2)
    origin = torch.zeros(2, dtype=torch.float64)
    assert realism(rows_at_origin[:2], rows_at_origin, torch.zeros(5).double(), origin).tolist() == [1, 1]
