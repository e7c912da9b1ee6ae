import torch
import torch.nn.functional as F
from torch import nn

from iwin_core.backbone.backbone import initialise
from iwin_core.backbone.resize import resize_bicubic
from iwin_core.backbone.stage import ImagePatchEmbed


def test_an_image_that_no_patch_divides_is_padded_at_its_own_far_ends():
    torch.manual_seed(0)
    embed = ImagePatchEmbed(3, 8, 4)
    image = torch.randn(1, 3, 5, 10)
    assert embed(image).shape == (1, 2, 3, 8)
    torch.testing.assert_close(embed(image), embed(F.pad(image, (0, 2, 0, 3))))


def test_tables_are_resized_bicubically():
    table = torch.arange(12.0).reshape(1, 3, 4, 1) ** 2
    expected = F.interpolate(table.movedim(-1, 1), (6, 5), mode="bicubic").movedim(1, -1)
    torch.testing.assert_close(resize_bicubic(table, (6, 5)), expected)


def test_a_linear_starts_at_the_released_scale():
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    initialise(linear)
    assert 0.018 < linear.weight.std() < 0.022
    assert not linear.bias.any()
