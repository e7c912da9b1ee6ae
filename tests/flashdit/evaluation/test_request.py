"""A request for an evaluation: its checks, its defaults, and what is opened of it."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from flashdit.config import EvaluationOptions, RunConfig
from flashdit.digits.images import DIGIT_NAMES, digits
from flashdit.evaluation.evaluate import evaluate, share_warnings
from flashdit.evaluation.features.ranks import Ranks
from flashdit.evaluation.images.sources import GeneratedSource
from flashdit.evaluation.request import EvaluationRequest, open_plan
from flashdit.evaluation.stored import extractor_of
from flashdit.sampling.options import SamplingOptions
from flashdit.trainer import InTrainingEvaluation


def generator(**changes) -> SimpleNamespace:
    """What a request reads of a generator of digits."""
    vae = SimpleNamespace(config={"block_out_channels": (8, 16)})
    space = SimpleNamespace(need_vae=lambda: vae, factor=2)
    about = {"num_classes": 10, "class_names": DIGIT_NAMES, "space": space}
    about |= {"latent_shape": lambda options: (1, 16, 16), "image_size": lambda options: (32, 32)}
    return SimpleNamespace(**about | changes)


def drawn(**changes) -> EvaluationRequest:
    """A request for samples of a generator that was trained on digits."""
    about = {"generator": generator(), "sampling": SamplingOptions(seed=3), "data": "digits"}
    return EvaluationRequest(**about | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"samples": Path("a.npz")},
            "requires samples, or a generator and how it samples, got samples=a.npz",
        ),
        ({"generator": None}, "requires samples, or a generator and how it samples, got samples=None"),
        ({"sampling": None}, "requires samples, or a generator and how it samples, .*sampling=None"),
        ({"labels": "even"}, "unknown labels 'even'"),
        ({"num_images": 0}, "the number of images must be positive, got 0"),
        ({"batch_size": 0}, "the batch size must be positive, got 0"),
        ({"metrics": ["fidd"]}, "unknown metric 'fidd'; did you mean 'fid'"),
    ],
)
def test_a_request_is_checked_where_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        drawn(**changes)


def test_processes_that_read_different_checkpoints_are_refused():
    class SecondOfTwo(Ranks):
        def broadcast(self, value):
            return "step_1"

    request = drawn(generator=generator(read_from="step_2"))
    with pytest.raises(ValueError, match="must read one checkpoint, got step_1 and step_2: give its folder"):
        open_plan(request, SecondOfTwo(1, 2))


def test_a_data_set_gives_reference_extractor_and_number_of_samples():
    plan = open_plan(drawn(), Ranks())
    assert plan.reference.spec == "digits"
    assert plan.extractor.name == "digits"
    assert plan.samples.count == 1000
    assert plan.metrics == ["fid", "sfid", "is", "precision", "recall", "accuracy"]
    assert plan.cache is not None
    assert open_plan(drawn(cache=False, num_images=5), Ranks()).cache is None


def test_a_reference_of_images_has_inception_and_fifty_thousand_samples_by_default(tmp_path):
    np.savez(tmp_path / "r.npz", np.zeros((5, 32, 32, 3), np.uint8))
    assert extractor_of(str(tmp_path / "r.npz")) == ("inception", None)
    assert extractor_of("digits") == ("digits", None)
    plan = open_plan(drawn(reference=str(tmp_path / "r.npz"), extractor="digits"), Ranks())
    assert plan.samples.count == 50_000


@pytest.mark.parametrize("data", ["images", "shards", None])
def test_data_that_brings_no_reference_needs_one_whatever_folder_lies_there(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images", "shards"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "samples.npz", np.zeros((5, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"--reference or evaluation\.reference"):
        open_plan(drawn(data=data), Ranks())
    assert open_plan(drawn(data=data, reference="images", extractor="digits"), Ranks()).reference.count == 5


def test_labels_are_in_equal_shares_or_drawn():
    labels = {}
    for kind in ("balanced", "random"):
        samples = open_plan(drawn(labels=kind, num_images=40), Ranks()).samples
        assert samples.labels is not None
        labels[kind] = samples.labels.bincount(minlength=10)
    assert labels["balanced"].tolist() == [4] * 10
    assert labels["random"].tolist() != [4] * 10
    assert labels["random"].sum() == 40


def test_labels_like_the_reference_have_its_shares_by_name_whatever_their_order(tmp_path):
    shown = np.repeat([0, 1], [30, 90])
    path, pixels = str(tmp_path / "r.npz"), np.zeros((120, 32, 32, 3), np.uint8)
    np.savez(path, arr_0=pixels, arr_1=shown, class_names=np.array(["nine", "two"]))
    request = drawn(labels="reference", num_images=40, reference=path, extractor="digits")
    samples = open_plan(request, Ranks()).samples
    assert samples.labels is not None
    assert samples.labels.bincount(minlength=10).tolist() == [0, 0, 30, 0, 0, 0, 0, 0, 0, 10]
    assert samples.labels.tolist() != sorted(samples.labels.tolist())
    np.savez(path, arr_0=pixels, arr_1=shown, class_names=np.array(["nine", "ten"]))
    with pytest.raises(ValueError, match=r"a reference of the model's classes, .* has others: ten"):
        open_plan(request, Ranks())
    np.savez(path, arr_0=pixels)
    with pytest.raises(ValueError, match=r"labels=reference requires a reference with labels, .* has none"):
        open_plan(request, Ranks())


def test_other_shares_of_the_classes_than_the_references_are_told(tmp_path):
    shown = np.repeat(np.arange(10), [200, *[20] * 9])
    path, pixels = str(tmp_path / "r.npz"), np.zeros((380, 32, 32, 3), np.uint8)
    np.savez(path, arr_0=pixels, arr_1=shown)
    request = drawn(num_images=40, reference=path, extractor="digits")
    (warning,) = share_warnings(open_plan(request, Ranks()))
    assert "than in the reference, zero 10% and 53%, which adds to the distances: --labels ref" in warning
    assert share_warnings(open_plan(replace(request, labels="reference"), Ranks())) == []
    np.savez(path, arr_0=pixels[::10], arr_1=shown[::10])  # by chance, where labels are drawn
    assert share_warnings(open_plan(replace(request, labels="random"), Ranks())) == []
    assert share_warnings(open_plan(request, Ranks())) == [warning]


def test_samples_by_another_generator_or_option_keep_their_labels():
    plan = open_plan(drawn(num_images=7), Ranks())
    other, options = generator(), SamplingOptions(cfg_scale=2.5)
    for new in (plan.redrawn(generator=other), plan.redrawn(options=options)):
        assert isinstance(new.samples, GeneratedSource)
        assert new.samples.labels is plan.samples.labels
        assert new._replace(samples=plan.samples) == plan
    changed = plan.redrawn(generator=other, options=options).samples
    assert isinstance(changed, GeneratedSource)
    assert (changed.generator, changed.options) == (other, options)


def test_samples_that_are_drawn_in_another_size_than_the_plans_are_refused():
    plan = open_plan(drawn(num_images=7), Ranks())
    larger = plan.redrawn(generator=generator(image_size=lambda options: (64, 32)))
    with pytest.raises(ValueError, match=r"one size \(h×w\), got 64×32 and 32×32"):
        evaluate(larger)


def test_the_floor_of_accuracy_is_that_of_images_the_extractor_has_not_seen(tmp_path):
    images, labels = digits("train")
    np.savez(tmp_path / "samples.npz", images[:8].permute(0, 2, 3, 1).numpy(), labels[:8].numpy())
    request = EvaluationRequest(
        samples=tmp_path / "samples.npz", reference="digits", metrics=["accuracy"], cache=False
    )
    plan = open_plan(request, Ranks())
    floor = evaluate(plan).floor
    unseen, known = digits("held-out")
    logits = plan.extractor(unseen)["logits"]
    assert floor is not None
    assert floor.values["accuracy"] == pytest.approx((logits.argmax(1) == known).double().mean().item())
    assert floor.values["accuracy"] < 1


def test_a_reference_and_its_floor_are_read_once(tmp_path, monkeypatch):
    images = torch.arange(8 * 32 * 32 * 3).remainder(255).to(torch.uint8).reshape(8, 32, 32, 3)
    np.savez(tmp_path / "samples.npz", images.numpy())
    request = EvaluationRequest(
        samples=tmp_path / "samples.npz", reference="digits", metrics=["fid", "recall"], cache=False
    )
    plan = open_plan(request, Ranks())
    first = evaluate(plan)
    assert "the samples are colour images, extractor 'digits' was trained on grey ones" in first.warnings
    assert plan.reference.source is not None
    monkeypatch.setattr(plan.reference.source, "batches", None)  # what is read again raises
    monkeypatch.setattr("flashdit.digits.reference.DigitsSource.batches", None)
    second = evaluate(plan)
    assert first.scores.values == second.scores.values
    assert first.floor is not None
    assert second.floor == first.floor
    assert first.floor.count == 1437
    assert first.reference["num_images"] == 360


def test_a_reference_that_is_not_there_is_named_before_its_extractor_is_asked_for(tmp_path):
    request = drawn(reference=str(tmp_path / "absent.npz"), extractor="inception", data=None)
    with pytest.raises(ValueError, match=r"an existing npz or a folder, got .*absent\.npz"):
        open_plan(request, Ranks())


def test_without_a_reference_the_sentence_says_what_to_do_with_the_images_of_the_run():
    message = (
        r"data set 'images' brings none: for its images, --reference pics --image-size 32, or once "
        r"`flashdit eval make-reference pics reference.npz --image-size 32` and then that file"
    )
    with pytest.raises(ValueError, match=message):
        open_plan(drawn(data="images", data_path="pics"), Ranks())


def test_images_of_another_size_are_refused_before_any_is_drawn(tmp_path):
    for number in range(4):
        Image.new("RGB", (40, 48)).save(tmp_path / f"{number}.png")
    request = {"reference": str(tmp_path), "extractor": "digits", "num_images": 5}
    with pytest.raises(ValueError, match=r" and 48×40: --image-size or evaluation\.image_size crops"):
        open_plan(drawn(**request), Ranks())
    assert open_plan(drawn(**request, image_size=32), Ranks()).reference.image_size == (32, 32)


@pytest.mark.parametrize(("given", "expected"), [(None, (32, 32)), (24, "got 32×32 and 24×24")])
def test_training_crops_a_folder_to_the_size_of_its_samples(tmp_path, given, expected):
    for number in range(4):
        Image.new("RGB", (40, 48)).save(tmp_path / f"{number}.png")
    options = {"reference": str(tmp_path), "extractor": "digits", "num_images": 5, "image_size": given}
    config = RunConfig(data={"name": "images", "path": "pics"}, evaluation=EvaluationOptions(**options))
    if given is None:
        evaluation = InTrainingEvaluation(config, generator(), torch.device("cpu"))
        assert evaluation.plan.reference.image_size == expected
        return
    with pytest.raises(ValueError, match=re.escape(expected)):
        InTrainingEvaluation(config, generator(), torch.device("cpu"))
