"""Is an index one image, and is no image of one split in another?"""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from flashdit.data.sources import DATASETS, companions_of, spec_of
from flashdit.evaluation.features.extractors import build_extractor
from flashdit.evaluation.features.statistics import collect
from flashdit.evaluation.images.sources import digest_of, open_reference
from flashdit.glyphs import dataset
from flashdit.glyphs.drawing import draw, draw_numbers, ink_share
from flashdit.glyphs.fonts import HELD_OUT_FAMILIES, LETTERS, TRAINING_FAMILIES
from flashdit.shared.pictures import to_pil


def build(**options):
    """Returns the data set of some options."""
    return DATASETS.build({"name": "glyphs", **options})


def faces(families):
    """Returns the faces of families."""
    return {face for cuts in families.values() for face in cuts}


def test_an_index_is_one_image_whoever_asks_and_the_next_of_its_letter_is_another():
    first, again = build(image_size=32, ground="both"), build(image_size=32, ground="both", num_images=52)
    for index in (51, 0, 25):
        assert torch.equal(first.image(index), again.image(index))
    images = {hashlib.sha256(first.image(index).numpy()).hexdigest() for index in range(0, 26 * 8, 26)}
    assert len(images) == 8


def test_splits_share_no_drawing_and_families_no_face():
    drawn = {
        split: [draw_numbers(split, index, dataset.FAMILIES_OF[split], "plain") for index in range(260)]
        for split in dataset.FAMILIES_OF
    }
    inks = {split: {(one.ink, one.ground, one.weight) for one in drawn[split]} for split in drawn}
    assert all(len(colours) == 260 for colours in inks.values())
    assert not inks["train"] & inks["held-out"]
    assert not inks["train"] & inks["families"]
    assert {one.face for one in drawn["train"]} == {one.face for one in drawn["held-out"]}
    assert {one.face for one in drawn["train"]} == faces(TRAINING_FAMILIES)
    assert {one.face for one in drawn["families"]} == faces(HELD_OUT_FAMILIES)


def test_classes_are_the_letters_in_equal_shares():
    glyphs = build(num_images=130)
    assert "".join(glyphs.class_names) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert glyphs.labels.bincount().tolist() == [5] * 26
    assert glyphs.mirrors is False, "a mirrored N is none"
    assert [draw_numbers("train", index, TRAINING_FAMILIES, "plain").letter for index in (0, 27, 259)] == [
        LETTERS[glyphs.labels[index % 130]] for index in (0, 27, 259 % 130)
    ]


@pytest.mark.parametrize("size", [32, 61, 256])
def test_a_drawing_is_the_same_at_any_size(size):
    drawing = draw_numbers("train", 16, TRAINING_FAMILIES, "plain")
    image = draw(drawing, size)
    assert image.shape == (3, size, size)
    assert image.dtype == torch.uint8
    shape = (64, 64)
    reference = to_pil(draw(drawing, 128)).resize(shape, Image.Resampling.BOX)
    smaller = to_pil(image).resize(shape, Image.Resampling.BILINEAR)
    difference = np.abs(np.asarray(smaller, float) - np.asarray(reference, float)).mean()
    assert difference < 6


def test_no_part_of_a_letter_is_cut_off():
    for index in range(104):
        share, corner = ink_share(draw_numbers("train", index, TRAINING_FAMILIES, "plain"), 256)
        assert share.max() == 1
        assert max(share[0].max(), share[-1].max(), share[:, 0].max(), share[:, -1].max()) == 0
        assert min(corner) > 0


