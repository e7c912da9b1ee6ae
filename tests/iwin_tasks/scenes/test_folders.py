import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from flashdit.digits.images import DIGIT_NAMES
from iwin_tasks.scenes import SceneOptions, draw_scene
from iwin_tasks.scenes.folders import write_ade20k, write_coco

OPTIONS = SceneOptions(image_size=(60, 92), digits=(0, 5), train_images=6, held_out_images=3)
COUNTS = {"train": 6, "held-out": 3}


def pixels(path):
    """Returns an image file's numbers."""
    with Image.open(path) as file:
        return torch.from_numpy(np.array(file))


@pytest.mark.parametrize("split", COUNTS)
def test_coco_folder_gives_the_scenes_back(split, tmp_path, capsys):
    path = write_coco(tmp_path, OPTIONS, split)
    assert path == tmp_path / "annotations" / f"instances_{path.stem.removeprefix('instances_')}.json"
    coco = COCO(path)
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == DIGIT_NAMES
    assert coco.getImgIds() == list(range(COUNTS[split]))
    folder = tmp_path / {"train": "train2017", "held-out": "val2017"}[split]
    empty = 0
    for index in coco.getImgIds():
        scene, record = draw_scene(OPTIONS, split, index), coco.loadImgs(index)[0]
        assert (record["height"], record["width"]) == (60, 92)
        assert pixels(folder / record["file_name"]).permute(2, 0, 1).equal(scene.image)
        found = coco.loadAnns(coco.getAnnIds(index))
        empty += not found
        boxes = torch.tensor([a["bbox"] for a in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        assert boxes.equal(scene.boxes)
        assert [a["category_id"] - 1 for a in found] == scene.labels.tolist()
        masks = [torch.from_numpy(coco.annToMask(a)).bool() for a in found]
        assert [a["area"] for a in found] == [int(mask.sum()) for mask in masks]
        assert torch.stack([*masks, scene.label_map > 0])[:-1].equal(scene.masks)
    assert split != "train" or empty
    ids = [a["id"] for a in json.loads(path.read_text())["annotations"]]
    assert len(set(ids)) == len(ids)
    assert 0 not in ids  # which pycocotools takes for no match


@pytest.mark.parametrize("split", COUNTS)
def test_ade20k_folder_gives_the_scenes_back(split, tmp_path):
    write_ade20k(tmp_path, OPTIONS, split)
    name = {"train": "training", "held-out": "validation"}[split]
    images, labels = (sorted((tmp_path / kind / name).iterdir()) for kind in ("images", "annotations"))
    assert [path.name for path in images] == [path.name for path in labels]
    assert len(images) == COUNTS[split]
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        scene = draw_scene(OPTIONS, split, index)
        assert pixels(image).permute(2, 0, 1).equal(scene.image)
        assert pixels(label).equal(scene.label_map + 1)


@pytest.mark.parametrize("write", [write_coco, write_ade20k])
def test_an_unknown_split_writes_nothing(write, tmp_path):
    with pytest.raises(ValueError, match="unknown split 'val'"):
        write(tmp_path / "folder", OPTIONS, "val")
    assert not (tmp_path / "folder").exists()
