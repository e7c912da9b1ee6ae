"""Are classes matched by name, whatever order samples, reference and extractor have them in?"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from flashdit.evaluation.classes import match_classes
from flashdit.evaluation.evaluate import evaluate_fully
from flashdit.evaluation.features.extractor import Extractor
from flashdit.evaluation.features.ranks import Ranks
from flashdit.evaluation.reports.gallery import make_gallery
from flashdit.evaluation.request import EvaluationRequest, open_plan
from flashdit.sampling.options import SamplingOptions

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


class ColourExtractor(Extractor):
    """Knows pictures of one colour exactly: its logits are the channels in the order of its class names."""

    name, pool_dimensions, class_names = "colours", 3, ["red", "green", "blue"]

    def forward(self, images):
        means = images.float().mean((2, 3))
        return {"pool": means, "spatial": None, "logits": means}


def blind() -> Extractor:
    extractor = ColourExtractor()
    extractor.class_names = ["red", "green", "yellow"]
    return extractor


class ColourGenerator:
    """Draws pictures of one colour; its classes have an order of their own."""

    num_classes, class_names = 3, ["green", "blue", "red"]

    def __init__(self, class_names=None):
        self.class_names = class_names or self.class_names
        self.space = SimpleNamespace(mean=torch.zeros(1), std=torch.ones(1), options="")

    def evaluations(self, options):
        return options.nfe

    def image_size(self, options):
        return 4, 4

    def recipe(self):
        return {"checkpoint": "colours"}

    def generate(self, labels, options, ids):
        noise = torch.Generator().manual_seed(0)
        for batch in ids.split(options.batch_size):
            colours = [COLOURS[self.class_names[label]] for label in labels[batch].tolist()]
            images = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 4, 4).clone()
            images[:, :, 0, 0] = torch.randint(0, 9, images.shape[:2], generator=noise).to(torch.uint8)
            yield SimpleNamespace(images=images)


@pytest.fixture
def folder(tmp_path):
    """Returns a folder of four pictures of each colour, in the order blue, green, red."""
    draws = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for number in range(4):
            pixels = np.full((4, 4, 3), colour, np.uint8)
            pixels[0, 0] = draws.integers(0, 9, 3)
            (tmp_path / "real" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "real" / name / f"{number}.png")
    return tmp_path / "real"


def plan_of(monkeypatch, extractor=None, **changes):
    monkeypatch.setattr(
        "flashdit.evaluation.request.build_extractor", lambda *_: extractor or ColourExtractor()
    )
    about = {"extractor": "colours", "cache": False} | changes
    if "samples" not in about:
        about |= {"generator": changes.get("generator", ColourGenerator()), "sampling": SamplingOptions()}
        about |= {"num_images": 12}
    return open_plan(EvaluationRequest(**about), Ranks())


def test_accuracy_is_right_when_the_orders_differ(folder, monkeypatch):
    plan = plan_of(monkeypatch, reference=str(folder), metrics=["accuracy", "fid"])
    result, samples, reference = evaluate_fully(plan, extra_parts={"pool", "logits"})
    assert result.scores.values["accuracy"] == 1
    names = ColourExtractor.class_names
    assert [names[label] for label in samples.labels] == [
        ColourGenerator.class_names[label] for label in plan.samples.labels
    ]
    assert [names[label] for label in reference.labels] == ["blue", "green", "red"] * 4
    tables = make_gallery(plan, samples, reference).classes
    assert [score.name for score in tables] == names
    assert [score.accuracy for score in tables] == [1, 1, 1]
    assert [(score.num_samples, score.num_real) for score in tables] == [(4, 4)] * 3
    assert all(score.distance < 100 for score in tables)  # of one colour; of two it is above 30,000


def test_the_samples_of_a_folder_by_class_are_matched_too(folder, monkeypatch):
    plan = plan_of(monkeypatch, reference=str(folder), samples=folder, metrics=["accuracy"])
    assert evaluate_fully(plan).result.scores.values["accuracy"] == 1


def test_samples_of_some_classes_of_the_extractor_have_an_accuracy(folder, monkeypatch):
    generator = ColourGenerator(["blue", "red"])
    generator.num_classes = 2
    plan = plan_of(monkeypatch, reference=str(folder), generator=generator, metrics=["accuracy"])
    assert evaluate_fully(plan).result.scores.values["accuracy"] == 1


def test_classes_that_the_extractor_does_not_know_are_named(folder, monkeypatch):
    with pytest.raises(
        ValueError, match=r"accuracy needs .*: extractor 'colours' does not know blue of 3 classes"
    ):
        plan_of(monkeypatch, blind(), reference=str(folder), metrics=["accuracy"])
    plan = plan_of(monkeypatch, blind(), reference=str(folder))
    assert "accuracy" not in plan.metrics
    result, samples, reference = evaluate_fully(plan, extra_parts={"pool", "logits"})
    assert "no accuracy: extractor 'colours' does not know blue of 3 classes" in result.warnings
    gallery = make_gallery(plan, samples, reference)
    assert [score.name for score in gallery.classes] == ["green", "blue", "red"]
    assert [score.accuracy for score in gallery.classes] == [None] * 3
    assert all(score.distance < 100 for score in gallery.classes)  # the folder's order is another
    assert "no accuracy: extractor 'colours' does not know blue of 3 classes" in gallery.class_notes


def source(labels, names):
    tensor = None if labels is None else torch.tensor(labels)
    return SimpleNamespace(name="s", labels=tensor, class_names=names)


@pytest.mark.parametrize(
    ("names", "labels", "unknown"),
    [
        ({0: "red", 7: "blue"}, [0, 7], ""),
        ({0: "2", 1: "0"}, [0, 1], ""),  # folders called by the numbers of classes
        (None, [0, 2], ""),
        (None, [0, 3], "has 3 classes, labels are from 0 to 3"),
        (None, [-1, 2], "has 3 classes, labels are from -1 to 2"),
        ({}, [0], "the samples have no classes"),
        ({0: "red", 1: "red"}, [0, 1], "several classes are called red"),
        ({0: "cat", 1: "red"}, [0, 1], "does not know cat of 2 classes"),
    ],
)
def test_what_is_known_of_the_samples_classes(names, labels, unknown):
    assert match_classes(ColourExtractor(), source(labels, names), None).unknown.endswith(unknown)


def test_labels_become_the_numbers_of_their_names():
    samples = source([0, 1, 0], {0: "blue", 1: "green"})
    reference = source([5, 1, 0], {0: "grey", 1: "blue", 5: "red"})
    classes = match_classes(ColourExtractor(), samples, reference)
    assert classes.numbered(samples.labels, samples).tolist() == [2, 1, 2]
    found = classes.numbered(reference.labels, reference).tolist()
    assert [classes.name_of(label) for label in found] == ["red", "blue", "grey"]
    assert classes.name_of(9) == "class 9"


def test_a_class_of_the_reference_alone_gets_a_number_that_no_other_has():
    samples, reference = source([0, 2], {0: "cat", 2: "eel"}), source([0, 1], {0: "dog", 1: "eel"})
    classes = match_classes(ColourExtractor(), samples, reference)
    assert classes.names == {0: "cat", 2: "eel", 3: "dog"}
    assert classes.numbered(reference.labels, reference).tolist() == [3, 2]


def test_classes_of_one_name_are_known_where_their_numbers_are_the_extractors():
    extractor = ColourExtractor()
    extractor.class_names = ["crane", "crane", "red"]  # as ImageNet has a bird and a machine
    assert not match_classes(extractor, source([0, 1], {0: "crane", 1: "crane", 2: "red"}), None).unknown
    other = source([0, 1], {1: "crane", 2: "red"})
    assert match_classes(extractor, other, None).unknown.endswith("several classes are called crane")


def test_labels_without_names_are_taken_for_numbers_and_that_is_said(folder, monkeypatch, tmp_path):
    images = np.array([[[COLOURS[name]] * 4] * 4 for name in ("red", "blue")], np.uint8)
    np.savez(tmp_path / "s.npz", images, np.array([0, 2]))
    plan = plan_of(monkeypatch, reference=str(folder), samples=tmp_path / "s.npz", metrics=["accuracy"])
    result = evaluate_fully(plan).result
    assert result.scores.values["accuracy"] == 1
    assert "'s.npz' does not name its classes" in json.dumps(result.warnings)