@pytest.mark.parametrize("ground", ["plain", "photograph"])
def test_a_letter_stands_off_its_ground_and_within_the_image(ground):
    glyphs, plain = build(ground=ground), build(ground="plain")
    colours = []
    for index in range(52):
        drawing = draw_numbers("train", index, TRAINING_FAMILIES, ground)
        image = glyphs.image(index).float()
        colour = torch.tensor(drawing.ink).view(3, 1, 1)
        is_ink = ((image - colour).abs() < 3).all(0)
        assert is_ink.float().mean() > 0.015
        edge = torch.cat([is_ink[0], is_ink[-1], is_ink[:, 0], is_ink[:, -1]])
        assert not edge.any()
        between = ((image > 112) & (image < 143)).all(0)  # neither dark nor light: edges of strokes alone
        assert between.float().mean() < 0.12
        colours.append(image[:, ~is_ink].flatten(1).unique(dim=1).shape[1])
    assert (np.median(colours) > 600) == (ground == "photograph")
    assert torch.equal(plain.image(3), build().image(3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_size": 31}, "image_size of glyphs must be from 32 to 256, got 31"),
        ({"image_size": 257}, "must be from 32 to 256, got 257"),
        ({"num_images": 25}, "num_images must be from 26, one of each letter, to 10,000,000, got 25"),
        ({"ground": "photo"}, "unknown data.ground 'photo'; did you mean 'photograph'"),
        ({"split": "test"}, "unknown data.split 'test'"),
    ],
)
def test_invalid_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        build(**options)


def test_what_goes_with_letters_has_their_size_and_ground():
    spec = spec_of({"name": "glyphs", "image_size": 32, "ground": "photograph", "num_images": 26_000})
    assert spec == "{name: glyphs, image_size: 32, ground: photograph}"
    reference, floor = open_reference(spec), companions_of(spec).floor()
    expected = build(image_size=32, ground="photograph", split="held-out")
    ids = torch.tensor([3, 40, 1299])
    assert torch.equal(
        next(iter(reference.batches(8, ids))), torch.stack([expected.image(i) for i in ids.tolist()])
    )
    assert (reference.count, floor.count, companions_of(spec).num_images) == (1300, 1300, 1300)
    assert torch.equal(next(iter(floor.batches(1))), build(image_size=32, ground="photograph").image(0)[None])
    assert spec_of({"name": "glyphs", "image_size": 64}) == "glyphs"
    families = open_reference("{name: glyphs, split: families}")
    assert families.name == "glyphs families"
    assert torch.equal(next(iter(families.batches(1))), build(split="families").image(0)[None])


def test_a_reference_with_invalid_options_is_refused():
    with pytest.raises(ValueError, match="unknown option of data 'glyphs' 'size'"):
        open_reference("{name: glyphs, size: 32}")
    with pytest.raises(ValueError, match=r"must be \{name: NAME, option: value\}, got \{glyphs\}"):
        open_reference("{glyphs}")
    with pytest.raises(ValueError, match="a data set with options must be YAML, got"):
        open_reference("{name: [}")


def test_reference_and_floor_are_scored_by_the_letters_own_classifier(monkeypatch):
    monkeypatch.setattr(dataset, "COMPARED", 260)
    brought = companions_of("{name: glyphs, image_size: 48}")
    extractor = build_extractor(brought.extractor)
    for source in (brought.reference(), brought.floor()):
        found = collect(source, extractor, {"moments", "spatial", "logits"}, 100)
        assert (found.count, len(found.mu), len(found.mu_s)) == (260, 96, 112)
        assert (found.logits.argmax(1) == source.labels).float().mean() > 0.97
        assert source.identity() == {
            "kind": "glyphs",
            "images": digest_of([torch.cat(list(source.batches(70)))]),
            "count": 260,
        }


@pytest.mark.parametrize("size", [32, 256])
def test_the_classifier_reads_letters_of_other_families_on_photographs_at_any_size(size):
    glyphs = build(split="families", ground="photograph", num_images=104, image_size=size)
    logits = build_extractor("glyphs")(torch.stack([glyphs.image(index) for index in range(104)]))["logits"]
    assert (logits.argmax(1) == glyphs.labels).float().mean() > 0.9
