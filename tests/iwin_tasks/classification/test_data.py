import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from flashdit.digits.images import digits
from iwin_tasks.classification.data import HeldOutExamples, check_same_classes, open_split


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
    with pytest.raises(ValueError, match=r"model.num_classes must be the data's 3 classes, got 4"):
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
