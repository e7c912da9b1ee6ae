"""A folder of samples: what it knows to be there, how it is mended, who may write it."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.damage import is_whole_png, is_whole_samples
from flashdit.sampling.folder import FORMATS, take_room
from flashdit.sampling.options import SamplingOptions
from flashdit.sampling.run import fill, open_folder
from flashdit.shared.files import TEMPORARY
from flashdit.shared.locks import only_writer

LABELS = torch.tensor([0, 1, 2, 0, 1])
OPTIONS = SamplingOptions(steps=1, batch_size=2)
ALONE = SimpleNamespace(
    process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None
)


@pytest.fixture(scope="module")
def generator(tiny_checkpoint):
    return load_generator(tiny_checkpoint)


def fill_folder(generator, path, form="both"):
    folder = open_folder(generator, LABELS, OPTIONS, path, form=form)
    fill(folder, generator, OPTIONS, ALONE)
    return folder


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize(
    ("form", "lost"),
    [
        ("both", ["000003.png"]),
        ("both", ["samples.npz"]),
        ("both", ["samples.npz", "000000.png", "grid.png"]),
        ("both", ["grid.png"]),
        ("png", ["000001.png", "000002.png"]),
        ("png", ["grid.png"]),
        ("npz", ["samples.npz"]),
        ("npz", ["grid.png"]),
    ],
)
def test_what_is_deleted_from_finished_samples_is_made_again(generator, tmp_path, form, lost):
    whole = files(fill_folder(generator, tmp_path / "out", form).path)
    for name in lost:
        (tmp_path / "out" / name).unlink()
    fill_folder(generator, tmp_path / "out", form)
    assert files(tmp_path / "out") == whole


def flip(path, place=0.5):
    """Flips the bits of a byte, by its place in the file from 0 to 1."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 255
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, truncate, empty])
@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("both", ["000003.png"]),
        ("both", ["samples.npz"]),
        ("both", ["grid.png", "000000.png", "samples.npz"]),
        ("png", ["000001.png", "000002.png"]),
        ("npz", ["samples.npz"]),
    ],
)
def test_what_is_damaged_in_finished_samples_is_named_and_alone_made_again(
    generator, tmp_path, caplog, damage, form, names
):
    whole = files(fill_folder(generator, tmp_path / "out", form).path)
    for name in names:
        damage(tmp_path / "out" / name)
    others = [path for path in (tmp_path / "out").glob("0*.png") if path.name not in names]
    written = [path.stat().st_mtime_ns for path in others]
    fill_folder(generator, tmp_path / "out", form)
    assert files(tmp_path / "out") == whole
    assert [path.stat().st_mtime_ns for path in others] == written
    assert caplog.messages == [f"{tmp_path / 'out'}: damaged files are made again: {', '.join(names)}"]


def test_a_deleted_grid_is_made_again_beside_damaged_arrays(generator, tmp_path):
    whole = files(fill_folder(generator, tmp_path / "out").path)
    (tmp_path / "out" / "grid.png").unlink()
    truncate(tmp_path / "out" / "samples.npz")
    fill_folder(generator, tmp_path / "out")
    assert files(tmp_path / "out") == whole


def test_arrays_of_other_samples_are_made_again(generator, tmp_path):
    whole = files(fill_folder(generator, tmp_path / "out").path)
    with (tmp_path / "out" / "samples.npz").open("wb") as file:
        np.savez(file, arr_0=np.zeros((2, 32, 32, 3), np.uint8), arr_1=np.zeros(2, int))
    fill_folder(generator, tmp_path / "out")
    assert files(tmp_path / "out") == whole


def test_no_flipped_byte_of_a_picture_changes_it_unseen(generator, tmp_path):
    path = fill_folder(generator, tmp_path / "out").path / "000000.png"
    whole, pixels = path.read_bytes(), np.asarray(Image.open(path))
    assert is_whole_png(path)
    changed = 0
    for place in range(0, len(whole), 31):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        if is_whole_png(path):
            assert np.array_equal(np.asarray(Image.open(path)), pixels), place
        else:
            changed += 1
    assert changed > len(whole) / 31 - 2


def test_no_flipped_byte_of_arrays_changes_them_unseen(tmp_path):
    arrays = {"arr_0": np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3), "arr_1": np.array([3])}
    path = tmp_path / "samples.npz"
    np.savez(path, **arrays)
    whole = path.read_bytes()
    assert is_whole_samples(path, arrays["arr_1"])
    assert not is_whole_samples(path, np.array([4]))
    for place in range(0, len(whole), 3):
        content = bytearray(whole)
        content[place] ^= 255
        path.write_bytes(content)
        if is_whole_samples(path, arrays["arr_1"]):
            with np.load(path) as found:
                assert np.array_equal(found["arr_0"], arrays["arr_0"]), place


def test_no_pixels_are_read_to_learn_what_is_there(generator, tmp_path, monkeypatch):
    folder = open_folder(generator, LABELS, OPTIONS, tmp_path / "out")
    folder.open()
    for batch in generator.generate(LABELS, OPTIONS, torch.tensor([1, 4])):
        folder.add(batch)
    read = []
    real = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(
        np.lib.npyio.NpzFile, "__getitem__", lambda self, key: (read.append(key), real(self, key))[1]
    )
    assert folder.missing().tolist() == [0, 2, 3]
    assert set(read) == {"ids"}


