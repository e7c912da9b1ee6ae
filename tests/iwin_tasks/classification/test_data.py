import hashlib
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from flashdit.digits.images import digits
from iwin_tasks.classification.data import HeldOutExamples, check_same_classes, keep_readable, open_split


def open_images(folder, split="train", num_classes=3):
    return open_split({"name": "images", "path": str(folder)}, split, (8, 12), num_classes)


def test_an_example_depends_on_seed_and_position_alone(training):
    first = training(seed=3)[17]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    other = training(seed=3)
    other[2]
    assert torch.equal(other[17]["image"], first["image"])
    assert torch.equal(other[17]["target"], first["target"])
    assert not torch.equal(other[16]["image"], first["image"])
    assert not torch.equal(training(seed=4)[17]["image"], first["image"])
    assert first["image"].shape == (3, 8, 12)
    assert first["target"].sum() == pytest.approx(1)


@pytest.mark.parametrize("size", [1, 3, 4, 12])
def test_batches_of_any_size_hold_the_same_examples(training, size):
    examples = training()
    alone = [examples[position] for position in range(3, 15)]
    batched = []
    for start in range(3, 15, size):
        batched += examples.__getitems__(range(start, start + size))
    for one, other in zip(alone, batched, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["target"], other["target"])


def test_a_loader_with_workers_gives_the_same_batches(training):
    examples, batches = training(), [range(6), range(6, 12)]
    here, there = (list(DataLoader(examples, batch_sampler=batches, num_workers=n)) for n in (0, 1))
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["target"], other["target"])
    assert here[0]["image"].shape == (6, 3, 8, 12)


def test_reading_examples_leaves_the_global_generators_alone(training):
    examples = training()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    examples.__getitems__(range(8))
    assert random.getstate() == states[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[2])


def test_every_epoch_is_another_order_of_all_images(training):
    examples = training()
    epochs = [[examples.order(9 * epoch + place) for place in range(9)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_held_out_images_come_in_order_resized_and_normalised(folder, form):
    examples = HeldOutExamples(open_images(folder, "held-out"), form)
    assert [label for _, label in examples] == [0, 0, 1, 1, 2, 2]
    image, _ = examples[0]
    assert image.shape == (3, 8, 12)
    assert torch.equal(image, examples[0][0])
    pixels = image * torch.tensor(form.std)[:, None, None] + torch.tensor(form.mean)[:, None, None]
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_digits_come_unchanged_at_the_models_size(form):
    square = form.__class__(**vars(form) | {"image_size": (32, 32), "crop_pct": 1.0})
    examples = HeldOutExamples(open_split({"name": "digits"}, "held-out", (32, 32), 10), square)
    images, labels = digits("held-out")
    mean, std = (torch.tensor(value)[:, None, None] for value in (form.mean, form.std))
    torch.testing.assert_close(examples[5][0], (images[5] / 255 - mean) / std)
    assert [examples[row][1] for row in range(9)] == labels[:9].tolist()
    assert len(examples) == 360


def test_digits_of_another_size_are_enlarged_from_the_originals():
    large, labels = digits("held-out", 64)
    images, same = digits("held-out", 32)
    assert torch.equal(labels, same)
    assert torch.equal(images, digits("held-out")[0])
    assert large.shape == (360, 3, 64, 64)
    originals = torch.from_numpy(load_digits().images).float()[:, None] / 16 * 255
    enlarged = F.interpolate(originals, size=(64, 64), mode="bicubic").round().clamp(0, 255)
    known = {picture.numpy().tobytes() for picture in enlarged.to(torch.uint8)}
    assert all(picture[:1].numpy().tobytes() in known for picture in large)


def test_folders_that_cannot_be_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"sub-folders train and val, .* where train/ is not there"):
        open_images(tmp_path / "absent")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"sub-folders train and val, .*flat, where train/ has no class"):
        open_images(tmp_path / "flat")
    with pytest.raises(
        ValueError, match=r"model.num_classes must be the number of the data's classes, 3, got 4"
    ):
        open_images(folder, num_classes=4)
    with pytest.raises(ValueError, match=r"unknown split 'test' \(known: held-out, train\)"):
        open_images(folder, "test")
    (folder / "val" / "owl").rename(folder / "val" / "elk")
    with pytest.raises(ValueError, match=r"same classes, got 2 that only one of them has: elk, owl"):
        check_same_classes(open_images(folder), open_images(folder, "held-out"))


