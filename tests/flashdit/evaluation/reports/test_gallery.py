"""What a report shows: planted copies and outliers are found, and every picture is the image it says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flashdit.digits.images import DIGIT_NAMES, digits
from flashdit.digits.reference import DigitsSource
from flashdit.evaluation.evaluate import Plan
from flashdit.evaluation.features.extractor import EXTRACTORS
from flashdit.evaluation.features.statistics import collect
from flashdit.evaluation.images.sources import NpzSource
from flashdit.evaluation.metrics import precision_recall
from flashdit.evaluation.reference import Reference
from flashdit.evaluation.reports.gallery import (
    GALLERY_PARTS,
    GalleryOptions,
    first_rows_by_class,
    make_gallery,
)

SAMPLES, COPY, WRONG = 60, 7, 2  # sample number 7 is a copy of the reference's number 123


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """60 training digits with their labels; one replaced by a held-out one, one with a wrong label."""
    images, labels = (part[:SAMPLES].clone() for part in digits("train"))
    images[COPY], labels[COPY] = digits("held-out")[0][123], digits("held-out")[1][123]
    labels[WRONG] = (labels[WRONG] + 1) % 10
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    np.savez(path, images.permute(0, 2, 3, 1).numpy(), labels.numpy())
    return path


@pytest.fixture(scope="module")
def plan(samples) -> Plan:
    extractor = EXTRACTORS.build({"name": "digits"}).eval()
    return Plan(NpzSource(samples), extractor, Reference("digits", extractor), ["fid"])


@pytest.fixture(scope="module")
def statistics(plan):
    return [
        collect(source, plan.extractor, set(GALLERY_PARTS), 50)
        for source in (plan.samples, DigitsSource("held-out"))
    ]


@pytest.fixture(scope="module")
def gallery(plan, statistics):
    return make_gallery(plan, *statistics)


def rows_of(gallery, heading):
    (section,) = [section for section in gallery.sections if section.heading == heading]
    return [pictures for _, pictures in section.rows]


def test_every_picture_is_the_image_of_its_number(gallery, samples):
    ours = torch.from_numpy(np.load(samples)["arr_0"]).permute(0, 3, 1, 2)
    theirs = digits("held-out")[0]
    shown = [picture for section in gallery.sections for _, row in section.rows for picture in row]
    assert len(shown) > 100
    for picture in shown:
        assert torch.equal(gallery.image_of(picture), (theirs if picture.real else ours)[picture.row])


def test_grid_has_a_row_for_each_class_and_only_its_samples(gallery, samples):
    labels = np.load(samples)["arr_1"]
    (grid,) = [section for section in gallery.sections if section.heading == "Samples"]
    assert [label for label, _ in grid.rows] == DIGIT_NAMES
    for number, (_, pictures) in enumerate(grid.rows):
        expected = np.flatnonzero(labels == number)[:10].tolist()
        assert [picture.row for picture in pictures] == expected


def test_a_copy_is_its_own_nearest_real_image_at_distance_zero(plan, statistics):
    statistics[0].labels = torch.where(torch.arange(SAMPLES) == COPY, 0, 1)  # of two classes: both are shown
    rows = rows_of(make_gallery(plan, *statistics), "Nearest real images")
    statistics[0].labels = plan.samples.labels
    assert [row[0].row for row in rows] == [COPY, 0]
    sample, *neighbours = rows[0]
    assert not sample.real
    assert all(picture.real for picture in neighbours)
    assert neighbours[0].row == 123
    assert neighbours[0].caption[-1] == "0.00"
    distances = [float(picture.caption[-1]) for picture in neighbours]
    assert distances == sorted(distances)
    assert len(neighbours) == 5
    assert distances[1] > 0


def test_counts_of_outliers_are_those_of_precision_and_recall(gallery, statistics):
    ours, theirs = statistics
    precision, recall = precision_recall(theirs.pool, ours.pool)
    assert 0 < precision < 1
    abouts = {section.heading: section.about for section in gallery.sections}
    assert abouts["Precision outliers"].startswith(
        f"{round((1 - precision) * SAMPLES)} of {SAMPLES} samples lie"
    )
    assert abouts["Recall outliers"].startswith(f"{round((1 - recall) * 360)} of 360 real images lie")
    for heading in ("Precision outliers", "Recall outliers"):
        ratios = [float(picture.caption[-1]) for picture in rows_of(gallery, heading)[0]]
        assert ratios == sorted(ratios)
        assert ratios[-1] < 1


def test_a_sample_far_from_every_real_image_is_the_first_precision_outlier(plan, statistics):
    ours, theirs = statistics
    far = ours.pool.clone()
    far[31] += 40
    gallery = make_gallery(plan, replace(ours, pool=far), theirs)
    (outliers,) = rows_of(gallery, "Precision outliers")
    assert not outliers[0].real
    assert outliers[0].row == 31
    assert float(outliers[0].caption[-1]) < 0.2 < float(outliers[1].caption[-1])


def test_a_real_image_far_from_every_sample_is_the_first_recall_outlier(plan, statistics):
    ours, theirs = statistics
    far = theirs.pool.clone()
    far[200] += 40
    gallery = make_gallery(plan, ours, replace(theirs, pool=far))
    (outliers,) = rows_of(gallery, "Recall outliers")
    assert outliers[0].real
    assert outliers[0].row == 200
    assert len(outliers) == 10


def test_what_the_extractor_takes_for_another_class_is_marked(gallery, statistics):
    ours, _ = statistics
    assert int(ours.logits[WRONG].argmax()) != int(ours.labels[WRONG])
    shown = {p.row: p for section in gallery.sections for _, row in section.rows for p in row if not p.real}
    assert shown[WRONG].doubtful
    assert shown[WRONG].caption[1] == f"taken for {DIGIT_NAMES[ours.logits[WRONG].argmax()]}"
    wrong = (ours.logits.argmax(1) != ours.labels).nonzero()[:, 0].tolist()
    assert {picture.row for picture in shown.values() if picture.doubtful} == set(wrong) & shown.keys()


def test_classes_come_with_accuracy_and_distance(gallery, plan):
    assert [score.name for score in gallery.classes] == DIGIT_NAMES
    assert sum(score.num_samples for score in gallery.classes) == SAMPLES
    assert sum(score.num_real for score in gallery.classes) == 360
    assert all(score.distance > 0 for score in gallery.classes)
    assert f"than the {plan.extractor.pool_dimensions} dimensions" in gallery.class_notes[0]


def test_a_reference_of_statistics_alone_is_said_to_have_no_images(plan, statistics, tmp_path):
    d = plan.extractor.pool_dimensions
    np.savez(tmp_path / "adm.npz", mu=np.zeros(d), sigma=np.eye(d))
    reference = Reference(str(tmp_path / "adm.npz"), plan.extractor)
    bare = reference.statistics(set(GALLERY_PARTS), 50, "cpu")
    gallery = make_gallery(plan._replace(reference=reference), statistics[0], bare)
    assert rows_of(gallery, "Samples")
    for section in gallery.sections[1:]:
        assert section.rows == []
        assert section.about == "'adm.npz' has no images, only statistics."
    assert [score.num_real for score in gallery.classes] == [None] * 10
    assert "'adm.npz' has no labelled images" in gallery.class_notes[0]


def test_three_samples_have_neighbours_but_no_outliers(plan, statistics, tmp_path):
    np.savez(tmp_path / "three.npz", digits("train")[0][:3].permute(0, 2, 3, 1).numpy())
    source = NpzSource(tmp_path / "three.npz")
    ours = collect(source, plan.extractor, set(GALLERY_PARTS), 50)
    gallery = make_gallery(plan._replace(samples=source), ours, statistics[1])
    assert len(rows_of(gallery, "Nearest real images")) == 3
    for section in gallery.sections[2:]:
        assert section.rows == []
        assert section.about == "They need more than 3 images on each side."


def test_samples_without_labels_fill_the_grid_in_their_order(plan, statistics, tmp_path):
    np.savez(tmp_path / "bare.npz", digits("train")[0][:13].permute(0, 2, 3, 1).numpy())
    source = NpzSource(tmp_path / "bare.npz")
    ours = collect(source, plan.extractor, set(GALLERY_PARTS), 50)
    gallery = make_gallery(plan._replace(samples=source), ours, statistics[1])
    rows = rows_of(gallery, "Samples")
    assert [[picture.row for picture in row] for row in rows] == [list(range(10)), [10, 11, 12]]
    assert all(picture.caption == () for row in rows for picture in row)
    assert gallery.classes == []
    assert gallery.class_notes == ["the samples have no labels"]


def test_of_many_classes_those_shown_are_spread_evenly():
    labels = torch.arange(1000).repeat(2)
    rows = first_rows_by_class(labels, 2000, classes=3, per_class=5)
    assert rows == [(0, [0, 1000]), (500, [500, 1500]), (999, [999, 1999])]


def test_fewer_images_are_shown_where_they_are_large():
    assert GalleryOptions.for_size((32, 32)) == GalleryOptions()
    assert GalleryOptions.for_size((32, 256)).per_class < GalleryOptions().per_class
    assert GalleryOptions.for_size(None) == GalleryOptions.for_size((256, 256))
