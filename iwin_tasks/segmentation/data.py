"""Images with a label for each pixel, by name: ADE20K's folders, and the embedded scenes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from flashdit.data.images import FoundImages, find_images, parse_background, read_image, read_numbers
from flashdit.data.sources import check_path
from flashdit.shared.paths import printable
from flashdit.shared.registry import Registry, unknown
from flashdit.shared.seeds import EpochOrder, generator_for
from iwin_tasks.scenes import SceneOptions, draw_scene
from iwin_tasks.scenes.drawing import LABEL_NAMES
from iwin_tasks.scenes.folders import ADE20K_OFFSET, ADE20K_SPLITS
from iwin_tasks.segmentation.augmentation import PixelAugmentation, held_out_image, train_pair
from iwin_tasks.segmentation.labels import LabelFormat

SEGMENTATION_DATASETS = Registry("data")
TWINS_NAMED = 3  # files in an error


class LabelledPixels(Protocol):
    """One split: a picture and its labels for each index."""

    class_names: list[str] | None
    """Of the classes; None where the data do not say."""
    ignore: int
    """The label of pixels that do not count."""

    def __len__(self) -> int:
        """Returns how many images there are."""
        ...

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns an image uint8 (3, H, W) and its labels int64 (H, W)."""
        ...


@dataclass(kw_only=True)
class LabelFolderOptions:
    """Options of folders of images and of label images."""

    path: str
    """Folder with images/training, images/validation, annotations/training and annotations/validation."""
    ignore: int = 255
    """The value of pixels that do not count."""
    offset: int = ADE20K_OFFSET
    """Taken off every other value; what lies below it does not count. 1 for ADE20K, whose 0 is no class."""
    background: str = "white"
    """What transparent pixels show: a colour's name or `#rrggbb`."""

    def __post_init__(self):
        check_path(self.path)
        parse_background(self.background)
        self.format  # noqa: B018 - made once to be checked

    @property
    def format(self) -> LabelFormat:
        """What the values of label images mean."""
        return LabelFormat(ignore=self.ignore, offset=self.offset)


@SEGMENTATION_DATASETS.register("ade20k", LabelFolderOptions)
class LabelFolder:
    """One split of a folder as ADE20K's: each image has a label image of its name, .jpg or .png alike.

    Args:
        options: The folder, and what values mean.
        split: `train` for training/, `held-out` for validation/.
        num_classes: K; label images are checked against it when they are read.

    Raises:
        ValueError: If the folder is not laid out so, or an image or a label image has no twin.
    """

    class_names = None

    def __init__(self, options: LabelFolderOptions, split: str, num_classes: int):
        self.options, self.num_classes, self.ignore = options, num_classes, options.ignore
        options.format.check(num_classes)
        self.root, self.below = Path(options.path), ADE20K_SPLITS[split]
        folders = [self.root / kind / self.below for kind in ("images", "annotations")]
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(
                    "data.path must be a folder with images/training, images/validation, "
                    "annotations/training and annotations/validation, got "
                    f"{printable(self.root)} without {folder.parent.name}/{self.below}"
                )
        images, labels = (by_stem(find_images(folder)) for folder in folders)
        for have, others, kind, lack in (
            (images, labels, "image", "label image in annotations"),
            (labels, images, "label image", "image in images"),
        ):
            alone = [have[stem][0] for stem in have if stem not in others]
            if alone:
                named = ", ".join(printable(path.name) for path in alone[:TWINS_NAMED])
                raise ValueError(
                    f"every {kind} must have the {lack} of its name, {len(alone)} of {printable(self.root)} "
                    f"have not: {named}{', …' if len(alone) > TWINS_NAMED else ''}"
                )
        self.pairs = [(images[stem], labels[stem]) for stem in images]

    def __len__(self) -> int:
        """Returns how many images there are."""
        return len(self.pairs)

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns an image of any size and its labels.

        Raises:
            ValueError: If a file cannot be read, the sizes differ or a label is of no class.
        """
        (image_path, _), (label_path, _) = self.pairs[index]
        image = pil_to_tensor(read_image(image_path, parse_background(self.options.background)))
        name = printable(label_path)
        labels = self.options.format.classes(read_numbers(label_path), self.num_classes, name)
        if labels.shape != image.shape[-2:]:
            height, width = image.shape[-2:]
            raise ValueError(
                f"labels must be of their image's size, {width} × {height}, got "
                f"{labels.shape[1]} × {labels.shape[0]} in {name}"
            )
        return image, labels

    def files(self) -> dict[str, int]:
        """Returns the bytes of each file by its name below the folder of both splits."""
        both = [item for pair in self.pairs for item in pair]
        return {path.relative_to(self.root).as_posix(): size for path, size in both}


def by_stem(found: FoundImages) -> dict[str, tuple[Path, int]]:
    """Returns the path and bytes of each image by its name below the folder, without what follows the dot.

    Raises:
        ValueError: If two differ in that alone.
    """
    files: dict[str, tuple[Path, int]] = {}
    for path, size in zip(found.paths, found.num_bytes, strict=True):
        stem = path.relative_to(found.root).with_suffix("").as_posix()
        if stem in files:
            raise ValueError(
                f"images must differ in more than the suffix, got {printable(files[stem][0])} and "
                f"{printable(path.name)}"
            )
        files[stem] = path, size
    return files


@SEGMENTATION_DATASETS.register("scenes", SceneOptions)
class SceneMaps:
    """One split of the embedded scenes, each drawn when it is asked for."""

    ignore = 255  # no pixel is

    def __init__(self, options: SceneOptions, split: str, num_classes: int):
        self.options, self.split, self.class_names = options, split, list(LABEL_NAMES)

    def __len__(self) -> int:
        """Returns how many scenes there are."""
        return self.options.train_images if self.split == "train" else self.options.held_out_images

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns a scene and its labels."""
        scene = draw_scene(self.options, self.split, index)
        return scene.image, scene.label_map.long()


