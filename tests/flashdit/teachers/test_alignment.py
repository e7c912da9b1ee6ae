"""Aligning tokens with an extractor's features: the loss, checkpoints, resuming, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from flashdit import FlashDiT, config
from flashdit.commands import estimate
from flashdit.commands.budget import checkpoint_bytes, train_flops
from flashdit.data.autoencoders import load_vae
from flashdit.data.shards import write_shard
from flashdit.digits.classifier import load_digits_classifier
from flashdit.digits.images import digits
from flashdit.evaluation.features.extractor import Extractor
from flashdit.memory import count_parameters, memory_bytes
from flashdit.models.costs import Activations, forward_flops
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.export import export_run
from flashdit.sampling.options import SamplingOptions
from flashdit.shared.pictures import save_png
from flashdit.shared.runs import list_checkpoints
from flashdit.trainer import Trainer

ROOT = Path(__file__).parents[3]
PIXELS = {
    "latents.space": "pixels",
    "latents.vae": "null",
    "model.sample_size": 32,
    "model.in_channels": 3,
    "model.patch_size": 4,
}
ENCODED = [
    "latents.space=vae",
    "latents.vae=digits",
    "model.sample_size=16",
    "model.in_channels=1",
    "model.patch_size=2",
]
ALIGNED = ["alignment.extractor=digits", "alignment.block=1", "alignment.width=24", "alignment.weight=0.7"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def plain(tmp_path):
    """Returns the overrides of a tiny run on the digits' pixels."""
    options = {
        **PIXELS,
        "model.hidden_size": 16,
        "model.depth": 2,
        "model.num_heads": 2,
        "run.dir": tmp_path / "run",
        "training.steps": 6,
        "training.global_batch_size": 8,
        "training.save_every": 2,
        "training.log_every": 1,
        "training.preview_every": 0,
        "optimizer.warmup_steps": 0,
    }
    return [f"{name}={value}" for name, value in options.items()]


@pytest.fixture
def overrides(plain):
    """Returns the overrides of a run whose tokens are aligned with the digits' classifier."""
    return [*plain, *ALIGNED]


@pytest.fixture
def own(monkeypatch) -> ModuleType:
    """A module of the user's."""
    module = ModuleType("my_features")
    monkeypatch.setitem(sys.modules, "my_features", module)
    return module


def train(overrides, *more):
    trainer = Trainer(config.load(None, [*overrides, *more]))
    trainer.fit()
    return trainer


def moved_off_zero(model, seed=3):
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))


def plain_terms(trainer, batch, x_1, images, pools, grid):
    """Returns the flow-matching loss and 1 − cosine, in a few lines of torch, after block 1."""
    t = batch["time"].reshape(-1, 1, 1, 1)
    label = batch["label"].where(~batch["drop"], trainer.model.num_classes)
    kept = []
    hook = trainer.model.blocks[0].register_forward_hook(lambda *passed: kept.append(passed[-1]))
    with torch.no_grad(), hook:
        v = trainer.model.eval()(t * x_1 + (1 - t) * batch["noise"], batch["time"], label)
    flow = ((v - (x_1 - batch["noise"])) ** 2).mean()
    backbone = load_digits_classifier().backbone
    with torch.no_grad():
        features = backbone.forward_features(images.float() / 127.5 - 1)
    if pools:
        tokens, wanted = kept[0].mean((1, 2))[:, None], features.mean((1, 2))[:, None]
    else:
        wanted = F.interpolate(features.movedim(-1, 1), grid, mode="bilinear", antialias=True)
        tokens, wanted = kept[0].flatten(1, 2), wanted.flatten(2).mT
    first, _, second, _, third = trainer.task.alignment.network.projector
    for layer in (first, second, third):
        tokens = tokens @ layer.weight.T + layer.bias
        tokens = tokens if layer is third else tokens * tokens.sigmoid()
    cosine = (tokens * wanted).sum(-1) / (tokens.norm(dim=-1) * wanted.norm(dim=-1))
    return flow, (1 - cosine).mean()


