import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from golden_rule import golden_tensor
from PIL import Image
from safetensors.torch import load_file

from flashdit.training.meter import TIMINGS
from iwin_core import IwinTransformer, load_official_checkpoint
from iwin_tasks.commands import segment
from iwin_tasks.segmentation import build_segmenter
from iwin_tasks.segmentation.config import load_segmentation_config
from iwin_tasks.segmentation.start import SegmenterOptions, load_start, make_segmenter
from iwin_tasks.segmentation.task import SegmentationTrainer, evaluate_run

ROOT = Path(__file__).parents[3]
BODY = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
TINY = [
    "data.image_size=[40,48]",
    "data.digits=[1,4]",
    "data.train_images=10",
    "data.held_out_images=5",
    "model.channels=8",
    "model.auxiliary_channels=4",
    "model.dropout=0.1",
    *(f"model.backbone_options.{name}={value}" for name, value in BODY.items()),
    "model.backbone_options.drop_path_rate=0.3",
    "augmentation.hflip=0.5",
    "training.steps=6",
    "training.global_batch_size=4",
    "training.save_every=2",
    "training.log_every=1",
    "training.preview_every=3",
    "training.keep_last=null",
    "optimizer.decay_steps=6",
    "optimizer.warmup_steps=2",
]


def train(run_dir, *more):
    trainer = SegmentationTrainer(load_segmentation_config(None, [*TINY, f"run.dir={run_dir}", *more]))
    trainer.fit()
    return trainer


def weights(run_dir, step=6, part="ema"):
    return load_file(run_dir / f"checkpoints/step_{step:08d}/{part}/model.safetensors")


def records(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("segmentation") / "run"
    train(folder)
    return folder


def test_a_killed_run_ends_as_an_uninterrupted_one(run, tmp_path):
    paused = SegmentationTrainer(load_segmentation_config(None, [*TINY, f"run.dir={tmp_path / 'paused'}"]))
    update = paused.ema.update

    def update_and_terminate(model):
        update(model)
        if paused.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    paused.ema.update = update_and_terminate
    paused.fit()
    assert paused.step == 3
    torch.manual_seed(99)
    train(tmp_path / "paused")
    for part in ("model", "ema"):
        whole, again = weights(run, part=part), weights(tmp_path / "paused", part=part)
        assert whole.keys() == again.keys()
        assert "decode_head.bottleneck.bn.running_var" in whole
        assert [name for name in whole if not whole[name].equal(again[name])] == []
    keep = [[{k: v for k, v in r.items() if k != "scores" and not k.startswith("ema_")} for r in records(d)]
            for d in (run, tmp_path / "paused")]  # fmt: skip
    assert keep[0] == keep[1]  # the signal left out the scores of its step


def test_scores_and_previews_are_of_the_average_every_so_many_steps(run):
    found = {r["step"]: r for r in records(run) if "ema_miou" in r}
    assert [*found] == [3, 6]
    assert all(r["scores"] == ["ema_miou", "ema_mean_acc", "ema_pixel_acc"] for r in found.values())
    assert all(0 <= r[name] <= 1 for r in found.values() for name in r["scores"])
    assert {"decode.loss_seg", "aux.loss_seg", "decode.acc_seg", "aux.acc_seg"} <= records(run)[0].keys()
    first = records(run)[0]
    assert first["loss"] == pytest.approx(first["decode.loss_seg"] + first["aux.loss_seg"], rel=1e-6)
    pictures = sorted((run / "samples").iterdir())
    assert [path.name for path in pictures] == ["step_00000003.png", "step_00000006.png"]
    with Image.open(pictures[0]) as picture:
        assert picture.width > 3 * 48
        assert picture.height > 5 * 40


def test_eval_only_finds_the_scores_of_the_run(run, capsys):
    last = records(run)[-1]
    source, result = evaluate_run(load_segmentation_config(None, [*TINY, f"run.dir={run}"]))
    assert source == str(run)
    assert result.num_images == 5
    assert result.recorded() == {name: last[name] for name in last["scores"]}
    segment.main(["--eval-only", "--weights", str(run), *TINY, f"run.dir={run / 'absent'}"])
    assert f"{run}: mIoU {last['ema_miou']:.2%}  mAcc {last['ema_mean_acc']:.2%}" in capsys.readouterr().out


def test_training_learns(tmp_path):
    more = [
        "training.steps=60",
        "optimizer.decay_steps=60",
        "training.save_every=60",
        "training.preview_every=60",
    ]
    more += ["model.backbone_options.drop_path_rate=0", "optimizer.lr=0.004", "training.log_every=10"]
    trainer = train(tmp_path, *more, "ema.decay=0.9", "class_weights=null")
    losses = [r["decode.loss_seg"] for r in records(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]
    assert trainer.task.result.scores.pixel_accuracy > 0.8


def test_class_weights_count_pixels(tmp_path):
    equal, other = (
        train(tmp_path / name, "training.steps=1", "training.save_every=1", f"class_weights={weights}")
        for name, weights in (("a", [0.5] * 11), ("b", "null"))
    )
    a, b = records(tmp_path / "a")[0], records(tmp_path / "b")[0]
    assert a["decode.loss_seg"] == pytest.approx(0.5 * b["decode.loss_seg"], rel=1e-5)
    assert a["aux.loss_seg"] == pytest.approx(0.5 * b["aux.loss_seg"], rel=1e-5)
    assert equal.task.model is not other.task.model


def rule_segmenter():
    """Returns the small UPerNet of 11 classes with weights by rule, and these by name."""
    options = {"channels": 16, "auxiliary_channels": 8, "dropout": 0.0}
    body = {**BODY, "drop_path_rate": 0.0}
    model = build_segmenter("upernet", "iwin_tiny_patch4_window7_224", 11, backbone_options=body, **options)
    state = {}
    for name, value in model.state_dict().items():
        is_count = name.endswith("num_batches_tracked")
        state[name] = torch.tensor(0) if is_count else golden_tensor(name, list(value.shape))
        if name.endswith("running_var"):
            state[name] = 1 + state[name].abs()
    load_official_checkpoint(model, state)
    return model.eval(), state


@pytest.fixture
def authors_file(tmp_path):
    """Returns a file as the authors' training writes it."""
    _, state = rule_segmenter()
    meta = {
        "CLASSES": ("wall", "building"),
        "PALETTE": [[120, 120, 120]],
        "env_info": "torch",
        "iter": 160000,
    }
    momentum = {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 6e-5}]}
    content = {
        "meta": meta,
        "state_dict": state,
        "optimizer": momentum,
        "amp": {"loss_scaler0": {"unskipped": 3}},
    }
    torch.save(content, tmp_path / "authors.pth")
    return tmp_path / "authors.pth"


