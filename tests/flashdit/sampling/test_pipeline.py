import copy
import logging
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback
from PIL import Image

import flashdit
from flashdit import FlashDiTPipeline
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.export import make_pipeline
from flashdit.sampling.options import SamplingOptions

IDS, LABELS = torch.tensor([4, 9]), torch.tensor([2, 0])
GUIDED = {"cfg_scale": 1.5, "cfg_interval": (0.2, 0.9)}


@pytest.fixture(scope="module")
def generator(tiny_checkpoint):
    return load_generator(tiny_checkpoint)


@pytest.fixture
def pipe(generator):
    pipeline = make_pipeline(generator)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def exact(pipe, generator, options, **given):
    """Returns the pipeline's result for the native sampler's noise and options."""
    noise = generator.noise(IDS, options.seed, generator.latent_shape(options))
    return pipe(
        LABELS,
        guidance_scale=options.cfg_scale,
        guidance_interval=options.cfg_interval,
        num_inference_steps=options.steps,
        height=options.height,
        width=options.width,
        latents=noise,
        **given,
    ).images


@pytest.mark.parametrize(
    "options",
    [
        {},
        GUIDED,
        {**GUIDED, "shift": 0.3, "steps": 7},
        {"cfg_scale": 0.0, "shift": 2.0},
        {**GUIDED, "height": 44, "width": 24},
    ],
)
def test_images_equal_the_native_samplers(generator, options):
    options = SamplingOptions(**({"steps": 5, "seed": 3} | options))
    native, _ = generator.latents(IDS, LABELS, options)
    pipe = make_pipeline(generator)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / options.shift)
    torch.testing.assert_close(
        exact(pipe, generator, options, output_type="latent"), native, rtol=0, atol=1e-4
    )
    pixels = exact(pipe, generator, options, output_type="np")
    raw = generator.space.vae.module.decode(generator.space.denormalise(native)).sample
    expected = (raw / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-4)
    uint8 = generator.space.decode(native).permute(0, 2, 3, 1).numpy()
    pictures = [np.asarray(picture) for picture in exact(pipe, generator, options)]
    assert abs(np.stack(pictures).astype(int) - uint8).max() <= 1


def test_a_saved_pipeline_gives_the_same_images(pipe, generator, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    options = SamplingOptions(steps=3, **GUIDED)
    before = exact(pipe, generator, options, output_type="pt")
    for kind in (FlashDiTPipeline, DiffusionPipeline):
        again = kind.from_pretrained(tmp_path / "pipe")
        assert isinstance(again, FlashDiTPipeline)
        again.set_progress_bar_config(disable=True)
        assert exact(again, generator, options, output_type="pt").equal(before)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == (tmp_path / "pipe" / "README.md").read_text()


@pytest.mark.parametrize(
    "given", ["Golden retriever", 1, ["golden retriever"], torch.tensor([1]), ["1"], torch.tensor(1)]
)
def test_classes_go_by_name_or_number(pipe, given):
    images = pipe(given, num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images
    expected = pipe(1, num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images
    assert len(images) == 1
    assert isinstance(images[0], Image.Image)
    assert images[0].size == (32, 32)
    assert images[0].tobytes() == expected[0].tobytes()


def test_a_generator_for_each_image_makes_it_independent_of_the_others(pipe):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    two = pipe([0, 2], num_inference_steps=2, generator=generators(5, 6), output_type="np").images
    one = pipe(2, num_inference_steps=2, generator=generators(6), output_type="np").images
    np.testing.assert_allclose(two[1:], one, atol=1e-5)
    with pytest.raises(ValueError, match="a generator per image, got 2 for 1"):
        pipe(0, generator=generators(5, 6))


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (FlowMatchHeunDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, FLOW),
        (UniPCMultistepScheduler, FLOW),
    ],
)
def test_other_flow_matching_schedulers_reach_the_same_images(pipe, generator, scheduler, options):
    truth, _ = generator.latents(IDS, LABELS, SamplingOptions(sampler="dopri5"))
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    errors = [
        (exact(pipe, generator, SamplingOptions(steps=n), output_type="latent") - truth).abs().mean()
        for n in (5, 40)
    ]
    euler, _ = generator.latents(IDS, LABELS, SamplingOptions(steps=40))
    assert errors[1] < errors[0]
    assert errors[1] < (euler - truth).abs().mean() + 2e-3  # their grids stop 0.001 short of an end


def test_callbacks_see_each_step_and_may_change_the_latents(pipe, generator):
    seen = []

    def observe(pipeline, step, timestep, given):
        seen.append((step, float(timestep), given["latents"].shape))
        return {"latents": torch.zeros_like(given["latents"])} if step == 2 else {}

    options = SamplingOptions(steps=3)
    latents = exact(pipe, generator, options, output_type="latent", callback_on_step_end=observe)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [round(time) for _, time, _ in seen] == [1000, 667, 333]
    assert seen[0][2] == (2, 1, 16, 16)
    assert latents.abs().max() == 0
    with pytest.raises(ValueError, match="callbacks can have"):
        pipe(0, callback_on_step_end=observe, callback_on_step_end_tensor_inputs=["labels"])


def test_half_precision_weights_give_nearly_the_same_images(pipe, generator):
    options = SamplingOptions(steps=3, **GUIDED)
    full = exact(pipe, generator, options, output_type="np")
    pipe.to(torch.bfloat16)
    half = exact(pipe, generator, options, output_type="np")
    assert half.dtype == np.float32
    assert 0 < abs(half - full).max() < 0.1
    pipe.to(torch.float32)
    assert set(pipe.model_cpu_offload_seq.split("->")) == {"transformer", "guide", "vae"}


def test_a_tuple_comes_back_where_it_is_asked_for(pipe):
    (images,) = pipe(0, num_inference_steps=1, return_dict=False, output_type="pt")
    assert images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"class_labels": 3}, r"class 3 is out of range for this 3-class model \(0–2\)"),
        ({"class_labels": -1}, r"class -1 is out of range"),
        ({"class_labels": "hem"}, "unknown class 'hem'; did you mean 'hen'"),
        (
            {"height": 30},
            r"height must be a multiple of 4 pixels \(the VAE's factor 2 × the patch size 2\), got 30",
        ),
        ({"width": 0}, r"width must be a multiple of 4 pixels \(.*\), got 0"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance interval must be 0 ≤ low ≤ high ≤ 1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"latents": torch.zeros(1, 2, 16, 16)}, r"latents must have the shape \(1, 1, 16, 16\)"),
    ],
)
def test_invalid_calls_are_named(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe(**({"class_labels": 0} | given))


def test_a_scheduler_of_another_path_is_refused(pipe):
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="the scheduler must be a FlowMatch… one"):
        pipe(0)


