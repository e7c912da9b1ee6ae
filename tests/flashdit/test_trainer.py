import json
import os
import subprocess
import sys
import zlib
from dataclasses import asdict
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file

from flashdit import FlashDiT, config
from flashdit.data.autoencoders import load_vae
from flashdit.digits.images import digits
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.classes import choose_labels
from flashdit.sampling.generator import warn_of_guidance
from flashdit.sampling.options import SamplingOptions
from flashdit.shared.files import read_checked_json
from flashdit.shared.pictures import to_pil
from flashdit.trainer import Trainer
from flashdit.training.meter import TIMINGS


def train(overrides, *more):
    trainer = Trainer(config.load(None, [*overrides, *more]))
    trainer.fit()
    return trainer


def tensors(run_dir, step):
    """Returns every tensor of a checkpoint by name."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}/{name}": value for name, value in load_file(path).items()}
    states = torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    found |= {f"optimizer/{i}/{name}": value for i, state in states.items() for name, value in state.items()}
    return found | {"rng": torch.load(folder / "processes.pt", weights_only=True)[0]["cpu"]}


def records(run_dir):
    """Returns the run's records without their speed."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def assert_same_runs(one, other, step):
    mine, theirs = tensors(one, step), tensors(other, step)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not mine[name].equal(theirs[name])]
    assert different == []
    assert records(one) == records(other)


@pytest.mark.parametrize("pause", [2, 4])
def test_a_paused_run_ends_as_an_uninterrupted_one(tiny_overrides, tmp_path, pause):
    train(tiny_overrides)  # 6 steps of 8 images: epochs of 37 end within a batch
    paused = [*tiny_overrides, f"run.dir={tmp_path / 'paused'}"]
    train(paused, f"training.steps={pause}")
    torch.manual_seed(99)
    train(paused)
    assert_same_runs(tmp_path / "run", tmp_path / "paused", 6)


def test_accumulation_and_batch_layout_change_no_update(tiny_overrides, tmp_path):
    train(tiny_overrides)
    train(tiny_overrides, f"run.dir={tmp_path / 'split'}", "training.accumulation=4")
    whole, split = tensors(tmp_path / "run", 6), tensors(tmp_path / "split", 6)
    for name in whole:
        if name.startswith(("model/", "ema/")):
            torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-5)


def test_worker_processes_change_nothing(tiny_overrides, tmp_path):
    train(tiny_overrides)
    train(tiny_overrides, f"run.dir={tmp_path / 'workers'}", "training.workers=2")
    assert_same_runs(tmp_path / "run", tmp_path / "workers", 6)


def test_training_learns(tiny_overrides, tmp_path):
    steady = ("optimizer.decay_steps=null", "optimizer.warmup_steps=0", "training.save_every=120")
    train(tiny_overrides, "training.steps=120", *steady)
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_checkpoint_holds_everything_and_loads_safely(tiny_overrides, tmp_path):
    trainer = train(tiny_overrides)
    folder = tmp_path / "run" / "checkpoints" / "step_00000006"
    state = read_checked_json(folder / "state.json")
    assert state.pop("crc32") == {
        path.relative_to(folder).as_posix(): f"{zlib.crc32(path.read_bytes()):08x}"
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("state.json", "config.yaml")
    }
    assert state == {
        "format": 1,
        "step": 6,
        "images_seen": 48,
        "ema_updates": 6,
        "skipped": 0,
        "skipped_in_a_row": 0,
        "class_names": ["0", "1", "2"],
        "data_name": "shards",
        "sampling": asdict(trainer.config.sampling) | {"cfg_interval": [0.22, 1.0]},
    }
    assert config.load(folder / "config.yaml") == trainer.config
    raw, ema = (FlashDiT.from_pretrained(folder / name).state_dict() for name in ("model", "ema"))
    for name, value in trainer.model.state_dict().items():
        assert raw[name].equal(value)
        assert ema[name].equal(trainer.ema.average[name])
    assert not any(path.name.startswith(".") for path in (tmp_path / "run").rglob("*"))


def test_statistics_of_the_data_travel_with_the_checkpoint(tiny_overrides, tmp_path):
    train(tiny_overrides)
    generator = load_generator(tmp_path / "run")
    assert generator.space.mean.flatten().tolist() == [2.0] * 3
    assert generator.space.std.flatten().tolist() == [3.0] * 3
    with pytest.raises(ValueError, match=r"pixels need the VAE"):
        next(iter(generator.generate(torch.tensor([0]), SamplingOptions(steps=1))))


def test_a_finished_run_is_left_alone(tiny_overrides, tmp_path):
    train(tiny_overrides)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert train(tiny_overrides).step == 6
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_bfloat16_and_activation_checkpointing_train(tiny_overrides, tmp_path, precision):
    trainer = train(tiny_overrides, f"training.precision={precision}", "training.gradient_checkpointing=true")
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in records(tmp_path / "run"))


