import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from flashdit.shared.runs import list_checkpoints
from flashdit.training.meter import TIMINGS
from iwin_core import load_official_checkpoint
from iwin_tasks.classification.config import load_classifier_config
from iwin_tasks.classification.task import ClassifierTrainer, evaluate_only
from iwin_tasks.commands import classify as train_classifier

TINY = [
    "model.embed_dim=8",
    "model.depths=[1,1]",
    "model.num_heads=[1,2]",
    "model.drop_path_rate=0.3",
    "augmentation.mixup=0.5",
    "augmentation.cutmix=1.0",
    "augmentation.random_erasing=0.3",
    "training.steps=6",
    "training.global_batch_size=8",
    "training.save_every=2",
    "training.log_every=1",
    "training.preview_every=0",
    "optimizer.decay_steps=6",
    "optimizer.warmup_steps=2",
]


def train(run_dir, *more):
    trainer = ClassifierTrainer(load_classifier_config(None, [*TINY, f"run.dir={run_dir}", *more]))
    trainer.fit()
    return trainer


def weights(run_dir, step=6, part="ema"):
    return load_file(run_dir / f"checkpoints/step_{step:08d}/{part}/model.safetensors")


def records(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def test_a_paused_run_with_drop_path_ends_as_an_uninterrupted_one(tmp_path):
    train(tmp_path / "whole")
    paused = ClassifierTrainer(load_classifier_config(None, [*TINY, f"run.dir={tmp_path / 'paused'}"]))
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
        whole, again = weights(tmp_path / "whole", part=part), weights(tmp_path / "paused", part=part)
        assert whole.keys() == again.keys()
        assert [name for name in whole if not whole[name].equal(again[name])] == []
    assert records(tmp_path / "whole") == records(tmp_path / "paused")


def test_accumulation_changes_no_update(tmp_path):
    plain = "model.drop_path_rate=0"
    train(tmp_path / "whole", plain)
    train(tmp_path / "split", plain, "training.accumulation=4")
    whole, split = weights(tmp_path / "whole"), weights(tmp_path / "split")
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-3, atol=1e-4)


def test_biases_and_norms_do_not_decay(tmp_path):
    trainer = ClassifierTrainer(load_classifier_config(None, [*TINY, f"run.dir={tmp_path}"]))
    decayed, others = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (trainer.config.optimizer.weight_decay, 0)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    count = len(decayed["params"]) + len(others["params"])
    assert count == len(list(trainer.model.parameters()))


def test_every_parameter_is_in_one_group_and_only_matrices_decay(tmp_path):
    more = ["model.position=relative", f"run.dir={tmp_path}"]
    trainer = ClassifierTrainer(load_classifier_config(None, [*TINY, *more]))
    decayed, others = trainer.optimizer.param_groups
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    grouped = [names[id(parameter)] for group in (decayed, others) for parameter in group["params"]]
    exempt = trainer.model.no_weight_decay()
    expected = [n for n, p in trainer.model.named_parameters() if p.ndim > 1 and n not in exempt]
    assert grouped[: len(expected)] == expected
    assert sorted(grouped) == sorted(names.values())
    plain = {names[id(parameter)] for parameter in others["params"]}
    assert {name for name in names.values() if name.endswith(("bias", "bias_table"))} <= plain
    assert "layers.0.blocks.0.attn.qkv.weight" not in plain


def test_training_learns_and_eval_only_finds_the_same_accuracy(tmp_path, capsys):
    more = (
        "model.drop_path_rate=0",
        "augmentation.mixup=0",
        "augmentation.cutmix=0",
        "optimizer.decay_steps=null",
    )
    more = (
        *more,
        "optimizer.lr=0.003",
        "training.steps=80",
        "training.global_batch_size=32",
        "ema.decay=0.9",
    )
    more = (*more, "training.preview_every=80", "training.save_every=80", "model.embed_dim=16")
    trainer = train(tmp_path / "run", *more)
    assert trainer.task.accuracy.top1 > 0.25, "a guess is right in one of ten"
    assert records(tmp_path / "run")[-1]["ema_top1"] == trainer.task.accuracy.top1
    overrides = [*TINY, f"run.dir={tmp_path / 'run'}", *more]
    source, accuracy = evaluate_only(load_classifier_config(None, overrides))
    assert source == str(tmp_path / "run")
    assert (accuracy.top1, accuracy.top5) == (trainer.task.accuracy.top1, trainer.task.accuracy.top5)
    train_classifier.main(["--eval-only", *overrides])
    assert f"top-1 {accuracy.top1:.2%}" in capsys.readouterr().out