RULE = [
    "model.num_classes=11",
    "model.channels=16",
    "model.auxiliary_channels=8",
    *(f"model.backbone_options.{name}={value}" for name, value in BODY.items()),
    "training.precision=fp32",
    "training.workers=0",
]


def confusion(folder, predicted):
    """Returns the confusion matrix (11, 11) of a folder's held-out labels and what a function predicts."""
    counts = np.zeros((11, 11), np.int64)
    for path in sorted((folder / "images" / "validation").iterdir()):
        with Image.open(path) as picture, Image.open(folder / "annotations/validation" / path.name) as labels:
            image, truth = np.array(picture.convert("RGB")), np.array(labels).astype(int) - 1
        for row, column in zip(truth.flatten(), predicted(image).flatten(), strict=True):
            counts[row, column] += 1
    return counts


def miou(counts):
    """Returns the mean IoU of a confusion matrix over the classes that occur."""
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return (counts.diagonal()[union > 0] / union[union > 0]).mean()


@torch.no_grad()
def test_the_authors_file_is_scored_from_its_preprocessing_on(folder, authors_file, tmp_path, capsys):
    model, _ = rule_segmenter()

    def predicted(image):  # 40 × 56 into 2048 × 512, at a quarter: 128 × 179
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        x = torch.nn.functional.interpolate(x, (128, 179), mode="bilinear").round() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        logits = torch.nn.functional.interpolate(model((x - mean) / std), (40, 56), mode="bilinear")
        return logits.argmax(1)[0].numpy()

    counts = confusion(folder, predicted)
    assert (counts.sum(0) > 0).sum() > 2, "the rule's weights tell some classes apart"
    given = [*RULE, f"data.path={folder}", "augmentation.scale=[512,128]", f"run.dir={tmp_path / 'run'}"]
    segment.main(["--eval-only", "--weights", str(authors_file), *given])
    printed = capsys.readouterr().out
    assert f"mIoU {miou(counts):.2%}" in printed
    assert f"aAcc {counts.diagonal().sum() / counts.sum():.2%}" in printed
    assert "3 images" in printed
    config = load_segmentation_config(None, [*given, "inference.flip=true", "inference.scales=[0.5,1.0]"])
    _, flipped = evaluate_run(config, authors_file)
    config = load_segmentation_config(None, [*given, "inference.window=[64,64]", "inference.stride=[40,40]"])
    _, slid = evaluate_run(config, authors_file)
    assert len({f"{miou(counts):.4f}", f"{flipped.scores.miou:.4f}", f"{slid.scores.miou:.4f}"}) == 3
    assert not (tmp_path / "run").exists()


