"""Does a trained classifier, or any model of timm, score images as an extractor?"""

import hashlib
import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from flashdit.__main__ import main
from flashdit.evaluation.features.extractors import build_extractor
from flashdit.shared.runs import list_checkpoints

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_a_run_is_an_extractor_of_its_own_classes(classifier_run):
    extractor = build_extractor(str(classifier_run))
    assert extractor.class_names[:2] == ["zero", "one"]
    assert extractor.colours == "grey"
    assert extractor.size == (32, 32)
    average = list_checkpoints(classifier_run)[-1] / "ema" / "model.safetensors"
    assert extractor.weights_sha256 == hashlib.sha256(average.read_bytes()).hexdigest()
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    for side in (48, 20):  # edges that are enlarged overshoot
        images = torch.randint(0, 2, (2, 3, side, side), dtype=torch.uint8) * 255
        features = extractor(images)
        assert features["pool"].shape == (2, extractor.pool_dimensions)
        pixels = F.interpolate(images / 255, size=(32, 32), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            torch.testing.assert_close(features["logits"], extractor.network((pixels - mean) / std))


def test_the_command_scores_by_a_run_with_accuracy(classifier_run, tmp_path, capsys):
    words = ["eval", "--samples", str(digit_folder(tmp_path)), "--reference", str(tmp_path / "digits")]
    words += [
        "--extractor",
        str(classifier_run),
        "--metrics",
        "fid,accuracy",
        "--output",
        str(tmp_path / "out.json"),
    ]
    main(words)
    scores = json.loads((tmp_path / "out.json").read_text())
    assert scores["metrics"]["fd_8"] == pytest.approx(0, abs=1e-3)
    assert 0 <= scores["metrics"]["accuracy"] <= 1
    assert scores["extractor"]["name"] == "classifier"
    top1 = json.loads((classifier_run / "metrics.jsonl").read_text().splitlines()[-1])["ema_top1"]
    said = f"the judge of accuracy, 'classifier', is right on {top1:.1%} of its held-out images"
    assert said in capsys.readouterr().out


def digit_folder(tmp_path):
    """Returns a folder of eight grey pictures in the classes zero and one."""
    generator = np.random.default_rng(0)
    for number in range(8):
        path = tmp_path / "digits" / ("zero", "one")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32), dtype=np.uint8)).save(path)
    return tmp_path / "digits"


def test_a_run_of_another_kind_is_refused(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    (checkpoint / "ema").mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"format": 1}')
    (checkpoint / "ema" / "config.json").write_text('{"_class_name": "FlashDiT"}')
    with pytest.raises(ValueError, match=r"must be a run of iwin classify, got .*step_00000001 of FlashDiT"):
        build_extractor(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="has its own weights"):
        build_extractor(str(tmp_path / "run"), "other.pth")


def test_any_model_of_timm_with_its_weights_file(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", pretrained=False).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    extractor = build_extractor("timm/resnet10t", str(tmp_path / "weights.pth"))
    assert (extractor.pool_dimensions, extractor.name) == (512, "timm/resnet10t")
    images = torch.randint(0, 256, (1, 3, *extractor.size), dtype=torch.uint8)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected = network((images / 255 - mean) / std)
        torch.testing.assert_close(extractor(images)["logits"], expected)
        torch.testing.assert_close(network.get_classifier()(extractor(images)["pool"]), expected)


def test_timms_models_need_a_name_and_their_own_weights(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="unknown model of timm 'resnet10tt'; did you mean"):
        build_extractor("timm/resnet10tt", str(tmp_path / "weights.pth"))
    with pytest.raises(ValueError, match="needs its weights file"):
        build_extractor("timm/resnet10t")
    with pytest.raises(ValueError, match="weights must be those of timm's resnet10t"):
        build_extractor("timm/resnet10t", str(tmp_path / "weights.pth"))


def test_grey_judges_of_colour_pictures_are_warned_of_on_the_terminal_and_in_the_report(
    classifier_run, tmp_path, capsys
):
    folder = tmp_path / "colour"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    words = ["eval", "--samples", str(folder), "--reference", str(folder), "--metrics", "fid"]
    main([*words, "--extractor", str(classifier_run), "--output", str(tmp_path / "out.json")])
    warning = "the samples are colour images, extractor 'classifier' was trained on grey ones"
    assert warning in " ".join(capsys.readouterr().out.split())
    assert warning in json.loads((tmp_path / "out.json").read_text())["warnings"]


def test_a_reference_made_by_a_run_finds_it_again_from_any_folder(classifier_run, tmp_path, monkeypatch):
    monkeypatch.chdir(classifier_run.parent)
    samples = str(digit_folder(tmp_path))
    main(["eval", "make-reference", samples, str(tmp_path / "r.npz"), "--extractor", classifier_run.name])
    monkeypatch.chdir(tmp_path)
    main(["eval", "--samples", samples, "--reference", "r.npz", "--output", "out.json"])
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["extractor"]["name"] == "classifier"
    assert content["metrics"]["fd_8"] == pytest.approx(0, abs=1e-3)
