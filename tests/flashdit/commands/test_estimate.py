import re
import resource
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from flashdit import config
from flashdit.commands import estimate
from flashdit.commands.budget import (
    checkpoint_bytes,
    duration,
    kept_checkpoints,
    read_config,
    snapshot_bytes,
    train_seconds,
)
from flashdit.memory import count_parameters, memory_bytes
from flashdit.models.costs import RECOMPUTED, Activations, activations, forward_flops, saved_bytes
from flashdit.models.dit import FlashDiT
from flashdit.models.recompute import keep_matmuls
from flashdit.shared.files import write_json
from flashdit.shared.runs import list_checkpoints, step_folder
from flashdit.trainer import Trainer
from flashdit.training.checkpoint import prune
from flashdit.training.ema import Ema, EmaOptions
from flashdit.training.optim import OptimizerOptions, make_optimizer
from flashdit.training.options import TrainingOptions
from iwin_core.kernels import cpu_attention
from iwin_core.kernels.cpu_attention import FUSED, PRODUCTS

SMALL = {
    "sample_size": 16,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}
ATTENTIONS = [{"name": "iwin", "window": 4, "kernel": 3}, {"name": "global", "rope": True}]


def xl(*overrides):
    return read_config("flashdit_xl", overrides)


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("flashdit_b", 130_451_744, 21.90),
        ("flashdit_xl", 675_284_384, 114.74),
        ("lightningdit_xl", 675_256_736, 118.63),
    ],
)
def test_parameters_and_multiply_adds_are_those_of_the_sizes(name, parameters, multiply_adds):
    settings = read_config(name, ())
    assert count_parameters(settings).all == parameters
    assert forward_flops(settings.model) / 2e9 == pytest.approx(multiply_adds, abs=0.005)


@pytest.mark.parametrize("way", [FUSED, PRODUCTS])
@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda spec: spec["name"])
def test_a_model_without_memory_saves_what_a_real_one_does(attention, low_precision, way, monkeypatch):
    monkeypatch.setattr(cpu_attention, "cpu_attention", lambda *case: way)
    options = SMALL | {"attention": attention}
    kept, again, _ = activations(options, low_precision).values()
    model = FlashDiT(**options).train()
    assert kept.of(5) == saved_bytes(model, 5, low_precision)
    model.enable_gradient_checkpointing()
    inputs = saved_bytes(model, 5, low_precision)
    assert again.of(5) == pytest.approx(inputs + (kept.of(5) - inputs) / 3)
    assert (kept.fixed > 0) == low_precision, "only autocast copies weights"