def options_of(*more):
    """Returns the model options of the tiny configuration."""
    return load_segmentation_config(None, [*TINY, *more]).model


def test_a_run_starts_from_a_classifier_a_segmenter_or_the_authors_file(run, tmp_path, authors_file):
    options = options_of()
    body = IwinTransformer(**BODY, img_size=40, num_classes=3)
    torch.save({"model": body.state_dict()}, tmp_path / "classifier.pth")
    model = make_segmenter(options)
    load_start(model, options, tmp_path / "classifier.pth")
    assert model.backbone.layers[2].blocks[0].attn.qkv.weight.equal(body.layers[2].blocks[0].attn.qkv.weight)
    with pytest.raises(
        ValueError, match=r"needs the weights of a whole segmenter, got others in .*classifier"
    ):
        load_start(model, options, tmp_path / "classifier.pth", whole=True)
    load_start(model, options, run)
    average, state = weights(run), model.state_dict()
    assert [name for name in average if not average[name].equal(state[name])] == []
    trainer = SegmentationTrainer(
        load_segmentation_config(None, [*RULE, f"weights={authors_file}", f"run.dir={tmp_path / 'new'}"])
    )
    assert trainer.model.decode_head.conv_seg.weight.equal(rule_segmenter()[1]["decode_head.conv_seg.weight"])


def test_starting_from_a_classifier_says_that_heads_of_the_small_one_differ(tmp_path, caplog):
    options = SegmenterOptions(backbone="iwin_small_patch4_window7_224", num_classes=3, channels=8)
    with torch.device("meta"):
        classifier = timm.create_model(options.backbone)
    state = {name: torch.zeros(value.shape) for name, value in classifier.state_dict().items()}
    torch.save(state, tmp_path / "small.pth")
    load_start(make_segmenter(options), options, tmp_path / "small.pth")
    assert "classification weights have heads (3, 4, 8, 16), this model has (3, 6, 12, 24)" in caplog.text


