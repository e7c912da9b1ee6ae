import pickle
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from iwin_core import IwinTransformer, load_official_checkpoint
from iwin_core.backbone.config import BACKBONE_SIZES
from iwin_core.backbone.resize import resize_bicubic

STAGE_4 = tuple(f"layers.3.blocks.0.dwconv.depthwise.{name}" for name in ("weight", "bias"))


def small(**options):
    """Returns a backbone of tests: at 64 px stage 4 is one window, at 128 it is not."""
    given = {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
    return IwinTransformer(**(given | {"num_classes": 10, "window_size": 2} | options)).eval()


def copies(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def renamed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


LAYOUTS = {
    "under model": lambda state: {"model": state, "epoch": 299},
    "bare": lambda state: state,
    "distributed": lambda state: {"model": renamed(state, "module.")},
    "compiled and distributed": lambda state: renamed(state, "module._orig_mod."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("through_a_file", [True, False])
def test_every_layout_loads(layout, through_a_file, tmp_path):
    source, model = small(), small()
    checkpoint = LAYOUTS[layout](source.state_dict())
    if through_a_file:
        torch.save(checkpoint, tmp_path / "iwin.pth")
    report = load_official_checkpoint(model, tmp_path / "iwin.pth" if through_a_file else checkpoint)
    assert_unchanged(model, source.state_dict())
    assert set(vars(report).values()) == {()}


def test_safetensors_load(tmp_path):
    source, model = small(), small()
    save_file(source.state_dict(), tmp_path / "iwin.safetensors")
    load_official_checkpoint(model, str(tmp_path / "iwin.safetensors"))
    assert_unchanged(model, source.state_dict())


def test_a_trainers_configuration_beside_the_weights_is_passed_over(tmp_path, monkeypatch):
    module = ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = module.CfgNode(MODEL=module.CfgNode(TYPE="iwin"))
    config.__dict__["__immutable__"] = True
    source, model = small(), small()
    torch.save({"model": source.state_dict(), "config": config}, tmp_path / "iwin.pth")
    load_official_checkpoint(model, tmp_path / "iwin.pth")
    assert_unchanged(model, source.state_dict())


def test_a_larger_input_adds_only_identity_convolutions_and_names_them(caplog):
    source, model = small(), small(img_size=128)
    with caplog.at_level("INFO", "iwin_core.backbone.weights"):
        report = load_official_checkpoint(model, source.state_dict())
    assert report.new == STAGE_4
    assert (report.resized, report.reinitialised, report.left_out) == ((), (), ())
    assert caplog.messages == [f"loading weights: new {', '.join(STAGE_4)}"]
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), source(x))


def test_released_224_weights_in_a_1024_model_lack_the_four_tensors_of_stage_4():
    with torch.device("meta"):
        source = IwinTransformer(**BACKBONE_SIZES["tiny"])
        models = {
            side: IwinTransformer(**BACKBONE_SIZES["tiny"], img_size=side, window_size=window)
            for window, side in ((12, 384), (16, 512), (16, 1024))
        }
    news = {side: load_official_checkpoint(model, source.state_dict()).new for side, model in models.items()}
    names = [f"layers.3.blocks.{b}.dwconv.depthwise.{name}" for b in (0, 1) for name in ("weight", "bias")]
    assert news == {384: (), 512: (), 1024: tuple(names)}


def test_convolutions_of_a_larger_input_are_left_over_in_a_smaller_one():
    model = small()
    before = copies(model)
    with pytest.raises(
        ValueError, match=f"weights must be exactly the model's, got left over: {', '.join(STAGE_4)}$"
    ):
        load_official_checkpoint(model, small(img_size=128).state_dict())
    assert_unchanged(model, before)


def test_a_head_for_other_classes_is_fresh_and_named():
    source, model = small(), small(num_classes=7)
    report = load_official_checkpoint(model, source.state_dict())
    assert report.reinitialised == ("head.weight", "head.bias")
    assert 0.01 < model.head.weight.std() < 0.03
    assert not model.head.bias.any()
    assert model.norm.weight.equal(source.norm.weight)


def test_a_model_without_a_head_leaves_it_out():
    report = load_official_checkpoint(small(num_classes=0), small().state_dict())
    assert report.left_out == ("head.weight", "head.bias")


def test_absolute_positions_of_another_size_are_resized():
    source, model = small(position="absolute"), small(position="absolute", img_size=(64, 96))
    report = load_official_checkpoint(model, source.state_dict())
    assert report.resized == ("absolute_pos_embed",)
    table = resize_bicubic(source.absolute_pos_embed.unflatten(1, (16, 16)), (16, 24)).flatten(1, 2)
    torch.testing.assert_close(model.absolute_pos_embed, table)
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(model(x), source(x))


def test_relative_positions_of_another_window_are_resized():
    options = {"position": "relative", "img_size": 128}
    source, model = small(**options), small(**options, window_size=4)
    expected = small(**options)
    state = {name: torch.randn_like(value) for name, value in source.state_dict().items()}
    load_official_checkpoint(expected, state)
    expected.set_input_size(window_size=4)
    absent = [name for name in state if ".dwconv." in name and name not in model.state_dict()]
    report = load_official_checkpoint(model, {name: state[name] for name in state if name not in absent})
    assert len(report.resized) == 5
    for name in report.resized:
        assert model.get_parameter(name).equal(expected.get_parameter(name))


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


FAULTS = {  # what is done to good weights, and what the error says of it
    "missing": (without("layers.1.downsample.conv.bias"), "got missing: layers.1.downsample.conv.bias$"),
    "half a convolution": (
        without("layers.0.blocks.0.dwconv.depthwise.bias"),
        "got missing: layers.0.blocks.0.dwconv.depthwise.bias$",
    ),
    "left over": (lambda state: state | {"extra": torch.ones(1)}, "got left over: extra$"),
    "shape": (
        lambda state: state | {"norm.bias": torch.ones(3)},
        r"got of another shape: norm.bias \(3,\) for \(128,\)$",
    ),
    "head of another width": (
        lambda state: state | {"head.weight": torch.ones(10, 3)},
        r"got of another shape: head.weight \(10, 3\) for \(10, 128\)$",
    ),
    "several": (
        lambda state: without("norm.bias")(state) | {"extra": torch.ones(1)},
        "got missing: norm.bias; left over: extra$",
    ),
    "another model": (
        lambda state: renamed(state, "backbone."),
        r"got missing: patch_embed.proj.weight, .* and \d+ more; left over: backbone.patch_embed.* more$",
    ),
    "nothing": (lambda state: {"model": {}}, "weights must be tensors by name, .* got nothing$"),
    "no tensors": (
        lambda state: {"epoch": 3},
        "weights must be tensors by name, .* something else under epoch$",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_the_models_are_refused_and_nothing_is_loaded(fault):
    damage, message = FAULTS[fault]
    model = small()
    before = copies(model)
    with pytest.raises(ValueError, match=message):
        load_official_checkpoint(model, damage(small().state_dict()))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pth", None, "got .*absent.pth: .*No such file"),
        ("text.pth", b"not weights", "got .*text.pth: it is no torch file$"),
        ("empty.pth", b"", "got .*empty.pth: "),
        ("cut.pth", 5000, "got .*cut.pth: "),
        ("cut.safetensors", 5000, "got .*cut.safetensors: "),
        (
            "list.pth",
            [1, 2],
            "weights must be tensors by name, at the top or under 'model' or 'state_dict', got list$",
        ),
    ],
)
def test_a_file_that_is_not_weights_is_refused_in_one_sentence(name, content, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        state = small().state_dict() if isinstance(content, int) else content
        (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
        path.write_bytes(path.read_bytes()[: content if isinstance(content, int) else None])
    model = small()
    before = copies(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_official_checkpoint(model, path)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


def test_code_in_a_pickle_is_named_and_not_run(tmp_path):
    torch.save({"model": small().state_dict(), "run": pickle.Pickler}, tmp_path / "iwin.pth")
    with pytest.raises(ValueError, match=r"it holds a pickle.Pickler, not tensors alone$"):
        load_official_checkpoint(small(), tmp_path / "iwin.pth")
