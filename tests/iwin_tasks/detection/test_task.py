import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from flashdit.shared.runs import list_checkpoints, read_state
from flashdit.training.meter import TIMINGS
from iwin_core import load_official_checkpoint
from iwin_tasks.commands import detect
from iwin_tasks.detection.average_precision import average_precision
from iwin_tasks.detection.config import load_detection_config
from iwin_tasks.detection.costs import detector_flops
from iwin_tasks.detection.data import open_objects
from iwin_tasks.detection.evaluate import evaluate_detector, find_objects
from iwin_tasks.detection.model import make_detector, read_detector
from iwin_tasks.detection.task import DetectionTrainer, score_only
from tests.iwin_tasks.detection.coco_folder import content, write_folder

ROOT = Path(__file__).parents[3]
SMALL = [
    "model.backbone_options={window_size: 4, embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [1, 1, 2, 2], "
    "drop_path_rate: 0.2}",
    "model.fpn_channels=8",
    "model.fc_channels=16",
    "model.head_channels=8",
    "model.proposals=40",
    "model.sampled_boxes=16",
    "model.short_side=64",
    "model.long_side=96",
]
TINY = [
    *SMALL,
    "data.image_size=[64,96]",
    "data.digit_size=[16,30]",
    "data.digits=[0,4]",
    "data.held_out_images=5",
    "training.steps=6",
    "training.workers=0",
    "training.global_batch_size=4",
    "training.save_every=2",
    "training.log_every=1",
    "training.preview_every=0",
    "optimizer.decay_steps=6",
    "optimizer.warmup_steps=2",
]
KINDS = ("mask_rcnn", "cascade_mask_rcnn")


def train(run_dir, *more):
    trainer = DetectionTrainer(
        load_detection_config("iwin/detect_scenes", [*TINY, f"run.dir={run_dir}", *more])
    )
    trainer.fit()
    return trainer


def coco_config(run_dir, data, *more):
    few = [*SMALL, "optimizer.decay_steps=9", "optimizer.warmup_steps=1", "training.save_every=9"]
    few += [
        "training.steps=1",
        "training.global_batch_size=2",
        "training.preview_every=0",
        f"data.path={data}",
    ]
    overrides = [*few, "data.name=coco", f"run.dir={run_dir}", *more]
    return load_detection_config("iwin/detect_scenes", overrides)


def weights(run_dir, step=6, part="ema"):
    return load_file(run_dir / f"checkpoints/step_{step:08d}/{part}/model.safetensors")


