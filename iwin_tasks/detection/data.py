"""Images with objects by name: COCO's folders, and the embedded scenes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from flashdit.data.images import parse_background, read_image
from flashdit.data.sources import check_path
from flashdit.digits.images import DIGIT_NAMES
from flashdit.shared.command import is_first_process
from flashdit.shared.files import file_crc32
from flashdit.shared.paths import printable
from flashdit.shared.registry import Registry, unknown
from flashdit.shared.seeds import EpochOrder, generator_for
from iwin_tasks.detection.augmentation import ObjectAugmentation, augmented
from iwin_tasks.detection.coco import Categories, mask_rle, object_tensors, read_coco
from iwin_tasks.scenes import SceneOptions, draw_scene
from iwin_tasks.scenes.drawing import REGIONS
from iwin_tasks.scenes.folders import FIRST_CATEGORY, scene_annotations

logger = logging.getLogger(__name__)
DETECTION_DATASETS = Registry("data")
FILES_NAMED = 3  # missing images in an error


class Objects(NamedTuple):
    """One image and what is to be found in it; n may be 0."""

    image: Tensor
    """uint8 (3, H, W), RGB."""
    boxes: Tensor
    """float32 (n, 4): x1, y1, x2, y2 in pixels."""
    labels: Tensor
    """int64 (n,), from 0."""
    masks: Tensor
    """uint8 (n, H, W), 0 or 1."""


class ObjectImages(Protocol):
    """One split: an image and its objects for each index."""

    categories: Categories
    image_ids: Sequence[int]
    """Of each index, as the data have it."""

    def __len__(self) -> int:
        """Returns how many images there are."""
        ...

    def image(self, index: int) -> Tensor:
        """Returns one image, uint8 (3, H, W)."""
        ...

    def objects(self, index: int) -> Objects:
        """Returns one image and its objects as training takes them, crowds left out."""
        ...

    def truth(self) -> dict[str, Any]:
        """Returns `images`, `annotations` with crowds, and `categories` as COCO's evaluation takes them.

        Masks are compressed run lengths, and ids of annotations begin at 1.
        """
        ...


@dataclass(kw_only=True)
class CocoOptions:
    """Options of a folder as COCO's."""

    path: str
    """Folder with annotations/instances_NAME.json and the images in NAME/, for both splits."""
    train: str = "train2017"
    """NAME of what is trained on."""
    held_out: str = "val2017"
    """NAME of what is scored."""
    background: str = "white"
    """What transparent pixels show: a colour's name or `#rrggbb`."""

    def __post_init__(self):
        check_path(self.path)
        for name in ("train", "held_out"):
            if not getattr(self, name):
                raise ValueError(f"data.{name} must name a folder of images, got ''")
        parse_background(self.background)


@DETECTION_DATASETS.register("coco", CocoOptions)
class CocoImages:
    """One split of a folder as COCO's; an image is read when it is asked for.

    Args:
        options: The folder.
        split: `train` or `held-out`.

    Raises:
        ValueError: If the folder is not laid out so, the json is invalid or an image is missing.
    """

    def __init__(self, options: CocoOptions, split: str):
        self.options = options
        self.name = options.train if split == "train" else options.held_out
        root = Path(options.path)
        self.folder, self.json = root / self.name, root / "annotations" / f"instances_{self.name}.json"
        for path, there in ((self.json, self.json.is_file()), (self.folder, self.folder.is_dir())):
            if not there:
                raise ValueError(
                    f"data.path must be a folder with annotations/instances_{self.name}.json and the images "
                    f"in {self.name}/, got {printable(root)} without {printable(path.relative_to(root))}"
                )
        self.content, remarks = read_coco(self.json)
        self.categories = self.content.categories
        self.image_ids = [image["id"] for image in self.content.images]
        self.num_bytes = self._sizes_of_files()
        if is_first_process():
            for line in remarks:
                logger.info("%s", line)

    def _sizes_of_files(self) -> dict[str, int]:
        """Returns the bytes of each image by its name in the json; raises ValueError if some are missing."""
        sizes, missing = {}, []
        for image in self.content.images:
            name = image["file_name"]
            try:
                sizes[name] = (self.folder / name).stat().st_size
            except (OSError, ValueError):
                missing.append(name)
        if missing:
            named = ", ".join(map(printable, missing[:FILES_NAMED]))
            raise ValueError(
                f"every image of {printable(self.json)} must lie in {self.name}/, "
                f"{len(missing):,} of {len(self.content.images):,} do not: "
                f"{named}{', …' if len(missing) > FILES_NAMED else ''}"
            )
        return sizes

    def __len__(self) -> int:
        """Returns how many images there are."""
        return len(self.content.images)

    def image(self, index: int) -> Tensor:
        """Returns one image.

        Raises:
            ValueError: If it cannot be read, or is of another size than the json says.
        """
        about = self.content.images[index]
        path = self.folder / about["file_name"]
        image = pil_to_tensor(read_image(path, parse_background(self.options.background)))
        if image.shape[-2:] != (about["height"], about["width"]):
            raise ValueError(
                f"an image must be of the size that its json says, {about['width']} × {about['height']}, "
                f"got {image.shape[-1]} × {image.shape[-2]} in {printable(path)}"
            )
        return image

    def objects(self, index: int) -> Objects:
        """Returns one image and its objects."""
        image = self.image(index)
        usable = self.content.usable(self.image_ids[index])
        return Objects(image, *object_tensors(usable, self.categories, (image.shape[-2], image.shape[-1])))

    def truth(self) -> dict[str, Any]:
        """Returns what the json says, for scoring."""
        annotations = []
        for about in self.content.images:
            size = about["height"], about["width"]
            for one in self.content.annotations.get(about["id"], []):
                mask = mask_rle(one, size)
                annotations.append(
                    {
                        "image_id": about["id"],
                        "category_id": one["category_id"],
                        "bbox": one["bbox"],
                        "area": one.get("area", float(rle.area(cast(Any, mask)))),
                        "segmentation": mask,
                        "iscrowd": int(bool(one.get("iscrowd"))),
                        "id": len(annotations) + 1,
                    }
                )
        return {
            "images": self.content.images,
            "annotations": annotations,
            "categories": self.categories.listed(),
        }

    def files(self) -> dict[str, int | str]:
        """Returns by name below the folder the bytes of each image, and the checksum of the json."""
        sizes: dict[str, int | str] = {f"{self.name}/{name}": size for name, size in self.num_bytes.items()}
        return sizes | {f"annotations/{self.json.name}": file_crc32(self.json)}


