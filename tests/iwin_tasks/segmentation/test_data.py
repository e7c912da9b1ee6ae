import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from iwin_tasks.scenes import draw_scene
from iwin_tasks.segmentation.augmentation import PixelAugmentation
from iwin_tasks.segmentation.data import HeldOutPixels, PixelExamples, open_pixels

from .conftest import SCENES

SPLITS = ("train", "held-out")


def opened(folder, split="train", num_classes=11, **options):
    """Returns a split of a folder."""
    return open_pixels({"name": "ade20k", "path": str(folder), **options}, split, num_classes)


@pytest.mark.parametrize("split", SPLITS)
def test_a_folder_and_the_scenes_it_was_written_from_are_the_same(folder, split):
    found = opened(folder, split)
    assert len(found) == (4 if split == "train" else 3)
    given = {"image_size": [40, 56], "digits": [1, 4], "train_images": 4, "held_out_images": 3}
    scenes = open_pixels({"name": "scenes", **given}, split, 11)
    assert len(scenes) == len(found)
    for index in range(len(found)):
        image, labels = found.pair(index)
        scene = draw_scene(SCENES, split, index)
        assert image.equal(scene.image)
        assert labels.equal(scene.label_map.long())
        drawn, classes = scenes.pair(index)
        assert drawn.equal(image)
        assert classes.equal(labels)
    below = {"train": "training", "held-out": "validation"}[split]
    assert {name.rpartition("/")[0] for name in found.files()} == {f"images/{below}", f"annotations/{below}"}
    assert all(size == (folder / name).stat().st_size for name, size in found.files().items())


def write_labels(folder, values, name="00000001.png"):
    """Puts other labels in the place of one's of the training split."""
    picture = values if isinstance(values, Image.Image) else Image.fromarray(values)
    picture.save(folder / "annotations" / "training" / name)


@pytest.mark.parametrize("kind", ["16 bits", "palette", "bits"])
def test_labels_are_the_numbers_in_the_file(folder, kind):
    values = np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) % 11 + 1
    if kind == "bits":
        values %= 2
        write_labels(folder, Image.fromarray(values.astype(np.uint8) * 255).convert("1"))
    elif kind == "palette":
        picture = Image.fromarray(values.astype(np.uint8))
        picture.putpalette([7, 99, 3] * 256)
        write_labels(folder, picture)
    else:
        write_labels(folder, values)
    _, labels = opened(folder).pair(1)
    expected = torch.from_numpy(values.astype(np.int64)) - 1
    assert labels.equal(expected.where(expected >= 0, 255))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((40, 56), 12, np.uint8), r"labels must be 1 to 11, .* got 12 in .*training/00000001.png"),
        (np.full((40, 56), 300, np.uint16), r"labels must be 1 to 11, .* got 300 in .*training/00000001.png"),
        (np.full((40, 57), 1, np.uint8), r"of their image's size, 56 × 40, got 57 × 40 in .*00000001.png"),
        (np.ones((40, 56, 3), np.uint8), r"must be integers \(H, W\), got uint8 \(40, 56, 3\) in .*00000001"),
    ],
)
def test_labels_that_are_none_are_named_with_their_file(folder, values, message):
    write_labels(folder, values)
    with pytest.raises(ValueError, match=message):
        opened(folder).pair(1)


def test_offset_and_ignored_value_are_options(folder):
    write_labels(folder, np.full((40, 56), 7, np.uint8))
    assert opened(folder, ignore=99, offset=0).pair(1)[1].unique().tolist() == [7]
    assert opened(folder, ignore=99, offset=8).pair(1)[1].unique().tolist() == [99]
    assert opened(folder, ignore=50, num_classes=50).ignore == 50
    with pytest.raises(ValueError, match="ignore must be no class, got 10 for 11 classes"):
        opened(folder, ignore=10)


def test_a_broken_label_image_is_named(folder):
    (folder / "annotations" / "training" / "00000001.png").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"every image must be readable, .*training/00000001.png is not"):
        opened(folder).pair(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rm -r annotations/training", r"with images/training, .* without annotations/training"),
        ("rm -r images", r"data.path must be a folder with images/training, .* without images/training"),
        ("rm annotations/training/00000001.png", r"every image must have the label image .* 1 of .*00000001"),
        ("rm images/training/00000002.png", r"every label image must have the image in images .*00000002"),
        ("cp images/training/00000002.png images/training/00000002.jpg", "differ in more than the suffix"),
    ],
)
def test_a_folder_that_is_laid_out_otherwise_is_named(folder, change, message):
    command, *rest = change.split()
    paths = [folder / name for name in rest if name != "-r"]
    if command == "cp":
        shutil.copy(*paths)
    elif paths[0].is_dir():
        shutil.rmtree(paths[0])
    else:
        paths[0].unlink()
    with pytest.raises(ValueError, match=message):
        opened(folder)


def test_scenes_need_their_number_of_classes():
    with pytest.raises(ValueError, match=r"num_classes must be the number of the data's classes, 11, got 9"):
        open_pixels({"name": "scenes"}, "train", 9)
    with pytest.raises(ValueError, match=r"unknown split 'val'"):
        open_pixels({"name": "scenes"}, "val", 11)


def test_an_example_depends_on_seed_and_position_alone(folder):
    options = PixelAugmentation(scale=(80, 40), crop=(24, 32))
    first, again, other = (PixelExamples(opened(folder), options, seed) for seed in (0, 0, 1))
    assert first.size == 4
    for position in (5, 0, 11):
        example = first[position]
        assert example["image"].shape == (3, 24, 32)
        assert example["label"].shape == (24, 32)
        assert all(example[name].equal(again[position][name]) for name in example)
        assert not example["image"].equal(other[position]["image"])
        assert not example["image"].equal(first[position + 4]["image"])


def test_every_image_comes_once_an_epoch(folder):
    still = PixelAugmentation(scale=None, ratio=(1.0, 1.0), crop=None, hflip=0.0, photometric=0.0)
    examples = PixelExamples(opened(folder), still, 0)
    whole = {opened(folder).pair(i)[1].numpy().tobytes() for i in range(4)}
    for epoch in range(2):
        assert {examples[4 * epoch + i]["label"].numpy().tobytes() for i in range(4)} == whole


def test_held_out_images_are_resized_and_their_labels_are_not(folder):
    data = HeldOutPixels(opened(folder, "held-out"), (112, 60))
    assert len(data) == 3
    image, labels = data[1]
    assert image.shape == (3, 60, 84)
    assert labels.equal(opened(folder, "held-out").pair(1)[1])
