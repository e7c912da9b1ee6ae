import pytest
import torch
from golden_rule import assert_golden, assert_summary, golden_input, golden_tensor, load_json, load_npz
from torch import nn

from iwin_core import IwinTransformer, load_official_checkpoint
from iwin_tasks.segmentation import build_segmenter
from iwin_tasks.segmentation.heads import FCNHead
from iwin_tasks.segmentation.model import pixel_loss

META = load_json("iwin_seg_share_meta.json")
GOLDEN = load_npz("iwin_seg_share.npz")
KINDS = {"uper": "upernet", "fpn": "semantic_fpn"}
NAME = "iwin_tiny_patch4_window7_224"
BODY = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "drop_path_rate": 0.0}
PARAMETERS = {
    "upernet": {"tiny": 61_880_012, "small": 83_219_660, "base": 124_753_068},
    "semantic_fpn": {"tiny": 33_831_990, "small": 55_171_638, "base": 94_714_390},
}


def small(kind="upernet", **options):
    """Returns the golden variant of a segmenter, freshly initialised."""
    given = {"channels": 64, "auxiliary_channels": 32, "dropout": 0.0, "backbone_options": BODY}
    return build_segmenter(kind, NAME, 7, **(given | options))


def rule_state(shapes):
    """Returns the tensors that the golden rule and its additions give official names."""
    state = {}
    for key, shape in shapes.items():
        tensor = torch.tensor(0) if key.endswith("num_batches_tracked") else golden_tensor(key, shape)
        state[key] = 1 + tensor.abs() if key.endswith("running_var") else tensor
    return state


@pytest.fixture(scope="module", params=KINDS)
def golden(request, tmp_path_factory):
    """Returns a kind and its model with the golden weights, read from a file as the authors write theirs."""
    kind, model = request.param, small(KINDS[request.param])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == META["shapes"][kind]
    path = tmp_path_factory.mktemp("weights") / f"{kind}.pth"
    meta = {"CLASSES": ("wall", "sky"), "PALETTE": [[1, 2, 3]], "env_info": "torch 1.7", "iter": 160000}
    momentum = {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 6e-5}]}
    state = rule_state(META["shapes"][kind])
    torch.save({"meta": meta, "state_dict": state, "optimizer": momentum}, path)
    assert set(vars(load_official_checkpoint(model, path)).values()) == {()}
    return kind, model


@pytest.mark.parametrize("case", ["a", "b"])
@torch.no_grad()
def test_maps_and_logits_equal_the_released_code(golden, case):
    kind, model = golden
    name = f"{kind}_{case}"
    x = golden_input(META["cases"][name]["seed"], (1, 3, *META["cases"][name]["hw"]))
    model.eval()
    for number, m in enumerate(model.maps(x)):
        assert_summary(m, GOLDEN, f"{name}/features{number}")
    assert_golden(model.decode(x), GOLDEN[f"{name}/logits"])
    assert_summary(model(x), GOLDEN, f"{name}/full")
    assert model(x).argmax(1)[0].equal(torch.from_numpy(GOLDEN[f"{name}/argmax"]).long())
    if model.auxiliary_head is not None:
        assert_golden(model.auxiliary_head(model.maps(x)), GOLDEN[f"{name}/aux"])