def records(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the folder of a run of two steps that was scored after the second."""
    folder = tmp_path_factory.mktemp("detector") / "run"
    train(folder, "training.steps=2", "training.preview_every=2")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_paused_run_ends_as_an_uninterrupted_one(tmp_path, kind):
    more = [f"model.kind={kind}", "training.preview_every=4"]
    train(tmp_path / "whole", *more)
    overrides = [*TINY, f"run.dir={tmp_path / 'paused'}", *more]
    paused = DetectionTrainer(load_detection_config("iwin/detect_scenes", overrides))
    update = paused.ema.update

    def update_and_terminate(model):
        update(model)
        if paused.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    paused.ema.update = update_and_terminate
    paused.fit()
    assert paused.step == 3
    torch.manual_seed(99)
    train(tmp_path / "paused", *more)
    for part in ("model", "ema"):
        whole, again = weights(tmp_path / "whole", part=part), weights(tmp_path / "paused", part=part)
        assert whole.keys() == again.keys()
        assert [name for name in whole if not whole[name].equal(again[name])] == []
    assert records(tmp_path / "whole") == records(tmp_path / "paused")


def test_losses_are_logged_by_name_and_their_sum_is_the_loss(run):
    first = records(run)[0]
    names = ["loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"]
    assert first["loss"] == pytest.approx(sum(first[name] for name in names), rel=1e-5)


def test_flops_are_those_of_a_forward_and_backward_pass_at_the_run_s_boxes(tmp_path):
    overrides = [*TINY, f"run.dir={tmp_path / 'run'}"]
    trainer = DetectionTrainer(load_detection_config("iwin/detect_scenes", overrides))
    assert trainer.flops_per_image == 3 * detector_flops(trainer.model, 64, 96, boxes=16, masks=4)


def test_scores_are_logged_and_a_picture_is_drawn(run):
    last = records(run)[-1]
    assert last["scores"] == [
        f"ema_{kind}_{name}" for kind in ("box", "mask") for name in ("ap", "ap50", "ap75")
    ]
    assert all(0 <= last[name] <= 1 for name in last["scores"])
    with Image.open(run / "samples" / "step_00000002.png") as picture:
        assert picture.width > 4 * 384
    state = read_state(list_checkpoints(run)[-1])
    assert (state["category_ids"][0], state["class_names"][0]) == (1, "zero")
    assert state["box_ap"] == last["ema_box_ap"]


def test_a_run_is_scored_again_to_the_same_figures(run, capsys, tmp_path):
    overrides = [*TINY, f"run.dir={run}"]
    detect.main(
        ["--config", "iwin/detect_scenes", "--eval-only", "--results", str(tmp_path / "r.json"), *overrides]
    )
    printed = capsys.readouterr().out
    assert printed.startswith(f"{run}\nbox AP ")
    assert "  seven: box " in printed
    results = json.loads((tmp_path / "r.json").read_text())
    source, found = score_only(load_detection_config("iwin/detect_scenes", overrides))
    assert source == str(run)
    assert results == found.results
    assert found.scores.scores() == {name: records(run)[-1][name] for name in records(run)[-1]["scores"]}


def test_a_checkpoint_gives_its_detector_and_categories_back(run):
    model, categories = read_detector(run)
    assert categories.ids == tuple(range(1, 11))
    assert (model.transform.min_size, model.transform.max_size) == ((64,), 96)
    average = weights(run, 2)
    assert [name for name, value in model.state_dict().items() if not value.equal(average[name])] == []
    assert not model.training


class Share:
    """An accelerator of one of several processes."""

    def __init__(self, rank, ranks):
        self.process_index, self.num_processes, self.device = rank, ranks, torch.device("cpu")
        self.autocast = Accelerator().autocast


def test_each_process_takes_its_share_and_no_image_counts_twice(run, monkeypatch):
    model, _ = read_detector(run)
    model.train()
    model.roi_heads.score_thresh = 0.0
    images = open_objects({"name": "scenes", "image_size": [64, 96], "held_out_images": 5}, "held-out")
    whole = evaluate_detector(model, images, 2, Share(0, 1))
    assert model.training, "given back in the mode it came"
    parts, gather = [], lambda mine: parts.append(mine) or mine
    monkeypatch.setattr("iwin_tasks.detection.evaluate.gather_object", gather)
    monkeypatch.setattr("iwin_tasks.detection.evaluate.broadcast_object_list", lambda scores: None)
    evaluate_detector(model, images, 2, Share(0, 2))
    with pytest.raises(AssertionError):  # the main process has not sent the scores
        evaluate_detector(model, images, 2, Share(1, 2))
    assert [{one["image_id"] for one in part} for part in parts] == [{0, 2, 4}, {1, 3}]
    assert len(parts[0]) + len(parts[1]) == len(whole.results)
    assert whole.scores.num_images == 5
    joined = average_precision(images.truth(), parts[0] + parts[1], "bbox")
    assert joined.ap == pytest.approx(whole.scores.box.ap, abs=1e-3)


def test_what_is_found_on_an_image_does_not_depend_on_its_batch(run):
    model, _ = read_detector(run)
    model.roi_heads.score_thresh = 0.0
    images = [torch.rand(3, 64, 96), torch.rand(3, 80, 64), torch.rand(3, 64, 96)]
    with torch.inference_mode():
        together, alone = find_objects(model, images), [find_objects(model, [image])[0] for image in images]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one["scores"], other["scores"], atol=1e-5, rtol=0)
        torch.testing.assert_close(one["boxes"], other["boxes"], atol=1e-2, rtol=0)


def test_images_without_any_object_train(tmp_path):
    changed = content()
    changed["images"] = changed["images"][::-1]
    data = write_folder(tmp_path / "data", changed)
    trainer = DetectionTrainer(
        coco_config(tmp_path / "run", data, "training.steps=3", "training.preview_every=3")
    )
    trainer.fit()
    assert trainer.step == 3
    with Image.open(tmp_path / "run" / "samples" / "step_00000003.png") as picture:
        assert picture.width > 3 * 420, "three images side by side, whatever their sizes"
    assert all(record["loss"] > 0 for record in records(tmp_path / "run"))


def test_weights_of_a_classifier_start_the_backbone(tmp_path):
    config = load_detection_config("iwin/detect_scenes", [*TINY, f"run.dir={tmp_path / 'run'}"])
    source = make_detector(config.model, 10)
    state = {name: torch.full_like(value, 0.25) for name, value in source.backbone.body.state_dict().items()}
    classifier = {
        name: value for name, value in state.items() if name[:5] not in {f"norm{i}" for i in range(4)}
    }
    classifier |= {"norm.weight": torch.ones(64), "norm.bias": torch.ones(64)}
    classifier |= {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}
    torch.save({"model": classifier}, tmp_path / "classifier.pth")
    overrides = [*TINY, f"run.dir={tmp_path / 'run'}", f"weights={tmp_path / 'classifier.pth'}"]
    trainer = DetectionTrainer(load_detection_config("iwin/detect_scenes", overrides))
    body = trainer.model.backbone.body.state_dict()
    assert all((body[name] == 0.25).all() for name in classifier if name in body)
    assert (body["norm3.weight"] == 1).all()
    with pytest.raises(
        ValueError, match=r"needs the weights of a whole detector, got others in .*classifier"
    ):
        score_only(load_detection_config("iwin/detect_scenes", overrides), weights_first=True)


def test_weights_of_the_command_line_come_before_the_run_s_own(run, tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"model": weights(run, 2, "model")}, other)
    config = load_detection_config("iwin/detect_scenes", [*TINY, f"run.dir={run}", f"weights={other}"])
    assert score_only(config)[0] == str(run)
    assert score_only(config, weights_first=True)[0] == str(other)


def test_a_run_starts_from_another_of_as_many_classes(run, tmp_path):
    trainer = DetectionTrainer(
        load_detection_config("iwin/detect_scenes", [*TINY, f"run.dir={tmp_path / 'run'}", f"weights={run}"])
    )
    started, average = trainer.model.state_dict(), weights(run, 2)
    assert [name for name in average if not average[name].equal(started[name])] == []


def test_weights_of_another_number_of_classes_are_refused(run, tmp_path):
    data = write_folder(tmp_path / "data")
    message = r"weights must be of a detector of the data's 3 classes, got one of 10 in"
    with pytest.raises(ValueError, match=message):
        DetectionTrainer(coco_config(tmp_path / "run", data, f"weights={run}"))


def test_a_run_goes_on_with_its_own_categories_alone(tmp_path):
    data, other = write_folder(tmp_path / "data"), tmp_path / "other"
    DetectionTrainer(coco_config(tmp_path / "run", data)).fit()
    changed = content()
    changed["categories"][2]["id"] = 8
    changed["annotations"][0]["category_id"] = 8
    write_folder(other, changed, splits=("train2017",))
    write_folder(other, changed, splits=("val2017",))
    message = r"holds a run whose category 7 is dog, got dog with 8 in its place: give another run.dir"
    with pytest.raises(ValueError, match=message):
        DetectionTrainer(coco_config(tmp_path / "run", other, "training.steps=2"))
    changed["categories"].append({"id": 300, "name": "zebra"})
    for split in ("train2017", "val2017"):
        write_folder(other, changed, splits=(split,))
    with pytest.raises(ValueError, match=r"holds a run on 3 classes, got data of 4: give another run.dir"):
        DetectionTrainer(coco_config(tmp_path / "run", other, "training.steps=2"))


def test_a_moved_folder_goes_on_and_a_changed_json_does_not(tmp_path, caplog):
    caplog.set_level("INFO")
    data = write_folder(tmp_path / "data")
    DetectionTrainer(coco_config(tmp_path / "run", data)).fit()
    moved = data.rename(tmp_path / "moved")
    trainer = DetectionTrainer(coco_config(tmp_path / "run", moved, "training.steps=2"))
    trainer.fit()
    assert trainer.step == 2
    assert "its files have the same names" in caplog.text
    changed = content()
    changed["annotations"][0]["bbox"] = [11, 5, 20, 20]
    write_folder(moved, changed)
    message = "files 1 changed, such as annotations/instances_train2017.json"
    with pytest.raises(ValueError, match=message):
        DetectionTrainer(coco_config(tmp_path / "run", moved, "training.steps=3"))


def test_two_processes_train_and_score_one_model(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29617"]
    command += [
        "-m",
        "iwin_tasks",
        "detect",
        "--config",
        "iwin/detect_scenes",
        *TINY,
        f"run.dir={tmp_path / 'run'}",
    ]
    command += ["training.steps=2", "training.preview_every=2", "model.backbone_options.drop_path_rate=0.0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("EMA box AP ") == 1
    assert "5 images" in done.stdout
    last = records(tmp_path / "run")[-1]
    assert (last["step"], last["images_seen"]) == (2, 8)
    model, _ = read_detector(tmp_path / "run")
    load_official_checkpoint(model, weights(tmp_path / "run", 2, "model"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.kind=mask"], "unknown model.kind 'mask'; did you mean 'mask_rcnn'"),
        (["model.backbone=iwin_tny"], "unknown model.backbone 'iwin_tny'"),
        (
            ["model.backbone_options.windw=4"],
            "unknown option of model.backbone_options 'windw'; did you mean 'w",
        ),
        (["model.backbone_options.window_size=0"], "window_size must be a positive integer, or one"),
        (["model.backbone_options.window_size=seven"], "window_size must be a whole number, got 'seven'"),
        (["model.sampled_boxes=0"], "model.sampled_boxes must be from 1 to 100000, got 0"),
        (["model.short_side=90", "model.long_side=80"], "must be 1 ≤ short ≤ long ≤ 8192, got 90 and 80"),
        (["model.anchor_scale=0"], "model.anchor_scale must be positive, got 0"),
        (["training.compile=model"], "training.compile must be none or block for a detector"),
        (
            ["data={name: coco, path: absent}"],
            "data.path must be a folder with annotations/instances_train2017",
        ),
        (["weights=absent"], "weights must be a file of weights or a run, got absent"),
        (["--eval-only"], "--eval-only needs a trained run in run.dir or weights=PATH, got"),
        (["augmentation.hflip=2"], "augmentation.hflip must be from 0 to 1, got 2"),
        (["--checkpoint", "x"], "--checkpoint, --images and --out go together"),
        (["--results", "x.json"], "--results requires --eval-only"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, exit_message, arguments, message):
    assert message in exit_message(detect, *arguments, f"run.dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_scoring_fails_is_saved_first(tmp_path):
    data = write_folder(tmp_path / "data")
    for path in (data / "val2017").rglob("*.*"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="val2017"):
        DetectionTrainer(coco_config(tmp_path / "run", data, "training.preview_every=1")).fit()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]


def test_an_image_may_be_very_long(run):
    model, _ = read_detector(run)
    (found,) = model([torch.zeros(3, 1, 500)])
    assert found["masks"].shape[1:] == (1, 500)
