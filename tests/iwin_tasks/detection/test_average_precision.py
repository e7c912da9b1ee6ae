import contextlib
import io
import json

import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iwin_tasks.detection.average_precision import average_precision, results_of
from iwin_tasks.detection.coco import Categories
from iwin_tasks.detection.data import open_objects
from tests.iwin_tasks.detection.coco_folder import write_folder

SCENES = {"name": "scenes", "held_out_images": 12, "digits": [0, 6], "digit_size": [18, 60]}


def guesses(images, seed=0, others=3):
    """Returns results on a split: most objects, some shifted, under a wrong class or not there."""
    draws = torch.Generator().manual_seed(seed)
    results = []
    for index, number in enumerate(images.image_ids):
        found = images.objects(index)
        height, width = found.image.shape[1:]
        boxes, labels, masks = found.boxes.clone(), found.labels.clone(), found.masks.bool()
        kept = torch.rand(len(boxes), generator=draws) < 0.8
        boxes, labels, masks = boxes[kept], labels[kept], masks[kept]
        boxes += torch.randn(boxes.shape, generator=draws) * 2
        boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + 1)
        masks = masks & (torch.rand(masks.shape, generator=draws) < 0.9)
        wrong = torch.rand(len(labels), generator=draws) < 0.2
        labels[wrong] = torch.randint(len(images.categories), (int(wrong.sum()),), generator=draws)
        corner = torch.rand(others, 2, generator=draws) * torch.tensor([width / 2, height / 2])
        boxes = torch.cat([boxes, torch.cat([corner, corner + 12], dim=1)])
        labels = torch.cat([labels, torch.randint(len(images.categories), (others,), generator=draws)])
        masks = torch.cat([masks, torch.rand(others, height, width, generator=draws) < 0.01])
        scores = torch.rand(len(boxes), generator=draws)
        one = {"boxes": boxes, "labels": labels, "masks": masks, "scores": scores}
        results += results_of(one, number, images.categories)
    return results


def by_pycocotools(path, results, kind):
    """Returns COCOeval's own twelve figures, as its users call it."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        given = [{k: v for k, v in one.items() if kind == "bbox" or k != "bbox"} for one in results]
        evaluation = COCOeval(truth, truth.loadRes(given), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_figures_are_those_of_pycocotools(tmp_path, kind):
    images = open_objects(SCENES, "held-out")
    results = guesses(images)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(images.truth()))
    stats = by_pycocotools(path, results, kind)
    found = average_precision(images.truth(), results, kind)
    assert 0.1 < found.ap50 < 1
    ours = [found.ap, found.ap50, found.ap75, found.small, found.medium, found.large]
    assert [-1 if value is None else value for value in ours] == pytest.approx(stats[:6])


def test_no_detections_are_an_average_precision_of_0():
    images = open_objects(SCENES, "held-out")
    for kind in ("bbox", "segm"):
        found = average_precision(images.truth(), [], kind)
        assert (found.ap, found.ap50, found.ap75, found.small) == (0, 0, 0, 0)
        assert set(found.per_class.values()) <= {0, None}


def test_the_truth_is_found_with_an_average_precision_of_1():
    images = open_objects(SCENES, "held-out")
    truth = images.truth()
    results = [{**one, "score": 0.9} for one in truth["annotations"]]
    for kind in ("bbox", "segm"):
        found = average_precision(truth, results, kind)
        assert ([found.ap, found.ap50, found.ap75], found.large) == (pytest.approx([1, 1, 1]), None)
        assert list(found.per_class) == list(images.categories.names)
        assert all(value is None or value == pytest.approx(1) for value in found.per_class.values())
    assert truth["annotations"] == images.truth()["annotations"], "nothing was written into it"


def test_crowds_neither_count_as_found_nor_as_missed(tmp_path):
    images = open_objects({"name": "coco", "path": str(write_folder(tmp_path))}, "held-out")
    truth = images.truth()
    objects = [one for one in truth["annotations"] if not one["iscrowd"]]
    crowd = next(one for one in truth["annotations"] if one["iscrowd"])
    results = [{**one, "score": 0.5} for one in objects]
    best = average_precision(truth, results, "bbox")
    assert best.ap == pytest.approx(1)
    within = {**crowd, "bbox": [1, 1, 6, 6], "score": 0.9}
    assert average_precision(truth, [*results, within], "bbox").ap == pytest.approx(1)
    beside = {**crowd, "bbox": [30, 1, 6, 6], "score": 0.9}
    assert average_precision(truth, [*results, beside], "bbox").ap < 0.99


def test_results_are_in_the_data_s_ids_and_as_coco_s_server_takes_them():
    found = {
        "boxes": torch.tensor([[4.0, 6, 14, 26], [0, 0, 8, 4]]),
        "scores": torch.tensor([0.75, 0.5]),
        "labels": torch.tensor([2, 0]),
        "masks": torch.zeros(2, 40, 60, dtype=torch.bool),
    }
    found["masks"][0, 6:26, 4:14] = True
    first, second = json.loads(json.dumps(results_of(found, 42, Categories((3, 7, 90), ("a", "b", "c")))))
    assert (first["image_id"], first["category_id"], first["score"]) == (42, 90, 0.75)
    assert first["bbox"] == [4, 6, 10, 20]
    assert second["category_id"] == 3
    assert first["segmentation"]["size"] == [40, 60]
    assert isinstance(first["segmentation"]["counts"], str)
    assert torch.from_numpy(rle.decode(first["segmentation"])).bool().equal(found["masks"][0])