def test_losses_and_gradients_equal_the_released_code(golden):
    kind, model = golden
    name, meta = f"{kind}_train_t", META["train"][f"{kind}_train_t"]
    load_official_checkpoint(model, rule_state(META["shapes"][kind]))
    labels = torch.from_numpy(GOLDEN[f"{name}/labels"]).long()
    found = model.train()(golden_input(meta["seed"], (2, 3, *meta["hw"])), labels)
    assert {key: value.item() for key, value in found.items()} == pytest.approx(meta["losses"], rel=1e-5)
    total = sum(value for key, value in found.items() if "loss" in key)
    assert total.item() == pytest.approx(meta["total"], rel=1e-5)
    model.zero_grad()
    total.backward()
    parameters = dict(model.named_parameters())
    norms = torch.tensor([parameters[key].grad.norm() for key in meta["grad_keys"]])
    expected = torch.from_numpy(GOLDEN[f"{name}/grad_l2"]).float()
    assert len(parameters) == len(norms)
    torch.testing.assert_close(norms, expected, rtol=0, atol=1e-4 * float(expected.max()))
    norm = model.get_submodule(meta["running_of"])
    for what in ("running_mean", "running_var"):
        assert_summary(getattr(norm, what), GOLDEN, f"{name}/{what}")


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_parameters_are_those_of_mmsegmentation(kind, size):
    with torch.device("meta"):
        model = build_segmenter(kind, f"iwin_{size}_patch4_window7_224", 150)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[kind][size]
    assert model.backbone.config.drop_path_rate == 0.3
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout2d)] == [0.1] * (
        2 if kind == "upernet" else 1
    )


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("size", [(4, 4), (37, 90)])
def test_any_input_size_gives_logits_of_its_sides(kind, size):
    assert small(kind).eval()(torch.randn(2, 3, *size)).shape == (2, 7, *size)


def test_whole_channels_are_dropped_before_the_logits_in_training_alone():
    head, seen = FCNHead((2, 2, 2, 2), 64, 3, dropout=0.5), []
    head.conv_seg.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    maps = [torch.randn(2, 2, 5, 7)] * 4
    head(maps)
    head.eval()(maps)
    dropped, kept = (x.flatten(2).eq(0).all(-1).float().mean().item() for x in seen)
    assert 0.2 < dropped < 0.8
    assert kept == 0


def test_ignored_pixels_weigh_nothing_but_are_counted():
    logits, labels = torch.randn(1, 3, 4, 6), torch.randint(0, 3, (1, 4, 6))
    labels[0, 0] = 9
    mean = nn.functional.cross_entropy(logits, labels, ignore_index=9)
    torch.testing.assert_close(pixel_loss(logits, labels, 9), mean * 18 / 24)
    assert pixel_loss(logits, torch.full_like(labels, 9), 9) == 0


def test_an_auxiliary_head_that_the_model_lacks_is_left_out():
    source, model = small(), small(auxiliary_channels=0)
    report = load_official_checkpoint(model, {"state_dict": source.state_dict()})
    assert len(report.left_out) == 8
    assert model.decode_head.conv_seg.weight.equal(source.decode_head.conv_seg.weight)
    with pytest.raises(ValueError, match="weights must be exactly the model's, got missing: auxiliary_head"):
        load_official_checkpoint(source, model.state_dict())
    with pytest.raises(
        ValueError, match=r"of another shape: decode_head.conv_seg.weight \(7, 64, 1, 1\) for"
    ):
        load_official_checkpoint(build_segmenter("upernet", NAME, 8, channels=64, auxiliary_channels=0,
                                                 backbone_options=BODY), source.state_dict())  # fmt: skip


def test_a_classifiers_weights_start_the_backbone():
    source, model = IwinTransformer(**BODY), small()
    load_official_checkpoint(model.backbone, {"model": source.state_dict()})
    assert model.backbone.patch_embed.proj.weight.equal(source.patch_embed.proj.weight)


def test_another_timm_backbone_learns():
    model = build_segmenter("semantic_fpn", "resnet10t", 3, channels=16)
    found = model(torch.randn(2, 3, 64, 96), torch.randint(0, 3, (2, 64, 96)))
    found["decode.loss_seg"].backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("upernets", {}, "segmenter .*upernet"),
        ("upernet", {"channels": 0}, "channels at least 1 .* got 7, 0 and 32"),
        ("semantic_fpn", {"channels": 1}, "channels at least 2 .* got 7, 1 and 32"),
        ("upernet", {"auxiliary_channels": -1}, "auxiliary_channels at least 0, got 7, 64 and -1"),
        ("upernet", {"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ("upernet", {"backbone_options": {"window": 4}}, "must be fields of IwinConfig, got window"),
    ],
)
def test_options_that_cannot_be_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        small(kind, **options)