@pytest.mark.parametrize(
    ("features", "more", "grid"),
    [
        ("map", ENCODED, (8, 8)),
        ("map", (), (8, 8)),
        ("map", ("model.patch_size=16", "model.attention.window=2"), (2, 2)),  # smaller than the map
        ("pool", (), (8, 8)),
    ],
    ids=str,
)
def test_the_loss_has_one_minus_the_cosine_to_the_features_besides(overrides, features, more, grid):
    trainer = Trainer(config.load(None, [*overrides, *more, f"alignment.features={features}"]))
    moved_off_zero(trainer.model)
    batch = trainer.task.examples.__getitems__(range(16))
    loss, terms = trainer.task.loss(trainer.network.eval(), batch)
    rows = [trainer.task.examples.order(position) for position in range(16)]
    images = digits("train")[0][rows]
    x_1 = images.float() / 127.5 - 1 if more != ENCODED else trainer.task.space.normalise(batch["latent"])
    flow, distance = plain_terms(trainer, batch, x_1, images, features == "pool", grid)
    assert 0.1 < distance < 1.9
    assert terms["alignment"].item() == pytest.approx(distance.item(), rel=1e-4)
    assert loss.item() == pytest.approx((flow + 0.7 * distance).item(), rel=1e-4)


def test_images_are_mirrored_where_their_latents_are(overrides, tmp_path):
    for row, image in enumerate(digits("train")[0][:6]):
        (tmp_path / "pictures" / "abc"[row % 3]).mkdir(parents=True, exist_ok=True)
        save_png(image, tmp_path / "pictures" / "abc"[row % 3] / f"{row}.png")
    more = ["data.name=images", f"data.path={tmp_path / 'pictures'}", "data.image_size=32"]
    trainer = Trainer(config.load(None, [*overrides, *ENCODED, *more, "model.num_classes=3"]))
    batch = trainer.task.examples.__getitems__(range(16))
    torch.testing.assert_close(trainer.task.space.vae.encode(batch["image"]), batch["latent"])
    flipped = {bytes(image.flip(-1).numpy()) for image in digits("train")[0][:6]}
    assert 0 < sum(bytes(image.numpy()) in flipped for image in batch["image"]) < 16


@pytest.fixture
def shards(tmp_path):
    """Returns overrides of a run on digits' latents in a folder, without an autoencoder."""
    images, labels = digits("train")
    latents = load_vae("digits").encode(images[:40])
    write_shard(tmp_path / "shards", 0, 0, latents, latents.flip(-1), labels[:40])
    return [*ENCODED, "data.name=shards", f"data.path={tmp_path / 'shards'}", "latents.vae=null"]


