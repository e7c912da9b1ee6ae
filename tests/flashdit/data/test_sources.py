import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from flashdit.data.images import centre_crop
from flashdit.data.sources import DATASETS
from flashdit.digits.images import digits


@pytest.fixture
def folder(tmp_path):
    """Returns an image folder of two classes with images of several sizes and formats."""
    for name, count in {"cat": 3, "dog": 2}.items():
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = np.full((20 + i, 30, 3), 40 * i, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.{'png' if i else 'jpg'}")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    return tmp_path


def open_images(path, size=16):
    return DATASETS.build({"name": "images", "path": str(path), "image_size": size})


def test_sub_folders_are_classes(folder):
    source = open_images(folder)
    assert source.class_names == ["cat", "dog"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    assert source.image(2).shape == (3, 16, 16)
    assert source.image(2).dtype == torch.uint8
    assert source.image(2).float().mean() == 80


def test_a_folder_without_sub_folders_is_one_class(folder):
    source = open_images(folder / "dog")
    assert source.class_names == ["dog"]
    assert source.labels.tolist() == [0, 0]


@pytest.mark.parametrize("size", [(100, 40), (37, 90), (16, 16), (9, 12)])
def test_centre_crop_is_a_square_around_the_centre(size):
    ramp = np.tile(np.linspace(0, 255, size[0]), (size[1], 1)).astype(np.uint8)
    cropped = centre_crop(Image.fromarray(ramp), 16)
    assert cropped.size == (16, 16)
    assert abs(np.asarray(cropped).mean() - 127.5) < 3


def test_image_folders_that_cannot_be_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"data.path must be a folder of images, got .*absent"):
        open_images(tmp_path / "absent")
    (folder / "empty" / "class").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"data.path must hold images \(.*.bmp.*\), got none in .*empty"):
        open_images(folder / "empty")
    with pytest.raises(ValueError, match=r"every class folder must hold an image, .* has without: empty"):
        open_images(folder)
    (folder / "empty" / "class").rmdir()
    (folder / "empty").rmdir()
    (folder / "cat" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"every image must be readable, .*cat/1.png is not"):
        open_images(folder).image(1)


def test_digits_are_the_real_ones_in_a_fixed_split():
    images, labels = digits("train")
    held_out, held_out_labels = digits("held-out")
    assert (len(images), len(held_out)) == (1437, 360)
    assert images.shape[1:] == (3, 32, 32)
    assert (
        torch.cat([labels, held_out_labels]).bincount().tolist() == np.bincount(load_digits().target).tolist()
    )
    assert held_out_labels.bincount().min() >= 35
    distinct = {image.numpy().tobytes() for image in torch.cat([images, held_out])}
    assert len(distinct) == len({row.tobytes() for row in load_digits().data})
    with pytest.raises(ValueError, match=r"splits 'train' and 'held-out', got split='test'"):
        digits("test")


def test_digits_are_a_data_set_of_ten_classes_that_a_mirror_would_change():
    source = DATASETS.build("digits")
    assert len(source.class_names) == 10
    assert not source.mirrors
    assert source.image(3).equal(digits("train")[0][3])
    assert source.labels.equal(digits("train")[1])


def test_enlarged_digits_keep_their_picture():
    images, _ = digits("train")
    small = torch.nn.functional.avg_pool2d(images[:, :1].float(), 4)
    originals = torch.from_numpy(load_digits().images).float() / 16 * 255
    nearest = torch.cdist(small.flatten(1)[:50], originals.flatten(1)).min(1).values
    assert (nearest / 8 < 20).all()  # root mean square, in grey levels


def test_a_path_without_a_data_sets_name_says_which_have_one():
    with pytest.raises(
        ValueError, match=r"unknown option of data 'digits' 'path': data.name=images and data.name="
    ):
        DATASETS.options({"name": "digits", "path": "pictures"})


def test_a_background_that_is_none_is_named(folder):
    with pytest.raises(ValueError, match=r"background must be a colour's name or #rrggbb, got 'clear'"):
        DATASETS.build({"name": "images", "path": str(folder), "background": "clear"})


def test_an_image_too_long_to_crop_is_named(folder):
    Image.new("L", (100_000, 1)).save(folder / "cat" / "1.png")
    with pytest.raises(ValueError, match=r"cat/1.png is not: an image must have at most"):
        open_images(folder, 256).image(1)
