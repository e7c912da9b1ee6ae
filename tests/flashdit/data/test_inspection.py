"""The pass over a folder before the first step: what it leaves out, keeps beside the run, and refuses."""

import json
import logging

import pytest
import torch
from hard_pictures import CLASSES, READABLE, make_hard_pictures, square

from flashdit.data import inspection
from flashdit.data.encode import open_latents
from flashdit.data.inspection import Inspection, leave_out_unreadable
from flashdit.data.latents import LatentOptions
from flashdit.data.sources import ImageFolder, ImagesOptions


@pytest.fixture
def folder(tmp_path):
    return make_hard_pictures(tmp_path / "pictures")


@pytest.fixture
def record(tmp_path):
    return tmp_path / "run" / "images.json"


@pytest.fixture
def decoded(monkeypatch):
    """Returns the list of names that are decoded from here on."""
    names, look = [], inspection._look
    monkeypatch.setattr(
        inspection, "_look", lambda source, row: names.append(source.names[row]) or look(source, row)
    )
    return names


def open_folder(folder, image_size=32):
    return ImageFolder(ImagesOptions(path=str(folder), image_size=image_size))


def inspect(source, record):
    """Returns the readable images of a run that begins, and keeps the record of all."""
    seen = Inspection(record)
    readable = leave_out_unreadable(source, seen)
    seen.write()
    return readable


def checkpoint(record, class_names):
    """Makes the run of a record one that has a checkpoint."""
    state = record.parent / "checkpoints" / "step_00000002" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"format": 1, "class_names": class_names}))


def test_broken_images_are_left_out_and_told_with_all_else_in_one_line(folder, record, caplog):
    caplog.set_level(logging.INFO)
    source = inspect(open_folder(folder), record)
    assert len(source.paths) == len(source.labels) == READABLE
    assert source.labels.bincount().tolist() == [5, 5, 2]
    assert [source.image(row).shape for row in range(READABLE)] == [(3, 32, 32)] * READABLE
    broken, line = caplog.messages
    assert broken.startswith("skipped formes/broken.png, which cannot be read: ")
    assert line.endswith(
        "pictures: 12 images in 3 classes; left out: 3 hidden, 1 loose beside the class folders, 1 .txt, "
        "1 unreadable; 2 smaller than 32 px were enlarged, formes/small.png 1.6 times; "
        "5 with transparency are shown over white; of 1 with several frames the first is taken"
    )


def test_the_record_keeps_names_bytes_and_sizes(folder, record):
    inspect(open_folder(folder), record)
    content = json.loads(record.read_text())
    path = folder / "10 squares" / "phone.jpg"
    assert content["images"]["10 squares/phone.jpg"] == [path.stat().st_size, 40, 60, False, False]
    assert content["images"]["2 discs/rgba.png"][1:] == [48, 48, True, False]
    size, why = content["unreadable"]["formes/broken.png"]
    assert size == (folder / "formes" / "broken.png").stat().st_size
    assert why
    assert len(content["images"]) == READABLE


def test_a_second_pass_reads_only_what_is_new(folder, record, decoded):
    first = inspect(open_folder(folder), record)
    assert len(decoded) == READABLE + 1
    decoded.clear()
    folder = folder.rename(folder.with_name("moved"))
    again = inspect(open_folder(folder), record)
    assert decoded == []
    assert again.names == first.names
    square(50, 51).save(folder / "formes" / "new.png")
    inspect(open_folder(folder), record)
    assert decoded == ["formes/new.png"]


def test_what_a_run_knows_its_images_by_changes_with_those_that_it_reads_alone(folder, record):
    before = inspect(open_folder(folder), record).identity()
    assert len(before["files"]) == READABLE
    (folder / "formes" / "broken.png").unlink()  # which it did without
    assert inspect(open_folder(folder), record).identity() == before
    (folder / "10 squares" / "phone.jpg").rename(folder / "10 squares" / "renamed.jpg")
    square(90, 91).save(folder / "formes" / "small.png")
    now = inspect(open_folder(folder), record).identity()
    assert before["files"].keys() ^ now["files"].keys() == {"10 squares/phone.jpg", "10 squares/renamed.jpg"}
    assert before["files"]["formes/small.png"] != now["files"]["formes/small.png"]
    assert now["classes"] == before["classes"]


def test_a_resumed_run_keeps_the_order_of_its_classes(folder, record):
    old = sorted(CLASSES)  # as an earlier version ordered them
    assert old != CLASSES
    checkpoint(record, old)
    source = inspect(open_folder(folder), record)
    assert source.class_names == old
    assert source.labels.bincount().tolist() == [5, 5, 2]
    assert source.names[0].startswith("10 squares/")
    (folder / "extra").mkdir()
    square(9, 9).save(folder / "extra" / "a.png")
    with pytest.raises(ValueError, match=r"a resumed run keeps its classes, .* has others too: extra"):
        inspect(open_folder(folder), record)


def test_a_class_of_broken_images_is_named(folder):
    for name in ("small.png", "deeper/größe 絵.bmp"):
        (folder / "formes" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"every class must have a readable image, .* has none of formes"):
        leave_out_unreadable(open_folder(folder))


def test_an_image_too_long_to_be_scaled_is_left_out(folder, caplog):
    square(1_500, 1).save(folder / "formes" / "line.png")  # 256 × 384,000 pixels before it is cropped
    source = leave_out_unreadable(open_folder(folder, 256))
    assert len(source.paths) == READABLE
    assert "skipped formes/line.png, which cannot be read: an image must have at most" in caplog.text
    assert "formes/line.png" in leave_out_unreadable(open_folder(folder, 128)).names


def test_a_run_among_its_images_is_refused(folder):
    record = folder / "run" / "images.json"
    with pytest.raises(
        ValueError, match=r"run\.dir must not lie in the images of data\.path, .*pictures/run$"
    ):
        inspect(open_folder(folder), record)
    assert not record.parent.exists()


def test_a_damaged_record_is_named(folder, record):
    record.parent.mkdir()
    record.write_text("{")
    with pytest.raises(ValueError, match=r"images.json must be as it was written, delete it"):
        inspect(open_folder(folder), record)


def test_an_image_that_breaks_later_is_named(folder):
    source = leave_out_unreadable(open_folder(folder))
    source.paths[0].write_bytes(b"")
    with pytest.raises(ValueError, match=r"every image must be readable, .*animated.gif is not"):
        source.image(0)


def test_training_on_images_leaves_broken_ones_out(folder):
    data = {"name": "images", "path": str(folder), "image_size": 16, "mirrors": False}
    latents, _ = open_latents(data, LatentOptions(vae="digits"), torch.device("cpu"), False)
    assert len(latents.labels) == len(latents.latents) == READABLE