def test_latent_statistics_must_fit_the_channels(generator):
    with pytest.raises(ValueError, match="latents need 1 means and stds, got 2 and 1"):
        FlashDiTPipeline(generator.model, generator.space.vae.module, None, latents_mean=[0.0, 0.0])


def test_an_upload_carries_our_card_in_place_of_an_empty_one(pipe, tmp_path, monkeypatch):
    import diffusers.utils.hub_utils as hub

    class Card:
        def save(self, path):
            with open(path, "w") as file:
                file.write("an empty card")

    uploaded = []
    monkeypatch.setattr(hub, "create_repo", lambda name, **_: type("Repository", (), {"repo_id": name}))
    monkeypatch.setattr(hub, "load_or_create_model_card", lambda *_, **__: Card())
    monkeypatch.setattr(hub, "populate_model_card", lambda card, *_, **__: card)
    monkeypatch.setattr(
        hub,
        "upload_folder",
        lambda **given: uploaded.append(shutil.copytree(given["folder_path"], tmp_path / "hub")),
    )
    pipe.push_to_hub("someone/flashdit")
    assert len(uploaded) == 1
    assert (tmp_path / "hub" / "README.md").read_text() == pipe.card()
    assert (tmp_path / "hub" / "model_index.json").is_file()


def test_public_names_load_when_asked_for():
    assert flashdit.__all__ == ["FlashDiT", "FlashDiTPipeline"]
    with pytest.raises(AttributeError, match="no attribute 'FlashDit'"):
        flashdit.FlashDit  # noqa: B018


@pytest.mark.parametrize(("steps", "interval"), [(30, (1 / 3, 1.0)), (7, (2 / 7, 6 / 7))])
def test_steps_on_the_ends_of_the_interval_are_guided_as_natively(generator, pipe, steps, interval):
    options = SamplingOptions(steps=steps, cfg_scale=4.0, cfg_interval=interval)
    native, _ = generator.latents(IDS, LABELS, options)
    found = exact(pipe, generator, options, output_type="latent")
    torch.testing.assert_close(found, native, rtol=0, atol=1e-4)


