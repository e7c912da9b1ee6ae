"""Learning from a teacher's velocity: the loss against plain torch, what a teacher must be, and resuming."""

import json
import logging
import shutil
from contextlib import nullcontext

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from flashdit import FlashDiT, config
from flashdit.commands import estimate
from flashdit.commands.budget import train_flops
from flashdit.data.autoencoders import load_vae
from flashdit.data.latents import LatentOptions, LatentSpace
from flashdit.memory import count_parameters, memory_bytes
from flashdit.models.costs import Activations, forward_flops
from flashdit.sampling.export import export_run
from flashdit.shared.runs import list_checkpoints
from flashdit.teachers.distillation import open_teacher, read_trained
from flashdit.trainer import Trainer

WIDE = {"hidden_size": 24, "depth": 2, "num_heads": 2, "patch_size": 2, "time_scale": 100.0}
NAMES = ["cat", "golden retriever", "hen"]
CPU = torch.device("cpu")


def train(overrides, *more):
    trainer = Trainer(config.load(None, [*overrides, *more]))
    trainer.fit()
    return trainer


@pytest.fixture
def teacher(tiny_overrides, tmp_path):
    """Returns the run of a teacher of another width, depth, patch, attention and time scale."""
    options = [f"model.{name}={value}" for name, value in WIDE.items()]
    more = ["model.attention=global", "optimizer.lr=0.01", "optimizer.decay_steps=null", "ema.decay=0.5"]
    train(tiny_overrides, *options, *more, f"run.dir={tmp_path / 'teacher'}")
    return tmp_path / "teacher"


@pytest.fixture
def taught(tiny_overrides, teacher):
    """Returns the overrides of a run that learns from the teacher."""
    return [*tiny_overrides, f"distillation.teacher={teacher}", "distillation.weight=0.7"]


def moved_off_zero(model, seed=3):
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))


def test_the_loss_has_the_weighted_error_to_the_teachers_velocity_besides(taught, teacher, tiny_shards):
    trainer = Trainer(
        config.load(None, [*taught, "flow.loss.cosine_weight=0", "model.class_dropout_prob=0.5"])
    )
    moved_off_zero(trainer.model)
    batch = trainer.task.examples.__getitems__(range(16))
    assert 0 < batch["drop"].sum() < 16
    loss, terms = trainer.task.loss(trainer.network.eval(), batch)

    folder = list_checkpoints(teacher)[-1] / "ema"
    plain = FlashDiT(sample_size=8, in_channels=3, num_classes=3, attention="global", **WIDE).eval()
    plain.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    x_1, x_0, t = (batch["latent"] - 2) / 3, batch["noise"], batch["time"].reshape(-1, 1, 1, 1)
    label = batch["label"].where(~batch["drop"], 3)
    x_t = t * x_1 + (1 - t) * x_0
    with torch.no_grad():
        v, v_teacher = (model(x_t, batch["time"], label) for model in (trainer.model.eval(), plain))
    flow, distance = ((v - (x_1 - x_0)) ** 2).mean(), ((v - v_teacher) ** 2).mean()
    assert distance > 0.01
    assert terms["teacher"].item() == pytest.approx(distance.item(), rel=1e-5)
    assert loss.item() == pytest.approx((flow + 0.7 * distance).item(), rel=1e-5)


def test_a_model_learns_its_teachers_velocity(tiny_overrides, teacher):
    more = [f"distillation.teacher={teacher}", "distillation.weight=1e4", "optimizer.lr=0.02"]
    trainer = train(tiny_overrides, *more, "optimizer.decay_steps=null", "training.steps=60")
    lines = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["teacher"] < 0.3 * lines[0]["teacher"]


def test_the_teacher_stays_as_it_was_and_out_of_checkpoints(taught, teacher, tmp_path):
    before = read_trained(str(teacher)).model.state_dict()
    trainer = train(taught)
    assert not trainer.task.teacher.model.training
    assert not any(p.requires_grad or p.grad is not None for p in trainer.task.teacher.model.parameters())
    for name, value in trainer.task.teacher.model.state_dict().items():
        assert value.equal(before[name])
    newest = list_checkpoints(tmp_path / "run")[-1]
    for part in ("model", "ema"):
        assert (
            load_file(newest / part / "diffusion_pytorch_model.safetensors").keys()
            == dict(trainer.model.named_parameters()).keys()
        )
    assert json.loads((newest / "state.json").read_text())["teacher"] == trainer.task.teacher.identity


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(taught, tmp_path):
    whole = train(taught, f"run.dir={tmp_path / 'whole'}")
    train(taught, "training.steps=4")
    resumed = train(taught)
    for name, value in whole.model.state_dict().items():
        assert resumed.model.state_dict()[name].equal(value)


