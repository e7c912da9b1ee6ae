import pytest
import torch
from golden_rule import assert_golden, assert_summary, golden_input, golden_state, load_json, load_npz
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from iwin_core import IwinConfig, IwinTransformer
from iwin_core.backbone.config import BACKBONE_SIZES, divides, nearest_sizes, stage_kernels, stage_windows

GOLDEN = load_npz("iwin_cls_custom.npz")
META = load_json("iwin_cls_custom_meta.json")["w2"]
SIZE_CASES = load_json("params_flops.json")["iwin"]
ABLATIONS = {  # paper Table VII: options, parameters in M, multiply-adds in G
    "DWConv only": ({"attention": "none"}, 21.60, 3.20),
    "W-MSA": ({"attention": "window", "kernel_sizes": 0}, 30.20, 4.71),
    "IW-MSA": ({"kernel_sizes": 0}, 30.20, 4.71),
    "DWConv + W-MSA": ({"attention": "window"}, 30.23, 4.72),
    "DWConv + IW-MSA": ({}, 30.23, 4.72),
    "down: DWConv": ({"downsample": "dwconv"}, 27.14, 4.38),  # the paper prints 4.57, by no form we found
    "down: average pooling": ({"downsample": "pool"}, 27.13, 4.51),
    "down: patch merging": ({"downsample": "merge"}, 28.29, 4.51),
    "down: standard conv": ({"downsample": "conv"}, 30.23, 4.72),
    "kernels 7,5,3": ({"kernel_sizes": (7, 5, 3, 3)}, 30.24, None),
    "kernels 7": ({"kernel_sizes": 7}, 30.34, None),
    "kernels 5": ({"kernel_sizes": 5}, 30.27, None),
    "kernels 3": ({"kernel_sizes": 3}, 30.23, None),
    "depths 4,3,2,2": ({"depths": (4, 3, 2, 2)}, 23.79, 4.43),
    "depths 3,3,3,3": (
        {"depths": (3, 3, 3, 3)},
        32.54,
        4.75,
    ),  # the paper prints 32.56 / 4.80; so does no code
    "position: absolute": ({"position": "absolute"}, 30.53, None),
    "position: relative": ({"position": "relative"}, 30.25, None),
    "position: none": ({"position": "none"}, 30.23, None),
}


def measure(**options):
    """Returns parameters, multiply-adds at batch 1, and how many numbers are normed; nothing is computed."""
    normed = []
    with torch.device("meta"):
        model = IwinTransformer(**options).eval()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_hook(lambda _module, _args, out: normed.append(out.numel()))
        size = options.get("img_size", 224)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2, sum(normed)


