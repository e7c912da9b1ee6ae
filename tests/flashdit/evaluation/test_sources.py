import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from flashdit.evaluation.sources import DigitsSource, FolderSource, NpzSource, open_source

NUM_IMAGES = 7


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 6, 9, 3), dtype=np.uint8)


def save_folder(folder: Path, images: np.ndarray, names: list[str]) -> Path:
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return folder


def read(source, batch_size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    batches = list(source.batches(batch_size))
    labels = [label for _, label in batches if label is not None]
    return torch.cat([image for image, _ in batches]), torch.cat(labels) if labels else None


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_npz_and_folder_give_the_same_images_for_any_batch_size(tmp_path, images, save, batch_size):
    save(tmp_path / "samples.npz", images, np.arange(NUM_IMAGES))
    folder = save_folder(tmp_path / "folder", images, [f"{n}.png" for n in range(NUM_IMAGES)])
    from_npz, labels = read(open_source(tmp_path / "samples.npz"), batch_size)
    from_folder, no_labels = read(open_source(folder), batch_size)
    assert_close(from_npz, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert_close(from_folder, from_npz)
    assert labels is not None
    assert labels.tolist() == list(range(NUM_IMAGES))
    assert no_labels is None


def test_a_limit_reads_so_many_from_the_start(tmp_path, images):
    np.savez(tmp_path / "samples.npz", images)
    source = NpzSource(tmp_path / "samples.npz", limit=4)
    assert source.count == 4
    assert_close(read(source, 3)[0], torch.from_numpy(images[:4]).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"must be 1 to the 7 in .*, got 8"):
        NpzSource(tmp_path / "samples.npz", limit=8)


def test_folder_order_is_by_integer_stem_and_then_by_name(tmp_path, images):
    names = ["b.png", "10.png", "2.png", "a.png", "001.png", "c.jpg", "x.png"]
    files = FolderSource(save_folder(tmp_path, images, names)).files
    assert [file.name for file in files] == ["001.png", "2.png", "10.png", "a.png", "b.png", "c.jpg", "x.png"]


@pytest.mark.parametrize(
    ("folders", "labels"),
    [(("two", "zero"), [2, 0]), (("7", "11"), [7, 11]), (("cat", "dog"), [0, 1])],
    ids=["class names", "numbers", "anything else"],
)
def test_class_folders_give_labels(tmp_path, images, folders, labels):
    names = [f"{folders[0]}/0.png", f"{folders[1]}/deeper/1.png"]
    source = FolderSource(save_folder(tmp_path, images[:2], names), class_names=["zero", "one", "two"])
    assert read(source, 2)[1].tolist() == labels  # pyright: ignore[reportOptionalMemberAccess]


def test_digits_source_reads_the_held_out_split():
    images, labels = read(DigitsSource("held-out"), 100)
    assert (len(images), images.dtype) == (360, torch.uint8)
    assert labels is not None
    assert len(labels) == 360


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 4, 4, 3), dtype=np.float32),
        np.zeros((2, 3, 4, 4), dtype=np.uint8),
        np.zeros((0, 4, 4, 3), dtype=np.uint8),
        np.zeros((2, 4), dtype=np.uint8),
    ],
    ids=["float", "channels first", "none", "rows"],
)
def test_npz_that_holds_no_images_is_refused(tmp_path, array):
    np.savez(tmp_path / "samples.npz", array)
    with pytest.raises(
        ValueError, match=r"arr_0 must be uint8 \(n, h, w, 3\) in C order with n ≥ 1, got .*samples"
    ):
        NpzSource(tmp_path / "samples.npz")


def test_npz_without_images_or_that_is_none_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("other.npz", "text.npz"):
        with pytest.raises(ValueError, match=f"must be an npz with images in arr_0, got .*{name}"):
            NpzSource(tmp_path / name)


def test_labels_that_do_not_match_the_images_are_refused(tmp_path, images):
    np.savez(tmp_path / "samples.npz", images, np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match=r"one integer label per image, got int64 \(3,\)"):
        NpzSource(tmp_path / "samples.npz")


def test_npz_that_ends_early_is_named(tmp_path, images):
    whole, short = tmp_path / "whole.npz", tmp_path / "short.npz"
    np.savez(whole, images)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(short, "w") as cut:
        cut.writestr("arr_0.npy", archive.read("arr_0.npy")[:-200])
    with pytest.raises(ValueError, match=r"short\.npz ends early: arr_0 lacks images from number 4 on"):
        read(NpzSource(short), 2)


def test_truncated_and_damaged_npz_are_named(tmp_path, images):
    many = np.tile(images, (20, 1, 1, 1))  # more than the first read, which takes the header
    np.savez(tmp_path / "whole.npz", many)
    data = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "truncated.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"must be an npz with images in arr_0, got .*truncated\.npz"):
        NpzSource(tmp_path / "truncated.npz")
    place = len(data) - 1000
    (tmp_path / "damaged.npz").write_bytes(data[:place] + bytes(64) + data[place + 64 :])
    with pytest.raises(ValueError, match=r"damaged\.npz is damaged: Bad CRC-32"):
        read(NpzSource(tmp_path / "damaged.npz"), 100)


def test_empty_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="a folder of images must hold at least one"):
        FolderSource(tmp_path)


def test_mixed_sizes_name_both_files(tmp_path, images):
    save_folder(tmp_path, images[:2], ["0.png", "1.png"])
    Image.new("RGB", (5, 6)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"must have one size, got 9×6 and 5×6 \(.*0\.png and .*2\.png\)"):
        read(FolderSource(tmp_path), 10)


@pytest.mark.parametrize("keep", [0, 20, 100], ids=["empty", "header", "half"])
def test_unreadable_image_is_named(tmp_path, images, keep):
    save_folder(tmp_path, images[:2], ["0.png", "1.png"])
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"every image of a folder must be readable, got .*1\.png"):
        read(FolderSource(tmp_path), 10)


def test_folder_of_the_sampler_is_read_from_its_npz(tmp_path, images):
    save_folder(tmp_path, images, [f"{n:06d}.png" for n in range(NUM_IMAGES)])
    Image.new("RGB", (90, 60)).save(tmp_path / "grid.png")
    np.savez(tmp_path / "samples.npz", images, np.arange(NUM_IMAGES))
    source = open_source(tmp_path)
    assert source.count == NUM_IMAGES
    assert read(source, 3)[1].tolist() == list(range(NUM_IMAGES))  # pyright: ignore[reportOptionalMemberAccess]


def test_a_path_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be an existing npz or folder, got .*absent"):
        open_source(tmp_path / "absent")
