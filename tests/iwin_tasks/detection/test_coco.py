import json

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from iwin_tasks.detection.coco import read_coco
from iwin_tasks.detection.data import check_same_categories, open_objects
from iwin_tasks.scenes import SceneOptions
from iwin_tasks.scenes.folders import run_lengths, write_coco
from tests.iwin_tasks.detection.coco_folder import content, write_folder


def opened(root, split="train", **options):
    return open_objects({"name": "coco", "path": str(root), **options}, split)


def test_categories_with_gaps_are_labels_from_0_by_rising_id(tmp_path):
    images = opened(write_folder(tmp_path))
    assert images.categories.ids == (3, 7, 90)
    assert images.categories.names == ("cat", "dog", "owl")
    assert images.image_ids == [11, 42, 77]
    found = images.objects(0)
    assert found.labels.tolist() == [1, 2]
    assert found.boxes.tolist() == [[10, 5, 30, 25], [40, 30, 55, 40]]


def test_polygons_and_run_lengths_are_masks_and_crowds_are_left_out(tmp_path):
    images = opened(write_folder(tmp_path))
    found = images.objects(0)
    assert found.image.shape == (3, 40, 60)
    assert (found.masks.dtype, tuple(found.masks.shape)) == (torch.uint8, (2, 40, 60))
    square = torch.zeros(40, 60, dtype=torch.uint8)
    square[5:25, 10:30] = 1
    assert found.masks[0].equal(square)
    assert found.masks[1, 30:40, 40].all()
    assert found.masks[1].sum() == 20
    coco = COCO(tmp_path / "annotations" / "instances_train2017.json")
    for mask, number in zip(found.masks, (501, 502), strict=True):
        assert mask.equal(torch.from_numpy(coco.annToMask(coco.anns[number])))
    crowd = images.truth()["annotations"][2]
    assert (crowd["iscrowd"], crowd["category_id"]) == (1, 3)


def test_boxes_end_at_the_image_and_an_image_may_have_no_object(tmp_path):
    images = opened(write_folder(tmp_path))
    assert images.objects(1).boxes.tolist() == [[20, 30, 30, 50]]
    empty = images.objects(2)
    assert (empty.boxes.shape, empty.labels.shape, empty.masks.shape) == ((0, 4), (0,), (0, 20, 20))


def test_truth_has_the_json_s_own_boxes_and_ids_from_1(tmp_path):
    truth = opened(write_folder(tmp_path)).truth()
    assert [one["id"] for one in truth["annotations"]] == [1, 2, 3, 4]
    assert truth["annotations"][3]["bbox"] == [20, 30, 20, 40]
    assert truth["annotations"][1]["area"] == 20, "of the mask, where the json has none"
    assert [one["id"] for one in truth["categories"]] == [3, 7, 90]


DEGENERATE = {
    "no width": ([4, 4, 0, 9], "annotation 501 of sub/a.png: its box has no width"),
    "no height": ([4, 4, 9, -1], "annotation 501 of sub/a.png: its box has no height"),
    "outside": ([60, 4, 9, 9], "annotation 501 of sub/a.png: its box lies outside the image"),
    "thin": ([59.5, 4, 9, 9], "annotation 501 of sub/a.png: its box is less than 1 px wide or high"),
}


@pytest.mark.parametrize("fault", DEGENERATE)
def test_a_degenerate_box_is_named_and_left_out_of_training(tmp_path, fault, caplog):
    caplog.set_level("INFO")
    box, sentence = DEGENERATE[fault]
    changed = content()
    changed["annotations"][0]["bbox"] = box
    images = opened(write_folder(tmp_path, changed))
    assert images.objects(0).labels.tolist() == [2]
    assert sentence in caplog.text
    assert len(images.truth()["annotations"]) == 4, "scoring takes the json as it is"


