import pytest
import torch
from torch import func

from iwin_core.rotary import rope_tables, rotate

COS, SIN = rope_tables((4, 6), 16)


def draw(dtype: torch.dtype) -> torch.Tensor:
    """Queries (2, 3, 24, 16) as a layer leaves them: a view of one projection."""
    qkv = torch.randn(2, 24, 3, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    return qkv[:, :, 1].transpose(1, 2)


def by_hand(x: torch.Tensor) -> torch.Tensor:
    """Each pair turned, in float32 or wider, a channel at a time."""
    wide, out = x.to(torch.promote_types(x.dtype, torch.float32)), torch.empty_like(x)
    for i in range(0, 16, 2):
        out[..., i] = (wide[..., i] * COS[:, i] - wide[..., i + 1] * SIN[:, i]).to(x.dtype)
        out[..., i + 1] = (wide[..., i + 1] * COS[:, i] + wide[..., i] * SIN[:, i]).to(x.dtype)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_pair_is_turned(dtype):
    x = draw(dtype)
    assert rotate(x, COS, SIN).dtype == dtype
    assert torch.equal(rotate(x, COS, SIN), by_hand(x))


def test_what_a_compiler_sees_is_equal():
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(compiled(draw(dtype), COS, SIN), rotate(draw(dtype), COS, SIN))


def test_an_exported_rotation_has_no_complex_numbers():
    class Turn(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return rotate(x, COS, SIN)

    program = torch.export.export(Turn(), (draw(torch.float32),))
    assert "complex" not in str(program.graph)


def test_tables_of_a_model_in_bfloat16_are_taken():
    turned = rotate(draw(torch.bfloat16), COS.bfloat16(), SIN.bfloat16())
    assert turned.dtype == torch.bfloat16
    assert (turned - by_hand(draw(torch.bfloat16))).abs().max() < 0.05


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's, in forward mode
def test_gradients_both_ways():
    x = draw(torch.float64).requires_grad_()
    cos, sin = COS.double(), SIN.double()
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x)
    tangent = draw(torch.float64).flip(0)
    _, derivative = func.jvp(lambda x: rotate(x, cos, sin), (x.detach(),), (tangent,))
    torch.testing.assert_close(derivative, rotate(tangent, cos, sin))


def test_nothing_but_the_tables_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        rotate(draw(torch.bfloat16).requires_grad_(), COS, SIN)
    assert kept == [COS.data_ptr(), SIN.data_ptr()]


def test_any_strides_are_taken():
    plain = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    shifted, wide = torch.empty(769)[1:].view(2, 24, 16), torch.empty(2, 24, 17)[..., :16]
    for other in (shifted, wide, torch.empty(2, 16, 24).mT, torch.empty(2, 24, 32)[..., ::2]):
        assert torch.equal(rotate(other.copy_(plain), COS, SIN), rotate(plain, COS, SIN))