def test_another_timm_backbone_starts_from_its_classifiers_file(tmp_path):
    options = SegmenterOptions(backbone="resnet10t", num_classes=3, channels=8)
    classifier = timm.create_model("resnet10t", num_classes=5)
    torch.save(classifier.state_dict(), tmp_path / "resnet.pth")
    model = make_segmenter(options)
    load_start(model, options, tmp_path / "resnet.pth")
    assert model.backbone.layer3[0].conv1.weight.equal(classifier.layer3[0].conv1.weight)
    state = {name: value for name, value in classifier.state_dict().items() if "layer3.0.conv1" not in name}
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(
        ValueError, match=r"weights must be those of resnet10t, got .*part.pth without layer3"
    ):
        load_start(model, options, tmp_path / "part.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["model.num_classes=9", "class_weights=null"],
            "model.num_classes must be the number of the data's classes, 11, got 9",
        ),
        (["data.path=absent"], "data.path must be a folder with images/training, images/validation"),
        (["weights=absent"], "weights must be a file of weights or a run, got absent"),
        (["--eval-only"], "--eval-only needs a trained run in run.dir or --weights PATH, got"),
        (["--weights=x"], "--weights is for --eval-only; training starts from weights=PATH"),
        (["--checkpoint=x"], "--checkpoint, --images and --out go together, got none of --images, --out"),
        (["training.global_batch_size=7", "training.accumulation=2"], "global_batch_size must be a multiple"),
        (["model.backbone_options.window_size=-1"], "window"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, exit_message, arguments, message):
    given = TINY if "data.path=absent" not in arguments else []
    assert message in exit_message(segment, *given, *arguments, f"run.dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_another_number_of_classes_than_the_checkpoints_is_refused(folder, authors_file, tmp_path):
    given = [*RULE, f"data.path={folder}", "model.num_classes=12", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(
        ValueError, match=r"of another shape: decode_head.conv_seg.weight \(11, 16, 1, 1\) for \(12"
    ):
        evaluate_run(load_segmentation_config(None, given), authors_file)


def folder_run(run_dir, data, *more):
    """Trains on a folder."""
    small = [*RULE, f"data.path={data}", "augmentation.scale=[56,40]", "augmentation.crop=[32,32]"]
    small += [
        "training.steps=1",
        "training.global_batch_size=2",
        "training.preview_every=0",
        f"run.dir={run_dir}",
        *more,
    ]
    trainer = SegmentationTrainer(load_segmentation_config(None, small))
    trainer.fit()
    return trainer


def test_a_moved_folder_resumes_and_other_classes_or_files_do_not(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    run_dir = tmp_path / "run"
    folder_run(run_dir, folder)
    moved = shutil.move(folder, tmp_path / "moved")
    assert folder_run(run_dir, moved, "training.steps=2").step == 2
    assert "its files have the same names and sizes" in caplog.text
    with pytest.raises(ValueError, match=r"model.num_classes"):
        folder_run(run_dir, moved, "training.steps=3", "model.num_classes=12")
    for kind in ("images", "annotations"):
        (moved / kind / "validation" / "00000000.png").unlink()
    with pytest.raises(ValueError, match=r"files 2 fewer, such as images/validation/00000000.png"):
        folder_run(run_dir, moved, "training.steps=3")


def test_a_wrong_label_ends_a_run_with_its_name(folder, tmp_path):
    for path in (folder / "annotations" / "training").iterdir():
        Image.fromarray(np.full((40, 56), 77, np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"labels must be 1 to 11, .* got 77 in .*annotations/training"):
        folder_run(tmp_path / "run", folder)


def test_images_of_several_sizes_need_a_crop(folder, tmp_path):
    for kind in ("images", "annotations"):
        path = folder / kind / "training" / "00000001.png"
        with Image.open(path) as picture:
            picture.crop((0, 0, 56, 33)).save(path)
    more = ["augmentation.scale=null", "augmentation.ratio=[1.0,1.0]", "augmentation.crop=null"]
    with pytest.raises(
        ValueError, match=r"of one size where augmentation.crop is null, got 33 × 56 and 40 × 56"
    ):
        folder_run(tmp_path / "run", folder, *more, "training.global_batch_size=4")
    more += ["training.global_batch_size=1"]
    with pytest.raises(
        ValueError, match=r"model.kind=upernet requires two images a process at once, .* got 1"
    ):
        folder_run(tmp_path / "run", folder, *more)
    assert folder_run(tmp_path / "run", folder, *more, "model.kind=semantic_fpn").step == 1


def test_a_folder_of_pictures_is_segmented(run, folder, tmp_path, capsys, caplog, exit_message):
    images, out = folder / "images" / "validation", tmp_path / "out"
    given = ["--checkpoint", str(run), "--images", str(images), "--out", str(out)]
    segment.main(given)
    assert f"3 pictures segmented: {out}" in capsys.readouterr().out
    model = make_segmenter(options_of()).eval()
    load_official_checkpoint(model, weights(run))
    for path in images.iterdir():
        with Image.open(path) as picture, Image.open(out / "labels" / path.name) as written:
            image, classes = np.array(picture.convert("RGB")), np.array(written)
            assert written.mode == "P"
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        x = torch.from_numpy(((image / 255 - mean) / std).transpose(2, 0, 1)).float()[None]
        with torch.no_grad():
            expected = model(x).argmax(1)[0].numpy()
        assert (classes != expected).mean() < 1e-3
        with Image.open(out / "pictures" / path.name) as shown:
            assert shown.size == (56, 40)
            assert shown.mode == "RGB"
    assert "--out must be a new folder or an empty one" in exit_message(segment, *given)
    (images / "z.png").write_bytes((images / "00000000.png").read_bytes()[:100])
    segment.main([*given[:-1], str(tmp_path / "rest")])
    assert "3 pictures segmented" in capsys.readouterr().out
    assert "skipped z.png, which cannot be read" in caplog.text
    inside = exit_message(segment, *given[:-1], images / "out")
    assert "--out" in inside
    assert not (images / "out").exists()
    assert "does not exist" in exit_message(segment, "--checkpoint", "absent", *given[2:-1], tmp_path / "b")


def test_two_processes_count_each_image_once_and_train_as_one(tmp_path):
    more = ["model.backbone_options.drop_path_rate=0", "model.dropout=0", "training.steps=3"]
    more += ["model.kind=semantic_fpn", "training.save_every=3"]
    config = ROOT / "configs" / "accelerate" / "cpu_2.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command = [*launch, "-m", "iwin_tasks", "segment", *TINY, *more, f"run.dir={tmp_path / 'two'}"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    given = [*TINY, *more, f"run.dir={tmp_path / 'two'}"]
    _, result = evaluate_run(load_segmentation_config(None, given))
    last = records(tmp_path / "two")[-1]
    assert result.recorded() == pytest.approx({name: last[name] for name in last["scores"]}, abs=1e-12)