def test_a_scheduler_that_draws_takes_the_generator(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    one, same, other = (
        pipe(0, num_inference_steps=3, generator=torch.Generator().manual_seed(seed), output_type="np").images
        for seed in (0, 0, 1)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_schedulers_made_from_the_configuration_keep_path_and_shift(
    tiny_checkpoint, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    generator = load_generator(tiny_checkpoint)
    generator.sampling = SamplingOptions(shift=0.25)
    make_pipeline(generator).save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        pipe = FlashDiTPipeline.from_pretrained(tmp_path)
    assert "will be ignored" not in caplog.text
    for scheduler in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        swapped = scheduler.from_config(pipe.scheduler.config)
        assert (swapped.config.flow_shift, swapped.config.use_flow_sigmas) == (4.0, True)


def test_several_images_of_each_class_lie_next_to_one_another(pipe):
    many = pipe([0, 2], num_images_per_prompt=2, num_inference_steps=2, latents=torch.ones(4, 1, 16, 16))
    one = pipe([0, 0, 2, 2], num_inference_steps=2, latents=torch.ones(4, 1, 16, 16))
    assert [image.tobytes() for image in many.images] == [image.tobytes() for image in one.images]


class Stops(PipelineCallback):
    """A callback of diffusers' own kind, which ends the run after its second step."""

    tensor_inputs = ("latents",)

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert pipeline.num_timesteps == 5
        self.steps = step_index + 1
        pipeline._interrupt = step_index == 1
        return callback_kwargs


def test_a_callback_of_diffusers_own_kind_can_end_a_run(pipe):
    callback = Stops(cutoff_step_ratio=None, cutoff_step_index=0)
    pipe(0, num_inference_steps=5, callback_on_step_end=callback)
    assert callback.steps == 2
    assert pipe.interrupt


@pytest.mark.parametrize(
    ("labels", "message"), [([], "there must be an image to make, got 0 classes"), ([1.5], "1.5")]
)
def test_labels_that_are_none_are_refused(pipe, labels, message):
    with pytest.raises(ValueError, match=message):
        pipe(labels)
    assert len(pipe(np.int64(1), num_inference_steps=1).images) == 1


def test_labels_may_be_nested_as_other_pipelines_take_them(pipe):
    for given in ([[1], [2]], [(1, 2)], torch.tensor([[1], [2]]), [torch.tensor(1), "2"], np.array([[1, 2]])):
        assert pipe.label_ids(given) == [1, 2]


def test_a_callback_reads_and_changes_the_guidance_of_the_steps_to_come(pipe):
    seen = []

    def stop_guiding(pipe, step, timestep, given):
        seen.append(pipe.guidance_scale)
        pipe._guidance_scale = 1.0
        return given

    def sample(**given):
        noise = torch.randn(1, *pipe_shape(pipe), generator=torch.Generator().manual_seed(0))
        return pipe(1, num_inference_steps=2, latents=noise, output_type="latent", **given).images

    guided, plain = sample(guidance_scale=4.0), sample()
    once = sample(guidance_scale=4.0, callback_on_step_end=stop_guiding)
    early = sample(guidance_scale=4.0, guidance_interval=(0.0, 0.25))
    assert seen == [4.0, 1.0]
    assert not once.equal(guided)
    assert not once.equal(plain)
    torch.testing.assert_close(once, early)


def pipe_shape(pipe):
    config = pipe.transformer.config
    return config["in_channels"], config["sample_size"], config["sample_size"]


def test_a_scheduler_that_does_not_know_flow_is_refused_though_its_config_says_so(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"one that takes use_flow_sigmas=True .* got DDIMScheduler"):
        pipe(1)


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
def test_weights_that_are_not_finite_make_no_picture(generator, output_type):
    broken = copy.copy(generator)
    broken.model = copy.deepcopy(generator.model)
    broken.model.final_layer.linear.bias.data[0] = torch.nan
    pipeline = make_pipeline(broken)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"in samples 0, 1: 1 of .* not finite, final_layer\.linear\.bias"):
        pipeline([0, 1], num_inference_steps=1, output_type=output_type)


def test_layerwise_casting_of_the_model_keeps_the_pictures(generator):
    before = copy.copy(generator)
    before.model = copy.deepcopy(generator.model)
    pipeline = make_pipeline(before)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *pipe_shape(pipeline), generator=torch.Generator().manual_seed(0))
    expected = pipeline(1, num_inference_steps=2, latents=noise, output_type="np").images
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    dtypes = {parameter.dtype for parameter in pipeline.transformer.parameters()}
    assert torch.bfloat16 in dtypes
    found = pipeline(1, num_inference_steps=2, latents=noise, output_type="np").images
    np.testing.assert_allclose(found, expected, atol=0.05)
