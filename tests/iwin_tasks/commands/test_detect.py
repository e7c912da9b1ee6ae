import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.image_list import ImageList

from iwin_core import load_official_checkpoint
from iwin_tasks.commands import detect
from iwin_tasks.detection.average_precision import average_precision
from iwin_tasks.detection.config import load_detection_config
from iwin_tasks.detection.data import open_objects
from iwin_tasks.detection.model import options_of_weights
from iwin_tasks.detection.regions import paste_masks
from iwin_tasks.detection.task import DetectionTrainer
from iwin_tasks.scenes import SceneOptions
from iwin_tasks.scenes.folders import write_coco
from tests.iwin_tasks.detection.conftest import NAMES, golden_detector
from tests.iwin_tasks.detection.test_task import TINY

IDS = (2, 5, 9, 40, 77)  # of five categories, with gaps
GOLDEN = [
    "model.backbone_options={embed_dim: 24, depths: [1, 1, 2, 1], num_heads: [1, 2, 4, 8]}",
    "model.fpn_channels=64",
    "model.fc_channels=128",
    "model.head_channels=64",
    "training.precision=fp32",
]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Returns a folder as COCO's of two scenes, their digits in five categories."""
    folder = tmp_path_factory.mktemp("coco")
    options = SceneOptions(image_size=(60, 92), digits=(3, 5), train_images=2, held_out_images=2)
    for split in ("train", "held-out"):
        path = write_coco(folder, options, split)
        content = json.loads(path.read_text())
        content["categories"] = [{"id": number, "name": f"kind {number}"} for number in IDS]
        for one in content["annotations"]:
            one["category_id"] = IDS[(one["category_id"] - 1) % 5]
        path.write_text(json.dumps(content))
    return folder