@pytest.mark.parametrize("damage", [flip, truncate, empty])
@pytest.mark.parametrize("name", [".parts/00000002.npz", "000003.png"])
def test_what_is_damaged_in_unfinished_samples_is_named_and_made_again(
    generator, tmp_path, caplog, name, damage
):
    whole = files(fill_folder(generator, tmp_path / "whole").path)
    folder = open_folder(generator, LABELS, OPTIONS, tmp_path / "out")
    folder.open()
    for batch in generator.generate(LABELS, OPTIONS, torch.arange(4)):
        folder.add(batch)
    damage(folder.path / name)
    fill_folder(generator, tmp_path / "out")
    assert caplog.messages == [f"{folder.path}: damaged files are made again: {name}"]
    assert files(tmp_path / "out") == whole


def test_what_a_killed_writer_left_among_the_parts_goes_with_them(generator, tmp_path):
    folder = open_folder(generator, LABELS, OPTIONS, tmp_path / "out")
    folder.open()
    for batch in generator.generate(LABELS, OPTIONS):
        folder.add(batch)
    left = folder.parts / f".00000002.npz.abc{TEMPORARY}"
    left.mkdir()
    (left / "00000002.npz").write_bytes(b"half")
    folder.finish()
    assert not folder.parts.exists()


def test_a_file_of_ones_own_among_the_parts_stays(generator, tmp_path):
    folder = open_folder(generator, LABELS, OPTIONS, tmp_path / "out")
    folder.open()
    (folder.parts / "mine.txt").touch()
    fill_folder(generator, tmp_path / "out")
    assert [path.name for path in folder.parts.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("sampling", 3, "sampling must be a mapping of keys, got 3"),
        ("sampling", {"sampler": 3, "atol": 1}, "'int' object is not iterable"),
        ("finished", "yes", "finished must be true or false, got 'yes'"),
        ("nfe", None, "nfe must be a number, got None"),
        ("nfe", [1], r"nfe must be a number, got \[1\]"),
    ],
)
def test_a_recipe_of_other_types_is_refused(generator, tmp_path, key, value, rule):
    path = fill_folder(generator, tmp_path / "out").path / "recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"recipe.json must be of `flashdit sample`: {rule}"):
        fill_folder(generator, tmp_path / "out")
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("content", ["3", "[]", "null", "{", '"text"'])
def test_a_recipe_that_is_no_mapping_is_refused(generator, tmp_path, content):
    (fill_folder(generator, tmp_path / "out").path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=r"recipe.json must be of `flashdit sample`"):
        fill_folder(generator, tmp_path / "out")


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_is_bound_to_a_recipe_by_its_first_samples(generator, tmp_path, form):
    folder = open_folder(generator, LABELS, OPTIONS, tmp_path / "out", form=form)
    folder.open()
    other = SamplingOptions(steps=2, batch_size=2)
    assert len(open_folder(generator, LABELS, other, tmp_path / "out", form=form).missing()) == 5
    folder.add(next(generator.generate(LABELS, OPTIONS, torch.arange(2))))
    with pytest.raises(ValueError, match=r"samples of another recipe \(sampling, title\)"):
        open_folder(generator, LABELS, other, tmp_path / "out", form=form)


def test_samples_that_cannot_be_written_leave_none_behind(generator, tmp_path, no_room):
    folder = open_folder(generator, LABELS, OPTIONS, tmp_path / "out")
    folder.open()
    batch = next(generator.generate(LABELS, OPTIONS, torch.arange(2)))
    with no_room(), pytest.raises(OSError, match="File too large"):
        folder.add(batch)
    assert not list(folder.path.glob("*.png"))
    fill(open_folder(generator, LABELS, SamplingOptions(steps=2), folder.path), generator, OPTIONS, ALONE)


def test_a_file_that_is_mapped_has_its_room_on_the_disk(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**20)
    assert (tmp_path / "sparse").stat().st_blocks * 512 < 2**20
    take_room(tmp_path / "sparse")
    assert (tmp_path / "sparse").stat().st_blocks * 512 >= 2**20


def test_a_folder_that_another_process_filled_meanwhile_is_refused(generator, tmp_path):
    folder = open_folder(generator, LABELS, SamplingOptions(steps=2), tmp_path / "out")
    fill_folder(generator, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match="samples of another recipe"):
        fill(folder, generator, OPTIONS, ALONE)
    assert files(tmp_path / "out") == before


def test_a_second_writer_is_refused(generator, tmp_path):
    with (
        only_writer(tmp_path / "out"),
        pytest.raises(ValueError, match=r"out must have one writer at a time"),
    ):
        fill_folder(generator, tmp_path / "out")
    fill_folder(generator, tmp_path / "out")


def test_the_recipe_names_the_classes_and_older_recipes_without_names_are_the_same(generator, tmp_path):
    folder = fill_folder(generator, tmp_path / "out")
    recipe = folder.read_recipe()
    assert recipe["class_names"] == ["cat", "golden retriever", "hen"]
    del recipe["class_names"]
    (tmp_path / "out" / "recipe.json").write_text(json.dumps(recipe))
    before = files(tmp_path / "out")
    fill_folder(generator, tmp_path / "out")
    assert files(tmp_path / "out") == before
    assert re.fullmatch(
        r"cfg_1.5_seed_0_\w{8}", open_folder(generator, LABELS, SamplingOptions(cfg_scale=1.5)).path.name
    )
