"""The average of the weights against a plain loop in float64: its law, its readers, where it is saved."""

import json

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file
from torch import nn

from flashdit.sampling.generator import ImageGenerator
from flashdit.shared.runs import step_folder
from flashdit.training.ema import Ema, EmaOptions

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def plain_average(start, weights, decay, warmup=True, seen=0):
    """Returns the average after each update of a list of weights."""
    average, averages = start.double(), []
    for n, value in enumerate(weights, seen + 1):
        kept = min(decay, (1 + n) / (10 + n)) if warmup else decay
        average = kept * average + (1 - kept) * value.double()
        averages.append(average)
    return averages


def walk(model, steps):
    """Yields after each of some random moves of the weights."""
    draws = torch.Generator().manual_seed(6)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draws))
        yield {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("decay", "warmup"), [(0.6, True), (0.9999, True), (0.6, False), (0.0, True)])
def test_an_update_keeps_the_stated_share_of_the_old_average(decay, warmup):
    model = nn.Linear(3, 5)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ema = Ema(model, EmaOptions(decay=decay, warmup=warmup))
    assert all(ema.state()[name].equal(value) for name, value in start.items())
    seen, averages = [], []
    for weights in walk(model, 20):  # a decay of 0.6 ends the warm-up at the 13th
        ema.update(model)
        seen.append(weights)
        averages.append({name: value.clone() for name, value in ema.state().items()})
        assert ema.updates == len(seen)
    for name in start:
        expected = plain_average(start[name], [weights[name] for weights in seen], decay, warmup)
        for found, wanted in zip(averages, expected, strict=True):
            torch.testing.assert_close(found[name].double(), wanted, **CLOSE)


def test_the_defaults_are_lightningdits_decay_with_the_warm_up():
    assert (EmaOptions().decay, EmaOptions().warmup) == (0.9999, True)


def test_a_loaded_average_goes_on_with_its_counter():
    model, start = nn.Linear(3, 5), torch.full((5, 3), 7.0)
    ema = Ema(model, EmaOptions(decay=0.8))
    ema.load({"weight": start, "bias": torch.zeros(5)}, 20)
    seen = []
    for weights in walk(model, 15):  # (1 + n) / (10 + n) reaches 0.8 at 35
        ema.update(model)
        seen.append(weights["weight"])
    expected = plain_average(start, seen, 0.8, seen=20)[-1]
    torch.testing.assert_close(ema.state()["weight"].double(), expected, **CLOSE)
    assert ema.updates == 35


def saved(run, step, part):
    return load_file(step_folder(run.run_dir, step) / part / "diffusion_pytorch_model.safetensors")


def assert_average_of_raw(run, steps, decay, warmup=True):
    """Asserts that `ema/` of the last step is the average of `model/` over the steps that count."""
    raw = [saved(run, step, "model") for step in steps]
    found = saved(run, steps[-1], "ema")
    assert found.keys() == run.initial.keys()
    for name, start in run.initial.items():
        expected = plain_average(start, [weights[name] for weights in raw], decay, warmup)[-1]
        torch.testing.assert_close(found[name].double(), expected, **CLOSE)
    assert any(not torch.allclose(found[name], value, rtol=1e-3) for name, value in raw[-1].items())


@pytest.mark.parametrize("warmup", [True, False])
def test_a_checkpoint_holds_the_raw_weights_and_their_average_apart(make_recorded, warmup):
    more = (f"ema.warmup={warmup}", "ema.decay=0.3", "optimizer.lr=0.02", "optimizer.warmup_steps=0")
    run = make_recorded(*more, "training.save_every=1", "training.accumulation=2")
    live = []
    update = run.ema.update

    def note_and_update(model):
        live.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        update(model)

    run.ema.update = note_and_update
    run.fit()
    assert len(live) == 6  # one update for an optimiser step, not for each of its two parts
    for step, weights in enumerate(live, 1):
        raw = saved(run, step, "model")
        assert [name for name in raw if not raw[name].equal(weights[name])] == []
    assert_average_of_raw(run, range(1, 7), 0.3, warmup)


def test_a_skipped_step_is_no_update_of_the_average(make_recorded):
    run = make_recorded("training.save_every=1", "optimizer.lr=0.02", "optimizer.warmup_steps=0")
    run.poisoned_steps = (1, 4)
    run.fit()
    for name, value in saved(run, 1, "ema").items():
        assert value.equal(run.initial[name])
        assert saved(run, 4, "ema")[name].equal(saved(run, 3, "ema")[name])
    assert_average_of_raw(run, [2, 3, 5, 6], 0.995)
    states = [json.loads((step_folder(run.run_dir, n) / "state.json").read_text()) for n in range(1, 7)]
    assert [state["ema_updates"] for state in states] == [0, 1, 2, 2, 3, 4]
    assert states[-1]["skipped"] == 2


@pytest.fixture(scope="module")
def small_vae(tmp_path_factory):
    """Returns the folder of an autoencoder that makes 32×32 images of 3 × 4 × 4 latents."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=3,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=32,
    ).save_pretrained(folder)
    return folder


PREVIEWS = ("training.preview_every=2", "evaluation.every=0")
SCORES = (
    *("training.preview_every=0", "evaluation.every=2", "evaluation.num_images=20"),
    *("evaluation.extractor=digits", "evaluation.reference=digits", "evaluation.metrics=[fid]"),
)


@pytest.mark.parametrize("looks", [PREVIEWS, SCORES])
def test_previews_and_scores_are_those_of_the_average(make_recorded, small_vae, monkeypatch, looks):
    drawn_with = []
    generate = ImageGenerator.generate

    def note_and_generate(self, labels, *arguments, **named):
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        drawn_with.append((weights, self.model.training))
        return generate(self, labels, *arguments, **named)

    monkeypatch.setattr(ImageGenerator, "generate", note_and_generate)
    more = ("training.save_every=2", "optimizer.lr=0.02", "optimizer.warmup_steps=0", "sampling.steps=1")
    run = make_recorded(f"latents.vae={small_vae}", *more, *looks)
    run.fit()
    assert len(drawn_with) == 3
    for step, (weights, training) in zip((2, 4, 6), drawn_with, strict=True):
        average, raw = saved(run, step, "ema"), saved(run, step, "model")
        assert not training
        assert [name for name in weights if not weights[name].equal(average[name])] == []
        assert any(not weights[name].equal(raw[name]) for name in weights)
    assert run.model.training, "and the model goes on training"
