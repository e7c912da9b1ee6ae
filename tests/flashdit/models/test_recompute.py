import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flashdit import FlashDiT
from flashdit.models.recompute import keep_matmuls

KINDS = {"iwin": {"name": "iwin"}, "global": {"name": "global", "rope": True}}


def step(attention, how):
    """Returns the gradients of a training step and its FLOPs; `how` is how activations are saved."""
    torch.manual_seed(0)
    model = FlashDiT(8, 3, hidden_size=16, depth=2, num_heads=2, num_classes=5, attention=attention)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    if how != "all kept":
        model.enable_gradient_checkpointing(keep_matmuls if how == "matmuls kept" else None)
    x, drop = torch.randn(2, 3, 8, 12), torch.tensor([False, True])
    with FlopCounterMode(display=False) as counter:
        model(x, torch.rand(2), torch.arange(2), drop).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_matmuls_changes_no_gradient_and_repeats_no_product(kind):
    (kept, flops), (cheap, cheap_flops), (_, again_flops) = (
        step(KINDS[kind], how) for how in ("all kept", "matmuls kept", "blocks again")
    )
    torch.testing.assert_close(cheap, kept, rtol=0, atol=0)
    assert cheap_flops - flops < 0.02 * flops < again_flops - flops  # the depthwise convolution is repeated
    assert kind == "iwin" or cheap_flops == flops
