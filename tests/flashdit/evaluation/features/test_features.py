from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close

from flashdit.digits.classifier import DIGITS_WEIGHTS, load_digits_classifier
from flashdit.digits.images import digits
from flashdit.evaluation.features.extractor import EXTRACTORS
from flashdit.evaluation.features.inception import INCEPTION_FILE, WEIGHTS_VARIABLE
from flashdit.evaluation.features.iwin_classifier import accuracy_of
from flashdit.evaluation.features.timm_models import ModelExtractor
from flashdit.evaluation.metrics.scoring import score_names
from tools.digits_classifier import augment, train

BUILT = [name for name in EXTRACTORS.names() if name != "classifier"]  # which needs a run: tests/iwin_tasks
GOLDEN = Path(__file__).parents[3] / "golden" / "eval"


def build(name: str, weights: Path):
    return EXTRACTORS.build({"name": name, **({"weights": str(weights)} if name == "inception" else {})})


def test_inception_equals_the_stored_outputs_of_adms_evaluator(inception_weights):
    extractor = build("inception", inception_weights)
    with np.load(GOLDEN / "inception_random_e2e.npz") as golden:
        images = torch.from_numpy(golden["images"]).permute(0, 3, 1, 2)
        pool, spatial, softmax = (torch.from_numpy(golden[key]) for key in ("pool_3", "spatial", "softmax"))
    features = extractor(images)
    assert_close(features["pool"], pool, rtol=0, atol=1e-5)
    assert_close(features["spatial"], spatial, rtol=0, atol=1e-5)
    assert_close(features["logits"].softmax(dim=1), softmax, rtol=0, atol=1e-7)
    assert extractor.warnings[0].startswith("random.pth is not the published")


@pytest.mark.parametrize("name", BUILT)
def test_extractors_give_what_they_declare_for_any_size_and_batch(name, inception_weights):
    extractor = build(name, inception_weights)
    images = torch.randint(0, 256, (3, 3, 20, 36), dtype=torch.uint8)
    features = extractor(images)
    assert features["pool"].shape == (3, extractor.pool_dimensions)
    assert features["spatial"].shape == (3, extractor.spatial_dimensions)
    assert extractor.class_names is None or features["logits"].shape == (3, len(extractor.class_names))
    assert not any(value.requires_grad for value in features.values())
    for key, value in extractor(images[2:]).items():
        assert_close(value, features[key][2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BUILT)
def test_only_inception_may_say_fid(name, inception_weights):
    extractor = build(name, inception_weights)
    name_of = score_names(["fid"], extractor)["fid"]
    assert name_of.label == ("FID" if name == "inception" else f"FD[{name}]")
    assert name_of.stem == ("fid" if name == "inception" else "fd")


def test_fingerprint_changes_with_a_weight_and_with_nothing_else():
    first, second = EXTRACTORS.build("digits"), EXTRACTORS.build("digits")
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint.startswith("DigitsExtractor:sha256=")
    with torch.no_grad():
        next(second.parameters()).view(-1)[0].add_(1e-6)
    assert first.fingerprint != second.fingerprint


def test_absent_inception_weights_name_the_path_the_file_and_the_ways_to_give_it(tmp_path, monkeypatch):
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / INCEPTION_FILE
    with pytest.raises(
        ValueError, match=f"no file {cached}; fetch {INCEPTION_FILE}.* --inception-weights or"
    ):
        EXTRACTORS.build("inception")
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path / "from_environment.pth"))
    with pytest.raises(ValueError, match=r"no file .*from_environment\.pth"):
        EXTRACTORS.build("inception")
    with pytest.raises(ValueError, match=r"no file given\.pth"):
        EXTRACTORS.build({"name": "inception", "weights": "given.pth"})


class Intruder:
    """Anything but a tensor, which an unsafe load would build."""


@pytest.mark.parametrize("content", [Intruder(), b"no pickle at all"])
def test_weights_that_are_no_tensors_are_refused_unopened(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"must be a readable torch .* file, .*weights\.pth is not"):
        EXTRACTORS.build({"name": "inception", "weights": str(path)})


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    with pytest.raises(ValueError, match=r"must hold the 472 tensors of .*, got 2"):
        EXTRACTORS.build({"name": "inception", "weights": str(path)})
    torch.save({f"layer{number}": torch.zeros(1) for number in range(472)}, path)
    with pytest.raises(ValueError, match=r"torch-fidelity's names and shapes, got .*weights\.pth: Error"):
        EXTRACTORS.build({"name": "inception", "weights": str(path)})


def test_digits_classifier_knows_the_held_out_digits():
    assert accuracy_of(load_digits_classifier(), *digits("held-out")) >= 0.99
    assert DIGITS_WEIGHTS.stat().st_size < 300_000


def test_digits_classifier_trains_the_same_twice():
    first, second = train(epochs=1), train(epochs=1)
    for (key, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert_close(value, other, rtol=0, atol=0, msg=key)


def test_augmentation_keeps_type_shape_and_most_of_the_picture():
    images, _ = digits("train")
    moved = augment(images[:50], torch.Generator().manual_seed(0))
    assert (moved.shape, moved.dtype) == (images[:50].shape, torch.uint8)
    assert (moved.float() - images[:50].float()).abs().mean() < 60


@pytest.mark.parametrize("name", BUILT)
def test_the_mean_of_a_feature_map_is_the_pooled_feature(name, inception_weights):
    extractor = build(name, inception_weights)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = extractor.feature_map(images)
    assert found.ndim == 4
    assert not found.requires_grad
    assert_close(found.mean((1, 2)), extractor(images)["pool"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "options", "shape"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "class_token": True}, (4, 4, 192)),
        ("resnet18", {}, (2, 2, 512)),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}, (2, 2, 768)),
    ],
)
def test_a_timm_model_has_the_map_of_its_patches(model, options, shape):
    network = timm.create_model(model, **options).eval()
    extractor = ModelExtractor(model, network, size=(64, 64))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    found = extractor.feature_map(images)
    assert found.shape == (2, *shape)
    with torch.no_grad():
        last = network.forward_features((images.float() / 255 - extractor.mean) / extractor.std)
    if model == "resnet18":
        assert_close(found[:, 1, 0], last[:, :, 1, 0])
    elif last.ndim == 4:
        assert_close(found, last)
    else:
        assert_close(found[:, 1, 2], last[:, 1 + 1 * 4 + 2])  # after the class token
