"""Labelled images for classification by name: an ImageNet-like folder, and the embedded digits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from flashdit.data.images import parse_background
from flashdit.data.inspection import RECORD, Inspection, leave_out_unreadable, with_classes_of_run
from flashdit.data.sources import ImageFolder, ImagesOptions, check_path
from flashdit.digits.images import DIGIT_NAMES, digits
from flashdit.shared.registry import Registry, unknown
from flashdit.shared.seeds import EpochOrder
from iwin_tasks.classification.augmentation import (
    AugmentationOptions,
    held_out_transform,
    kept_globals,
    make_mixup,
    seed_globals,
    train_transform,
)
from iwin_tasks.classification.model import InputFormat

CLASSIFICATION_DATASETS = Registry("data")
VAL_RECORD = f"val_{RECORD}"
SPLITS = {"train": "train", "held-out": "val"}  # and the sub-folder of each
NAMED_IN_ERRORS = 5  # classes in an error


class LabelledImages(Protocol):
    """One split: a picture and a label for each index."""

    labels: Tensor
    class_names: list[str]

    def picture(self, index: int) -> Image.Image:
        """Returns one image, RGB."""
        ...


@dataclass(kw_only=True)
class FolderOptions:
    """Options of a folder of images."""

    path: str
    """Folder with sub-folders train and val, in each of which the sub-folders are the classes; with held_out
    the folder of the classes itself."""
    held_out: float | None = None
    """Share of each class that is held out of a folder without train and val, chosen by the files' names."""
    background: str = "white"
    """What transparent pixels show: a colour's name or `#rrggbb`."""

    def __post_init__(self):
        check_path(self.path)
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out must be between 0 and 1, got {self.held_out}")
        parse_background(self.background)


@CLASSIFICATION_DATASETS.register("images", FolderOptions)
class FolderImages:
    """One split of an ImageNet-like folder, or of a folder of classes; an image is read when it is asked for.

    Args:
        options: The folder.
        split: `train`, or `held-out` for val/.
        image_size: Of the model; files have their own.

    Raises:
        ValueError: If the folder is not laid out so.
    """

    def __init__(self, options: FolderOptions, split: str, image_size: tuple[int, int]):
        self.options, self.split = options, split
        root = Path(options.path)
        folder = root if options.held_out is not None else root / SPLITS[split]
        classes = [child for child in folder.iterdir() if child.is_dir()] if folder.is_dir() else []
        if not classes:
            where = f"{folder.name}/" if folder != root else "it"
            raise ValueError(
                "data.path must be a folder with sub-folders train and val, whose own are the classes, or of "
                "the classes themselves with data.held_out=0.1, "
                f"got {root}, where {where} {'has no class' if folder.is_dir() else 'is not there'}"
            )
        images = ImagesOptions(path=str(folder), image_size=min(image_size), background=options.background)
        self.take(ImageFolder(images))

    def take(self, whole: ImageFolder) -> None:
        """Takes the split's images out of a folder's."""
        self.whole, self.source = whole, whole
        if self.options.held_out is not None:
            held_out = held_out_rows(whole, self.options.held_out)
            rows = [row for row in range(len(whole.names)) if (row in held_out) == (self.split == "held-out")]
            self.source = whole.subset(rows)
        self.labels, self.class_names = self.source.labels, self.source.class_names

    def keep_classes(self, run_dir: Path) -> None:
        """Numbers the classes as the run of a folder does."""
        self.take(with_classes_of_run(self.whole, run_dir))

    def leave_out_unreadable(self, run_dir: Path, progress: bool) -> Inspection:
        """Leaves images that cannot be read out of training, and returns what was seen.

        Raises:
            ValueError: For one of val/.
        """
        is_val = self.split == "held-out"
        inspection = Inspection(run_dir / (VAL_RECORD if is_val else RECORD))
        readable = leave_out_unreadable(self.whole, inspection, progress)
        broken = sorted(set(self.whole.names) - set(readable.names))
        if is_val and broken:
            raise ValueError(
                f"every held-out image must be readable, {self.whole.found.root / broken[0]} is not"
            )
        self.take(readable)
        return inspection

    def files(self) -> dict[str, int]:
        """Returns the bytes of each file by its name below the folder of both splits."""
        below = "" if self.options.held_out is not None else f"{SPLITS[self.split]}/"
        return {
            below + name: size for name, size in zip(self.source.names, self.source.num_bytes, strict=True)
        }

    def picture(self, index: int) -> Image.Image:
        """Returns one image of any size, RGB."""
        return self.source.picture(index)


def held_out_rows(folder: ImageFolder, share: float) -> set[int]:
    """Returns the rows that are held out: those whose name's hash, as a fraction, is below the share.

    So a file stays on its side when others come or go. Of each class at least one is on either side.

    Raises:
        ValueError: If a class has only one image.
    """
    held_out: set[int] = set()
    for label, name in enumerate(folder.class_names):
        rows = (folder.labels == label).nonzero().flatten().tolist()
        if len(rows) < 2:
            raise ValueError(f"data.held_out requires two images of each class, {name} has {len(rows)}")
        digests = {row: hashlib.sha256(folder.names[row].encode()).digest()[:8] for row in rows}
        places = {row: int.from_bytes(digest, "big") / 2**64 for row, digest in digests.items()}
        first, *_, last = sorted(rows, key=places.__getitem__)
        held_out |= ({row for row in rows if places[row] < share} | {first}) - {last}
    return held_out


