"""A run of mean flows: trained, resumed, sampled by few evaluations, exported, and what it refuses."""

import pytest
import torch

from flashdit import FlashDiTPipeline, config
from flashdit.commands import export
from flashdit.flow.mean_flow import COST
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.options import SamplingOptions
from flashdit.sampling.recipe import make_recipe
from flashdit.shared.runs import list_checkpoints
from flashdit.trainer import Trainer

MEAN_FLOW = ["flow.mean_flow.enabled=true", "flow.mean_flow.most_guidance=4"]


@pytest.fixture
def run(tmp_path):
    """Returns a function that trains a small model of mean flows on the digits, and returns its folder."""
    given = [
        "model.hidden_size=16",
        "model.depth=1",
        "training.global_batch_size=8",
        "training.preview_every=0",
    ]
    given += ["optimizer.decay_steps=null", "sampling.cfg_interval=[0,1]", f"run.dir={tmp_path / 'run'}"]

    def trained(*more):
        return Trainer(config.load(None, [*given, *MEAN_FLOW, "training.steps=2", *more])).fit()

    return trained


def weights_of(run_dir):
    return next(list_checkpoints(run_dir)[-1].glob("model/*.safetensors")).read_bytes()


def test_a_run_that_goes_on_is_as_one_that_never_stopped(run, tmp_path):
    whole = run(f"run.dir={tmp_path / 'whole'}", "training.steps=4")
    run(f"run.dir={tmp_path / 'parts'}", "training.steps=2")
    parts = run(f"run.dir={tmp_path / 'parts'}", "training.steps=4")
    assert weights_of(whole) == weights_of(parts)
    other = run(f"run.dir={tmp_path / 'other'}", "training.steps=4", "flow.mean_flow.instant_share=1")
    assert weights_of(whole) != weights_of(other)


def test_a_guided_sample_takes_as_many_evaluations_as_it_has_updates(run):
    generator = load_generator(run())
    labels, noise = torch.tensor([0, 1]), generator.noise(torch.arange(2), 0)
    for parameter in generator.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    found, nfe = generator.latents(torch.arange(2), labels, SamplingOptions(steps=2, cfg_scale=3.0))
    half, three = torch.full((2,), 0.5), torch.full((2,), 3.0)
    with torch.no_grad():
        x = noise + generator.model(noise, torch.zeros(2), labels, duration=half, guidance=three) / 2
        x = x + generator.model(x, half, labels, duration=half, guidance=three) / 2
        torch.testing.assert_close(found, x)
        heun, _ = generator.latents(
            torch.arange(2), labels, SamplingOptions(sampler="heun", steps=1, cfg_scale=3.0)
        )
        first = generator.model(noise, torch.zeros(2), labels, guidance=three)
        second = generator.model(noise + first, torch.ones(2), labels, guidance=three)
        torch.testing.assert_close(heun, noise + (first + second) / 2)
    assert nfe.tolist() == [2, 2]
    recipe = make_recipe(generator, labels, SamplingOptions(steps=2, cfg_scale=3.0))
    assert recipe["nfe"] == generator.evaluations(SamplingOptions(steps=2, cfg_scale=3.0)) == 2
    assert generator.evaluations(SamplingOptions(sampler="heun", steps=2, cfg_scale=3.0)) == 4


def test_an_exported_model_makes_the_same_latents(run, tmp_path):
    run_dir = run()
    export.main([str(run_dir), str(tmp_path / "out")])
    pipe = FlashDiTPipeline.from_pretrained(str(tmp_path / "out"))
    pipe.set_progress_bar_config(disable=True)
    generator = load_generator(run_dir)
    noise = generator.noise(torch.arange(2), 0)
    made = pipe([1, 2], 2.0, 3, latents=noise, output_type="latent").images
    wanted, _ = generator.latents(
        torch.arange(2), torch.tensor([1, 2]), SamplingOptions(steps=3, cfg_scale=2.0)
    )
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must be from 1 to 4, got 9"):
        pipe([1], 9.0, 1)
    message = "has guidance as a condition, and takes no other kind"
    with pytest.raises(ValueError, match=message):
        pipe([1], 2.0, 1, guidance_channels=1)
    pipe.guide = pipe.transformer
    with pytest.raises(ValueError, match=message):
        pipe([1], 2.0, 1)


def test_the_cost_of_a_step_is_told(tiny_overrides):
    plain, mean = (
        Trainer(config.load(None, [*tiny_overrides, *more])).flops_per_image for more in ((), MEAN_FLOW)
    )
    assert mean == pytest.approx(plain * COST, rel=0.2)  # its embedder of stretches is new


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.cfg_scale=5", "must be from 1 to 4, got 5"),
        ("distillation.teacher=runs/teacher", "a teacher teaches velocities, no mean flows, got"),
        ("training.gradient_checkpointing=true", "requires training.gradient_checkpointing=false"),
        (
            "training.compile=block",
            "requires training.gradient_checkpointing=false and training.compile=none",
        ),
        ("model.most_guidance=2.0", "which alone is to be given"),
        ("flow.mean_flow.power=-1", "flow.mean_flow.power must not be negative, got -1"),
        ("flow.mean_flow.instant_share=2", "instant_share must be from 0 to 1, got 2"),
        ("flow.mean_flow.most_guidance=0.5", "most_guidance must be at least 1, got 0.5"),
    ],
)
def test_what_mean_flows_cannot_follow_is_refused(tiny_overrides, override, message):
    with pytest.raises(ValueError, match=message):
        config.load(None, [*tiny_overrides, *MEAN_FLOW, override])


def test_other_guidance_of_a_model_of_mean_flows_is_refused(run):
    generator = load_generator(run())
    labels = torch.tensor([0])
    for options, message in (
        (SamplingOptions(cfg_scale=0.5), "must be from 1 to 4, got 0.5"),
        (SamplingOptions(cfg_scale=2.0, cfg_interval=(0.2, 1.0)), "its interval must be 0 1, got 0.2 1"),
        (
            SamplingOptions(cfg_scale=2.0, cfg_channels=1),
            "has guidance as a condition, and takes no other kind",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            next(generator.generate(labels, options))