@pytest.mark.parametrize("keep", ["false", "true"])
def test_activation_checkpointing_changes_no_result(tiny_overrides, tmp_path, keep):
    train(tiny_overrides)
    saving = ("training.gradient_checkpointing=true", f"training.keep_matmuls={keep}")
    train(tiny_overrides, f"run.dir={tmp_path / 'saving'}", *saving)
    assert_same_runs(tmp_path / "run", tmp_path / "saving", 6)


def test_wandb_without_an_account_is_refused_before_anything_is_written(tiny_overrides, tmp_path):
    command = [sys.executable, "-m", "flashdit", "train", *tiny_overrides, "tracking.wandb=true"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "flashdit train: error: tracking.wandb needs an account on this machine: `wandb login` first, or"
    )
    assert not (tmp_path / "run").exists()


def test_wandb_gets_the_same_run_after_a_resume(tiny_overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tiny_overrides, "tracking.wandb=true", "training.steps=2")
    first = (tmp_path / "run" / "wandb_id.txt").read_text()
    train(tiny_overrides, "tracking.wandb=true")
    folders = sorted(path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(name.endswith(first) for name in folders)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.in_channels=4", r"model.in_channels=4 and model.sample_size=8, got 3 × 8 × 8"),
        ("model.sample_size=16", r"model.in_channels=3 and model.sample_size=16, got 3 × 8 × 8"),
        ("model.num_classes=2", r"labels must be from 0 to below model.num_classes=2, got 0 to 2"),
        ("training.accumulation=3", r"global_batch_size must be a multiple .* got 8 for 1 × 3"),
        ("data.path=absent", r"data.path must hold latents_rankRR_shardSSS.safetensors, got none in absent"),
        (
            "latents.vae=absent",
            r"vae must be a data set .*, a folder or a hub name .* got 'absent'",
        ),
        (
            "model.attention.window=0",
            r"window must be between 1 and the side of the token grid, got window=0",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_the_first_step(tiny_overrides, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_overrides, override)
    assert not (tmp_path / "run").exists()


def test_an_image_folder_trains_and_its_classes_travel(tmp_path):
    images, labels = digits("train")
    for i in range(24):
        folder = tmp_path / "images" / ("even" if labels[i] % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        to_pil(images[i]).save(folder / f"{i}.png")
    train(
        [f"run.dir={tmp_path / 'run'}", "data.name=images", f"data.path={tmp_path / 'images'}"],
        *("data.image_size=32", "model.num_classes=2", "model.hidden_size=16", "model.depth=1"),
        *("training.steps=4", "sampling.steps=2"),
    )
    generator = load_generator(tmp_path / "run")
    assert generator.class_names == ["even", "odd"]
    assert (tmp_path / "run" / "samples" / "step_00000004.png").exists()


def test_class_names_that_do_not_fit_the_model_are_named(tiny_overrides, tiny_shards):
    (tiny_shards / "class_names.json").write_text('["cat", "dog", "cow", "hen"]')
    with pytest.raises(
        ValueError, match=r"model.num_classes must be the number of the data's classes, 4, got 3"
    ):
        train(tiny_overrides)


def test_a_checkpoint_of_another_model_or_with_broken_weights_is_named(tiny_overrides, tmp_path):
    train(tiny_overrides, "training.steps=2")
    folder = tmp_path / "run" / "checkpoints" / "step_00000002"
    state = read_checked_json(folder / "state.json")
    (folder / "state.json").write_text(json.dumps(state | {"crc32": {}}))  # as before checksums were kept
    weights = folder / "ema" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"FlashDiT in .*ema must be readable"):
        load_generator(tmp_path / "run")
    with pytest.raises(ValueError, match=r"readable safetensors file, .*ema.* is not"):
        train(tiny_overrides)
    weights.unlink()
    with pytest.raises(
        ValueError, match=r"a checkpoint must hold weights, got no \.safetensors file in .*ema"
    ):
        train(tiny_overrides)
    with pytest.raises(
        ValueError, match=r"a checkpoint must hold weights, got no \.safetensors file in .*ema"
    ):
        load_generator(tmp_path / "run")
    (folder / "ema" / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    with pytest.raises(ValueError, match=r"must hold a FlashDiT, got DiTTransformer2DModel in .*ema"):
        load_generator(folder)
    (folder / "ema" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"is damaged: it has no ema/config\.json"):
        load_generator(folder)
    (folder / "latents.safetensors").unlink()
    with pytest.raises(ValueError, match=r"latents.safetensors is damaged: No such file"):
        load_generator(folder, weights="model")


def test_images_without_a_vae_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"images need a VAE: give latents.vae"):
        Trainer(config.load(None, ["latents.vae=null", f"run.dir={tmp_path}"]))


def test_another_model_in_the_same_run_folder_is_refused(tiny_overrides, tmp_path, caplog):
    train(tiny_overrides, "training.steps=2")
    with pytest.raises(
        ValueError, match=r"run holds a run whose model.depth is 1, not 2: give another run.dir"
    ):
        train(tiny_overrides, "model.depth=2")
    with caplog.at_level("INFO"):
        train(tiny_overrides, "optimizer.lr=0.01")
    assert "resumed with another optimizer.lr: 0.01, was 0.003" in caplog.text
    assert "resumed with another training.steps: 6, was 2" in caplog.text


DIGITS = [
    "model.hidden_size=16",
    "model.depth=1",
    "training.steps=4",
    "training.log_every=1",
    "training.save_every=4",
    "training.preview_every=0",
    "sampling.steps=2",
]


def test_scores_while_training_are_logged_and_disturb_nothing(tmp_path):
    train([*DIGITS, f"run.dir={tmp_path / 'plain'}"])
    scored = ["evaluation.every=2", "evaluation.num_images=40", "evaluation.extractor=digits"]
    train([*DIGITS, *scored, "evaluation.metrics=[fid,accuracy]", f"run.dir={tmp_path / 'scored'}"])
    lines = records(tmp_path / "scored")
    found = {line["step"]: line.pop("fd_40") for line in lines if "fd_40" in line}
    assert list(found) == [2, 4]
    assert all(score > 1 for score in found.values()), "four steps make no digits"
    assert [0 <= line.pop("accuracy") <= 1 for line in lines if "accuracy" in line] == [True, True]
    assert [line.pop("scores") for line in lines if "scores" in line] == [["fd_40", "accuracy"]] * 2
    assert lines == records(tmp_path / "plain")
    mine, theirs = tensors(tmp_path / "scored", 4), tensors(tmp_path / "plain", 4)
    assert [name for name in theirs if not theirs[name].equal(mine[name])] == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.metrics=[fidd]", r"unknown metric 'fidd'; did you mean 'fid'"),
        (
            "evaluation.reference=absent.npz",
            r"a reference must be a data set that brings one, .* got absent.npz",
        ),
        ("latents.vae=null", r"images need a VAE"),
    ],
)
def test_an_evaluation_that_cannot_be_is_named_before_the_first_step(tmp_path, override, message):
    scored = ["evaluation.every=2", "evaluation.extractor=digits", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=message):
        train([*DIGITS, *scored, override])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["images", "shards"])