def test_images_of_latents_in_a_folder_are_decoded(overrides, shards, caplog):
    caplog.set_level("INFO")
    trainer = Trainer(config.load(None, [*overrides, *shards, "latents.vae=digits"]))
    assert "alignment.extractor sees images that are decoded from the latents at each step" in caplog.text
    moved_off_zero(trainer.model)
    batch = trainer.task.examples.__getitems__(range(8))
    assert "image" not in batch
    _, terms = trainer.task.loss(trainer.network.eval(), batch)
    x_1 = trainer.task.space.normalise(batch["latent"])
    images = (load_vae("digits").decode(batch["latent"]) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    _, distance = plain_terms(trainer, batch, x_1, images, False, (8, 8))
    assert terms["alignment"].item() == pytest.approx(distance.item(), rel=1e-4)


def test_latents_in_a_folder_without_an_autoencoder_are_refused(overrides, shards, tmp_path):
    message = r"^alignment\.extractor sees images, and latents in a folder must be decoded .* latents\.vae"
    with pytest.raises(ValueError, match=message):
        train(overrides, *shards)
    assert not (tmp_path / "run").exists()


def test_tokens_come_to_the_features(overrides, tmp_path):
    train(overrides, "training.steps=60", "optimizer.lr=0.01", "training.save_every=60")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["alignment"] < 0.6 * lines[0]["alignment"]


def test_the_projector_is_in_no_model_average_or_export(overrides, tmp_path):
    trainer = train(overrides)
    names = dict(trainer.model.named_parameters()).keys()
    assert trainer.ema.average.keys() == names
    newest = list_checkpoints(tmp_path / "run")[-1]
    for part in ("model", "ema"):
        assert load_file(newest / part / WEIGHTS).keys() == names
    projector = load_file(newest / "projector.safetensors")
    assert [tuple(projector[f"{layer}.weight"].shape) for layer in (0, 2, 4)] == [
        (24, 16),
        (24, 24),
        (64, 24),
    ]
    for name, value in trainer.task.alignment.network.projector.state_dict().items():
        assert projector[name].equal(value)
    state = json.loads((newest / "state.json").read_text())
    assert state["extractor"] == trainer.task.alignment.extractor.fingerprint
    export_run(newest, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if "projector" in path.name]
    assert FlashDiT.from_pretrained(tmp_path / "out" / "transformer").state_dict().keys() == names
    images = next(load_generator(newest).generate(torch.tensor([1, 2]), SamplingOptions(steps=2))).images
    assert images.shape == (2, 3, 32, 32)


def test_the_extractor_stays_as_it_was(overrides):
    trainer = train(overrides)
    extractor = trainer.task.alignment.extractor
    assert not extractor.training
    assert not any(p.requires_grad or p.grad is not None for p in extractor.parameters())
    for name, value in load_digits_classifier().state_dict().items():
        assert extractor.network.state_dict()[name].equal(value)


def test_with_weight_0_the_same_model_is_trained_to_the_bit(plain, tmp_path):
    more = ["optimizer.max_grad_norm=null", "model.class_dropout_prob=0.4"]
    without = train(plain, *more, f"run.dir={tmp_path / 'without'}")
    aligned = train(plain, *more, *ALIGNED, "alignment.weight=0")
    for name, value in without.model.state_dict().items():
        assert aligned.model.state_dict()[name].equal(value)
        if name in without.ema.average:
            assert aligned.ema.average[name].equal(without.ema.average[name])


def same_state(one, other):
    """Asserts that two trainers hold the same model, projector, average and moments, to the bit."""
    pairs = [
        (one.task.trained.state_dict(), other.task.trained.state_dict()),
        (one.ema.average, other.ema.average),
    ]
    for moments in ("exp_avg", "exp_avg_sq"):
        found = (
            {
                name: trainer.optimizer.state[p].get(moments)
                for name, p in trainer.task.trained.named_parameters()
            }
            for trainer in (one, other)
        )
        pairs.append(tuple(found))
    for before, now in pairs:
        assert before.keys() == now.keys()
        for name, value in before.items():
            assert (value is None and now[name] is None) or value.equal(now[name]), name


@pytest.mark.parametrize(
    "more", [(), ("training.workers=1",), ("optimizer.name=muon", "alignment.features=pool")], ids=str
)
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(overrides, tmp_path, more):
    whole = train(overrides, *more, f"run.dir={tmp_path / 'whole'}")
    train(overrides, *more, "training.steps=4")
    same_state(whole, train(overrides, *more))


def test_gradient_checkpointing_gives_the_same_gradients(overrides):
    found = []
    for again in ("false", "true"):
        trainer = Trainer(config.load(None, [*overrides, f"training.gradient_checkpointing={again}"]))
        moved_off_zero(trainer.model)
        batch = trainer.task.examples.__getitems__(range(4))
        trainer.task.loss(trainer.network.train(), batch)[0].backward()
        found.append({name: p.grad for name, p in trainer.task.trained.named_parameters()})
    assert all(value is not None and value.any() for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=lambda m, n=name: f"{n}: {m}")


def launched(script, *overrides):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *script, *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_two_processes_train_the_projector_as_one_does(overrides, tmp_path):
    train(overrides, f"run.dir={tmp_path / 'one'}")
    train(overrides, "training.steps=2")
    done = launched([str(ROOT / "train.py")], *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("projector.safetensors", f"model/{WEIGHTS}"):
        one, two = (load_file(list_checkpoints(tmp_path / run)[-1] / name) for run in ("one", "run"))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=2e-3, atol=2e-5)


def test_sharded_training_is_refused_before_anything_is_written(overrides, tmp_path):
    done = launched([str(ROOT / "tests" / "flashdit" / "training" / "sharded_run.py")], *overrides)
    assert done.returncode
    assert "alignment.extractor requires whole models on each device (DDP), got FSDP2" in done.stderr
    assert not (tmp_path / "run").exists()


def test_another_extractor_is_refused_on_resume(overrides, own, tmp_path):
    train(overrides, "training.steps=2")
    message = r"run holds a run on another alignment\.extractor: its configuration or weights are others"
    for gone in (None, "contents.json.gz"):
        if gone:
            (tmp_path / "run" / gone).unlink()
        with pytest.raises(ValueError, match=message):
            train(overrides, "alignment.extractor=glyphs")
    with pytest.raises(ValueError, match=r"whose alignment\.extractor is digits, not None"):
        train(overrides, "alignment.extractor=null")
    with pytest.raises(ValueError, match=r"whose alignment\.weight is 0\.7, not 0\.2"):
        train(overrides, "alignment.weight=0.2")


class Rows(Extractor):
    """The image's own rows as a map, and its colours."""

    resize = "none"

    def forward(self, images):
        return {"pool": images.float().mean((2, 3)), "spatial": None, "logits": None}

    def feature_map(self, images):
        return images.float().unflatten(-1, (4, -1)).mean(-1).movedim(1, -1)  # (b, h, 4, 3)


class Colours(Rows):
    """Without a map."""

    feature_map = Extractor.feature_map


class Flat(Rows):
    """With a map that is none."""

    def feature_map(self, images):
        return images.float().flatten(1)


def test_an_extractor_of_the_users_gives_its_map(plain, own):
    own.rows = Rows
    trainer = Trainer(
        config.load(None, [*plain, "alignment.extractor=my_features:rows", "alignment.block=2"])
    )
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = trainer.task.alignment.features({"image": images, "latent": images}, images)
    rows = F.interpolate(Rows().feature_map(images).movedim(-1, 1), (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(found.unflatten(1, (8, 8)), rows.movedim(1, -1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alignment.extractor=digit", r"^alignment\.extractor: unknown extractor 'digit'.*digits"),
        (
            "alignment.extractor=my_features:colours",
            r"requires an extractor with a feature map, my_features:",
        ),
        ("alignment.extractor=my_features:Flat", r"to a map \(n, h, w, d\), got \(2, 3072\) for n = 2$"),
        ("alignment.features=maps", r"unknown alignment\.features 'maps'"),
        ("alignment.block=0", r"^alignment\.block must be at least 1, got 0"),
        ("alignment.block=3", r"^alignment\.block must be from 1 to model\.depth=2, got 3"),
        ("alignment.width=0", r"^alignment\.width must be at least 1, got 0"),
        ("alignment.weight=-1", r"^alignment\.weight must not be negative, got -1"),
        ("alignment.weight=.nan", r"^alignment\.weight must be finite, got nan"),
        (
            "flow.mean_flow.enabled=true",
            r"^alignment\.extractor requires a model of velocities, .* got digits",
        ),
    ],
)
def test_a_users_mistake_is_one_sentence_before_anything_is_written(
    overrides, own, tmp_path, override, message
):
    own.colours, own.Flat = Colours, Flat
    with pytest.raises(ValueError, match=message):
        train(overrides, "sampling.cfg_interval=[0,1]", override)
    assert not (tmp_path / "run").exists()


def test_the_estimate_counts_the_projector_and_the_extractor(overrides, capsys):
    settings, trainer = config.load(None, overrides), Trainer(config.load(None, overrides))
    extractor = sum(p.numel() for p in load_digits_classifier().parameters())
    products = 16 * 24 + 24 * 24 + 24 * 64
    counts, own = count_parameters(settings), forward_flops(settings.model_arguments)
    assert (counts.projector, counts.extractor) == (products + 24 + 24 + 64, extractor)
    saved = Activations(fixed=0.0, per_image=1.0)
    rows = memory_bytes(settings, counts, saved, gpus=1, sharded=False)
    assert rows["extractor"] == 4 * extractor
    assert rows["projector"] == 16 * counts.projector + 8 * 64 * 4 * 24 * 4  # images, tokens, width, bytes
    both = memory_bytes(settings, counts, saved, gpus=2, sharded=False)
    assert both["projector"] == 20 * counts.projector + 4 * 64 * 4 * 24 * 4
    plain = [item for item in overrides if not item.startswith("alignment.")]
    without = config.load(None, plain)
    assert checkpoint_bytes(settings, counts) == (
        checkpoint_bytes(without, count_parameters(without)) + 12 * counts.projector
    )
    beside = train_flops(settings, own / 2) - 3 * own
    features = trainer.task.frozen_flops()
    assert features > 1e5
    assert beside == 3 * 2 * 64 * products + features
    assert trainer.flops_per_image == 3 * own + beside
    estimate.main([*overrides, "--gpus", "1"])
    printed = capsys.readouterr().out
    assert f"{counts.projector:,} parameters" in printed
    assert f"{extractor:,} frozen parameters" in printed


def test_the_estimate_counts_decoding_where_latents_lie_in_a_folder(overrides, shards):
    decoded = config.load(None, [*overrides, *shards, "latents.vae=digits"])
    own = forward_flops(decoded.model_arguments) / 2
    assert train_flops(decoded, own) > train_flops(config.load(None, overrides), own) + 1e5
