"""Norms with their modulation and the gated MLP, beside autograd's own backward pass of a few plain lines."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

from flashdit.models.embed import PatchEmbed
from flashdit.models.layers import SwiGLU, gated_silu, make_norm, modulate

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's, in forward mode


def inputs(dtype=torch.float32, channels=24):
    """Returns tokens (3, 5, 7, c), scale and shift (3, c), and a gradient like the tokens."""
    draws = torch.Generator().manual_seed(0)
    shapes = ((3, 5, 7, channels), (3, channels), (3, channels), (3, 5, 7, channels))
    return [torch.randn(shape, generator=draws).to(dtype).requires_grad_() for shape in shapes]


def rms_norm(channels=24):
    norm = make_norm("rmsnorm", channels)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    return norm


def plain(x, weight, scale, shift):
    """Returns RMSNorm, scale and shift in float64."""
    x, weight, scale = x.double(), weight.double(), scale.double()
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    out = normed * weight * (1 + scale[:, None, None])
    return out if shift is None else out + shift.double()[:, None, None]


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_modulated_norm_and_its_gradients_are_those_of_plain_lines(dtype, bound, shifted):
    x, scale, shift, upstream = inputs(dtype)
    x = (30 * x).detach().requires_grad_()
    norm, shift = rms_norm(), shift if shifted else None
    out = modulate(norm, x, scale, shift)
    assert out.dtype == dtype
    expected = plain(x, norm.weight, scale, shift)
    parameters = [part for part in (x, norm.weight, scale, shift) if part is not None]
    got = torch.autograd.grad(out, parameters, upstream)
    assert [grad.dtype for grad in got] == [part.dtype for part in parameters]
    rounding = 1e-5 if dtype == torch.float32 else 2**-8  # computed in float32 and rounded once
    assert_close(out.double(), expected, rtol=rounding, atol=rounding / 8)
    for one, other in zip(
        got, torch.autograd.grad(expected, parameters, upstream.double(), retain_graph=True), strict=True
    ):
        assert_close(one.double(), other.double(), rtol=bound, atol=bound * other.abs().max().item())


def test_a_modulated_norm_is_one_with_and_without_gradient_compiled_and_in_forward_mode():
    x, scale, shift, upstream = inputs()
    norm = rms_norm()
    out = modulate(norm, x, scale, shift)
    with torch.no_grad():
        assert torch.equal(modulate(norm, x, scale, shift), out)
    assert_close(torch.compile(modulate, backend="aot_eager")(norm, x, scale, shift), out)
    direction = upstream.detach()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(
            modulate(norm, forward_ad.make_dual(x, direction), scale, shift)
        ).tangent
    expected = torch.autograd.functional.jvp(
        lambda value: plain(value, norm.weight, scale, shift), x.double(), direction.double()
    )[1]
    assert_close(tangent.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_modulated_norm_keeps_its_input_and_a_number_a_token():
    x, scale, shift, _ = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        modulate(rms_norm(), x, scale, shift)
    large = [tensor for tensor in kept if tensor.numel() > scale.numel()]
    assert sorted(tensor.numel() for tensor in large) == [x.numel() // 24, x.numel()]


def test_a_layer_norm_is_scaled_and_shifted():
    x, scale, shift, _ = inputs()
    norm = make_norm("layernorm", 24)
    expected = norm(x) * (1 + scale[:, None, None]) + shift[:, None, None]
    assert_close(modulate(norm, x, scale, shift), expected)
    assert_close(modulate(norm, x, scale, None), norm(x) * (1 + scale[:, None, None]))


def test_a_gradient_of_a_gradient_is_refused():
    x, scale, shift, _ = inputs()
    for out in (modulate(rms_norm(), x, scale, shift), gated_silu(x)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_mlp_has_autograds_gradients_to_the_bit(dtype):
    (x, *_, _), upstream = inputs(dtype), inputs(dtype)[0].detach()[..., :12]
    out = gated_silu(x)
    gate, value = x.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * value
    assert torch.equal(out, expected)
    (got,), (other,) = (torch.autograd.grad(y, x, upstream) for y in (out, expected))
    assert torch.equal(got, other)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(gated_silu(forward_ad.make_dual(x, x.detach()))).tangent
        assert tangent is not None


def test_tokens_lie_in_memory_one_after_the_other():
    assert PatchEmbed(3, 8, 2)(torch.randn(2, 3, 8, 8)).is_contiguous()


def test_swiglu_is_its_equation():
    x, *_ = inputs()
    mlp = SwiGLU(24, 16)
    a, b = mlp.w12(x)[..., :16], mlp.w12(x)[..., 16:]
    assert_close(mlp(x), mlp.w3(a * torch.sigmoid(a) * b))