def test_a_run_whose_data_brings_no_reference_must_name_one_whatever_folder_lies_there(
    tmp_path, tiny_overrides, monkeypatch, name
):
    for number in range(6):
        path = tmp_path / name / "class" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(path)
    if name == "images":
        data = ["data.name=images", f"data.path={tmp_path / 'images'}", "data.image_size=16"]
        data += ["latents.vae=digits", "model.in_channels=1", "model.num_classes=1"]
    else:
        channels: dict[str, Any] = {f"{side}_block_out_channels": (4,) for side in ("encoder", "decoder")}
        blocks: dict[str, Any] = {f"num_{side}_blocks": (1,) for side in ("encoder", "decoder")}
        AutoencoderTiny(**channels, **blocks, latent_channels=3).save_pretrained(tmp_path / "vae")
        data = [f"latents.vae={tmp_path / 'vae'}"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"evaluation\.reference: .*data set '{name}' brings none"):
        train([*tiny_overrides, *data, "evaluation.every=2", "evaluation.extractor=digits"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_on_digits_is_scored_by_what_the_digits_bring(tmp_path):
    trainer = Trainer(config.load(None, [*DIGITS, "evaluation.every=2", f"run.dir={tmp_path / 'run'}"]))
    plan = trainer.task.evaluation.plan
    assert plan.extractor.name == "digits"
    assert plan.reference.spec == "digits"
    assert plan.metrics == ["fid"]
    assert plan.samples.count == 5000


def test_a_model_without_classes_trains_on_any_data_and_samples(tiny_overrides, tmp_path, caplog):
    overrides = [*tiny_overrides, f"run.dir={tmp_path / 'run'}", "model.num_classes=0", "training.steps=2"]
    with caplog.at_level("INFO"):
        trainer = Trainer(config.load(None, overrides))
    assert "model.num_classes=0: the data's classes, " in caplog.text
    assert trainer.task.examples.__getitems__([0, 1, 2])["drop"].all()
    trainer.fit()
    generator = load_generator(tmp_path / "run")
    assert generator.class_names == []
    assert len(generator.model.y_embedder.embedding_table.weight) == 1
    assert choose_labels(generator.class_names, None, 3).tolist() == [0, 0, 0]
    with caplog.at_level("WARNING"):
        warn_of_guidance.cache_clear()
        generator.check_guidance(SamplingOptions(cfg_scale=2.0))
    assert "guidance changes nothing in a model without classes, got cfg_scale=2" in caplog.text


def test_a_preview_of_broken_weights_is_a_logged_line_and_no_end(tiny_overrides, tmp_path, caplog):
    task = Trainer(config.load(None, [*tiny_overrides, f"run.dir={tmp_path / 'run'}"])).task
    task.space.vae = load_vae("digits")  # never asked to decode
    average = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    average["final_layer.linear.bias"][0] = float("nan")
    assert task._write_preview(7, average) == {}
    assert "step 7: no preview: sampled latents must be finite" in caplog.text
    assert not list((tmp_path / "run").rglob("*.png"))