def test_a_moved_teacher_is_the_same_and_another_is_refused(taught, teacher, tmp_path, caplog):
    train(taught, "training.steps=2")
    moved = shutil.copytree(teacher, tmp_path / "moved")
    with caplog.at_level(logging.INFO):
        train(taught, "training.steps=4", f"distillation.teacher={moved}")
    assert "distillation.teacher is" in caplog.text
    assert "its configuration and weights are the same" in caplog.text
    shutil.rmtree(list_checkpoints(moved)[-1])  # so that an earlier one is its newest
    message = r"run holds a run on another distillation\.teacher: its configuration or weights are others"
    for gone in (None, "contents.json.gz"):
        if gone:
            (tmp_path / "run" / gone).unlink()
        with pytest.raises(ValueError, match=message):
            train(taught, f"distillation.teacher={moved}")


def test_a_run_neither_gains_nor_loses_a_teacher(taught, tiny_overrides, teacher, tmp_path):
    train(taught, "training.steps=2")
    with pytest.raises(
        ValueError, match=rf"whose distillation\.teacher is {teacher}, not None: give another"
    ):
        train(taught, "distillation.teacher=null")
    with pytest.raises(ValueError, match=r"whose distillation\.weight is 0\.7, not 0\.2"):
        train(taught, "distillation.weight=0.2")
    without = [*tiny_overrides, f"run.dir={tmp_path / 'without'}"]
    train(without, "training.steps=2")
    with pytest.raises(ValueError, match=rf"whose distillation\.teacher is None, not {teacher}"):
        train(without, f"distillation.teacher={teacher}")


def test_the_teacher_computes_in_the_runs_precision(taught):
    AcceleratorState._reset_state(reset_partial_state=True)  # in which the teacher was trained
    trainer = Trainer(config.load(None, [*taught, "training.precision=bf16"]))
    batch = trainer.task.examples.__getitems__(range(2))
    inputs = batch["noise"], batch["time"], batch["label"], batch["drop"]
    assert trainer.task.teacher.velocity(*inputs).dtype == torch.bfloat16
    assert next(trainer.task.teacher.model.parameters()).dtype == torch.float32


