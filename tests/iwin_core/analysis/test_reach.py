import itertools
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

from iwin_core import IwinAttention, IwinBlock
from iwin_core.analysis.global_exchange import (
    one_step_reaches_all,
    parallel_blocks,
    theorem_3_as_printed,
)
from iwin_core.analysis.mixing import KINDS, coverage
from iwin_core.analysis.mixing import reach as reached_tokens
from iwin_core.reference import same_window_mask

SIZES = [((4, 6), 2, 3), ((5, 7), 3, 3), ((6, 4), (3, 2), (1, 5)), ((2, 9), 4, 3)]  # grid, window, kernel
SEARCHED = [  # every (H, W) with H ≤ W ≤ 10, every window up to W: 385
    ((height, width), window)
    for width in range(1, 11)
    for height in range(1, width + 1)
    for window in range(1, width + 1)
]
KERNELS = (1, 3, 5, 7, 9)


class Block(nn.Module):
    """A block of the kind under test, from IwinAttention: a residual around attention and convolution."""

    def __init__(self, kind, window, kernel):
        super().__init__()
        self.order = KINDS[kind].conv
        interleaved = KINDS[kind].groupings == ("interleaved",)
        self.norm = nn.LayerNorm(4)
        self.attn = IwinAttention(4, 1, window, kernel if self.order else None, interleaved=interleaved)

    def forward(self, x):
        if self.order == "serial":
            x = x + self.attn.dwconv(self.norm(x))
            return x + self.attn.attend(self.norm(x))
        return x + self.attn(self.norm(x))


def jacobian_support(model, grid):
    """Returns bool (N, *grid): whether token s of the input moves a token of the output."""
    x = torch.randn(*grid, 4, dtype=torch.float64)
    derivative = jacobian(lambda tokens: model(tokens[None])[0], x).abs()  # (*grid, c, *grid, c)
    rank = len(grid)
    pairs = derivative.sum((rank, -1)).reshape(math.prod(grid), math.prod(grid))  # (target, start)
    return (pairs.T > 1e-12).reshape(math.prod(grid), *grid)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "swin"])
@pytest.mark.parametrize(("grid", "window", "kernel"), SIZES)
def test_reach_is_the_support_of_the_jacobian(grid, window, kernel, kind, blocks):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(kind, window, kernel) for _ in range(blocks))).double()
    assert torch.equal(reached_tokens(grid, window, kernel, kind, blocks), jacobian_support(model, grid))


@pytest.mark.parametrize(("structure", "kind"), [("S1", "iwin"), ("S3", "iwin_serial")])
def test_the_models_blocks_reach_the_same(structure, kind):
    torch.manual_seed(0)
    model = nn.Sequential(*(IwinBlock(4, 1, 2, 3, structure=structure) for _ in range(2))).double()
    assert torch.equal(reached_tokens((5, 8), 2, 3, kind, 2), jacobian_support(model, (5, 8)))


@pytest.mark.parametrize(("grid", "window"), [((4, 6), 2), ((6, 9), 3)])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_swin_reaches_what_timms_blocks_reach(grid, window, blocks):
    swin = pytest.importorskip("timm.models.swin_transformer")
    torch.manual_seed(0)
    model = nn.Sequential(
        *(
            swin.SwinTransformerBlock(4, grid, 1, window_size=window, shift_size=window // 2 * (i % 2))
            for i in range(blocks)
        )
    ).double()
    assert torch.equal(reached_tokens(grid, window, 3, "swin", blocks), jacobian_support(model, grid))


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (7, 3), (13,), (3, 4, 5)])
def test_attention_alone_reaches_its_window(grid):
    for window, (kind, interleaved) in itertools.product((2, 3), (("iwin_no_conv", True), ("plain", False))):
        alone = reached_tokens(grid, window, 3, kind).flatten(1)
        assert torch.equal(alone, same_window_mask(grid, window, interleaved))


def test_a_centred_kernel_reaches_half_of_what_lemma_2_prints():
    row = reached_tokens((1, 15), 1, 5, "iwin", token=(0, 7))[0, 0]  # windows of one token: the conv alone
    assert row.nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


def test_a_token_reaches_what_its_row_says():
    rows = reached_tokens((4, 6), 2, 3, "swin", 3)
    assert torch.equal(reached_tokens((4, 6), 2, 3, "swin", 3, token=(1, 2))[0], rows[1 * 6 + 2])


def test_coverage_counts_pairs_and_knows_when_it_is_stuck():
    covered = coverage((4, 6), 2, 3, "iwin", 2)
    share = reached_tokens((4, 6), 2, 3, "iwin").flatten(1).double().mean(1)
    expected = [share.min().item(), share.mean().item(), share.max().item()]
    assert covered.shares[0] == pytest.approx(expected)
    assert coverage((4, 6), 2, 3, "plain", 3).blocks_until_all is None
    assert coverage((8, 6), 2, 1, "iwin", 1).blocks_until_all is None
    assert coverage((3, 2), 4, 3, "plain", 1).blocks_until_all == 1