@dataclass(kw_only=True)
class DigitsSplitOptions:
    """The embedded digits have no options."""


@CLASSIFICATION_DATASETS.register("digits", DigitsSplitOptions)
class DigitsImages:
    """One split of scikit-learn's digits, enlarged from 8×8 to the model's input size at once."""

    def __init__(self, options: DigitsSplitOptions, split: str, image_size: tuple[int, int]):
        self.images, self.labels = digits(split, max(image_size))
        self.class_names = list(DIGIT_NAMES)

    def picture(self, index: int) -> Image.Image:
        """Returns one image of that size, RGB."""
        return Image.fromarray(rearrange(self.images[index], "c h w -> h w c").numpy())


def open_split(
    spec: Mapping[str, Any],
    split: str,
    image_size: tuple[int, int],
    num_classes: int,
    run_dir: Path | None = None,
) -> LabelledImages:
    """Returns one split of the images that a spec names.

    Args:
        spec: `{name, **options}` of `CLASSIFICATION_DATASETS`.
        split: `train` or `held-out`.
        image_size: Height and width that the model takes.
        num_classes: That the model tells apart.
        run_dir: Of the run whose order of classes is kept, where it has a checkpoint.

    Raises:
        ValueError: If the images are not there, or of another number of classes.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    images = CLASSIFICATION_DATASETS.build(spec, split, image_size)
    if run_dir is not None and isinstance(images, FolderImages):
        images.keep_classes(run_dir)
    if len(images.class_names) != num_classes:
        raise ValueError(
            f"model.num_classes must be the number of the data's classes, {len(images.class_names)}, got "
            f"{num_classes}"
        )
    return images


def keep_readable(
    train: FolderImages, held_out: FolderImages, run_dir: Path, progress: bool
) -> list[Inspection]:
    """Leaves images that cannot be read out of training, names each file once, returns what was seen.

    Raises:
        ValueError: If one of val/ cannot be read.
    """
    inspections = [train.leave_out_unreadable(run_dir, progress)]
    if train.options.held_out is None:
        inspections.append(held_out.leave_out_unreadable(run_dir, progress))
    else:  # both are of the same files
        held_out.take(train.whole)
    return inspections


def check_same_classes(train: LabelledImages, held_out: LabelledImages) -> None:
    """Raises ValueError unless two splits have the same classes, naming what only one of them has."""
    different = sorted(set(train.class_names) ^ set(held_out.class_names))
    if different:
        raise ValueError(
            f"train and val must have images of the same classes, got {len(different)} that only one of them "
            f"has: {', '.join(different[:NAMED_IN_ERRORS])}"
            f"{', …' if len(different) > NAMED_IN_ERRORS else ''}"
        )


class TrainExamples(Dataset):
    """Position in the endless stream → one augmented image and its soft target.

    Augmentation is drawn from (seed, position) alone, and positions 2k and 2k + 1 are mixed with each other,
    drawn from (seed, k). So examples are the same for any number of processes and any batch size, and a
    resume needs only a position. It differs from DeiT, where the batch of a process shares one draw and its
    size decides who is mixed with whom.

    Args:
        images: The training split.
        options: Augmentation.
        form: What images the model takes.
        seed: The run's.

    Attributes:
        size: Images of an epoch.
    """

    def __init__(self, images: LabelledImages, options: AugmentationOptions, form: InputFormat, seed: int):
        self.images, self.seed = images, seed
        self.transform = train_transform(options, form)
        self.mixup = make_mixup(options, len(images.class_names))
        self.size = len(images.labels)
        self.order = EpochOrder(self.size, seed)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """Returns image (3, H, W) and target (num_classes,), both float32."""
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Tensor]]:
        """Returns a batch of examples, each pair of the stream made once: what a DataLoader asks for."""
        with kept_globals():
            pairs = {pair: self._pair(pair) for pair in sorted({position // 2 for position in positions})}
        return [pairs[position // 2][position % 2] for position in positions]

    def _pair(self, pair: int) -> list[dict[str, Tensor]]:
        """Returns the two examples of a pair of the stream, augmented and mixed."""
        positions = (2 * pair, 2 * pair + 1)
        indices = [self.order(position) for position in positions]
        images = []
        for position, index in zip(positions, indices, strict=True):
            picture = self.images.picture(index)
            seed_globals(self.seed, "augmentation", position)
            images.append(self.transform(picture))
        seed_globals(self.seed, "mix", pair)
        mixed, targets = self.mixup(torch.stack(images), self.images.labels[indices])
        return [{"image": image, "target": target} for image, target in zip(mixed, targets, strict=True)]


class HeldOutExamples(Dataset):
    """Row → (image (3, H, W) float32, label), each image once and unchanged.

    Args:
        images: The held-out split.
        form: What images the model takes.
    """

    def __init__(self, images: LabelledImages, form: InputFormat):
        self.images, self.transform = images, held_out_transform(form)

    def __len__(self) -> int:
        """Returns how many images there are."""
        return len(self.images.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Returns one image and its label."""
        return self.transform(self.images.picture(row)), int(self.images.labels[row])
