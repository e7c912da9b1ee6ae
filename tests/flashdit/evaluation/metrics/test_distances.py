import pytest
import torch
from metric_oracles import normal_rows, rows

from flashdit.evaluation.metrics.distances import centred_tiles, mean_row, nearest_rows, squared_distances


def test_distances_are_within_their_rounding_of_every_direct_difference():
    real, fake = (torch.from_numpy(rows(seed, 40, 600) + 3) for seed in (21, 22))
    fake[:9] = real[:9] + 1e-4
    u, v = real - mean_row(real), fake - mean_row(real)
    exact = (real[:, None].double() - fake[None].double()).square().sum(dim=-1)
    squares, rounding = squared_distances(u, v)
    assert squares.dtype == rounding.dtype == torch.float64
    assert ((squares - exact).abs() <= rounding).all()
    assert (rounding < 1e-12 * (u.square().sum(1)[:, None] + v.square().sum(1))).all()


@pytest.mark.usefixtures("tile")
def test_tiles_hold_every_row_from_the_first_asked_for_relative_to_the_mean():
    features = normal_rows(31, 5, 2, mean=1000.0).half()
    origin = mean_row(features)
    torch.testing.assert_close(origin, features.double().mean(0), rtol=1e-14, atol=0)
    for start in (0, 9):
        places, tiles = zip(*centred_tiles(features, origin, start), strict=True)
        assert [row for place in places for row in range(31)[place]] == list(range(start, 31))
        torch.testing.assert_close(torch.cat(tiles), features[start:].double() - origin, rtol=0, atol=0)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_nearest_equals_the_full_table_of_distances(mean):
    points, others = normal_rows(9, 5, 0, mean), normal_rows(23, 5, 1, mean)
    distances, found = nearest_rows(points, others, 4)
    table = torch.cdist(points.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = table.topk(4, largest=False)
    torch.testing.assert_close(distances, expected.values, rtol=1e-12, atol=0)
    assert found.tolist() == expected.indices.tolist()


@pytest.mark.usefixtures("tile")
def test_a_duplicate_is_its_own_nearest_at_distance_exactly_zero():
    others = normal_rows(23, 5, 1, mean=300.0)
    distances, found = nearest_rows(others[[17, 2]], others, 3)
    assert found[:, 0].tolist() == [17, 2]
    assert distances[:, 0].tolist() == [0.0, 0.0]
    assert (distances[:, 1] > 0).all()


def test_fewer_others_than_neighbours_are_all_returned():
    distances, found = nearest_rows(normal_rows(2, 3, 0), normal_rows(3, 3, 1), 5)
    assert distances.shape == (2, 3)
    assert sorted(found[0].tolist()) == [0, 1, 2]
