import re

import pytest
import timm
import torch
from golden_rule import load_json
from safetensors.torch import save_file
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from iwin_core import IwinTransformer
from iwin_core.backbone.config import SMALL_1K_HEADS
from iwin_core.backbone.timm_models import CLASSES, INPUTS, RELEASED, variants

PARAMETERS = {(case["model"], case["img"]): case["params"] for case in load_json("params_flops.json")["iwin"]}
SMALL = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "img_size": (64, 96)}
NAME = "iwin_tiny_patch4_window7_224"


def create(name=NAME, **options):
    """Returns a model of the registry at a size for tests."""
    return timm.create_model(name, **(SMALL | {"num_classes": 10} | options))


def test_registry_holds_every_size_at_every_resolution():
    names = set(timm.list_models("iwin_*"))
    assert names == set(variants())
    assert {
        f"iwin_{size}_patch4_{which}" for size in ("tiny", "small", "base", "large") for which in INPUTS
    } < names
    assert {"iwin_base_patch4_window16_1024_22kto1k", "iwin_large_patch4_window12_384_22k"} < names


@pytest.mark.parametrize("name", variants())
def test_entry_point_is_the_released_model(name):
    size, side, suffix = (variants()[name][key] for key in ("size", "side", "suffix"))
    with torch.device("meta"):
        model = timm.create_model(name)
    classes = CLASSES[suffix]
    parameters = PARAMETERS[size, side] + (classes - 1000) * (model.num_features + 1)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert isinstance(model, IwinTransformer)
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (3, side, side)
    assert cfg["num_classes"] == model.num_classes == classes
    assert cfg["crop_pct"] == (0.9 if side == 224 else 1.0)
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model(torch.empty(1, 3, side, side, device="meta")).shape == (1, classes)
    released = side in RELEASED[suffix].get(size, ())
    assert cfg.get("notes") == ((f"{name}.pth",) if released else None)
    heads = SMALL_1K_HEADS if (size, suffix) == ("small", "") else model.config.num_heads
    assert model.config.num_heads == heads


@pytest.mark.parametrize("name", [name for name in variants() if name.startswith("iwin_tiny")])
def test_every_parameter_gets_a_gradient(name):
    model = create(name, drop_path_rate=0.1).train()
    model(torch.randn(2, 3, 64, 96)).square().sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("indices", "stages"),
    [(None, [0, 1, 2, 3]), ((0, 1), [0, 1]), ((-1, 0), [3, 0]), ([2], [2]), (2, [2, 3])],
)
def test_features_only_gives_nchw_maps_and_a_true_feature_info(indices, stages):
    model = create(features_only=True, out_indices=indices).train()  # timm leaves out what is None
    maps = model(torch.randn(2, 3, 64, 96))
    assert model.feature_info.channels() == [16 * 2**stage for stage in stages]
    assert model.feature_info.reduction() == [4 * 2**stage for stage in stages]
    shapes = [(2, 16 * 2**stage, 16 // 2**stage, 24 // 2**stage) for stage in stages]
    assert [features.shape for features in maps] == shapes
    sum(features.sum() for features in maps).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("indices", [(4,), (-5,), (0, 7), 5, 0, ()])
def test_stages_that_do_not_exist_are_named(indices):
    message = "stage indices must be from -4 to 3, or how many of the last, got"
    with pytest.raises(ValueError, match=message):
        create(features_only=True, out_indices=indices)
    with pytest.raises(ValueError, match=message):
        create().forward_intermediates(torch.randn(1, 3, 64, 96), indices)


def test_other_feature_extractors_are_refused():
    with pytest.raises(ValueError, match="feature_cls must be 'getter', which gives NCHW maps, got 'hook'"):
        create(features_only=True, feature_cls="hook")


def test_intermediates_are_the_stages_maps():
    model, x = create().eval(), torch.randn(2, 3, 64, 96)
    stages = model.forward_stages(x)
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    for ours, stage in zip(maps, stages, strict=True):
        assert ours.is_contiguous()
        assert ours.movedim(1, -1).equal(stage)
    normed = model.forward_intermediates(x, [0, -1], norm=True, output_fmt="NHWC", intermediates_only=True)
    assert normed[0].equal(stages[0])
    assert normed[1].equal(last)
    early, maps = model.forward_intermediates(x, [1], stop_early=True)
    assert early.movedim(-1, 1).equal(maps[0])
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NHWC, got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_pruning_keeps_what_the_chosen_stages_need():
    model, x = create(kernel_sizes=(5, 3, 3, 3)).eval(), torch.randn(2, 3, 64, 96)
    expected = model.forward_stages(x)
    assert model.prune_intermediate_layers([-4, 1]) == [0, 1]
    assert len(model.layers) == 2
    assert [type(part) for part in (model.norm, model.head)] == [nn.Identity, nn.Identity]
    torch.testing.assert_close(model(x), expected[1])
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)
    assert model.set_input_size((128, 96)) == []
    whole = create().eval()
    assert whole.prune_intermediate_layers(4, prune_head=False) == [0, 1, 2, 3]
    assert whole(x).shape == (2, 10)


def test_classifier_is_reset():
    model, x = create().eval().double(), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.num_classes == model.config.num_classes == model.get_classifier().out_features == 7
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    model.reset_classifier(0, global_pool="")
    assert model(x).shape == (2, 2, 3, 128)
    with pytest.raises(ValueError, match="global_pool must be one of 'avg', '', got 'max'"):
        model.reset_classifier(7, "max")
    assert create(num_classes=0, global_pool="").eval()(x.float()).shape == (2, 2, 3, 128)


FINE = ["stem", "layers.0.blocks.0", "layers.0.downsample", "layers.1.blocks.0", "layers.1.downsample"]
FINE += ["layers.2.blocks.0", "layers.2.blocks.1", "layers.2.downsample", "layers.3.blocks.0", "head"]
COARSE = ["stem", "layers.0", "layers.1", "layers.2", "layers.3", "head"]


@pytest.mark.parametrize(("coarse", "depth"), [(False, FINE), (True, COARSE)])
def test_layer_groups_hold_every_parameter_once_in_the_order_of_depth(coarse, depth):
    model = create(position="absolute")
    matcher = model.group_matcher(coarse)
    patterns = [matcher["stem"], *(pattern for pattern, _ in matcher["blocks"]), matcher["head"]]
    for name, _ in model.named_parameters():
        assert sum(re.match(pattern, name) is not None for pattern in patterns) == 1, name
    groups = group_parameters(model, matcher)
    for number, where in enumerate(depth):
        prefix = ("patch_embed.", "absolute_pos_embed") if where == "stem" else f"{where}."
        expected = {name for name, _ in model.named_parameters() if name.startswith(prefix)}
        last_stage = number == len(depth) - 2
        assert set(groups[number]) == expected | ({"norm.weight", "norm.bias"} if last_stage else set())
    assert len(groups) == len(depth)


def test_layer_wise_decay_scales_the_stem_least():
    model = create()
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    assert scale[id(model.patch_embed.proj.weight)] == 0.5**9
    assert scale[id(model.head.weight)] == 1


@pytest.mark.parametrize("position", ["absolute", "relative", "none"])
def test_position_tables_are_not_decayed(position):
    model = create(position=position)
    tables = model.no_weight_decay()
    assert len(tables) == {"absolute": 1, "relative": 5, "none": 0}[position]
    undecayed = create_optimizer_v2(model, opt="adamw", weight_decay=0.05).param_groups[0]
    assert undecayed["weight_decay"] == 0
    ids = {id(parameter) for parameter in undecayed["params"]}
    assert {id(model.get_parameter(name)) for name in tables} <= ids


def test_checkpointing_changes_memory_alone():
    model, x = create(drop_path_rate=0.0).train(), torch.randn(2, 3, 64, 96)
    model(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in model.stages())
    model(x).square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)
    model.set_grad_checkpointing(False)
    assert not any(stage.grad_checkpointing for stage in model.stages())


