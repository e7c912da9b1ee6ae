import pytest
import torch
from torch import nn

from iwin_core import IwinAttention
from iwin_core.analysis.mixing import reach
from iwin_core.analysis.saliency import (
    as_map,
    effective_receptive_field,
    grad_cam,
    share_of_pixels,
    token_grid,
)


class ChannelsLast(nn.Module):
    """NCHW images → interleaved attention on the map (B, H, W, C), followed by a LayerNorm."""

    def __init__(self, kernel):
        super().__init__()
        self.attn = IwinAttention(6, 2, 2, kernel)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.attn(x.movedim(1, -1)))


class Pooled(nn.Module):
    """A head on the mean of a feature map: the case in which Grad-CAM is the head's own weights."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class Tokens(nn.Module):
    """NCHW images → a class token and one token per 4 × 4 patch."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 5, 4, stride=4)
        self.tokens = nn.Identity()
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.tokens(torch.cat([tokens[:, :1], tokens], 1)).mean(1))


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_field_of_stacked_convolutions_ends_where_the_kernels_end(depth):
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(depth)))
    field = effective_receptive_field(model, str(depth - 1), torch.randn(2, 3, 11, 13), (5, 4))
    inside = torch.zeros(11, 13, dtype=torch.bool)
    inside[5 - depth : 6 + depth, 4 - depth : 5 + depth] = True
    assert torch.equal(field > 0, inside)


@pytest.mark.parametrize(("kernel", "kind"), [(3, "iwin"), (None, "iwin_no_conv")])
def test_field_of_interleaved_attention_is_what_reaches_the_token(kernel, kind):
    field = effective_receptive_field(ChannelsLast(kernel), "attn", torch.randn(2, 6, 8, 12), (3, 5))
    assert torch.equal(field > 1e-9, reach((8, 12), 2, 3, kind)[:, 3, 5].reshape(8, 12))


def test_field_of_normalised_channels_does_not_vanish():
    images = torch.randn(2, 6, 8, 12)
    field = effective_receptive_field(ChannelsLast(None), "norm", images)
    assert torch.equal(field > 1e-5, reach((8, 12), 2, 3, "iwin_no_conv", token=(4, 6))[0])


def test_field_of_one_linear_map_is_the_mean_of_its_weights(images):
    model = nn.Conv2d(3, 1, 1, bias=False)
    field = effective_receptive_field(nn.Sequential(model), "0", images, (2, 7))
    torch.testing.assert_close(field[2, 7], model.weight.abs().mean())
    assert field.count_nonzero() == 1


def test_field_of_tokens_starts_at_their_patch(images):
    field = effective_receptive_field(Tokens(), "tokens", images, (1, 2))
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[4:8, 8:12] = True
    assert torch.equal(field > 0, expected)


def test_share_of_pixels_counts_the_largest():
    field = torch.tensor([[6.0, 1.0], [2.0, 1.0]])
    assert [share_of_pixels(field, mass) for mass in (0.5, 0.79, 0.85)] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("layer", ["features", "features.0"])
@pytest.mark.parametrize("class_index", [None, 1])
def test_cam_of_a_pooled_head_is_its_weights_times_the_features(images, layer, class_index):
    model = Pooled()
    image = images[0]
    cam = grad_cam(model, layer, image, class_index)
    before = model.features[0](image[None])[0]
    feature = before.relu()
    index = model(image[None])[0].argmax() if class_index is None else class_index
    weight = model.head.weight[index] / feature[0].numel()  # the mean's share of the gradient
    if layer == "features.0":  # below the ReLU the gradient stops where it is closed
        weight, feature = weight * (before > 0).float().mean((1, 2)), before
    torch.testing.assert_close(cam, torch.einsum("c,chw->hw", weight, feature).relu().detach())


def test_cam_of_tokens_leaves_the_class_token_out(images):
    model = Tokens()
    cam = grad_cam(model, "tokens", images[0], 2)
    patches = model.embed(images[:1])[0]
    expected = torch.einsum("c,chw->hw", model.head.weight[2] / 7, patches).relu()
    torch.testing.assert_close(cam, expected.detach())


def test_model_keeps_its_modes_and_its_gradients(images):
    model = Pooled().train()
    model.features.eval()
    with torch.no_grad():
        grad_cam(model, "features", images[0])
    assert model.training
    assert not model.features.training
    assert model.head.weight.grad is None


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((2, 5, 4, 6), None, (2, 4, 6, 5)),
        ((2, 4, 6, 5), None, (2, 4, 6, 5)),
        ((2, 4, 4, 4), "nchw", (2, 4, 4, 4)),
        ((2, 26, 5), None, (2, 4, 6, 5)),
    ],
)
def test_layout_is_read_off_the_shape(shape, layout, expected):
    assert as_map(torch.zeros(shape), (32, 48), layout).shape == expected


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [
        (197, (224, 224), (14, 14)),
        (49, (224, 224), (7, 7)),
        (4 + 16, (64, 64), (4, 4)),
        (56, (100, 112), (7, 8)),
        (1 + 24, (64, 96), (4, 6)),
        (261, (256, 256), (16, 16)),
    ],
)
def test_token_grid_leaves_class_and_register_tokens_out(tokens, size, grid):
    assert token_grid(tokens, size) == grid


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("feature", "layer must be a module of the model, nearest are features.* got layer='feature'"),
        ("zzzz", "layer must be a module of the model, it has features, head, got layer='zzzz'"),
        ("head", r"layer must put out a map or the tokens of one, got \(2, 4\)"),
    ],
)
def test_unknown_layer_is_named_with_the_nearest(images, layer, message):
    with pytest.raises(ValueError, match=message):
        effective_receptive_field(Pooled(), layer, images)


def test_layer_that_does_not_run_is_named(images):
    model = Pooled()
    model.spare = nn.Identity()
    with pytest.raises(ValueError, match="layer must put out a tensor when the model runs, got nothing"):
        grad_cam(model, "spare", images[0])


def test_what_cannot_be_is_one_sentence(images):
    model = Pooled()
    with pytest.raises(ValueError, match=r"position must lie on the feature map, got position=\(8, 0\)"):
        effective_receptive_field(model, "features", images, (8, 0))
    with pytest.raises(ValueError, match="class_index must be below the number of classes 4, got"):
        grad_cam(model, "features", images[0], 4)
    with pytest.raises(ValueError, match=r"model must put out logits .* got \(1, 5, 8, 12\)"):
        grad_cam(model.features, "0", images[0])
    with pytest.raises(ValueError, match=r"layout must be given .* nchw or nhwc, got \(2, 4, 4, 4\)"):
        as_map(torch.zeros(2, 4, 4, 4), (32, 32))
    with pytest.raises(ValueError, match="layout must be one of nchw, nhwc, got layout='chw'"):
        as_map(torch.zeros(2, 4, 4, 4), (32, 32), "chw")