def test_a_checkpoint_is_what_the_authors_loader_takes(tmp_path):
    trainer = train(tmp_path / "run")
    folder = list_checkpoints(tmp_path / "run")[-1]
    again = ClassifierTrainer(load_classifier_config(None, [*TINY, f"run.dir={tmp_path / 'other'}"])).model
    report = load_official_checkpoint(again, folder / "model" / "model.safetensors")
    assert not report.new + report.reinitialised + report.left_out
    mine, theirs = trainer.model.state_dict(), again.state_dict()
    assert [name for name in mine if not mine[name].equal(theirs[name])] == []
    assert json.loads((folder / "state.json").read_text())["class_names"][7] == "seven"


def test_a_run_starts_from_another_at_another_size_by_its_window_alone(tmp_path):
    train(tmp_path / "small")
    more = (f"weights={tmp_path / 'small'}", "model.img_size=64", "model.window_size=8")
    source, accuracy = evaluate_only(
        load_classifier_config(None, [*TINY, f"run.dir={tmp_path / 'large'}", *more])
    )
    assert source == str(tmp_path / "small")
    assert accuracy.num_images == 360
    trainer = ClassifierTrainer(load_classifier_config(None, [*TINY, f"run.dir={tmp_path / 'large'}", *more]))
    started, average = trainer.model.state_dict(), weights(tmp_path / "small")
    assert [name for name in average if not average[name].equal(started[name])] == []


@pytest.mark.parametrize("more", ["training.precision=bf16", "training.gradient_checkpointing=true"])
def test_bfloat16_and_activation_checkpointing_train(tmp_path, more):
    train(tmp_path / "run", more, "training.steps=2")
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run", 2).values())
    assert all(record["loss"] > 0 for record in records(tmp_path / "run"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.num_classes=9"], "model.num_classes must be the number of the data's classes, 10, got 9"),
        (
            ["data.name=images", "data.path=absent"],
            "data.path must be a folder with sub-folders train and val",
        ),
        (["weights=absent"], "weights must be a file of weights or a run, got absent"),
        (["--eval-only"], "--eval-only needs a trained run in run.dir or weights=PATH, got"),
        (["model.embed_dm=9"], "unknown configuration key 'model.embed_dm'; did you mean 'model.embed_dim'"),
        (["model.feature_norms=true"], "model.feature_norms must be false, as a classifier needs its head"),
        (["model.num_classes=0"], "model.num_classes must be at least 1, got 0"),
        (["model.in_chans=1"], "model.in_chans must be 3, as pictures are RGB, got 1"),
        (["model.global_pool=max"], "model.global_pool must be avg for classes, got 'max'"),
        (["model.img_size=9999"], "model.img_size must be at most 8192, got 9999"),
        (["model.embed_dim=99999999999999"], "a model's tensors must be of sizes that a machine can address"),
        (["training.preview_every=-1"], "training.preview_every must not be negative, got -1"),
        (["augmentation.mixup=-1"], "augmentation.mixup must not be negative, got -1"),
        (["training.global_batch_size=7", "training.accumulation=2"], "global_batch_size must be a multiple"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, exit_message, arguments, message):
    assert message in exit_message(train_classifier, *arguments, f"run.dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def folder_run(run_dir, data, *more):
    small = ["model.num_classes=3", "training.steps=2", "optimizer.decay_steps=9", "optimizer.warmup_steps=1"]
    return train(run_dir, *small, "data={name: images, path: " + str(data) + "}", *more)


@pytest.mark.parametrize("change", ["moved", "moved, defaults written out", "fewer", "others"])
def test_a_moved_folder_resumes_and_one_with_other_files_does_not(folder, tmp_path, caplog, change):
    caplog.set_level("INFO")
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    folder_run(run_dir, folder)
    shutil.copytree(folder / "train", moved / "train")
    shutil.copytree(folder / "val", moved / "val")
    more = ["training.steps=3"]
    if change == "moved, defaults written out":
        more += ["data.background=white", "model.mlp_ratio=4.0"]
    if change == "fewer":
        (moved / "val" / "cat" / "0.png").unlink()
    if change == "others":
        (moved / "train" / "cat").rename(moved / "train" / "cow")
        (moved / "val" / "cat").rename(moved / "val" / "cow")
    if change.startswith("moved"):
        assert folder_run(run_dir, moved, *more).step == 3
        assert f"data.path is {moved}, was {folder}: its files have the same names and sizes" in caplog.text
        return
    message = {"fewer": "files 1 fewer, such as val/cat/0.png", "others": "lacks cat"}[change]
    with pytest.raises(ValueError, match=message):
        folder_run(run_dir, moved, *more)


def test_a_run_that_kept_no_contents_is_compared_by_its_classes(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    run_dir = tmp_path / "run"
    folder_run(run_dir, folder)
    (run_dir / "contents.json.gz").unlink()
    (tmp_path / "moved").mkdir()
    for split in ("train", "val"):
        shutil.copytree(folder / split, tmp_path / "moved" / split)
    assert folder_run(run_dir, tmp_path / "moved", "training.steps=3").step == 3
    assert "its classes have the same names, of its files nothing is known" in caplog.text
