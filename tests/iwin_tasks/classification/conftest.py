import numpy as np
import pytest
from PIL import Image

from iwin_tasks.classification.augmentation import AugmentationOptions
from iwin_tasks.classification.data import TrainExamples, open_split
from iwin_tasks.classification.model import InputFormat


@pytest.fixture
def folder(tmp_path):
    """Returns an ImageNet-like folder: 3 classes, 5 + 2 + 2 training images of several sizes, 6 held out."""
    generator = np.random.default_rng(0)
    for split, counts in {"train": (5, 2, 2), "val": (2, 2, 2)}.items():
        for name, count in zip(("cat", "dog", "owl"), counts, strict=True):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def form():
    """Returns a small input format that is not square."""
    return InputFormat(
        image_size=(8, 12), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic", crop_pct=0.9
    )


@pytest.fixture
def training(folder, form):
    """Returns a function of (seed, **augmentation) that gives the examples of the folder."""

    def make(seed=0, **options):
        images = open_split({"name": "images", "path": str(folder)}, "train", form.image_size, 3)
        return TrainExamples(images, AugmentationOptions(**options), form, seed)

    return make
