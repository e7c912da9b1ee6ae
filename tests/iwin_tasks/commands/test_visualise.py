import pytest
import torch
from PIL import Image

from flashdit.shared.command import run_script
from flashdit.shared.runs import find_checkpoint
from flashdit.shared.weights import read_tensors
from iwin_tasks.commands import visualise
from iwin_tasks.commands.panels import colours, read_photographs


def test_colours_run_from_violet_to_yellow():
    ends = colours(torch.tensor([[-1.0, 0.0, 0.5, 1.0]]))
    assert ends[0].tolist() == [[68, 1, 84], [68, 1, 84], [33, 145, 140], [253, 231, 37]]


@pytest.fixture
def photographs(tmp_path):
    """Returns a folder with a red and a blue image of unequal sides."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    Image.new("RGB", (50, 30), (255, 0, 0)).save(folder / "a.png")
    Image.new("L", (20, 40), 51).save(folder / "b.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_photographs_are_read_in_name_order(photographs):
    images = read_photographs(photographs, (4, 6), 5)
    assert images.shape == (2, 3, 4, 6)
    assert images[0, :, 1, 1].tolist() == [1, 0, 0]
    torch.testing.assert_close(images[1], torch.full((3, 4, 6), 0.2))


def test_photographs_with_alpha_are_white_where_they_are_clear(photographs):
    Image.new("RGBA", (50, 30), (0, 255, 0, 0)).save(photographs / "a.png")
    assert read_photographs(photographs, (4, 6), 1).unique().tolist() == [1]
    (photographs / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"every image must be readable, .*a.png is not"):
        read_photographs(photographs, (4, 6), 1)


@pytest.mark.parametrize(
    ("model", "layer", "kind", "size"),
    [
        ("resnet10t", "layer2", "erf", (64, 96)),
        ("resnet10t", "layer3", "gradcam", (64, 96)),
        ("swin_tiny_patch4_window7_224", "layers.2", "gradcam", (224, 224)),  # timm warns at others
        ("vit_tiny_patch16_224", "blocks.1", "erf", (64, 96)),
    ],
)
def test_command_draws_any_timm_model(model, layer, kind, size, photographs, tmp_path, capsys):
    pytest.importorskip("timm")
    output = tmp_path / "out.png"
    options = ["--images", str(photographs), "--size", *map(str, size), "--output", str(output)]
    visualise.main(["--model", model, "--layer", layer, "--kind", kind, *options])
    assert f"wrote {output}" in capsys.readouterr().out
    with Image.open(output) as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "resnet10", "--layer", "layer1"],
            "model must be a name that timm knows, nearest are resnet10t",
        ),
        (["--layer", "layer9"], "layer must be a module of the model, nearest are layer"),
        (["--layer", "layer1", "--images", "nowhere"], "images must be a folder of images, got nowhere"),
        (
            ["--layer", "layer1", "--checkpoint", "nowhere.pth"],
            "must be a file of weights or a run, got nowhere.pth",
        ),
        (["--layer", "layer1", "--checkpoint", __file__], "checkpoint must hold the weights of resnet10t"),
        (
            ["--layer", "layer1", "--class-index", "3"],
            "--class-index is for --kind gradcam, got it with --kind erf",
        ),
        (
            ["--layer", "layer1", "--kind", "gradcam", "--position", "0", "0"],
            "--position is for --kind erf, got it with --kind gradcam",
        ),
        (["--layer", "layer1", "--size", "0", "8"], "size and num_images must be positive"),
        (
            ["--layer", "layer1", "--output", "/proc/nowhere/out.png"],
            "--output must be where files can be written, got /proc/nowhere",
        ),
    ],
)
def test_command_ends_with_one_line(arguments, message, capsys):
    pytest.importorskip("timm")
    argv = ["--model", "resnet10t", "--size", "32", "48", *arguments]
    with pytest.raises(SystemExit) as exit_info:
        run_script(lambda: visualise.main(argv))
    assert exit_info.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_size_that_a_model_refuses_is_named():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"size must be one that swin_.* takes, got \(3, 5\)"):
        visualise.build_model("swin_tiny_patch4_window7_224", None, (3, 5))


def test_checkpoint_is_loaded_and_one_of_another_model_refused(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(5)
    trained = timm.create_model("resnet10t")
    torch.save({"model": trained.state_dict()}, tmp_path / "weights.pth")
    loaded = visualise.build_model("resnet10t", tmp_path / "weights.pth", None)
    torch.testing.assert_close(loaded.fc.weight, trained.fc.weight)
    with pytest.raises(ValueError, match="checkpoint must hold the weights of resnet18, got "):
        visualise.build_model("resnet18", tmp_path / "weights.pth", None)


def test_a_trained_run_is_drawn_with_its_own_model_and_size(classifier_run, photographs, tmp_path, capsys):
    words = ["--checkpoint", str(classifier_run), "--layer", "layers.1", "--kind", "gradcam"]
    visualise.main([*words, "--images", str(photographs), "--output", str(tmp_path / "cams.png")])
    assert "wrote" in capsys.readouterr().out
    average = read_tensors(find_checkpoint(classifier_run) / "ema")
    model = visualise.build_model(None, classifier_run, None)
    assert visualise.model_size(model) == (32, 32)
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())


def test_a_run_of_another_model_or_kind_is_refused(classifier_run, tmp_path):
    with pytest.raises(ValueError, match=r"--model must be that of the run, iwin_\w+, or be left out, got"):
        visualise.build_model("resnet10t", classifier_run, None)
    with pytest.raises(ValueError, match="a picture requires --model NAME, or --checkpoint with a run"):
        visualise.build_model(None, None, None)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    (checkpoint / "ema").mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"format": 1}')
    (checkpoint / "ema" / "config.json").write_text('{"_class_name": "FlashDiT"}')
    with pytest.raises(ValueError, match=r"must be a run of iwin classify, got .* of FlashDiT"):
        visualise.build_model(None, tmp_path / "run", None)