def open_pixels(spec: Mapping[str, Any], split: str, num_classes: int) -> LabelledPixels:
    """Returns one split of the images that a spec names.

    Args:
        spec: `{name, **options}` of `SEGMENTATION_DATASETS`.
        split: `train` or `held-out`.
        num_classes: That the model tells apart.

    Raises:
        ValueError: If the images are not there, or of another number of classes.
    """
    if split not in ADE20K_SPLITS:
        raise unknown("split", split, ADE20K_SPLITS)
    pixels = SEGMENTATION_DATASETS.build(spec, split, num_classes)
    if pixels.class_names is not None and len(pixels.class_names) != num_classes:
        raise ValueError(
            f"model.num_classes must be the number of the data's classes, {len(pixels.class_names)}, got "
            f"{num_classes}"
        )
    return pixels


class PixelExamples(Dataset):
    """Position in the endless stream → one augmented image and its labels.

    Augmentation is drawn from (seed, position) alone: examples are the same for any number of processes and
    any batch size, and a resume needs only a position.

    Args:
        images: The training split.
        options: Augmentation.
        seed: The run's.

    Attributes:
        size: Images of an epoch.
    """

    def __init__(self, images: LabelledPixels, options: PixelAugmentation, seed: int):
        self.images, self.options, self.seed = images, options, seed
        self.size = len(images)
        self.order = EpochOrder(self.size, seed)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """Returns image (3, h, w) float32 and label (h, w) int64."""
        image, labels = self.images.pair(self.order(position))
        generator = generator_for(self.seed, "augmentation", position)
        image, labels = train_pair(image, labels, self.options, self.images.ignore, generator)
        return {"image": image, "label": labels}


class HeldOutPixels(Dataset):
    """Row → (image (3, h, w) float32 as a model is tested on it, labels (H, W) int64 as they are).

    Args:
        images: The held-out split.
        scale: What images are resized to fit, as in `PixelAugmentation`.
    """

    def __init__(self, images: LabelledPixels, scale: tuple[int, int] | None):
        self.images, self.scale = images, scale

    def __len__(self) -> int:
        """Returns how many images there are."""
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """Returns one image and its labels."""
        image, labels = self.images.pair(row)
        return held_out_image(image, self.scale), labels
