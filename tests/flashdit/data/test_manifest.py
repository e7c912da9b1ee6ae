import numpy as np
import pytest
import torch

from flashdit.shared.moments import BLOCK_LATENTS, ChannelMoments


@pytest.mark.parametrize("sizes", [(7,), (3, 0, 5, 1), (BLOCK_LATENTS + 3, 2)])
def test_joined_moments_are_those_of_all_rows(sizes):
    torch.manual_seed(0)
    parts = [1000 + torch.arange(1, 4).reshape(3, 1, 1) * torch.randn(size, 3, 4, 6) for size in sizes]
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
