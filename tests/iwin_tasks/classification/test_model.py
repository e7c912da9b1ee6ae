import pytest
import torch
from safetensors.torch import save_file

from iwin_tasks.classification.model import input_format, load_weights, make_model

TINY = {
    "name": "iwin_tiny_patch4_window7_224",
    "img_size": (16, 24),
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": (1, 1),
    "num_heads": (1, 2),
    "num_classes": 7,
}


def test_the_input_format_is_the_models_unless_told_otherwise():
    form = input_format(make_model(TINY))
    assert (form.image_size, form.interpolation, form.crop_pct) == ((16, 24), "bicubic", 0.9)
    assert form.mean == pytest.approx((0.485, 0.456, 0.406))
    assert form.std == pytest.approx((0.229, 0.224, 0.225))
    told = input_format(make_model(TINY), "bilinear", 1.0)
    assert (told.interpolation, told.crop_pct) == ("bilinear", 1.0)


def test_weights_come_from_a_file_or_from_the_average_of_a_run(tmp_path):
    source = make_model(TINY).state_dict()
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    for folder in (checkpoint / "ema", checkpoint / "model"):
        folder.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"format": 1}')
    save_file(source, checkpoint / "ema" / "model.safetensors")
    save_file({name: value + 1 for name, value in source.items()}, checkpoint / "model" / "model.safetensors")
    for path in (tmp_path / "run", checkpoint, checkpoint / "ema" / "model.safetensors"):
        model = make_model(TINY)
        load_weights(model, path)
        for name, value in model.state_dict().items():
            assert torch.equal(value, source[name]), name


def test_weights_fit_a_larger_input_by_its_window_alone(tmp_path):
    small, large = make_model(TINY), make_model(TINY | {"img_size": (32, 48), "window_size": 8})
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    load_weights(large, tmp_path / "small.safetensors")
    for name, value in large.state_dict().items():
        assert torch.equal(value, small.state_dict()[name]), name
    assert large(torch.randn(2, 3, 32, 48)).shape == (2, 7)


def test_models_and_weights_that_cannot_be_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"model needs a 'name' such as iwin_tiny"):
        make_model({"depths": (1, 1)})
    with pytest.raises(ValueError, match=r"unknown model 'iwin_tiny_patch4_window7'; did you mean 'iwin_"):
        make_model({"name": "iwin_tiny_patch4_window7"})
    with pytest.raises(ValueError, match=r"key 'model.window'; did you mean 'model.window_size'"):
        make_model(TINY | {"window": 4})
    with pytest.raises(ValueError, match=r"weights must be a file of weights or a run, got .*absent"):
        load_weights(make_model(TINY), tmp_path / "absent")
    with pytest.raises(ValueError, match=r"a run or a folder step_"):
        load_weights(make_model(TINY), tmp_path)