@pytest.fixture
def student():
    """Returns what `open_teacher` takes of a run that fits `tiny_checkpoint`."""
    vae = load_vae("digits")
    mean, std = torch.full((1, 1, 1, 1), 0.1), torch.full((1, 1, 1, 1), 1.3)
    space = LatentSpace(mean, std, LatentOptions(vae="digits", multiplier=0.9), vae)

    def make(names=NAMES, space=space, **options):
        sizes = {"sample_size": 16, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
        model = FlashDiT(**(sizes | {"num_classes": len(names)} | options))
        return model, names, space, CPU, nullcontext

    return make


def test_classes_find_the_teachers_by_name(tiny_checkpoint, student):
    teacher = open_teacher(str(tiny_checkpoint), *student(["hen", "cat"]))
    x, t = torch.randn(3, 1, 16, 16), torch.tensor([0.1, 0.5, 0.9])
    drop = torch.tensor([False, False, True])
    found = teacher.velocity(x, t, torch.tensor([0, 1, 0]), drop)
    plain = FlashDiT.from_pretrained(tiny_checkpoint / "ema").eval()
    with torch.no_grad():
        expected = plain(x, t, torch.tensor([2, 0, 3]))
    torch.testing.assert_close(found, expected)
    assert not expected.allclose(plain(x, t, torch.tensor([0, 1, 3])), atol=1e-3)


def test_a_run_without_classes_learns_from_the_teachers_null_label(tiny_checkpoint, student):
    teacher = open_teacher(str(tiny_checkpoint), *student([]))
    x, t, y = torch.randn(2, 1, 16, 16), torch.tensor([0.3, 0.6]), torch.tensor([7, 9])
    found = teacher.velocity(x, t, y, torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(found, teacher.model(x, t))


def test_an_export_a_model_folder_and_a_file_are_the_same_teacher(tiny_checkpoint, student, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    export_run(tiny_checkpoint, tmp_path / "out")
    shutil.copytree(tiny_checkpoint / "ema", tmp_path / "folder")
    run = open_teacher(str(tiny_checkpoint), *student())
    assert "nothing tells" not in caplog.text
    assert open_teacher(str(tmp_path / "out"), *student()).identity == run.identity
    assert "nothing tells" not in caplog.text
    assert open_teacher(str(tmp_path / "folder"), *student()).identity == run.identity
    assert "nothing tells the latents that" in caplog.text
    assert "its 3 classes have no names and are taken in order" in caplog.text
    with pytest.raises(ValueError, match=r"must know the run's classes by name, \S*out lacks 'dog'$"):
        open_teacher(str(tmp_path / "out"), *student(["cat", "dog"]))

    options = {"sample_size": 16, "in_channels": 1, "num_classes": 3, **WIDE, "time_scale": 1.0}
    model = FlashDiT(
        **options, attention={"name": "global", "rope": True}, position_embedding="sincos"
    ).eval()
    moved_off_zero(model)
    rope = torch.zeros(64, 12)  # as released files have it: what it is computed to does not matter
    torch.save(
        {"ema": model.state_dict() | {"feat_rope.freqs_cos": rope, "feat_rope.freqs_sin": rope}},
        tmp_path / "file.pt",
    )
    given = torch.randn(2, 1, 16, 16), torch.tensor([0.2, 0.7]), torch.tensor([2, 0])
    found = open_teacher(str(tmp_path / "file.pt"), *student()).velocity(
        *given, torch.zeros(2, dtype=torch.bool)
    )
    with torch.no_grad():
        torch.testing.assert_close(found, model(*given))


def spaced(mean=0.1, std=1.3, **options):
    mean, std = torch.full((1, 1, 1, 1), mean), torch.full((1, 1, 1, 1), std)
    return LatentSpace(
        mean, std, LatentOptions(**{"vae": None, "multiplier": 0.9, **options}), identity="other"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": [*NAMES, "a", "b", "c", "d"]}, r"by name, \S+ lacks 'a', 'b', 'c', …$"),
        ({"sample_size": 8}, r"have the run's model\.sample_size=8, got one of 16$"),
        ({"in_channels": 3}, r"have the run's model\.in_channels=3, got one of 1$"),
        ({"space": spaced(mean=0.2)}, r"latents of the run's mean, got 0\.2 for 0\.1 of "),
        ({"space": spaced(std=1.31)}, r"of the run's standard deviation, got 1\.31 for 1\.3 of "),
        ({"space": spaced(multiplier=1.0)}, r"of the run's multiplier, got 1 for 0\.9 of "),
        (
            {"space": spaced(space="pixels")},
            r"be trained with the run's latents\.space=pixels, got one of vae$",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_words(tiny_checkpoint, student, options, message):
    with pytest.raises(ValueError, match=r"^distillation\.teacher must (.* )?" + message):
        open_teacher(str(tiny_checkpoint), *student(**options))


def test_another_autoencoder_is_refused(tiny_checkpoint, student, tmp_path):
    run = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    spaced().save(run / "latents.safetensors")
    with pytest.raises(
        ValueError, match=r"^the VAE must be the one of the teacher \S+ \(other\), got digits"
    ):
        open_teacher(str(run), *student())


def test_a_teacher_of_another_number_of_unnamed_classes_is_refused(tiny_checkpoint, student, tmp_path):
    folder = shutil.copytree(tiny_checkpoint / "ema", tmp_path / "folder")
    with pytest.raises(ValueError, match=r"must know the run's 2 classes, \S+ has 3, without names$"):
        open_teacher(str(folder), *student(["cat", "hen"]))


def test_a_teacher_that_always_had_its_label_is_refused_where_labels_are_dropped(student, tmp_path):
    sizes = {"sample_size": 16, "in_channels": 1, "num_classes": 3, **WIDE}
    FlashDiT(**sizes, class_dropout_prob=0.0).save_pretrained(tmp_path / "never")
    message = r"must be trained without labels too where the run is, \S+never has class_dropout_prob=0$"
    for options in ({}, {"names": []}):
        with pytest.raises(ValueError, match=message):
            open_teacher(str(tmp_path / "never"), *student(**options))
    open_teacher(str(tmp_path / "never"), *student(class_dropout_prob=0.0))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distillation.teacher=nowhere", r"^distillation\.teacher must be a run, .* there is no nowhere$"),
        (
            "distillation.teacher=/",
            r"^distillation\.teacher must be a run or a folder step_XXXXXXXX that holds",
        ),
        ("distillation.weight=-1", r"^distillation\.weight must not be negative, got -1"),
        ("distillation.weight=.inf", r"^distillation\.weight must be finite, got inf"),
    ],
)
def test_a_users_mistake_is_one_sentence_before_anything_is_written(
    tiny_overrides, tmp_path, override, message
):
    with pytest.raises(ValueError, match=message):
        train(tiny_overrides, override)
    assert not (tmp_path / "run").exists()


def test_the_estimate_counts_the_teachers_weights_and_forward_pass(taught, teacher, capsys):
    settings = config.load(None, taught)
    wide = {"sample_size": 8, "in_channels": 3, "num_classes": 3, "attention": "global", **WIDE}
    count = sum(p.numel() for p in FlashDiT(**wide).parameters())
    counts, own = count_parameters(settings), forward_flops(settings.model_arguments)
    assert counts.teacher == count
    rows = memory_bytes(settings, counts, Activations(fixed=0.0, per_image=1.0), gpus=4, sharded=True)
    assert rows["teacher"] == 4 * count
    assert train_flops(settings, own / 2) == 3 * own + forward_flops(wide)
    assert Trainer(settings).flops_per_image == 3 * own + forward_flops(wide)
    estimate.main([*taught, "--gpus", "1"])
    assert f"{count:,} frozen parameters" in capsys.readouterr().out