@DETECTION_DATASETS.register("scenes", SceneOptions)
class SceneImages:
    """One split of the embedded scenes, each drawn when it is asked for."""

    def __init__(self, options: SceneOptions, split: str):
        self.options, self.split = options, split
        ids = range(FIRST_CATEGORY, FIRST_CATEGORY + len(DIGIT_NAMES))
        self.categories = Categories(tuple(ids), tuple(DIGIT_NAMES))
        self.image_ids = range(options.train_images if split == "train" else options.held_out_images)

    def __len__(self) -> int:
        """Returns how many scenes there are."""
        return len(self.image_ids)

    def image(self, index: int) -> Tensor:
        """Returns one scene's image."""
        return draw_scene(self.options, self.split, index).image

    def objects(self, index: int) -> Objects:
        """Returns one scene."""
        scene = draw_scene(self.options, self.split, index)
        return Objects(scene.image, scene.boxes, scene.labels, scene.masks.to(torch.uint8))

    @cached_property
    def annotations(self) -> list[dict[str, Any]]:
        """Of all scenes, as COCO has them."""
        found: list[dict[str, Any]] = []
        for index in self.image_ids:
            found += scene_annotations(draw_scene(self.options, self.split, index), index, len(found) + 1)
        return found

    def truth(self) -> dict[str, Any]:
        """Returns what the scenes hold, for scoring."""
        height, width = self.options.image_size
        images = [{"id": index, "height": height, "width": width} for index in self.image_ids]
        return {
            "images": images,
            "annotations": self.annotations,
            "categories": self.categories.listed(),
        }


def open_objects(spec: Mapping[str, Any], split: str) -> ObjectImages:
    """Returns one split of the images that a spec names.

    Args:
        spec: `{name, **options}` of `DETECTION_DATASETS`.
        split: `train` or `held-out`.

    Raises:
        ValueError: If the images or their objects are not there.
    """
    if split not in REGIONS:
        raise unknown("split", split, REGIONS)
    return DETECTION_DATASETS.build(spec, split)


def check_same_categories(train: ObjectImages, held_out: ObjectImages) -> None:
    """Raises ValueError unless two splits have the same categories."""
    one, other = (dict(images.categories.pairs()) for images in (train, held_out))
    different = sorted(i for i in one.keys() | other.keys() if one.get(i) != other.get(i))
    if different:
        shown = [one.get(different[0]), other.get(different[0])]
        raise ValueError(
            "both splits must have the same categories, got "
            f"{printable(shown[0])} and {printable(shown[1])} as category {different[0]}"
        )


class ObjectExamples(Dataset):
    """Position in the stream → one augmented image and its objects, drawn from (seed, position) alone.

    Args:
        images: The training split.
        options: Augmentation.
        seed: The run's.

    Attributes:
        size: Images of an epoch.
    """

    def __init__(self, images: ObjectImages, options: ObjectAugmentation, seed: int):
        self.images, self.options, self.seed = images, options, seed
        self.size = len(images)
        self.order = EpochOrder(self.size, seed)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Returns `image` (3, H, W) float32 in 0 to 1, and its `target` as a `Detector` takes it."""
        found = self.images.objects(self.order(position))
        return augmented(*found, self.options, generator_for(self.seed, "augmentation", position))


class WholeImages(Dataset):
    """Row → (row, image (3, H, W) float32 in 0 to 1), each image once, as it is.

    Args:
        images: The held-out split.
    """

    def __init__(self, images: ObjectImages):
        self.images = images

    def __getitem__(self, row: int) -> tuple[int, Tensor]:
        """Returns one image and its row."""
        return row, self.images.image(row).float() / 255
