"""Attention on a CPU: both ways are the same function, and a table of measurements chooses between them."""

import math

import pytest
import torch

from iwin_core import IwinAttention
from iwin_core.kernels import attention, cpu_attention
from iwin_core.kernels.cpu_attention import (
    FUSED,
    GAIN,
    PRODUCTS,
    attention_of,
    backward_by_products,
    by_products,
    read_table,
    this_processor,
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(q, k, v, bias):
    logits = torch.einsum("nhid,nhjd->nhij", q, k) / math.sqrt(q.shape[-1])
    weights = torch.exp(logits if bias is None else logits + bias)
    return torch.einsum("nhij,nhjd->nhid", weights / weights.sum(dim=-1, keepdim=True), v)


def biases():
    """A mask of padding for each window, a learned bias for each head, both at once, and none."""
    mask = torch.zeros(3, 1, 1, 9, dtype=torch.float64)
    mask[1, :, :, -2:] = -math.inf
    learned = draw(1, 2, 9, 9, seed=5)
    return {"none": None, "mask": mask, "learned": learned, "both": mask + learned}


@pytest.mark.parametrize("bias", biases())
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
def test_products_are_attention_by_its_definition_with_its_gradients(bias, dtype, error):
    added = biases()[bias]
    inputs = [draw(3, 9, 2, 8, seed=seed).to(dtype).double() for seed in range(3)]
    found, expected = [], []
    for function, kind, results in ((by_products, dtype, found), (by_definition, torch.float64, expected)):
        q, k, v = (x.to(kind).transpose(1, 2).requires_grad_() for x in inputs)
        out = function(q, k, v, None if added is None else added.to(kind))
        results += [out, *torch.autograd.grad(out, (q, k, v), draw(3, 2, 9, 8, seed=9).to(kind))]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() <= error * theirs.abs().max()


@pytest.mark.parametrize("chunk", [1, 2 * 81])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
def test_a_backward_pass_by_products_has_the_gradients_of_the_definition(dtype, error, chunk, monkeypatch):
    monkeypatch.setattr(cpu_attention, "CHUNK", chunk)
    inputs = [draw(3, 9, 2, 8, seed=seed).to(dtype).double() for seed in range(3)]
    found, expected = [], []
    for function, kind, results in (
        (backward_by_products, dtype, found),
        (lambda *given: by_definition(*given, None), torch.float64, expected),
    ):
        q, k, v = (x.to(kind).transpose(1, 2).requires_grad_() for x in inputs)
        out = function(q, k, v)
        results += [out, *torch.autograd.grad(out, (q, k, v), draw(3, 2, 9, 8, seed=9).to(kind))]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() <= error * theirs.abs().max()


def test_windows_beyond_the_largest_that_is_kept_keep_no_probabilities(asked, monkeypatch):
    monkeypatch.setattr(cpu_attention, "KEPT", 9)
    for side, keeps in ((3, True), (4, False)):
        q, sizes = draw(2, 2, side**2, 4).float().requires_grad_(), []
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(
                lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x
            ),
        ):
            out = attention(q, q + 0, q - 0)
        assert out.dtype == torch.bfloat16
        assert (max(sizes) > q.numel()) == keeps
        (gradient,) = torch.autograd.grad(out.float().sum(), q)
        assert gradient.dtype == torch.float32
    with_bias = attention(q, q, q, torch.zeros(16, 16))
    torch.testing.assert_close(with_bias, attention(q, q, q))
    assert "BackwardByProducts" not in str(with_bias.grad_fn.next_functions), "it takes no bias"


def rows():
    return [(name, row) for name, measured in read_table().items() for row in measured["rows"]]


def test_what_was_measured_to_be_faster_by_enough_is_chosen_and_nothing_else():
    assert rows(), "some processor has been measured"
    for processor, row in rows():
        case = (row["tokens"], row["head_width"], getattr(torch, row["dtype"]), row["gradient"])
        gains = row["fused_ms"] / row["products_ms"] >= GAIN
        assert cpu_attention.cpu_attention(*case, processor) == (PRODUCTS if gains else FUSED)
        assert cpu_attention.cpu_attention(*case, "Acme avx9") == FUSED
        here = this_processor()
        assert cpu_attention.cpu_attention(*case, None) == cpu_attention.cpu_attention(*case, here)
    processor, row = rows()[0]
    assert cpu_attention.cpu_attention(17, 13, torch.bfloat16, True, processor) == FUSED, "not measured"


def test_a_processor_is_its_maker_and_its_fastest_instructions(monkeypatch):
    for name, has, called in (
        ("AMD EPYC 9654", {"avx2": True, "avx512_f": True, "avx512_bf16": True}, "AMD avx512_bf16"),
        ("Intel(R) Xeon(R) Processor", {"avx512_bf16": True, "amx_tile": True}, "Intel amx_tile"),
        ("AMD EPYC 7543", {"avx2": True, "amx_tile": False}, "AMD avx2"),
        ("Neoverse", {}, "Neoverse baseline"),
    ):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda name=name, has=has: {"cpu_name": name} | has
        )
        assert this_processor.__wrapped__() == called


@pytest.fixture
def asked(monkeypatch):
    """What the table is asked, in order; it says products where a gradient follows."""
    cases = []

    def choose(*case):
        cases.append(case)
        return PRODUCTS if case[3] else FUSED

    monkeypatch.setattr(cpu_attention, "cpu_attention", choose)
    return cases


def test_shape_dtype_gradient_and_processor_are_asked_for(asked):
    q = draw(2, 3, 16, 8).float().requires_grad_()
    with attention_of("Acme avx9"):
        attention(q, q, q)
    with torch.autocast("cpu", torch.bfloat16):
        attention(q, q, q)
        with torch.no_grad():
            attention(q, q, q)
    assert asked == [
        (16, 8, torch.float32, True, "Acme avx9"),
        (16, 8, torch.bfloat16, True, None),
        (16, 8, torch.bfloat16, False, None),
    ]


@pytest.mark.parametrize("size", [8, 7])
def test_a_layer_is_the_same_either_way(asked, size, monkeypatch):
    torch.manual_seed(0)
    layer = IwinAttention(16, 2, 4, relative_position=True).double()
    x = draw(2, size, size, 16)
    chosen = layer(x)
    monkeypatch.setattr(cpu_attention, "cpu_attention", lambda *case: FUSED)
    torch.testing.assert_close(chosen, layer(x))
    assert asked


def test_compiled_code_takes_the_same_way():
    gained = [found for found in rows() if found[1]["fused_ms"] >= GAIN * found[1]["products_ms"]]
    measured, case = next(found for found in gained if found[1]["gradient"])
    q = draw(2, 2, case["tokens"], case["head_width"]).to(getattr(torch, case["dtype"])).requires_grad_()
    names = []

    def see(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    for processor in ("fused", measured):
        torch.compiler.reset()
        names.clear()
        with attention_of(processor):
            compiled = torch.compile(attention, backend=see, fullgraph=True)(q, q, q)
            torch.testing.assert_close(compiled, attention(q, q, q))
        assert any("scaled_dot_product" in name for name in names) == (processor == "fused")