def by_hand(model, path):
    """Returns what a detector finds on an image that mmdetection's steps prepare, done with NumPy."""
    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGB"), np.float32)
    height, width = pixels.shape[:2]
    factor = min(800 / min(height, width), 1333 / max(height, width))
    size = int(height * factor + 0.5), int(width * factor + 0.5)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False
    )[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    canvas = torch.zeros(1, 3, *(-(-side // 32) * 32 for side in size))
    canvas[0, :, : size[0], : size[1]] = (resized - mean) / std
    with torch.no_grad():
        (found,) = model.forward_canvas(ImageList(canvas, [size]))
    scale = torch.tensor([width / size[1], height / size[0]]).repeat(2)
    boxes = found["boxes"] * scale
    return found | {"boxes": boxes, "masks": paste_masks(found["masks"], boxes, (height, width))}


@pytest.mark.parametrize("kind", NAMES)
def test_the_authors_weights_are_scored_from_the_file_to_the_results(coco, tmp_path, capsys, kind):
    model, container = golden_detector(kind)
    container |= {
        "meta": {"CLASSES": ("a", "b", "c", "d", "e"), "epoch": 36},
        "amp": {"loss_scaler0": {"unskipped": 3}},
    }
    weights, out = tmp_path / "epoch_36.pth", tmp_path / "results.json"
    torch.save(container, weights)
    arguments = [
        "--eval-only",
        "--weights",
        str(weights),
        "--results",
        str(out),
        f"data.path={coco}",
        *GOLDEN,
    ]
    detect.main(arguments)
    printed = capsys.readouterr().out
    results = json.loads(out.read_text())
    load_official_checkpoint(model, container)
    assert {one["image_id"] for one in results} == {0, 1}
    assert {one["category_id"] for one in results} <= set(IDS)
    for number in (0, 1):
        expected = by_hand(model.eval(), coco / "val2017" / f"{number:012d}.png")
        mine = [one for one in results if one["image_id"] == number]
        assert len(mine) == len(expected["scores"]) > 0
        boxes = torch.tensor([one["bbox"] for one in mine])
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(boxes, expected["boxes"], atol=1e-3, rtol=0)
        scores = torch.tensor([one["score"] for one in mine])
        torch.testing.assert_close(scores, expected["scores"], atol=1e-4, rtol=0)
        assert [one["category_id"] for one in mine] == [IDS[label] for label in expected["labels"]]
        areas = expected["masks"].flatten(1).sum(1)
        assert {one["segmentation"]["size"][0] for one in mine} == {60}
        assert len(areas) == len(mine)
    truth = open_objects({"name": "coco", "path": str(coco)}, "held-out").truth()
    assert f"box {average_precision(truth, results, 'bbox')}" in printed
    assert f"mask {average_precision(truth, results, 'segm')}" in printed
    assert "  kind 77: box " in printed


def test_results_take_no_annotations_place(coco, exit_message):
    truth = coco / "annotations" / "instances_val2017.json"
    before = truth.read_bytes()
    message = exit_message(detect, "--eval-only", "--results", truth, f"data.path={coco}", *GOLDEN)
    assert "--results must be a new file or an earlier list of results, got " in message
    assert truth.read_bytes() == before


def test_a_file_of_another_detector_than_the_configuration_s_is_refused(coco, tmp_path, exit_message):
    path = tmp_path / "cascade.pth"
    torch.save(golden_detector("cascade")[1], path)
    arguments = ["--eval-only", "--weights", str(path), f"data.path={coco}", *GOLDEN, "model.kind=mask_rcnn"]
    message = exit_message(detect, *arguments)
    assert "weights must be of a mask_rcnn, got an mmdetection file of cascade_mask_rcnn" in message


def test_a_file_of_other_heads_is_refused(coco, tmp_path, exit_message):
    path = tmp_path / "retina.pth"
    torch.save({"state_dict": {"bbox_head.retina_cls.weight": torch.ones(1)}}, path)
    message = exit_message(detect, "--eval-only", "--weights", path, f"data.path={coco}", *GOLDEN)
    assert "weights must be of a mask_rcnn, got an mmdetection file of other heads" in message


def test_a_file_of_another_number_of_classes_is_refused(tmp_path, exit_message):
    write_coco(
        tmp_path / "coco", SceneOptions(train_images=1, held_out_images=1, seed=1, digits=(2, 3)), "held-out"
    )
    torch.save(golden_detector("mask")[1], tmp_path / "five.pth")
    arguments = ["--eval-only", "--weights", tmp_path / "five.pth", f"data.path={tmp_path / 'coco'}", *GOLDEN]
    assert "must be of a detector of the data's 10 classes, got one of 5 in" in exit_message(
        detect, *arguments
    )


def test_a_file_says_which_detector_and_backbone_it_is_of(tmp_path):
    shapes = {
        "backbone.patch_embed.proj.weight": (96, 3, 4, 4),
        "roi_head.bbox_head.0.fc_cls.weight": (81, 8),
    }
    shapes |= {"roi_head.mask_head.0.conv_logits.weight": (80, 8, 1, 1)}
    for stage, depth in enumerate((2, 2, 18, 2)):
        shapes |= {f"backbone.layers.{stage}.blocks.{block}.norm1.weight": (8,) for block in range(depth)}
    torch.save(
        {"state_dict": {name: torch.zeros(shape) for name, shape in shapes.items()}}, tmp_path / "a.pth"
    )
    found = options_of_weights(tmp_path / "a.pth")
    assert found == {"model.kind": "cascade_mask_rcnn", "model.backbone": "iwin_small_patch4_window7_224"}
    torch.save({"model": {"head.weight": torch.zeros(2, 2)}}, tmp_path / "b.pth")
    assert options_of_weights(tmp_path / "b.pth") == {}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector") / "run"
    overrides = [*TINY, "training.steps=1", f"run.dir={folder}"]
    DetectionTrainer(load_detection_config("iwin/detect_scenes", overrides)).fit()
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, size in (("more/a.png", (90, 60)), ("more/b.jpg", (50, 70))):
        Image.new("RGB", size, "gray").save(folder / name)
    (folder / "more" / "broken.png").write_bytes(b"no image")
    return folder


def test_objects_of_a_folder_are_drawn_and_listed(run, pictures, tmp_path, capsys, caplog):
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(run), "--images", str(pictures), "--out", str(out), "--threshold", "0"]
    for _ in range(2):  # the second call replaces what the first one made
        detect.main(arguments)
    assert f" on 2 images: {out}" in capsys.readouterr().out
    assert "skipped more/broken.png, which cannot be read" in caplog.text
    content = json.loads((out / "detections.json").read_text())
    assert [(one["file_name"], one["height"], one["width"]) for one in content["images"]] == [
        ("more/a.png", 60, 90),
        ("more/b.jpg", 70, 50),
    ]
    assert [one["id"] for one in content["categories"]] == list(range(1, 11))
    assert all({"score", "bbox", "segmentation", "id"} <= one.keys() for one in content["annotations"])
    for name in ("more/a.png.png", "more/b.jpg.png"):
        with Image.open(out / name) as picture:
            assert max(picture.size) >= 384


def test_only_what_reaches_the_threshold_is_drawn(run, pictures, tmp_path):
    out = tmp_path / "out"
    detect.main(["--checkpoint", str(run), "--images", str(pictures), "--out", str(out), "--threshold", "1"])
    assert json.loads((out / "detections.json").read_text())["annotations"]
    with Image.open(out / "more/a.png.png") as picture:
        assert (np.asarray(picture) == 128).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("foreign", "--out must be a new or empty folder, or one of an earlier call, got"),
        ("inside", "--out must not lie in the images of --images"),
        ("no run", "--checkpoint: absent does not exist"),
        ("classifier", "--checkpoint must be a run of iwin detect, got"),
        ("no images", "--images must hold images"),
    ],
)
def test_what_is_invalid_is_said_before_anything_is_written(
    run, pictures, tmp_path, exit_message, change, message, request
):
    given = {"--checkpoint": run, "--images": pictures, "--out": tmp_path / "out"}
    if change == "foreign":
        given["--out"].mkdir()
        (given["--out"] / "photo.png").touch()
    if change == "inside":
        given["--out"] = pictures / "more" / "out"
    if change == "no run":
        given["--checkpoint"] = "absent"
    if change == "classifier":
        given["--checkpoint"] = request.getfixturevalue("classifier_run")
    if change == "no images":
        given["--images"] = tmp_path / "nothing"
        given["--images"].mkdir()
    assert message in exit_message(detect, *(word for pair in given.items() for word in pair))
    assert not (given["--out"] / "detections.json").exists()
