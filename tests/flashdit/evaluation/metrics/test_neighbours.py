"""Nearest rows, realism and the distance of small sets, against the plain formulas."""

import pytest
import torch

from flashdit.evaluation.metrics import distances as tiled
from flashdit.evaluation.metrics import frechet_distance, precision
from flashdit.evaluation.metrics.distances import nearest
from flashdit.evaluation.metrics.frechet import distance_of_rows
from flashdit.evaluation.metrics.manifold import NEIGHBOURS, realism, squared_radii


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles far smaller than the sets, so that every loop over tiles turns more than once."""
    monkeypatch.setattr(tiled, "TILE", 4)


def rows(count, dimensions, seed, mean=0.0):
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed)) + mean


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_nearest_equals_the_full_table_of_distances(mean):
    points, others = rows(9, 5, 0, mean), rows(23, 5, 1, mean)
    distances, found = nearest(points, others, 4)
    table = torch.cdist(points.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = table.topk(4, largest=False)
    torch.testing.assert_close(distances, expected.values, rtol=1e-12, atol=0)
    assert found.tolist() == expected.indices.tolist()


@pytest.mark.usefixtures("small_tiles")
def test_a_duplicate_is_its_own_nearest_at_distance_exactly_zero():
    others = rows(23, 5, 1, mean=300.0)
    distances, found = nearest(others[[17, 2]], others, 3)
    assert found[:, 0].tolist() == [17, 2]
    assert distances[:, 0].tolist() == [0.0, 0.0]
    assert (distances[:, 1] > 0).all()


def test_fewer_others_than_neighbours_are_all_returned():
    distances, found = nearest(rows(2, 3, 0), rows(3, 3, 1), 5)
    assert distances.shape == (2, 3)
    assert sorted(found[0].tolist()) == [0, 1, 2]


@pytest.mark.usefixtures("small_tiles")
def test_share_of_rows_with_realism_one_or_more_is_precision():
    real, fake = rows(40, 3, 0), rows(31, 3, 1, mean=0.8)
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


@pytest.mark.parametrize(("n", "m"), [(5, 7), (30, 4), (40, 33)])
def test_distance_of_rows_equals_that_of_their_moments(n, m):
    u, v = rows(n, 12, 0).double(), rows(m, 12, 1, mean=0.3).double() * 1.7
    expected = frechet_distance(u.mean(0), u.T.cov(), v.mean(0), v.T.cov(), n, m)
    assert distance_of_rows(u, v) == pytest.approx(expected, rel=1e-9)
    assert distance_of_rows(u, u) == pytest.approx(0, abs=1e-9)
