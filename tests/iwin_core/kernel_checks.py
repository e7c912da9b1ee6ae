"""The fused kernels against their eager twins; `test_kernels.py` runs this file in a process of its own.

Interpreted on the CPU where TRITON_INTERPRET=1, which Triton reads when it is first imported; else on a GPU.
"""

import os

import pytest
import torch
from torch import nn

from iwin_core import IwinAttention, kernels
from iwin_core.kernels import eager, ops

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
torch.backends.cudnn.allow_tf32 = False  # the twin's convolution of float32 stays float32
TOLERANCES = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}  # of the largest value
WINDOWS = [  # batch, grid, window, heads, head_dim, interleaved, normed
    (1, (8, 12), (4, 4), 2, 24, True, False),
    (2, (7, 9), (4, 4), 1, 8, True, True),
    (1, (7, 9), (4, 4), 1, 72, False, True),
    (1, (10, 5), (5, 5), 1, 16, True, False),
    (1, (3, 11), (3, 2), 1, 128, False, False),
    (2, (5, 1), (4, 1), 1, 8, True, True),
    (1, (9, 11), (9, 9), 1, 24, True, True),  # 81 slots: more than a tile, and padded
    (1, (17, 5), (16, 5), 1, 16, True, False),
]
MAPS = [  # batch, grid, channels, kernel, added
    (2, (7, 9), 72, (3, 3), True),
    (1, (5, 18), 24, (5, 5), False),
    (1, (3, 4), 8, (7, 7), True),
    (1, (6, 5), 16, (1, 3), True),
]


def draw(*shape, dtype=torch.float32, mean=0.0):
    """Returns random numbers that take a gradient."""
    return (torch.randn(*shape, device=DEVICE) + mean).to(dtype).detach().requires_grad_()


def assert_twins(kernel, twin, inputs, tolerance):
    """Compares outputs and the gradients of all inputs, each by the scale of the expected tensor."""
    inputs = [x for x in inputs if x is not None]
    out, expected = kernel(), twin()
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for ours, theirs in zip((out, *found), (expected, *wanted), strict=True):
        assert ours.dtype == theirs.dtype
        scale = theirs.float().abs().max().item()
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=tolerance * scale)


def attention_case(batch, grid, window, heads, head_dim, interleaved, normed, dtype):
    """Compares attention with its twin."""
    torch.manual_seed(0)
    qkv = draw(batch, *grid, 3 * heads * head_dim, dtype=dtype)
    weights = [draw(head_dim, mean=1.0) if normed else None for _ in range(2)]
    arguments = (qkv, heads, window, interleaved, *weights, 1e-6)
    assert_twins(
        lambda: kernels.window_attention(*arguments),
        lambda: eager.window_attention(*arguments),
        [qkv, *weights],
        TOLERANCES[dtype],
    )


@pytest.mark.parametrize("case", WINDOWS)
def test_attention_and_its_gradients_equal_the_eager_twin(case):
    attention_case(*case, torch.float32)


@pytest.mark.parametrize(("case", "dtype"), [(WINDOWS[1], torch.float16), (WINDOWS[6], torch.bfloat16)])
def test_attention_of_16_bits_equals_the_eager_twin(case, dtype):
    attention_case(*case, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("batch", "grid", "channels", "kernel", "added"), MAPS)
def test_convolution_and_its_gradients_equal_the_eager_twin(batch, grid, channels, kernel, added, dtype):
    if dtype != torch.float32 and kernel != (3, 3):
        pytest.skip("16 bits differ in loads and stores alone: one kernel size shows them")
    torch.manual_seed(0)
    x = draw(batch, *grid, channels, dtype=dtype)
    weight, bias = draw(channels, 1, *kernel, dtype=dtype), draw(channels, dtype=dtype)
    add = draw(batch, *grid, channels, dtype=dtype) if added else None
    assert_twins(
        lambda: kernels.depthwise_conv(x, weight, bias, add),
        lambda: eager.depthwise_conv(x, weight, bias, add),
        [x, weight, bias, add],
        TOLERANCES[dtype],
    )


def make_module(qk_norm=lambda width: nn.RMSNorm(width, eps=1e-6)):
    """Returns a small attention with weights far from zero."""
    torch.manual_seed(0)
    module = IwinAttention(16, 2, 4, qk_norm=qk_norm).to(DEVICE)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


@pytest.fixture
def demanded():
    """Demands the kernels for one test."""
    before = kernels.set_backend("triton")
    yield
    kernels.set_backend(before)


def run(module, x, backend):
    """Returns the output of a module under a backend and the gradients of the map and of every weight."""
    before = kernels.set_backend(backend)
    out = module(x)
    gradients = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
    kernels.set_backend(before)
    return out, *gradients


def test_module_with_kernels_equals_the_module_without():
    module = make_module()
    x = draw(1, 16, 7, 9).movedim(1, -1)  # as a convolution leaves it: not contiguous
    for ours, theirs in zip(run(module, x, "triton"), run(module, x, "eager"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_under_autocast_the_kernels_work_in_its_dtype(demanded):
    module = make_module(qk_norm=None)
    x = draw(1, 7, 9, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = module(x)
        kernels.set_backend("eager")
        theirs = module(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    scale = theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=scale * TOLERANCES[torch.bfloat16])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck traces clones of its inputs
def test_kernels_are_whole_operators_to_pytorch():
    qkv, weight = draw(1, 5, 6, 24), draw(8, mean=1.0)
    torch.library.opcheck(ops.window_attention_op, (qkv, 1, [4, 4], True, weight, weight, 1e-6))
    x = draw(1, 4, 5, 8)
    torch.library.opcheck(ops.depthwise_conv_op, (x, draw(8, 1, 3, 3), draw(8), x))


def test_compiled_graph_stays_whole_and_holds_the_kernels(demanded):
    module, graphs = make_module(), []

    def look(graph, _):
        graphs.append(graph)
        return graph

    x = draw(1, 7, 9, 16)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend=look)
    torch.testing.assert_close(compiled(x), expected)
    called = " ".join(str(node.target) for node in graphs[0].graph.nodes)
    assert "iwin_core.window_attention" in called
    assert "iwin_core.depthwise_conv" in called


def test_compiled_gradients_equal_the_eager_ones(demanded):
    module = make_module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = draw(1, 7, 9, 16)
    for ours, theirs in zip(run(compiled, x, "triton"), run(module, x, "eager"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
