"""What no machine can hold is refused in a sentence before it is made, and what fits is not."""

import resource
import shutil
from dataclasses import replace

import pytest
import torch

from flashdit import config, memory
from flashdit.autoencoder.config import load_autoencoder_config
from flashdit.autoencoder.task import AutoencoderTrainer
from flashdit.commands import estimate, evaluate, sample
from flashdit.memory import check_step_fits, count_parameters, memory_bytes
from flashdit.models.costs import activations
from flashdit.models.dit import FlashDiT
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.options import SamplingOptions
from flashdit.shared import process
from flashdit.trainer import Trainer
from iwin_tasks.classification.config import load_classifier_config
from iwin_tasks.classification.task import ClassifierTrainer

CPU = torch.device("cpu")
SIZES = r"tensors must be of sizes that a machine can address"


@pytest.fixture(autouse=True)
def little_memory():
    """Fails where a test takes memory as what it asks for would."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "a GiB was taken"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.depth=1000000000", r"of which AdamW take most, must fit into the memory of cpu, .*, got "),
        ("model.hidden_size=1000000000", rf"{SIZES}, got model\.hidden_size=1000000000"),
        ("model.hidden_size=1000000000000000000000000", rf"{SIZES}, got model\.hidden_size=10{{24}}$"),
        ("model.attention.kernel=1000000001", rf"{SIZES}, got model\.attention\.kernel=1000000001"),
        ("model.num_classes=100000000000000", r"of which AdamW take most, must fit into the memory"),
        ("model.mlp_ratio=1e12", r"of which AdamW take most, must fit into the memory"),
        (
            "training.global_batch_size=1000000000",
            r"of which activations take most, must fit into the memory",
        ),
        (
            "training.global_batch_size=1000000000000",
            r"^training\.global_batch_size must be at most 1000000000,",
        ),
        ("training.steps=1000000000000000000000000000000", r"must be below 2\^63 images, got 10+ × 8"),
        (
            "training.timeout_s=1000000000000000000000",
            r"^training\.timeout_s must be at most 31536000, got 10+",
        ),
        ("model.hidden_size=0", r"hidden_size must be at least 1, got hidden_size=0"),
        ("model.num_heads=0", r"num_heads must divide hidden_size, got num_heads=0"),
        ("seed=9223372036854775808", r"^seed must be from 0 to below 2\^63, got 9223372036854775808"),
    ],
)
def test_a_run_that_no_machine_holds_is_refused(tiny_overrides, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        Trainer(config.load(None, [*tiny_overrides, "optimizer.decay_steps=null", override]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("load", "make", "overrides", "message"),
    [
        (load_autoencoder_config, AutoencoderTrainer, ["autoencoder.width=1000000000"], SIZES),
        (
            *(load_autoencoder_config, AutoencoderTrainer, ["training.global_batch_size=1000000000"]),
            r"parameters on 1,000,000,000 images at once must fit into the memory of cpu",
        ),
        (
            *(load_autoencoder_config, AutoencoderTrainer, ["autoencoder.layers_per_block=1000000000"]),
            r"autoencoder\.layers_per_block must be at most 100, got 1000000000",
        ),
        (
            *(load_classifier_config, ClassifierTrainer, ["model.mlp_ratio=1e12"]),
            r"training 4[\d,]+ parameters on \d+ images at once must fit into the memory of cpu",
        ),
        (
            *(load_classifier_config, ClassifierTrainer, ["model.depths=[1000000000,2]"]),
            r"model\.depths must be 1000 blocks at most, got \[1000000000, 2\]",
        ),
    ],
)
def test_other_tasks_that_no_machine_holds_are_refused(tmp_path, load, make, overrides, message):
    with pytest.raises(ValueError, match=message):
        make(load(None, ["data.name=digits", f"run.dir={tmp_path / 'run'}", *overrides]))


def test_parameters_are_counted_without_the_blocks_being_made(tiny_overrides):
    overrides = [*tiny_overrides, "model.position_embedding=sincos", "model.depth=5"]
    settings = config.load(None, overrides)
    counts, model = count_parameters(settings), FlashDiT(**settings.model_arguments)
    assert counts.all == sum(p.numel() for p in model.parameters())
    assert counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad) < counts.all
    assert counts.block == sum(p.numel() for p in model.blocks[3].parameters())
    assert counts.outside == counts.all - 5 * counts.block
    deep = replace(settings, model=settings.model | {"depth": 2**62})
    assert count_parameters(deep).all == counts.outside + 2**62 * counts.block


def test_where_blocks_differ_the_largest_is_the_block_that_is_gathered(tiny_overrides):
    kinds = "model.attention=[global, {name: iwin, kernel: 5}, iwin]"
    settings = config.load(None, [*tiny_overrides, kinds, "model.depth=5"])
    counts, model = count_parameters(settings), FlashDiT(**settings.model_arguments)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    assert blocks[1] == counts.block == max(blocks) > blocks[2] > blocks[0]
    assert counts.all == counts.outside + sum(blocks)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_refused_exactly_where_the_estimate_is_larger_than_the_memory(
    tiny_overrides, monkeypatch, checkpointing
):
    more = f"training.gradient_checkpointing={str(checkpointing).lower()}"
    settings = config.load(None, [*tiny_overrides, more, "training.global_batch_size=700"])
    saved = activations(settings.model_arguments, False)["recomputed" if checkpointing else "all kept"]
    needed = 0.9 * memory_bytes(settings, count_parameters(settings), saved, 1, False)["sum"]
    for there in (needed * 1.001, needed * 0.999):
        for module in (memory, process):
            monkeypatch.setattr(module, "device_memory", lambda device, there=there: int(there))
        if there > needed:
            check_step_fits(settings, CPU, 1, False)
            continue
        with pytest.raises(ValueError, match="of which activations take most, must fit"):
            check_step_fits(settings, CPU, 1, False)


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    whole = process.device_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert process.device_memory(CPU) == whole // 4
    monkeypatch.setattr(process, "device_memory", lambda device: None)
    process.check_memory(1e30, CPU, "nothing")  # a system that does not tell is trusted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--num-images", 10**15],
            "the labels of num_images=1000000000000000 must fit into the memory of cpu",
        ),
        (["--height", 10**9, "--width", 10**9], "1 pictures of 1000000000×1000000000 at once must fit into"),
        (["--batch-size", 10**21], f"batch_size must be below 2^31, got {10**21}"),
        (["--steps", 10**30], "steps must be at most 1,000,000"),
        (["--seed", 2**63], f"seed must be from 0 to below 2^63, got {2**63}"),
        (["--seed", -1], "seed must be from 0 to below 2^63, got -1"),
    ],
)
def test_samples_that_no_machine_holds_are_refused(tiny_checkpoint, tmp_path, exit_message, words, message):
    argv = ["--checkpoint", tiny_checkpoint, "--output", tmp_path / "out", *words]
    assert message in exit_message(sample, *argv)
    assert not (tmp_path / "out").exists()


def test_samples_that_the_disk_cannot_hold_are_refused_unless_they_are_there(
    tiny_checkpoint, tmp_path, exit_message, monkeypatch
):
    argv = ["--checkpoint", tiny_checkpoint, "--output", tmp_path / "out", "--num-images", 3]
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=3 * 3 * 3 * 32 * 32))
    said = "--output needs room for 3 pictures, 2.594e-05 GiB, got 2.575e-05 GiB free for"
    assert said in exit_message(sample, *argv)
    assert not (tmp_path / "out").exists()
    sample.main([str(word) for word in [*argv, "--format", "npz"]])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=0))
    sample.main([str(word) for word in [*argv, "--format", "npz"]])


def test_a_batch_of_pictures_that_does_not_fit_is_refused_and_a_smaller_one_is_not(
    tiny_checkpoint, monkeypatch
):
    generator, labels = load_generator(tiny_checkpoint), torch.zeros(5, dtype=torch.int64)
    one = 4 * (3 * 32 * 32 + 1 * 16 * 16)
    assert generator.shape == (1, 16, 16)
    monkeypatch.setattr(process, "device_memory", lambda device: 2 * one)
    with pytest.raises(ValueError, match="5 pictures of 32×32 at once must fit into the memory"):
        next(generator.generate(labels, SamplingOptions(steps=1)))
    assert len(next(generator.generate(labels, SamplingOptions(steps=1, batch_size=2))).ids) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-images", 10**15], "the labels of num_images=1000000000000000 must fit into the memory"),
        (["--batch-size", 10**21], "must be below 2^31, got"),
        (["--image-size", 10**9], "the image size must be at most 8192, got 1000000000"),
    ],
)
def test_an_evaluation_that_no_machine_holds_is_refused(tiny_checkpoint, exit_message, words, message):
    argv = ["--checkpoint", tiny_checkpoint, "--reference", "digits", *words]
    assert message in exit_message(evaluate, *argv)


def test_references_and_estimates_have_bounds(tmp_path, exit_message):
    reference = ["make-reference", "digits", tmp_path / "x.npz"]
    assert "--seed must be from 0 to below 2^63" in exit_message(evaluate, *reference, "--seed", 2**63)
    assert "the batch size must be below 2^31" in exit_message(evaluate, *reference, "--batch-size", 10**21)
    assert "--images must be below 2^63" in exit_message(estimate, "--images", 10**400)
    assert "--gpus must be below 2^63" in exit_message(estimate, "--gpus", 10**400)


def test_an_estimate_of_what_no_machine_holds_is_still_given(capsys):
    steps = ["training.steps=1000000000000", "optimizer.decay_steps=null", "training.save_every=1"]
    estimate.main(["model.depth=1000000000", *steps, "--gpus", "1"])
    printed = capsys.readouterr().out
    assert "1,000,000,000,000 steps" in printed
    assert "kept × " in printed