def serial_reaches_all(grid, window, radius):
    """Returns by search whether one serial step reaches everything: a kernel 2r + 1 reaches r."""
    return bool(reached_tokens(grid, window, 2 * radius + 1, "iwin_serial").all())


def test_one_serial_step_is_exact_whatever_the_sizes():
    searched = Counter(
        (serial_reaches_all(grid, window, radius), one_step_reaches_all(grid, window, radius))
        for grid, window in SEARCHED
        for radius in range(10)
    )
    assert searched == {(True, True): 3083, (False, False): 767}


def test_theorem_3_as_printed_suffices_for_a_kernel_that_reaches_k_but_is_not_necessary():
    searched = Counter(
        (theorem_3_as_printed(grid, window, kernel), serial_reaches_all(grid, window, kernel))
        for grid, window in SEARCHED
        for kernel in range(1, 11)
    )
    # Not necessary: 330 sizes, as FlashDiT's, have K·M < max(H, W) ≤ (K + 1)·M and reach everything.
    assert searched == {(True, True): 3083, (False, True): 330, (False, False): 437}


def test_theorem_3_as_printed_does_not_suffice_for_a_centred_kernel():
    searched = Counter(
        (theorem_3_as_printed(grid, window, kernel), serial_reaches_all(grid, window, kernel // 2))
        for grid, window in SEARCHED
        for kernel in KERNELS
    )
    # 177 sizes that the theorem covers do not reach everything; it is necessary: none is (False, True).
    assert searched == {(True, True): 1248, (True, False): 177, (False, False): 500}


def test_inside_the_map_a_kernel_half_as_large_would_do():
    """The border alone asks for G − 1: on a circle every class modulo G is at most ⌊G/2⌋ away."""
    for side, window in ((12, 3), (20, 4), (15, 3)):
        groups = side // window
        reached = reached_tokens((side,), window, 2 * (groups // 2) + 1, "iwin_serial")
        assert reached[groups : side - groups].all()
        assert not reached.all()


def test_parallel_blocks_are_exact_where_the_window_divides_a_square():
    searched = Counter()
    for (grid, window), kernel in itertools.product(SEARCHED, KERNELS):
        found = coverage(grid, window, kernel, "iwin", 1).blocks_until_all
        bound = parallel_blocks(grid, window, kernel)
        divides = grid[0] == grid[1] and grid[0] % window == 0
        searched[divides, "never" if bound is None else bound - found] += 1
        assert (bound is None) == (found is None)
    assert searched == {
        (True, 0): 118,
        (True, "never"): 17,
        (False, 0): 1395,
        (False, 1): 82,  # one block less does
        (False, "never"): 313,
    }


def test_two_parallel_blocks_do_what_one_serial_step_does_and_one_does_not():
    searched = Counter()
    for (grid, window), kernel in itertools.product(SEARCHED, KERNELS):
        if one_step_reaches_all(grid, window, kernel // 2):
            searched[coverage(grid, window, kernel, "iwin", 1).blocks_until_all] += 1
    assert searched == {1: 354, 2: 894}  # one block only where a window or a kernel covers the map, or nearly


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_parallel_block_is_not_enough_where_one_serial_step_is(kernel):
    grid, window = (2 * (kernel // 2 + 1),) * 2, 2
    assert one_step_reaches_all(grid, window, kernel // 2)
    assert parallel_blocks(grid, window, kernel) == (1 if kernel == 1 else 2)


def test_flashdit_misses_the_printed_condition_and_needs_four_blocks():
    assert not theorem_3_as_printed((16, 16), 4, 3)  # 3 · 4 = 12 < 16
    assert one_step_reaches_all((16, 16), 4, 3)  # if the kernel reached 3, 4 · 4 = 16
    assert not one_step_reaches_all((16, 16), 4, 1)  # it reaches 1, 2 · 4 = 8
    assert parallel_blocks((16, 16), 4, 3) == 4
    assert coverage((16, 16), 4, 3, "iwin", 1).blocks_until_all == 4
    assert coverage((16, 16), 4, 3, "iwin_serial", 1).blocks_until_all == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4, 6), 2, 2, "iwin"), r"kernel must be odd along every axis, got kernel=\(2, 2\)"),
        (((4, 6), 0, 3, "iwin"), "window must be a positive integer"),
        (((4, 0), 2, 3, "iwin"), "size must be a positive integer"),
        (((4, 6), 2, 3, "swim"), "kind must be one of iwin, .* got kind='swim'"),
        (((4, 6), 2, 3, "iwin", 0), "blocks must be positive, got blocks=0"),
        (((4, 6), 2, 3, "iwin", 1, (4, 0)), r"token must lie inside the map, got token=\(4, 0\)"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        reached_tokens(*arguments)


def test_coverage_names_a_bad_number_of_blocks():
    with pytest.raises(ValueError, match="blocks must be positive, got blocks=0"):
        coverage((4, 6), 2, 3, "iwin", 0)
