import numpy as np
import pytest
import torch
from torch.testing import assert_close

from flashdit.shared.moments import BLOCK_ROWS, Moments

RTOL, ATOL = 1e-9, 1e-12


def moments_of(rows: torch.Tensor, batch_size: int) -> Moments:
    moments = Moments(rows.shape[1])
    for batch in rows.split(batch_size):
        moments.add(batch)
    return moments


def random_rows(n: int, d: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator)


@pytest.mark.parametrize("batch_size", [1, 7, 300, BLOCK_ROWS, 5000])
def test_moments_equal_numpy_for_any_batch_size(batch_size):
    rows = random_rows(2 * BLOCK_ROWS + 5)
    moments = moments_of(rows, batch_size)
    expected = rows.double().numpy()
    assert_close(moments.mean, torch.from_numpy(expected.mean(axis=0)), rtol=RTOL, atol=ATOL)
    assert_close(moments.covariance, torch.from_numpy(np.cov(expected, rowvar=False)), rtol=RTOL, atol=ATOL)
    assert moments.count == len(rows)


def test_merged_moments_equal_those_of_all_rows():
    rows = random_rows(3000)
    parts = [moments_of(part, 64) for part in (rows[:10], rows[10:1900], rows[1900:])]
    total = Moments(rows.shape[1])
    for part in parts:
        total.merge(part)
    whole = moments_of(rows, 3000)
    assert_close(total.mean, whole.mean, rtol=RTOL, atol=ATOL)
    assert_close(total.covariance, whole.covariance, rtol=RTOL, atol=ATOL)
    assert total.count == len(rows)


def test_merging_leaves_the_other_as_it_was():
    first, second = moments_of(random_rows(20), 20), moments_of(random_rows(30), 30)
    before = second.covariance
    first.merge(second)
    first.add(random_rows(40))
    assert_close(second.covariance, before, rtol=0, atol=0)


def test_a_mean_far_from_zero_costs_no_digits():
    rows = 1000 + 0.01 * random_rows(500).double()
    expected = torch.from_numpy(np.cov(rows.numpy(), rowvar=False))
    assert_close(moments_of(rows, 32).covariance, expected, rtol=1e-9, atol=1e-15)


def test_covariance_of_one_image_is_refused():
    with pytest.raises(ValueError, match="a covariance needs at least 2 images, got 1"):
        _ = moments_of(random_rows(1), 1).covariance