def measured_peak(options, images, low_precision, way):
    """Returns the most bytes that a training step really holds on the CPU."""
    model = FlashDiT(**options).train()
    if way != "all kept":
        model.enable_gradient_checkpointing(keep_matmuls if way == "products kept" else None)
    optimizer, ema = make_optimizer(model.parameters(), OptimizerOptions()), Ema(model, EmaOptions())
    x, t, y = torch.randn(images, 4, 16, 16), torch.rand(images), torch.zeros(images, dtype=torch.int64)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            v_t = model(x, t, y)
        (v_t.float() - x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)

    step()  # makes the moments
    moments = [value for state in optimizer.state.values() for value in state.values()]
    held = [*model.parameters(), *moments, *ema.average.values()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = sum(tensor.untyped_storage().nbytes() for tensor in held)
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("way", RECOMPUTED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_sum_is_within_a_tenth_of_the_measured_peak(precision, way):
    settings = config.load(None, ["training.global_batch_size=6", f"training.precision={precision}"])
    settings = replace(settings, model=SMALL)
    saved = activations(SMALL, precision == "bf16", None)[way]
    expected = memory_bytes(settings, count_parameters(settings), saved, gpus=1, sharded=False)["sum"]
    measured = measured_peak(SMALL, 6, precision == "bf16", way)
    assert measured == pytest.approx(expected, rel=0.1)
    assert expected > 2 * 20 * count_parameters(settings).all or way == "recomputed", (
        "activations outweigh the rest"
    )


def test_strategies_share_what_they_say():
    settings = xl("ema.power_widths=[0.05,0.1]")
    counts, saved = count_parameters(settings), Activations(fixed=7.0, per_image=11.0)
    p = counts.all
    alone = memory_bytes(
        xl("training.precision=fp32"), counts, Activations(fixed=0, per_image=11.0), 1, False
    )
    assert alone["sum"] == 20 * p + 11 * 1024, "16 bytes of weights, moments and average, 4 of gradients"
    ddp = memory_bytes(settings, counts, saved, gpus=8, sharded=False)
    assert (ddp["EMA"], ddp["DDP's buckets"], ddp["low-precision weights"]) == (12 * p, 4 * p, 7)
    sharded = memory_bytes(settings, counts, saved, gpus=8, sharded=True)
    for name in ("weights", "EMA", "AdamW", "gradients"):
        assert sharded[name] == ddp[name] / 8
    assert sharded["activations"] == ddp["activations"] == 11 * 128
    assert sharded["gathered"] == 2 * (counts.outside + 2 * counts.block) + 4 * counts.block
    assert counts.outside + 28 * counts.block == p
    accumulated = memory_bytes(xl("training.accumulation=4"), counts, saved, gpus=8, sharded=True)
    assert (accumulated["gradients"], accumulated["activations"]) == (4 * p, 11 * 32)


def test_frozen_parameters_have_no_moments():
    settings = read_config(config.DEFAULT_CONFIG, ("model.position_embedding=sincos",))
    counts = count_parameters(settings)
    assert counts.all - counts.trained == 8 * 8 * 64
    assert checkpoint_bytes(settings, counts) == 8 * counts.all + 8 * counts.trained


def test_a_checkpoint_takes_the_room_that_is_said(tiny_overrides, tmp_path):
    wider = [*tiny_overrides, "model.hidden_size=96", "model.depth=2", "training.steps=2"]
    settings = config.load(None, wider)
    Trainer(settings).fit()
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert size == pytest.approx(checkpoint_bytes(settings, count_parameters(settings)), rel=0.02)


@pytest.mark.parametrize(
    ("keep_last", "keep_every"), [(None, None), (1, None), (2, 30), (3, 20), (2, 7), (99, 7)]
)
def test_as_many_checkpoints_are_kept_as_pruning_leaves(keep_last, keep_every, tmp_path):
    training = TrainingOptions(steps=105, save_every=10, keep_last=keep_last, keep_every=keep_every)
    for step in (*range(10, 101, 10), 105):
        folder = step_folder(tmp_path, step)
        folder.mkdir(parents=True)
        write_json(folder / "state.json", {})
        prune(tmp_path, keep_last, keep_every)
    assert kept_checkpoints(training) == len(list_checkpoints(tmp_path))


def test_time_and_snapshots_follow_their_formulas():
    assert train_seconds(flops=3e12, images=1000, gpus=2, peak_tflops=100, mfu=0.3) == pytest.approx(50)
    settings = xl("ema.power_widths=[0.05,0.1]", "ema.snapshot_every=20000")
    counts = count_parameters(settings)
    assert snapshot_bytes(settings, counts) == 3 * 2 * 4 * counts.all
    assert [duration(s) for s in (0.3, 90, 600, 9000, 3e5)] == [
        "under a second",
        "90 seconds",
        "10.0 minutes",
        "2.5 hours",
        "3.5 days",
    ]


def test_the_command_prints_it_and_allocates_nothing(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path, kept = (
        "flashdit_xl",
        ("training.keep_last=2", "training.keep_every=null"),
    )
    estimate.main(["--config", str(path), "--gpus", "16", "--images", "1000000", *kept])
    grown_gib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown_gib < 1, "the weights alone would take 2.5"
    printed = capsys.readouterr().out
    for text in ("675,284,384", "114.74 G", "71.7 epochs of 1,000,000", "40% of 989", "2 kept × 10.06 GiB"):
        assert text in printed, printed
    assert all(
        name in printed
        for name in ("DDP: each holds", "FSDP2", "products kept", "activations", "low-precision weights")
    )


def test_recomputed_blocks_cost_a_third_more_time(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    hours = []
    again = "training.gradient_checkpointing=true"
    for overrides in ([], [again], [again, "training.keep_matmuls=true"]):
        estimate.main(["--gpus", "1", "--peak-tflops", "0.00001", *overrides])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "GPU hours" in line)
        hours.append(float(line.split("│")[2].replace(",", "")))
    assert hours[1] / hours[0] == pytest.approx(4 / 3, rel=1e-3)
    assert hours[2] == hours[0], "where products are kept, none is computed again"


def test_what_cannot_be_is_one_sentence(exit_message):
    assert "--gpus must be at least 1, got 0" in exit_message(estimate, "--gpus", 0)
    assert "--images must be at least 1, got 0" in exit_message(estimate, "--images", 0)
    assert "--mfu must be above 0 and at most 1" in exit_message(estimate, "--mfu", 1.5)
    assert "multiple of processes × accumulation, got 16 for 3 × 1" in exit_message(estimate, "--gpus", 3)
    assert "--config: absent does not exist, and is no shipped configuration" in exit_message(
        estimate, "--config", "absent"
    )
    assert "did you mean 'model.depth'" in exit_message(estimate, "model.dept=3")


def image_folder(root, classes=4, images=3):
    for label in range(classes):
        (root / f"class {label}").mkdir(parents=True)
        for place in range(images):
            Image.new("RGB", (20, 20), (label * 9, place, 5)).save(root / f"class {label}" / f"{place}.png")
    return root


def test_a_configuration_that_training_refuses_is_refused_in_its_words(tmp_path, exit_message, tiny_shards):
    pixels = ["data.name=images", f"data.path={image_folder(tmp_path / 'p')}", "data.image_size=16"]
    pixels += [
        "latents.vae=null",
        "latents.space=pixels",
        "model.in_channels=3",
        f"run.dir={tmp_path / 'run'}",
    ]
    shards = [
        "data.name=shards",
        f"data.path={tiny_shards}",
        "latents.vae=null",
        f"run.dir={tmp_path / 'run'}",
    ]
    shards += ["model.sample_size=8", "model.in_channels=3"]
    for overrides, rule in (
        (
            [*pixels, "model.num_classes=1000"],
            "model.num_classes must be the number of the data's classes, 4, got 1000",
        ),
        ([*pixels, "model.num_classes=3"], "labels must be from 0 to below model.num_classes=3, got 0 to 3"),
        ([*pixels, "model.num_classes=4", "model.sample_size=8"], "model.sample_size=8, got 3 × 16 × 16"),
        ([*shards, "model.num_classes=2"], "labels must be from 0 to below model.num_classes=2, got 0 to 2"),
        ([*shards, "model.num_classes=3", "model.in_channels=4"], "model.in_channels=4 and"),
        ([*shards, "latents.vae=digits"], "must have the 3 channels of the latents in"),
        ([*pixels, "latents.space=vae"], "images need a VAE"),
        ([*shards, "latents.space=pixels"], "latents.space=pixels requires images, got the latents in"),
    ):
        with pytest.raises(ValueError, match=re.escape(rule)) as refused:
            Trainer(config.load(None, overrides))
        assert str(refused.value) in exit_message(estimate, *overrides), overrides


def test_an_epoch_has_the_images_of_the_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = image_folder(tmp_path / "p")
    (folder / "class 0" / "0.png").write_bytes(b"broken")  # sizes are known without it
    estimate.main(["--config", "pixels_64", f"data.path={folder}", "training.global_batch_size=8"])
    printed = capsys.readouterr().out
    assert "12 images, 4 classes, 3 × 64 × 64 numbers each; the model fits them" in printed
    assert "6,000 steps = 48,000 images = 4000.0 epochs of 12 " in printed


def test_data_that_are_not_there_are_not_read(tmp_path, capsys, monkeypatch, exit_message):
    monkeypatch.setenv("COLUMNS", "200")
    for path in ([], [f"data.path={tmp_path / 'absent'}"]):
        estimate.main(["--config", "flashdit_b", *path])
        printed = capsys.readouterr().out
        assert "data not read" in printed
        assert "55.9 epochs of 1,281,167 images of ImageNet, assumed" in printed
    sentence = exit_message(estimate, "--config", "pixels_64", f"data.path={tmp_path / 'absent'}")
    assert "model.in_channels=null is read from the data: give data.path, got" in sentence


def test_here_is_one_device_of_this_machine_as_fast_as_it_was_measured(capsys, monkeypatch, exit_message):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("flashdit.commands.budget.matmul_peak", lambda device, dtype: 4e10)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    estimate.main(["--here", "--mfu", "0.5"])
    printed = capsys.readouterr().out
    assert (
        "50% of the 0.04 TFLOP/s that a matrix product was measured to reach on this machine's cpu" in printed
    )
    seconds = 4_200 * 16 * 6 * forward_flops(config.load().model) / 2 / (0.5 * 4e10)
    assert f"{duration(seconds)} in all" in printed
    assert "1 × 1 × 16 (devices" in printed
    assert "FSDP2" not in printed
    assert "GPU hours" not in printed
    assert "--here is for one device" in exit_message(estimate, "--here", "--gpus", 2)
    assert "--here is for one device" in exit_message(estimate, "--here", "--peak-tflops", 2)


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_gathered_parameters_have_the_width_of_the_precision(precision, width):
    settings = xl("data.path=x", f"training.precision={precision}")
    counts = count_parameters(settings)
    rows = memory_bytes(settings, counts, Activations(fixed=1.0, per_image=1.0), gpus=8, sharded=True)
    assert rows["gathered"] == width * (counts.outside + 2 * counts.block) + 4 * counts.block
