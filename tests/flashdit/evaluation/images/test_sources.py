import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from flashdit.data.images import centre_crop
from flashdit.digits.reference import DigitsSource
from flashdit.evaluation.images.folders import FolderSource
from flashdit.evaluation.images.npz import NpzSource
from flashdit.evaluation.images.reading import label_mode
from flashdit.evaluation.images.sources import GeneratedSource, open_reference, open_source, take
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.classes import balanced_labels

NUM_IMAGES = 7


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 6, 9, 3), dtype=np.uint8)


def save_folder(folder: Path, images: np.ndarray, names: list[str]) -> Path:
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return folder


def read(source, batch_size: int, ids: torch.Tensor | None = None) -> torch.Tensor:
    return torch.cat(list(source.batches(batch_size, ids)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_npz_and_folder_give_the_same_images_for_any_batch_size(tmp_path, images, save, batch_size):
    save(tmp_path / "samples.npz", images, np.arange(NUM_IMAGES))
    folder = save_folder(tmp_path / "folder", images, [f"{n}.png" for n in range(NUM_IMAGES)])
    npz, files = open_source(tmp_path / "samples.npz"), open_source(folder)
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    some = torch.tensor([1, 2, 5])
    for source in (npz, files):
        assert source.image_size == (6, 9)
        assert max(map(len, source.batches(batch_size))) <= batch_size
        assert_close(read(source, batch_size), expected)
        assert_close(read(source, batch_size, some), expected[some])
        assert list(source.batches(batch_size, some[:0])) == []
        assert_close(take(source, torch.tensor([5, 0, 5])), expected[[5, 0, 5]])
    assert npz.labels is not None
    assert npz.labels.tolist() == list(range(NUM_IMAGES))
    assert files.labels is None


def test_a_limit_reads_so_many_from_the_start(tmp_path, images):
    np.savez(tmp_path / "samples.npz", images)
    source = NpzSource(tmp_path / "samples.npz", limit=4)
    assert source.count == 4
    assert_close(read(source, 3), torch.from_numpy(images[:4]).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"must be 1 to the 7 in .*, got 8"):
        NpzSource(tmp_path / "samples.npz", limit=8)


def test_folder_order_is_by_integer_stem_and_then_by_name(tmp_path, images):
    names = ["b.png", "10.png", "2.png", "a.png", "001.png", "c.jpg", "x.png"]
    files = FolderSource(save_folder(tmp_path, images, names)).files
    assert [file.name for file in files] == ["001.png", "2.png", "10.png", "a.png", "b.png", "c.jpg", "x.png"]


@pytest.mark.parametrize(
    ("folders", "labels", "names"),
    [
        (("two", "zero"), [0, 1], {0: "two", 1: "zero"}),
        (("7", "11"), [7, 11], {7: "7", 11: "11"}),
        (("b10", "b9"), [1, 0], {0: "b9", 1: "b10"}),
        (("7", "07"), [1, 0], {0: "07", 1: "7"}),
    ],
    ids=["in order", "numbers", "natural order", "one number twice"],
)
def test_class_folders_give_labels_with_their_names(tmp_path, images, folders, labels, names):
    files = [f"{folders[0]}/0.png", f"{folders[1]}/deeper/1.png"]
    source = FolderSource(save_folder(tmp_path, images[:2], files))
    assert source.labels is not None
    assert source.labels.tolist() == labels
    assert source.class_names == names


def test_digits_source_reads_the_held_out_split():
    source = DigitsSource("held-out")
    images = read(source, 100)
    assert (len(images), images.dtype) == (360, torch.uint8)
    assert len(source.labels) == 360
    assert_close(take(source, torch.tensor([7, 3])), images[[7, 3]])


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
    with pytest.raises(ValueError, match=r"the .* bytes of its header, arr_0\.npy has .*short\.npz"):
        NpzSource(short)


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


def test_generated_images_depend_neither_on_the_shares_nor_on_who_asks(tiny_checkpoint):
    generator = load_generator(tiny_checkpoint)
    options = replace(generator.sampling, batch_size=3)
    source = GeneratedSource(generator, balanced_labels(7, 3, seed=0), options)
    whole = read(source, 100)
    assert whole.shape == (7, 3, *source.image_size)
    for world in (2, 3, 8):
        for rank in range(world):
            ids = torch.arange(rank, 7, world)
            found = [whole[:0], *source.batches(100, ids)]
            assert_close(torch.cat(found), whole[ids], rtol=0, atol=0)
    assert_close(take(source, torch.tensor([6, 1])), whole[[6, 1]], rtol=0, atol=0)


def test_every_forward_has_one_size_and_as_few_images_as_possible_are_thrown_away(
    tiny_checkpoint, monkeypatch
):
    generator = load_generator(tiny_checkpoint)
    source = GeneratedSource(
        generator, balanced_labels(9, 3, seed=0), replace(generator.sampling, batch_size=4)
    )
    sizes, latents = [], generator.latents

    def counted(ids, *others):
        sizes.append(len(ids))
        return latents(ids, *others)

    monkeypatch.setattr(generator, "latents", counted)
    assert len(read(source, 100)) == 9
    assert sizes == [3, 3, 3]
    sizes.clear()
    assert len(torch.cat(list(source.batches(100, torch.tensor([0, 2, 4, 6]))))) == 4
    assert sizes == [3, 3]


def test_identity_of_generated_images_follows_the_recipe_and_not_the_batch(tiny_checkpoint):
    generator = load_generator(tiny_checkpoint)
    labels = balanced_labels(7, 3, seed=0)

    def identity(labels=labels, weights="ema", **changes):
        made = load_generator(tiny_checkpoint, weights=weights)
        return GeneratedSource(made, labels, replace(generator.sampling, **changes)).identity()

    assert identity() == identity(batch_size=2)
    others = [identity(seed=1), identity(cfg_scale=2.0), identity(labels.flip(0)), identity(weights="model")]
    assert all(other != identity() for other in others)


def test_empty_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="a folder of images must hold images"):
        FolderSource(tmp_path)


def test_mixed_sizes_name_both_files(tmp_path, images):
    save_folder(tmp_path, images[:2], ["0.png", "1.png"])
    Image.new("RGB", (5, 6)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"must have one size, got 9×6 and 5×6 \(.*0\.png and .*2\.png\)"):
        read(FolderSource(tmp_path), 10)


def test_a_reader_that_stops_half_way_leaves_no_open_file(tmp_path, images):
    np.savez(tmp_path / "samples.npz", images)
    batches = NpzSource(tmp_path / "samples.npz").batches(2)
    next(batches)
    batches.close()  # an open file would warn when it is collected, and warnings are errors


def test_label_mode_says_whether_classes_have_equal_shares():
    assert label_mode(torch.tensor([0, 1, 1, 2])) == "balanced"
    assert label_mode(torch.tensor([0, 1, 1, 1])) == "not balanced"
    assert label_mode(None) is None


def test_identity_follows_the_content_and_not_the_name(tmp_path, images):
    path, other = tmp_path / "samples.npz", tmp_path / "other.npz"
    np.savez(path, images)
    before = NpzSource(path).identity()
    np.savez(other, images)
    assert NpzSource(other).identity() == before
    assert NpzSource(path, limit=3).identity() != before
    np.savez(path, images ^ 1)
    assert NpzSource(path).identity() != before


def test_an_npz_with_a_damaged_pixel_is_not_the_one_that_it_was(tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, np.zeros((20, 64, 64, 3), dtype=np.uint8))  # larger than what is read to open it
    before = NpzSource(path).identity()
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1  # the checksum that the archive keeps stays
    path.write_bytes(flipped)
    assert NpzSource(path).identity() != before


def test_identity_of_a_folder_follows_its_files(tmp_path, images):
    save_folder(tmp_path, images[:2], ["0.png", "1.png"])
    before = FolderSource(tmp_path)
    identity, digest = before.identity(), before.sha256
    os.utime(tmp_path / "1.png", ns=(1, 1))
    assert (FolderSource(tmp_path).identity(), FolderSource(tmp_path).sha256) == (identity, digest)
    (tmp_path / "1.png").rename(tmp_path / "2.png")
    renamed = FolderSource(tmp_path)
    assert renamed.identity() != identity
    assert renamed.sha256 != digest


def test_folders_of_equal_names_sizes_and_times_are_not_the_same_images(tmp_path, images):
    sources = []
    for name, change in (("one", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        Image.fromarray(images[0] ^ change).save(tmp_path / name / "0.bmp")
        os.utime(tmp_path / name / "0.bmp", ns=(1, 1))
        sources.append(FolderSource(tmp_path / name))
    one, other = sources
    assert (tmp_path / "one" / "0.bmp").stat().st_size == (tmp_path / "other" / "0.bmp").stat().st_size
    assert one.identity() != other.identity()
    assert one.sha256 != other.sha256


@pytest.mark.parametrize("keep", [0, 20, 100], ids=["empty", "header", "half"])
def test_unreadable_image_is_named(tmp_path, images, keep):
    save_folder(tmp_path, images[:2], ["0.png", "1.png"])
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"every image must be readable, .*1\.png is not"):
        read(FolderSource(tmp_path), 10)


def test_a_path_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be an existing npz or folder, got .*absent"):
        open_source(tmp_path / "absent")


def test_a_folder_with_links_is_the_same_images(tmp_path, images):
    """Its own reference: the full set against itself, not against what is there without links."""
    names = [f"class{n % 3}/{n}.png" for n in range(NUM_IMAGES)]
    whole = save_folder(tmp_path / "whole", images, names)
    linked = tmp_path / "linked"
    linked.mkdir()
    for n in range(3):
        (linked / f"class{n}").symlink_to(whole / f"class{n}")
    one, other = FolderSource(whole), FolderSource(linked)
    assert other.sha256 == one.sha256
    assert_close(read(other, 3), read(one, 3))
    assert other.labels is not None
    assert other.labels.tolist() == [n % 3 for n in range(NUM_IMAGES)]


def test_scoring_composites_as_encoding_does_and_a_background_is_another_content(tmp_path):
    Image.new("RGBA", (4, 5), (0, 255, 0, 0)).save(tmp_path / "0.png")
    white, red = open_source(tmp_path), open_source(tmp_path, background="red")
    assert read(white, 1).unique().tolist() == [255]
    assert read(red, 1)[0, :, 0, 0].tolist() == [255, 0, 0]
    assert white.identity() != red.identity()
    assert white.sha256 != red.sha256


def test_scoring_refuses_what_training_would_leave_out(tmp_path, images):
    save_folder(tmp_path, images[:2], ["0.png", "1.png"])
    (tmp_path / "gone.png").symlink_to(tmp_path / "absent.png")
    with pytest.raises(
        ValueError, match=r"every image must be readable, .*gone.png is not: a link to nothing"
    ):
        FolderSource(tmp_path)


def test_scoring_says_what_it_found(tmp_path, images, caplog):
    caplog.set_level("INFO")
    save_folder(tmp_path, images[:2], ["0.png", "1.png"])
    (tmp_path / "notes.txt").touch()
    FolderSource(tmp_path)
    assert caplog.messages[-1].endswith(": 2 images in 1 class; left out: 1 .txt")


def test_images_of_a_folder_are_cropped_as_encoding_does_and_that_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    draws = np.random.default_rng(0)
    for number, shape in enumerate([(9, 6, 3), (20, 31, 3), (8, 8, 3)]):
        Image.fromarray(draws.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    source = open_source(tmp_path, image_size=8)
    assert source.image_size == (8, 8)
    images = read(source, 2)
    for number in range(3):
        expected = centre_crop(Image.open(tmp_path / f"{number}.png"), 8)
        assert torch.equal(images[number], torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert caplog.messages[-1].endswith(
        ": 2 of 3 images are cropped to 8×8, as encoding does; "
        "1 smaller than 8 px was enlarged, 0.png 1.3 times"
    )
    other = open_source(tmp_path, image_size=6)
    assert other.identity() != source.identity()
    assert other.sha256 != source.sha256
    assert source.recipe()["cropped_to"] == 8


def test_a_size_that_images_have_already_changes_nothing(tmp_path, images, caplog):
    caplog.set_level("INFO")
    save_folder(tmp_path, images[:, :, :6], [f"{n}.png" for n in range(NUM_IMAGES)])
    plain, sized = open_source(tmp_path), open_source(tmp_path, image_size=6)
    assert sized.identity() == plain.identity()
    assert "cropped" not in caplog.text


def test_an_npz_of_another_size_is_refused(tmp_path, images):
    np.savez(tmp_path / "samples.npz", images)
    message = r"crops images of folders alone, others must have it, got 9×6 in .*samples\.npz for 8×8"
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "samples.npz", image_size=8)
    with pytest.raises(ValueError, match="got 32×32 in digits for 8×8"):
        open_reference("digits", image_size=8)
    with pytest.raises(ValueError, match="the image size must be at least 1, got 0"):
        open_source(tmp_path, image_size=0)