def test_an_object_without_a_mask_is_named_and_left_out_of_training(tmp_path, caplog):
    caplog.set_level("INFO")
    changed = content()
    changed["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    images = opened(write_folder(tmp_path, changed))
    assert images.objects(0).labels.tolist() == [2]
    assert "annotation 501 of sub/a.png: it has no mask" in caplog.text
    assert images.truth()["annotations"][0]["segmentation"]["size"] == [40, 60]


def test_of_many_left_out_ten_are_named(tmp_path):
    changed = content()
    for number in range(600, 615):
        changed["annotations"].append({**changed["annotations"][0], "id": number, "bbox": [0, 0, 0, 5]})
    path = write_folder(tmp_path, changed) / "annotations" / "instances_train2017.json"
    _, lines = read_coco(path)
    assert len(lines) == 11
    assert "annotation 600 " in lines[0]
    assert lines[-1].endswith("left out of training, 5 objects more")


def test_a_category_without_an_image_is_told_in_a_line(tmp_path, caplog):
    caplog.set_level("INFO")
    changed = content()
    changed["categories"].append({"id": 200, "name": "zebra"})
    images = opened(write_folder(tmp_path, changed))
    assert len(images.categories) == 4
    assert "instances_train2017.json: categories without an image: zebra" in caplog.text


def without(key, entry="annotations"):
    changed = content()
    del changed[entry][0][key]
    return changed


def changed_by(entry, place=0, **values):
    changed = content()
    changed[entry][place] |= values
    return changed


EMPTY_MASK = run_lengths(torch.zeros(40, 60, dtype=torch.bool))["counts"]
CROWD = {"annotations": [one | {"iscrowd": 1} for one in content()["annotations"]]}
INVALID = {
    "empty file": ("", "annotations must be a COCO json, .*instances_train2017.json is not: "),
    "empty json": ({}, "must have the lists images, annotations, categories, .* has not"),
    "a list": ([], "must have the lists images, annotations, categories, .* has not"),
    "no images": (content() | {"images": [], "annotations": []}, "must have images, .* has none"),
    "no categories": (content() | {"categories": [], "annotations": []}, "must have categories, .* has none"),
    "no annotations": (content() | {"annotations": []}, "an object that is no crowd, .* has no annotation"),
    "all crowd": (content() | CROWD, "has 4 annotations, every one a crowd, which is neither trained on nor"),
    "no bbox": (without("bbox"), "each of .* annotations must have id, image_id, category_id, bbox, got"),
    "no name": (without("name", "categories"), "categories must have id, name, got {'id': 90}"),
    "text id": (changed_by("images", id="7"), "id of each .* images must be a whole number, got '7'"),
    "same id": (changed_by("annotations", id=504), "annotations must each have an id .*, got 504 twice"),
    "no image": (
        changed_by("annotations", image_id=5),
        "an image of its file, got annotation 501 .* of none",
    ),
    "no category": (
        changed_by("annotations", category_id=8),
        "a category of its file, got 8 in annotation 501",
    ),
    "nan": (
        changed_by("annotations", bbox=[0, 0, float("nan"), 3]),
        "four finite numbers, got .*annotation 501",
    ),
    "three": (
        changed_by("annotations", bbox=[0, 0, 3]),
        r"four finite numbers, got \[0, 0, 3\] of annotation 501",
    ),
    "mask size": (
        changed_by("annotations", 1, segmentation={"size": [60, 40], "counts": "a"}),
        r"a mask must be of its image's height and width, \[40, 60\], got \[60, 40\] of annotation 502",
    ),
    "mask length": (
        changed_by("annotations", 1, segmentation={"size": [40, 60], "counts": [10, 10]}),
        "run lengths that cover its image, got others of annotation 502",
    ),
    **{
        f"text {counts!r}": (
            changed_by("annotations", 1, segmentation={"size": [40, 60], "counts": counts}),
            "run lengths that cover its image, got others of annotation 502",
        )
        for counts in ("", "0", "zzzz~~~~", EMPTY_MASK + "P", "é", [-5, 2405], [0.5, 2399.5], ["a"], [10**20])
    },
    **{
        f"point {point}": (
            changed_by("annotations", segmentation=[[point, 1, 5, 5, 9, 1]]),
            "finite numbers, got .* of annotation 501",
        )
        for point in (float("nan"), float("inf"), 1e9, 10**400)
    },
    "far box": (changed_by("annotations", bbox=[10**400, 1, 2, 3]), "four finite numbers, got .*501"),
    "text area": (
        changed_by("annotations", area="big"),
        "area must be a number of pixels, got 'big' of .*501",
    ),
    "negative area": (changed_by("annotations", area=-1), "area must be a number of pixels, got -1 of .*501"),
    "nan area": (changed_by("annotations", area=float("nan")), "area must be .*, got nan of annotation 501"),
    "text crowd": (
        changed_by("annotations", iscrowd="0"),
        "iscrowd must be 0 or 1, got '0' of annotation 501",
    ),
    "same name": (changed_by("categories", name="dog"), "a name of their own, got 'dog'"),
    "null name": (changed_by("categories", name=None), "a name of their own, got None"),
    "odd polygon": (
        changed_by("annotations", segmentation=[[1, 2, 3]]),
        "x and y of its points, .*, got .*501",
    ),
    "no size": (changed_by("images", 1, height=0), "height and width of at least 1, got"),
}


@pytest.mark.parametrize("fault", INVALID)
def test_an_invalid_json_is_refused_in_one_sentence(tmp_path, fault):
    changed, message = INVALID[fault]
    with pytest.raises(ValueError, match=message) as caught:
        opened(write_folder(tmp_path, changed))
    assert "\n" not in str(caught.value)


def test_all_objects_left_out_is_refused_with_the_reason(tmp_path):
    changed = content()
    for one in changed["annotations"]:
        one["segmentation"] = []
    with pytest.raises(ValueError, match="has none: of 3 objects it has no mask"):
        opened(write_folder(tmp_path, changed))


@pytest.mark.parametrize("lacks", ["train2017", "annotations"])
def test_a_missing_data_set_says_how_the_folder_must_look(tmp_path, lacks):
    write_folder(tmp_path)
    (tmp_path / lacks).rename(tmp_path / "away")
    message = (
        r"a folder with annotations/instances_train2017.json and the images in train2017/, got .* without"
    )
    with pytest.raises(ValueError, match=f"{message} {lacks}"):
        opened(tmp_path)


def test_missing_images_are_counted_and_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train2017" / "sub" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"must lie in train2017/, 1 of 3 do not: sub/a.png$"):
        opened(tmp_path)


def test_an_image_of_another_size_than_the_json_says_is_named(tmp_path):
    images = opened(write_folder(tmp_path))
    Image.new("RGB", (30, 40)).save(tmp_path / "train2017" / "b.png")
    with pytest.raises(ValueError, match=r"that its json says, 30 × 50, got 30 × 40 in .*b.png"):
        images.objects(1)


def test_a_turned_image_is_upright(tmp_path):
    images = opened(write_folder(tmp_path))
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held on its side
    Image.new("RGB", (50, 30)).save(tmp_path / "train2017" / "b.png", exif=exif)
    assert images.image(1).shape == (3, 50, 30)


def test_splits_with_other_categories_are_refused(tmp_path):
    changed = content()
    changed["categories"][1]["name"] = "cow"
    write_folder(tmp_path, changed)
    with pytest.raises(ValueError, match="the same categories, got cow and cat as category 3"):
        check_same_categories(opened(tmp_path), opened(tmp_path, "held-out"))


def test_scenes_are_what_their_coco_folder_gives(tmp_path):
    options = {"image_size": [60, 92], "train_images": 3, "held_out_images": 2, "digits": [0, 5]}
    write_coco(tmp_path, SceneOptions(**options), "train")
    drawn = open_objects({"name": "scenes", **options}, "train")
    read = opened(tmp_path)
    assert drawn.categories == read.categories
    assert list(drawn.image_ids) == read.image_ids
    for index in range(3):
        for one, other in zip(drawn.objects(index), read.objects(index), strict=True):
            assert one.equal(other)
    ours, theirs = (
        json.dumps(images.truth()["annotations"], default=str, sort_keys=True) for images in (drawn, read)
    )
    assert len(drawn.truth()["annotations"]) == len(read.truth()["annotations"])
    assert [one["bbox"] for one in json.loads(ours)] == [one["bbox"] for one in json.loads(theirs)]


def test_text_of_run_lengths_is_read_as_pycocotools_writes_it(tmp_path):
    draws = torch.Generator().manual_seed(0)
    for threshold in (0.0, 0.02, 0.5, 0.98, 1.0):
        mask = torch.rand(40, 60, generator=draws) < threshold
        changed = changed_by("annotations", 1, segmentation=run_lengths(mask))
        folder = write_folder(tmp_path / str(threshold), changed)
        assert opened(folder).objects(0).masks[1].bool().equal(mask)


def test_a_name_that_no_file_can_have_is_missing(tmp_path):
    folder = write_folder(tmp_path)
    changed = changed_by("images", file_name="a\0b.png")
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="1 of 3 do not: "):
        opened(folder)
