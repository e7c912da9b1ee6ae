import torch
from torch import nn

from flashdit.shared.flops import copy_without_memory, count_flops


def test_a_multiply_add_is_two_flops_and_the_module_is_as_it_was():
    module = nn.Sequential(
        nn.Conv2d(3, 4, (2, 3), bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(40, 5)
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = count_flops(module, lambda blank: blank(torch.zeros(2, 3, 3, 7)))
    assert found == 2 * (2 * 4 * 3 * 2 * 3 * 2 * 5 + 2 * 40 * 5)
    assert module.training
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())


def test_a_copy_without_memory_has_names_and_shapes_alone():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    copied = copy_without_memory(module)
    assert all(tensor.is_meta for tensor in (*copied.parameters(), *copied.buffers()))
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    assert {name: value.shape for name, value in copied.state_dict().items()} == shapes
    assert not copied.training