def test_an_image_that_cannot_be_read_is_named_when_it_is_reached(folder):
    (folder / "train" / "dog" / "1.png").write_bytes(b"not a picture")
    images = open_images(folder)
    assert images.picture(5).size == (30, 20)
    with pytest.raises(ValueError, match=r"every image must be readable, .*dog/1.png is not"):
        images.picture(6)


def open_flat(folder, split, **options):
    return open_split(
        {"name": "images", "path": str(folder / "train"), "held_out": 0.3, **options}, split, (8, 12), 3
    )


def test_a_folder_of_classes_is_split_by_name(folder):
    train, held_out = open_flat(folder, "train"), open_flat(folder, "held-out")
    names = {split: set(images.source.names) for split, images in (("train", train), ("held-out", held_out))}
    assert names["train"] | names["held-out"] == {
        path.relative_to(folder / "train").as_posix() for path in (folder / "train").rglob("*.png")
    }
    assert not names["train"] & names["held-out"]
    assert train.class_names == held_out.class_names == ["cat", "dog", "owl"]
    assert train.labels.unique().tolist() == held_out.labels.unique().tolist() == [0, 1, 2]

    def place(name):
        return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 2**64

    cats = sorted((f"cat/{n}.png" for n in range(5)), key=place)
    expected = {name for name in cats if place(name) < 0.3} or {cats[0]}
    assert {name for name in names["held-out"] if name.startswith("cat")} == expected


def test_a_split_that_cannot_be_is_named(folder):
    with pytest.raises(ValueError, match=r"data.held_out must be between 0 and 1, got 1.5"):
        open_flat(folder, "train", held_out=1.5)
    (folder / "train" / "owl" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"data.held_out requires two images of each class, owl has 1"):
        open_flat(folder, "train")
    with pytest.raises(
        ValueError, match=r"or of the classes themselves with data.held_out=0.1, got .*train, where"
    ):
        open_images(folder / "train")


def test_broken_images_are_left_out_of_training_and_refused_among_the_held_out(folder, tmp_path):
    run = tmp_path / "run"
    (folder / "train" / "dog" / "1.png").write_bytes(b"not a picture")
    train = open_images(folder)
    inspection = train.leave_out_unreadable(run, False)
    assert len(train.labels) == 8
    assert not run.exists(), "nothing is kept of a run that may be refused"
    inspection.write()
    assert (run / "images.json").is_file()
    held_out = open_images(folder, "held-out")
    held_out.leave_out_unreadable(run, False)
    (folder / "val" / "owl" / "0.png").write_bytes(b"")
    held_out = open_images(folder, "held-out")
    with pytest.raises(ValueError, match=r"every held-out image must be readable, .*val/owl/0.png is not"):
        held_out.leave_out_unreadable(run, False)


def test_a_broken_image_of_one_folder_for_both_splits_is_named_once(folder, tmp_path, caplog):
    (folder / "train" / "cat" / "1.png").write_bytes(b"not a picture")
    train, held_out = open_flat(folder, "train"), open_flat(folder, "held-out")
    caplog.set_level("INFO")
    keep_readable(train, held_out, tmp_path / "run", False)
    assert len(train.labels) + len(held_out.labels) == 8
    assert caplog.text.count("8 images in 3 classes; left out: 1 unreadable") == 1


def test_a_run_keeps_the_order_of_its_classes(folder, tmp_path):
    state = tmp_path / "run" / "checkpoints" / "step_00000001" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"format": 1, "class_names": ["owl", "cat", "dog"]}')
    images = open_split({"name": "images", "path": str(folder)}, "train", (8, 12), 3, tmp_path / "run")
    assert images.class_names == ["owl", "cat", "dog"]
    assert images.labels.tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2]


def test_pictures_with_alpha_show_the_background(folder):
    Image.new("RGBA", (9, 9), (0, 255, 0, 0)).save(folder / "train" / "cat" / "0.png")
    spec = {"name": "images", "path": str(folder), "background": "#102030"}
    assert open_split(spec, "train", (8, 12), 3).picture(0).getpixel((4, 4)) == (16, 32, 48)
    assert open_images(folder).picture(0).getpixel((4, 4)) == (255, 255, 255)