def tiny(**options):
    """Returns a small backbone in evaluation mode, weights by the golden rule where keys are official."""
    given = {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
    model = IwinTransformer(**(given | {"num_classes": 10, "window_size": 2} | options)).eval()
    model.load_state_dict(golden_state({key: value.shape for key, value in model.state_dict().items()}))
    return model


@pytest.mark.parametrize("case", SIZE_CASES, ids=lambda case: f"{case['model']}-{case['img']}")
def test_parameters_and_multiply_adds_equal_the_released_models(case):
    options = {"img_size": case["img"], "window_size": case["window"], **BACKBONE_SIZES[case["model"]]}
    assert measure(**options)[:2] == (case["params"], case["macs_hook"])


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_have_the_papers_parameters_and_multiply_adds(name):
    options, params_m, macs_g = ABLATIONS[name]
    params, macs, normed = measure(**options)
    assert f"{params / 1e6:.2f}" == f"{params_m:.2f}"
    if macs_g is not None:
        assert f"{(macs + normed) / 1e9:.2f}" == f"{macs_g:.2f}", "the paper counts a norm as one per number"


def test_state_dict_keys_are_the_released_ones():
    with torch.device("meta"):
        state = IwinTransformer().state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == load_json("iwin_cls_keys_tiny224.json")


@pytest.fixture(scope="module")
def golden():
    """Returns the golden variant's model, its inner outputs and the gradient of its input."""
    model, inner = tiny(), {}
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == META["keys"]
    watched = {"patch_embed": model.patch_embed, "norm": model.norm}
    for number, stage in enumerate(model.stages(), 1):
        watched |= {f"stage{number}_block0": stage.blocks[0], f"stage{number}_blocks": stage.blocks[-1]}
        watched[f"stage{number}_layer"] = stage.downsample or stage.blocks[-1]
    for name, module in watched.items():
        module.register_forward_hook(lambda _module, _args, out, name=name: inner.update({name: out}))
    x = golden_input(0, META["input_shape"]).requires_grad_()
    logits = model(x)
    loss = (logits * golden_input(2, logits.shape)).sum()
    loss.backward()
    return model, logits, inner, x.grad, loss


def test_logits_and_gradients_equal_the_released_model(golden):
    model, logits, _, grad_x, loss = golden
    assert_golden(logits, GOLDEN["w2/logits"])
    assert_golden(golden[2]["norm"].flatten(1, 2), GOLDEN["w2/stage4_norm_full"])
    assert_summary(grad_x, GOLDEN, "w2/grad_x")
    assert abs(loss.item() / META["grad_loss"] - 1) < 2e-5
    parameters = dict(model.named_parameters())
    for key, expected in META["param_grad_l2"].items():
        norm = float(parameters[key].grad.double().norm())
        assert norm == pytest.approx(expected, rel=2e-5, abs=1e-6), key


INNER = sorted({key.split("/")[1] for key in GOLDEN} - {"logits", "grad_x", "stage4_norm_full"})


@pytest.mark.parametrize("name", INNER)
def test_every_stage_equals_the_released_model(golden, name):
    assert_summary(golden[2][name].flatten(1, 2), GOLDEN, f"w2/{name}")


@pytest.mark.parametrize("size", [(64, 64), (61, 75), (5, 40), (4, 4), (100, 33)])
@pytest.mark.parametrize(
    "options", [{}, {"position": "relative"}, {"position": "absolute"}, {"window_size": 7}]
)
def test_any_input_size_works(size, options):
    logits = tiny(**options)(torch.randn(2, 3, *size))
    assert logits.shape == (2, 10)
    assert torch.isfinite(logits).all()


def test_padding_beside_the_map_is_invisible_to_attention():
    model = tiny(kernel_sizes=0)
    block = model.stages()[0].blocks[0]
    block.attn.window = (4, 4)
    x = torch.randn(1, 6, 7, 24)  # windows of 4 pad it to 8 × 8
    out = block(x)
    block.attn.window = (8, 8)  # cut to 6 × 7: no padding at all
    whole = block(x)
    assert not torch.allclose(out, whole)
    for row in range(2):  # window (p, q) holds the tokens of these residues, with or without padding
        for column in range(2):
            tokens = x[:, row::2, column::2]
            torch.testing.assert_close(block(tokens), out[:, row::2, column::2])


def test_an_image_that_divides_is_not_touched_by_the_padding_code():
    model = tiny()
    x = golden_input(0, META["input_shape"])
    strict = tiny(strict_img_size=True)
    assert model(x).equal(strict(x))


def test_strict_sizes_name_the_nearest_valid_ones():
    model = tiny(strict_img_size=True, window_size=2, img_size=64)
    with pytest.raises(
        ValueError, match=r"got 64×70: the nearest valid sizes are height 64 and width 64 or 128"
    ):
        model(torch.randn(1, 3, 64, 70))
    for side in (64, 128):
        assert divides(side, model.config)
    assert nearest_sizes(3, model.config) == [32]


def test_a_valid_size_is_one_that_pads_nowhere():
    config = IwinConfig()
    assert [side for side in range(1, 700) if divides(side, config)] == [224, 448, 672]
    assert nearest_sizes(500, config) == [448, 672]


def test_stages_that_one_window_covers_have_no_convolution():
    assert stage_windows(IwinConfig()) == [7, 7, 7, 7]
    assert stage_kernels(IwinConfig()) == [3, 3, 3, 0]
    assert stage_kernels(IwinConfig(img_size=1024, window_size=16)) == [3, 3, 3, 3]
    assert stage_kernels(IwinConfig(attention="none")) == [3, 3, 3, 3]


@pytest.mark.parametrize(
    "options", [{}, {"structure": "S3"}, {"position": "absolute"}, {"position": "relative"}]
)
def test_growing_the_input_adds_only_identity_convolutions(options):
    model = tiny(**options)
    x = torch.randn(1, 3, 64, 64)
    before = model(x)
    new = model.set_input_size(128)
    expected = {f"layers.3.blocks.0.dwconv.depthwise.{name}" for name in ("weight", "bias")}
    if options.get("structure") == "S3":
        expected |= {f"layers.3.blocks.0.norm0.{name}" for name in ("weight", "bias")}
    assert set(new) == expected
    assert not model.layers[3].blocks[0].dwconv.depthwise.weight.any()
    if options.get("position") != "absolute":  # the larger table's values differ at the old size
        torch.testing.assert_close(model(x), before)
    assert model(torch.randn(1, 3, 128, 128)).shape == (1, 10)
    assert model.set_input_size(64, 4) == []
    assert model.layers[0].blocks[0].attn.window == (4, 4)


@pytest.mark.parametrize("structure", ["S1", "S2", "S3"])
def test_structures_are_what_the_paper_draws(structure):
    model = tiny(structure=structure)
    block = model.stages()[0].blocks[0]
    x = torch.randn(2, 4, 6, 24)
    if structure == "S1":
        normed = block.norm1(x)
        y = x + block.attn(normed) + block.dwconv(normed)
    elif structure == "S2":
        y = x + block.attn(block.norm1(x)) + block.dwconv(x)
    else:
        z = x + block.dwconv(block.norm0(x))
        y = z + block.attn(block.norm1(z))
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))


