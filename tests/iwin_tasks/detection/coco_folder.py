"""A folder as COCO's for tests: two images a split, categories 3, 7 and 90, a crowd and an empty image."""

import json
from copy import deepcopy

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 90, "name": "owl"}, {"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
SIZE = (40, 60)  # of the first image; the second one is 50 × 30
POLYGON = [[10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]]
CONTENT = {
    "images": [
        {"id": 42, "file_name": "b.png", "height": 50, "width": 30},
        {"id": 11, "file_name": "sub/a.png", "height": 40, "width": 60},
        {"id": 77, "file_name": "empty.png", "height": 20, "width": 20},
    ],
    "annotations": [
        {
            "id": 501,
            "image_id": 11,
            "category_id": 7,
            "bbox": [10, 5, 20, 20],
            "segmentation": POLYGON,
            "area": 400.0,
            "iscrowd": 0,
        },
        {
            "id": 502,
            "image_id": 11,
            "category_id": 90,
            "bbox": [40, 30, 15, 10],
            "segmentation": {"size": [40, 60], "counts": [1630, 10, 30, 10, 720]},
        },
        {
            "id": 503,
            "image_id": 11,
            "category_id": 3,
            "bbox": [0, 0, 10, 10],
            "segmentation": {"size": [40, 60], "counts": [0, 10, 2390]},
            "area": 10,
            "iscrowd": 1,
        },
        {
            "id": 504,
            "image_id": 42,
            "category_id": 3,
            "bbox": [20, 30, 20, 40],
            "segmentation": [[20, 30, 30, 30, 30, 50, 20, 50]],
            "area": 200,
            "iscrowd": 0,
        },
    ],
    "categories": CATEGORIES,
}


def content():
    """Returns the json's content, to be changed."""
    return deepcopy(CONTENT)


def write_folder(root, changed=None, splits=("train2017", "val2017")):
    """Writes the folder and returns it; `changed` is the content of the first split's json instead."""
    generator = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in splits:
        about = changed if changed is not None and split == splits[0] else content()
        text = about if isinstance(about, str) else json.dumps(about)
        (root / "annotations" / f"instances_{split}.json").write_text(text)
        for image in CONTENT["images"]:
            path = root / split / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return root
