import pytest
import timm
import torch
from golden_rule import assert_golden, golden_input, golden_state, load_json, load_npz
from torch import nn

from iwin_core import IwinAttention, IwinConfig, IwinFeatures, IwinTransformer, load_official_checkpoint
from iwin_core.attention import pad_grid
from iwin_core.backbone.config import (
    BACKBONE_SIZES,
    SMALL_1K_HEADS,
    divides,
    stage_kernels,
    stage_windows,
)
from iwin_core.backbone.dense import make_dense_backbone
from iwin_core.backbone.weights import fit_tensors
from iwin_core.kernels import eager

CASE = "small_w7_61x75"
SMALL = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
NAME = "iwin_tiny_patch4_window7_224"
PARAMETERS = {"tiny": 29_458_848, "small": 50_798_496, "base": 90_218_368, "large": 202_788_672}


def ruled(model):
    """Returns the model in evaluation mode, weights by the golden rule."""
    model.load_state_dict(golden_state({key: value.shape for key, value in model.state_dict().items()}))
    return model.eval()


def kernels_of(model):
    return [block.dwconv is not None for stage in model.stages() for block in stage.blocks]


def test_maps_equal_the_released_dense_backbones():
    golden, meta = load_npz("iwin_dense.npz"), load_json("iwin_dense_meta.json")[CASE]
    model = ruled(IwinFeatures(**(SMALL | {"window_size": meta["ctor"]["window_size"]})))
    assert sum(p.numel() for p in model.parameters()) == meta["n_params"]
    maps = model(golden_input(0, meta["input_shape"]))
    assert [list(m.shape) for m in maps] == meta["out_shapes"]
    for number, m in enumerate(maps):
        assert m.is_contiguous()
        assert_golden(m, golden[f"{CASE}/out{number}/full"])


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_released_dense_backbones(name):
    with torch.device("meta"):
        model, channels = make_dense_backbone(f"iwin_{name}_patch4_window7_224")
        other, _ = make_dense_backbone(f"iwin_{name}_patch4_window12_384", drop_path_rate=0.1)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert channels == [BACKBONE_SIZES[name]["embed_dim"] * 2**stage for stage in range(4)]
    assert model.config.drop_path_rate == BACKBONE_SIZES[name]["drop_path_rate"]
    assert (other.config.drop_path_rate, other.config.window_size, other.config.img_size) == (0.1, 12, 384)


def test_keys_are_those_of_the_released_dense_backbone():
    with torch.device("meta"):
        state = IwinFeatures().state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == load_json("iwin_dense_keys_tiny.json")


@pytest.mark.parametrize(("window", "side"), [(7, 224), (4, 224), (16, 224), (7, 112), (7, 1280)])
def test_all_stages_but_the_last_have_a_convolution_whatever_window_and_size(window, side):
    model = IwinFeatures(**SMALL, window_size=window, img_size=side)
    assert kernels_of(model) == [True, True, True, True, False]
    assert stage_windows(model.config) == [window] * 4
    assert model.set_input_size(2 * side) == []
    assert stage_kernels(IwinConfig(feature_norms=True, kernel_sizes=(0, 3, 5, 7))) == [0, 3, 5, 7]


