import pytest
import torch
from golden_rule import assert_golden, golden_input, golden_state, load_npz
from torch import nn

from iwin_core import IwinAttention, IwinBlock, partition
from iwin_core.attention import relative_index
from iwin_core.reference import iwin_attention_reference

MODULES = load_npz("iwin_cls_modules.npz")
CASES = [  # rank, grid, window, kernel
    (2, (8, 12), 4, 3),
    (2, (7, 9), 4, 3),
    (2, (5, 13), (3, 4), 5),
    (2, (3, 10), 4, (1, 3)),
    (2, (1, 1), 4, 3),
    (2, (2, 3), 7, 7),
    (1, (13,), 4, 3),
    (3, (3, 5, 7), (2, 3, 3), 3),
]


def attention(rank=2, window=4, kernel=3, **options):
    """Returns a small attention with weights far from zero."""
    torch.manual_seed(0)
    module = IwinAttention(16, 4, window, kernel, rank=rank, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("rank", "grid", "window", "kernel"), CASES)
def test_attention_equals_masked_global_attention(rank, grid, window, kernel, interleaved):
    module = attention(rank, window, kernel, interleaved=interleaved)
    x = torch.randn(2, *grid, 16)
    expected = iwin_attention_reference(x, module.state_dict(), 4, window, interleaved)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("grid", [(8, 12), (7, 9)])
def test_gradients_equal_those_of_masked_global_attention(grid):
    module = attention()
    x = torch.randn(2, *grid, 16, requires_grad=True)
    weight = torch.randn(2, *grid, 16)
    (ours,) = torch.autograd.grad((module(x) * weight).sum(), x)
    (expected,) = torch.autograd.grad(
        (iwin_attention_reference(x, module.state_dict(), 4, 4) * weight).sum(), x
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=5e-5)


def test_attention_alone_equals_the_released_windows():
    block = golden_block()
    windows = torch.from_numpy(MODULES["blk_8x12_w4/attn_in_windows"])
    assert_golden(block.attn.attend_windows(windows), MODULES["blk_8x12_w4/attn_out_windows"])
    normed = block.norm1(golden_input(3, (1, 96, 24))).reshape(1, 8, 12, 24)
    assert_golden(partition(normed, 4), MODULES["blk_8x12_w4/attn_in_windows"])


def test_block_equals_the_released_block():
    out = golden_block()(golden_input(3, (1, 96, 24)).reshape(1, 8, 12, 24))
    assert_golden(out.flatten(1, 2), MODULES["blk_8x12_w4/out"])


def golden_block():
    """Returns the golden block: weights by the rule on the official keys, which are ours."""
    block = IwinBlock(24, 2, 4)
    block.load_state_dict(golden_state({key: value.shape for key, value in block.state_dict().items()}))
    return block.eval()


def test_padding_is_invisible_where_the_window_covers_the_axis():
    module = attention(window=8, kernel=None)
    x = torch.randn(2, 5, 6, 16)
    q_k_v = module.attend_windows(x.flatten(1, 2))
    torch.testing.assert_close(module(x), q_k_v.reshape(x.shape))


def test_convolution_sees_zeros_at_the_true_border_of_a_padded_map():
    module = attention(window=4)
    for parameter in module.proj.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 7, 9, 16)
    torch.testing.assert_close(module(x), module.dwconv(x))


def test_norm_of_queries_and_keys_is_applied_per_head():
    module = attention(kernel=None, qk_norm=lambda width: nn.RMSNorm(width, eps=1e-6))
    x = torch.randn(2, 8, 12, 16)
    before = module(x)
    nn.init.zeros_(module.q_norm.weight)  # no query, so every key weighs the same
    means = partition(x, 4).mean(1, keepdim=True)
    v = means @ module.qkv.weight[32:].T + module.qkv.bias[32:]
    torch.testing.assert_close(partition(module(x), 4), module.proj(v).expand(-1, 16, -1))
    assert not torch.allclose(before, module(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide dim, got num_heads=3 for dim=16"),
        ({"kernel": 4}, r"kernel must be odd along every axis, got kernel=\(4, 4\)"),
        ({"kernel": -3}, "kernel must be a positive integer"),
        ({"window": 0}, "window must be a positive integer, .* got 0"),
        ({"rank": 4}, "rank must be 1, 2 or 3, got rank=4"),
    ],
)
def test_options_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        IwinAttention(**({"dim": 16, "num_heads": 4, "window": 4} | options))


@pytest.mark.parametrize("part", [0, 1])
def test_normed_queries_and_keys_do_not_depend_on_the_size_of_their_projection(part):
    torch.manual_seed(0)
    attention = IwinAttention(8, 2, (2, 3), None, qk_norm=nn.RMSNorm).double()
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    before = attention(x)
    with torch.no_grad():
        for parameter in (attention.qkv.weight, attention.qkv.bias):
            parameter[8 * part : 8 * (part + 1)] *= 7
    torch.testing.assert_close(attention(x), before, rtol=1e-6, atol=1e-6)


def test_a_relative_bias_is_read_by_the_query_minus_the_key():
    index = relative_index((2, 2), (3, 3))
    assert index[3, 0] == (1 + 2) * 5 + (1 + 2), "one row and one column further on than the key"
    assert index[0, 3] == (-1 + 2) * 5 + (-1 + 2)


@pytest.mark.parametrize(
    ("kind", "reached"),
    [("window", [(0, 0), (0, 1), (1, 0), (1, 1)]), ("interleaved", [(0, 0), (0, 3), (2, 0), (2, 3)])],
)
def test_a_block_attends_in_the_windows_of_its_kind(kind, reached):
    torch.manual_seed(0)
    block = IwinBlock(8, 2, 2, kernel=0, attention=kind)
    x = torch.randn(1, 4, 6, 8, requires_grad=True)
    block(x)[0, 0, 0].sum().backward()
    assert x.grad is not None
    assert [tuple(place) for place in x.grad[0].abs().sum(-1).nonzero().tolist()] == reached


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")
@pytest.mark.parametrize("grid", [(2, 6), (8, 4), (5, 9)])
def test_a_trace_takes_grids_smaller_than_the_window(grid):
    attention = IwinAttention(8, 2, 4).eval()
    x = torch.randn(2, *grid, 8)
    traced = torch.jit.trace(attention, x)
    other = torch.randn(2, *grid, 8)
    torch.testing.assert_close(traced(other), attention(other))
