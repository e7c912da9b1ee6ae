import numpy as np
import pytest
import torch
from torch.testing import assert_close

from flashdit.shared.moments import BLOCK_LATENTS, BLOCK_ROWS, ChannelMoments, Moments

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
    assert moments.count == len(rows)
    expected = rows.double().numpy()
    assert_close(moments.mean, torch.from_numpy(expected.mean(axis=0)), rtol=RTOL, atol=ATOL)
    assert_close(moments.covariance, torch.from_numpy(np.cov(expected, rowvar=False)), rtol=RTOL, atol=ATOL)


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


def test_no_rows_change_nothing_whichever_side_has_none():
    empty, moments = Moments(6), moments_of(random_rows(20), 7)
    empty.merge(Moments(6))
    assert empty.count == 0
    mean, covariance = moments.mean, moments.covariance
    moments.merge(empty)
    empty.merge(moments)
    for each in (moments, empty):
        assert each.count == 20
        assert_close(each.mean, mean, rtol=0, atol=0)
        assert_close(each.covariance, covariance, rtol=0, atol=0)


def test_rows_are_not_kept_past_a_block():
    rows = random_rows(BLOCK_ROWS).double()
    expected = rows.mean(0)
    moments = moments_of(rows, BLOCK_ROWS)
    rows.zero_()
    assert_close(moments.mean, expected, rtol=RTOL, atol=ATOL)


def test_a_mean_far_from_zero_costs_no_digits():
    rows = 1000 + 0.01 * random_rows(500).double()
    expected = torch.from_numpy(np.cov(rows.numpy(), rowvar=False))
    assert_close(moments_of(rows, 32).covariance, expected, rtol=1e-9, atol=1e-15)


def test_covariance_of_one_image_is_refused():
    with pytest.raises(ValueError, match="a covariance needs at least 2 images, got 1"):
        _ = moments_of(random_rows(1), 1).covariance


@pytest.mark.parametrize("sizes", [(7,), (3, 0, 5, 1), (0, 0, 3), (BLOCK_LATENTS + 3, 2)])
def test_joined_channel_moments_are_those_of_all_rows(sizes):
    torch.manual_seed(0)
    parts = [1000 + torch.arange(1, 4).reshape(3, 1, 1) * torch.randn(size, 3, 4, 6) for size in sizes]
    assert ChannelMoments.of(parts[0][:0]) == ChannelMoments(0, [0.0] * 3, [0.0] * 3)
    joined = ChannelMoments.joined(ChannelMoments.of(part) for part in parts)
    values = torch.cat(parts).double().numpy()
    assert joined.count == sum(sizes) * 24
    np.testing.assert_allclose(joined.mean, values.mean((0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(joined.std(), values.std((0, 2, 3), ddof=1), rtol=1e-12)


def test_a_constant_channel_is_refused():
    latents = torch.randn(4, 2, 3, 5)
    latents[:, 1] = 2
    with pytest.raises(
        ValueError, match=r"every latent channel must vary over the data, got std=\[.*, 0.0\]"
    ):
        ChannelMoments.of(latents).std()