@pytest.mark.parametrize("size", [(61, 75), (5, 40), (4, 4), (100, 33)])
@pytest.mark.parametrize("options", [{}, {"position": "relative"}, {"padding": "mask"}])
def test_any_input_size_gives_four_maps(size, options):
    maps = ruled(IwinFeatures(**(SMALL | options)))(torch.randn(2, 3, *size))
    rows, columns = (-(-side // 4) for side in size)
    for stage, m in enumerate(maps):
        assert m.shape == (2, 24 * 2**stage, -(-rows // 2**stage), -(-columns // 2**stage))
        assert torch.isfinite(m).all()


def test_zero_padding_is_attention_on_a_map_with_zeros_at_its_ends():
    torch.manual_seed(0)
    attention = IwinAttention(16, 2, window=4, kernel=None, padding="zeros")
    nn.init.normal_(attention.qkv.bias)
    x = torch.randn(2, 6, 9, 16)
    torch.testing.assert_close(attention(x), attention(pad_grid(x, (8, 12)))[:, :6, :9])
    small = torch.randn(2, 3, 2, 16)  # the window is not clipped to a map smaller than it
    torch.testing.assert_close(attention(small), attention(pad_grid(small, (4, 4)))[:, :3, :2])


@pytest.mark.parametrize("padding", ["mask", "zeros"])
def test_fused_kernels_are_given_the_same_padding(padding, monkeypatch):
    attention = IwinAttention(16, 2, window=4, kernel=None, padding=padding)
    nn.init.normal_(attention.qkv.bias)
    x = torch.randn(2, 6, 9, 16)
    expected = attention(x)
    monkeypatch.setattr("iwin_core.attention.kernels_chosen", lambda *_: True)
    monkeypatch.setattr("iwin_core.attention.window_attention", eager.window_attention)
    torch.testing.assert_close(attention(x), expected)


def test_masked_and_zero_padding_agree_only_where_windows_divide():
    models = [ruled(IwinFeatures(**SMALL, padding=padding)) for padding in ("mask", "zeros")]
    for side, agree in ((224, True), (100, False)):
        last = [model(golden_input(0, (1, 3, side, side)))[-1] for model in models]
        assert torch.allclose(*last, atol=1e-4) == agree


def test_a_classifier_with_zero_padding_divides_by_its_whole_window():
    assert divides(64, IwinConfig(window_size=4, img_size=64))
    assert not divides(64, IwinConfig(window_size=4, img_size=64, padding="zeros"))
    with pytest.raises(ValueError, match="padding must be one of 'mask', 'zeros', got 'same'"):
        IwinTransformer(padding="same")
    with pytest.raises(ValueError, match="padding must be one of 'mask', 'zeros', got 'same'"):
        IwinAttention(16, 2, 4, padding="same")


def test_timms_features_take_padding_and_a_norm_of_each_map_asked_for():
    whole = ruled(IwinFeatures(**SMALL))
    options = {"features_only": True, "padding": "zeros", "feature_norms": True, "out_indices": (1, 3)}
    model = timm.create_model(NAME, **SMALL, **options).eval()
    names = {name.removeprefix("model.") for name in model.state_dict()}
    assert names == {key for key in whole.state_dict() if not key.startswith(("norm0", "norm2"))}
    model.load_state_dict({f"model.{name}": whole.state_dict()[name] for name in names})
    x = torch.randn(2, 3, 61, 75)
    torch.testing.assert_close(model(x), whole(x)[1::2])
    early = timm.create_model(NAME, **SMALL, **options | {"out_indices": (0, 1)}).eval()
    assert [block.dwconv is not None for stage in early.model.stages() for block in stage.blocks] == [
        True
    ] * 2
    assert [m.shape[1] for m in early(x)] == [24, 48]
    plain = timm.create_model(NAME, **SMALL, features_only=True, padding="zeros").eval()
    assert not [name for name in plain.state_dict() if name.startswith("model.norm")]


def test_every_parameter_of_a_dense_backbone_gets_a_gradient():
    model = IwinFeatures(**SMALL).train()
    model.set_grad_checkpointing()
    sum(m.square().sum() for m in model(torch.randn(2, 3, 61, 75))).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_small_backbone_of_dense_tasks_has_the_papers_heads_which_change_its_output():
    name, tiny = "iwin_small_patch4_window7_224", {"embed_dim": 48, "depths": (1, 1, 1, 1)}
    dense, _ = make_dense_backbone(name, tiny)
    assert tuple(dense.config.num_heads) == (3, 6, 12, 24)
    released = IwinFeatures(**tiny, num_heads=SMALL_1K_HEADS)
    x = golden_input(0, (1, 3, 64, 96))
    ours, theirs = ruled(dense)(x), ruled(released)(x)
    assert {key: v.shape for key, v in dense.state_dict().items()} == {
        key: v.shape for key, v in released.state_dict().items()
    }
    torch.testing.assert_close(ours[0], theirs[0])  # stage 1 has 3 heads in both
    assert all((a - b).abs().max() > 0.1 * b.std() for a, b in zip(ours[1:], theirs[1:], strict=True))


def test_starting_from_the_small_classifiers_weights_says_that_heads_differ(caplog):
    with torch.device("meta"):
        source = timm.create_model("iwin_small_patch4_window7_224").state_dict()
        dense, _ = make_dense_backbone("iwin_small_patch4_window7_224")
        tiny, state = IwinFeatures(), IwinTransformer().state_dict()
    _, report = fit_tensors(dense, source)
    assert caplog.messages == [
        "loading weights: the released Iwin-S 1K classification weights have heads (3, 4, 8, 16), "
        "this model has (3, 6, 12, 24)"
    ]
    assert report.left_out == ("head.weight", "head.bias", "norm.weight", "norm.bias")
    assert report.reinitialised[:2] == ("norm0.weight", "norm0.bias")
    caplog.clear()
    fit_tensors(tiny, state)
    fit_tensors(dense, dense.state_dict())
    assert caplog.messages == []


def test_a_classifiers_weights_start_a_dense_backbone_with_fresh_norms():
    source, dense = ruled(IwinTransformer(**SMALL)), ruled(IwinFeatures(**SMALL))
    report = load_official_checkpoint(dense, source.state_dict())
    assert len(report.reinitialised) == 8
    assert dense.norm2.weight.eq(1).all()
    assert dense.norm2.bias.eq(0).all()
    x = golden_input(0, (1, 3, 224, 224))
    maps, stages = dense(x), source.forward_stages(x)
    fresh = nn.functional.layer_norm(stages[1], (48,)).movedim(-1, 1)
    torch.testing.assert_close(maps[1], fresh, rtol=1e-4, atol=1e-4)


def test_dense_weights_load_from_under_state_dict(tmp_path):
    source, model = ruled(IwinFeatures(**SMALL)), IwinFeatures(**SMALL)
    torch.save(
        {"meta": {"epoch": 12, "CLASSES": ("a", "b")}, "state_dict": source.state_dict()}, tmp_path / "a.pth"
    )
    load_official_checkpoint(model, tmp_path / "a.pth")
    assert all(value.equal(source.state_dict()[name]) for name, value in model.state_dict().items())


class FourMaps(nn.Module):
    """Gives maps of 4, 6, 8 and 10 channels."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(3, 2 * c, 3, 2**s, 1) for s, c in zip((2, 3, 4, 5), (2, 3, 4, 5), strict=True)
        )

    def forward(self, x):
        return tuple(conv(x) for conv in self.convs)


@pytest.mark.parametrize(
    ("name", "options", "channels"),
    [
        ("resnet10t", {}, [64, 128, 256, 512]),
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 24, "depths": (1, 1, 1, 1), "img_size": 64},
            [24, 48, 96, 192],
        ),
        (FourMaps(), {}, [4, 6, 8, 10]),
    ],
    ids=["resnet", "swin", "module"],
)
def test_other_backbones_give_four_nchw_maps(name, options, channels):
    model, found = make_dense_backbone(name, options)
    assert found == channels
    assert [m.shape for m in model(torch.randn(2, 3, 64, 64))] == [
        (2, c, 16 // 2**stage, 16 // 2**stage) for stage, c in enumerate(channels)
    ]
    assert model.training


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (
            "iwin_tiny_patch4_window7_22",
            {},
            "a name that timm knows, got 'iwin_tiny_patch4_window7_22'; the nearest",
        ),
        (
            NAME,
            {"windows": 4, "dept": 1},
            f"options of {NAME} must be fields of IwinConfig, got dept, windows",
        ),
        (NAME, {"depths": (1, 1), "num_heads": (3, 6)}, "backbone must give 4 maps, got 2"),
        ("resnet10t", {"out_indices": (1, 2, 3)}, "backbone must give 4 maps, got 3"),
        (nn.Conv2d(3, 4, 3), {}, "backbone must give 4 maps, got 1"),
        (nn.Conv2d(3, 4, 3), {"depth": 3}, "backbone options go with a timm name, got depth for a module"),
    ],
)
def test_backbones_that_cannot_be_are_named(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        make_dense_backbone(backbone, options)
