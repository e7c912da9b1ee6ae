import pytest
import torch
from golden_rule import load_json
from timm.models.maxxvit import grid_partition, grid_reverse, window_partition

from iwin_core import merge, partition, rearrange, restore

PERMUTATIONS = load_json("rtr_permutations.json")
CASES = [((12,), 4), ((8, 12), 4), ((14, 14), 7), ((8, 12), (2, 3)), ((4, 6, 10), 2), ((4, 6, 10), (4, 3, 5))]


def tokens(grid, batch=2, channels=3):
    """Returns a map whose entries all differ."""
    count = batch * channels * int(torch.tensor(grid).prod())
    return torch.arange(count, dtype=torch.float32).reshape(batch, *grid, channels)


@pytest.mark.parametrize("case", PERMUTATIONS.values(), ids=PERMUTATIONS)
def test_permutations_equal_the_released_code(case):
    height, width, window = case["H"], case["W"], case["M"]
    index = torch.arange(height * width).reshape(1, height, width, 1)
    assert partition(index, window)[..., 0].tolist() == case["windows"]
    assert rearrange(index, window).flatten().tolist() == case["rearranged_flat"]
    assert restore(rearrange(index, window), window).equal(index)


@pytest.mark.parametrize(("grid", "window"), [((8, 12), 4), ((14, 14), 7), ((6, 10), 2)])
def test_interleaving_groups_tokens_as_maxvit_grid_attention(grid, window):
    x = tokens(grid)
    theirs = grid_partition(x, [window, window]).reshape(-1, window * window, x.shape[-1])
    assert partition(x, window).equal(theirs)
    assert merge(theirs, window, grid).equal(grid_reverse(theirs, [window, window], list(grid)))


def test_plain_windows_equal_maxvit_block_attention():
    x = tokens((8, 12))
    assert partition(x, 4, interleaved=False).equal(window_partition(x, [4, 4]).reshape(-1, 16, 3))


@pytest.mark.parametrize(("grid", "window"), CASES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_merge_undoes_partition(grid, window, interleaved):
    x = tokens(grid)
    assert merge(partition(x, window, interleaved), window, grid, interleaved).equal(x)


@pytest.mark.parametrize(("grid", "window"), CASES)
def test_restore_undoes_rearrange(grid, window):
    x = tokens(grid)
    assert restore(rearrange(x, window), window).equal(x)
    assert rearrange(restore(x, window), window).equal(x)


@pytest.mark.parametrize(("grid", "window"), CASES)
def test_interleaved_windows_are_plain_windows_of_the_rearranged_map(grid, window):
    x = tokens(grid)
    assert partition(x, window).equal(partition(rearrange(x, window), window, interleaved=False))


@pytest.mark.parametrize("function", [rearrange, restore, partition])
def test_window_that_does_not_divide_is_named(function):
    with pytest.raises(
        ValueError, match=r"window must divide the grid .* got window=\(5, 5\) for grid=\(8, 12\)"
    ):
        function(tokens((8, 12)), 5)


@pytest.mark.parametrize("window", [0, -1, 2.5, (4,), (4, 4, 4)])
def test_window_that_cannot_be_is_named(window):
    with pytest.raises(ValueError, match="window must be a positive integer"):
        partition(tokens((8, 12)), window)