@pytest.mark.parametrize(("attention", "apart"), [("window", 1), ("interleaved", 2)])
def test_windows_are_of_neighbours_or_of_tokens_apart(attention, apart):
    block = tiny(attention=attention, kernel_sizes=0).stages()[0].blocks[0].eval()
    x = torch.randn(1, 4, 4, 24)
    changed = x.clone()
    changed[0, 0, 0] = torch.randn(24)
    reached = (block(changed) - block(x)).abs().amax(dim=-1)[0] > 0
    window = torch.cartesian_prod(torch.tensor([0, apart]), torch.tensor([0, apart]))
    assert reached.nonzero().tolist() == window.tolist()


class Dropped(nn.Module):
    """Drops every branch, as stochastic depth does some."""

    def forward(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize("structure", ["S1", "S2", "S3"])
def test_stochastic_depth_drops_every_branch_and_leaves_the_input(structure):
    block = tiny(structure=structure, drop_path_rate=0.3).stages()[0].blocks[0]
    block.drop_path = Dropped()
    x = torch.randn(2, 4, 6, 24)
    assert torch.equal(block(x), x)


def test_every_parameter_gets_a_gradient_under_checkpointing():
    model = tiny(position="relative", drop_path_rate=0.3).train()
    for stage in model.stages():
        stage.grad_checkpointing = True
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_stochastic_depth_keeps_the_mean_and_grows_with_depth():
    torch.manual_seed(0)
    model = tiny(drop_path_rate=0.4)
    blocks = [block for stage in model.stages() for block in stage.blocks]
    assert [round(block.drop_path.rate, 2) for block in blocks] == [0.0, 0.1, 0.2, 0.3, 0.4]
    drop = blocks[-1].drop_path.train()
    out = drop(torch.ones(20_000, 1, 1, 1))
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert drop.eval()(out) is out


def test_heads_and_pools():
    x = torch.randn(2, 3, 64, 64)
    assert tiny(num_classes=0)(x).shape == (2, 192)
    assert tiny(num_classes=0, global_pool="")(x).shape == (2, 2, 2, 192)
    model = tiny()
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((1, 2)))
    torch.testing.assert_close(model.forward_head(features), model(x))


def test_relative_position_bias_is_by_offset():
    model = tiny(position="relative", window_size=4)
    attention = model.stages()[0].blocks[0].attn
    bias = attention.position_bias((4, 4))[0]
    assert bias.shape == (1, 16, 16)
    assert bias[0, 5, 0] == bias[0, 15, 10]  # both one down, one right
    table = attention.relative_position_bias_table.reshape(7, 7, -1)
    assert bias[0, 5, 0] == table[4, 4, 0]
    cut = attention.position_bias((3, 2))[0]
    assert cut.equal(bias.reshape(1, 4, 4, 4, 4)[:, :3, :2, :3, :2].reshape(1, 6, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "shifted"}, "attention must be one of 'interleaved', 'window', 'none', got 'shifted'"),
        ({"downsample": "max"}, "downsample must be one of 'conv', 'dwconv', 'pool', 'merge', got 'max'"),
        ({"structure": "S4"}, "structure must be one of"),
        ({"position": "sincos"}, "position must be one of"),
        ({"global_pool": "max"}, "global_pool must be one of"),
        ({"num_heads": (3, 6)}, "must have one number for each stage"),
        ({"kernel_sizes": (3, 3)}, "must have one number for each stage"),
        ({"kernel_sizes": 4}, "kernel_sizes must be odd, or 0 for none, got 4"),
        (
            {"num_heads": (5, 6, 12, 24)},
            "num_heads must divide the width of each stage, got 5 for 96 channels",
        ),
        ({"depths": (2, 0, 6, 2)}, "depths must be at least 1 in every stage"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"in_chans": -1}, "in_chans must be at least 1, got -1"),
        ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"mlp_ratio": 0.001}, "mlp_ratio must be finite and leave the MLPs .* got 0.001 for embed_dim=96"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio must be finite"),
        ({"drop_rate": float("nan")}, "drop_rate must be at least 0 and below 1, got nan"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1, got 1.0"),
        ({"window_size": 0}, "window_size must be a positive integer"),
        ({"img_size": 3}, "img_size must be at least one patch of 4, got 3"),
        ({"img_size": (224,)}, "img_size must be a positive integer, or one for each of 2 axes"),
    ],
)
def test_options_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        IwinTransformer(**options)