@pytest.mark.parametrize(
    "options",
    [
        {"in_chans": 1},
        {"img_size": 32},
        {"window_size": 4, "drop_rate": 0.1},
        {"attention": "window", "downsample": "merge"},
        {"kernel_sizes": (7, 5, 3, 0), "position": "relative"},
        {"structure": "S3", "num_heads": (2, 2, 2, 2)},
        {"dtype": torch.float64, "device": "cpu"},
    ],
    ids=str,
)
def test_options_reach_the_model(options):
    model = create(**options)
    for name in options.keys() - {"dtype", "device"}:
        assert getattr(model.config, name) == options[name]
    x = torch.randn(2, options.get("in_chans", 3), 64, 96, dtype=options.get("dtype"))
    assert model(x).shape == (2, 10)


def test_strict_sizes_and_a_new_input_size():
    model = create(strict_img_size=True, window_size=2, img_size=64)
    with pytest.raises(ValueError, match="with strict_img_size the input must divide without padding"):
        model(torch.randn(1, 3, 64, 70))
    assert "layers.3.blocks.0.dwconv.depthwise.weight" in model.set_input_size((128, 192))
    assert model(torch.randn(1, 3, 128, 192)).shape == (1, 10)


def test_pretrained_without_a_file_says_what_to_give():
    message = r"needs a local file with the release's iwin_tiny_patch4_window7_224.pth, got none: give it as"
    with pytest.raises(ValueError, match=message):
        create(pretrained=True)
    with pytest.raises(ValueError, match="weights that fit, as none were released, got none"):
        create("iwin_tiny_patch4_window12_384", pretrained=True)


@pytest.mark.parametrize(
    "options", [{}, {"num_classes": 3}, {"in_chans": 1}, {"features_only": True}], ids=str
)
def test_pretrained_with_a_file_reads_it_as_our_loader_does(options, tmp_path):
    source = create()
    save_file(source.state_dict(), tmp_path / "iwin.safetensors")
    torch.save({"model": source.state_dict()}, tmp_path / "iwin.pth")
    for path in tmp_path.iterdir():
        overlay = {"file": str(path)}
        model = create(pretrained=True, pretrained_cfg_overlay=overlay, **options)
        loaded = model.model if "features_only" in options else model
        assert loaded.layers[2].blocks[1].attn.qkv.weight.equal(source.layers[2].blocks[1].attn.qkv.weight)
        stem = loaded.patch_embed.proj.weight
        expected = source.patch_embed.proj.weight
        torch.testing.assert_close(stem, expected.sum(1, keepdim=True) if "in_chans" in options else expected)
    with pytest.raises(ValueError, match="weights must be exactly the model's, got missing: "):
        create(pretrained=True, pretrained_cfg_overlay=overlay, depths=(1, 1, 3, 1))


def test_a_new_head_and_new_parts_are_as_the_model_is():
    options = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "img_size": 64}
    model = timm.create_model("iwin_tiny_patch4_window7_224", **options, window_size=2, position="absolute")
    model.eval()
    model.reset_classifier(3)
    assert not model.head.training
    model.requires_grad_(False)
    assert model.set_input_size((256, 256), window_size=2)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == []
    assert [name for name, module in model.named_modules() if module.training] == []
    model.train().requires_grad_(True)
    model.reset_classifier(2)
    assert model.head.training
    assert all(p.requires_grad for p in model.head.parameters())
