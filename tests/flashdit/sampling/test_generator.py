import copy

import pytest
import torch
from torch import nn

from flashdit import FlashDiT
from flashdit.data.autoencoders import load_vae
from flashdit.data.latents import LatentOptions, LatentSpace
from flashdit.data.pixels import Pixels
from flashdit.flow.samplers import SAMPLERS
from flashdit.sampling.generator import ImageGenerator, latent_shape, warn_of_guidance, watching
from flashdit.sampling.options import SamplingOptions
from flashdit.shared.pictures import InvalidPixels, to_uint8

NAMES = ["cat", "golden retriever", "hen"]


def make_generator(**options):
    """Returns a generator of three classes: the digits' VAE behind a small model far from zero."""
    torch.manual_seed(0)
    vae = load_vae("digits")
    sizes = {"in_channels": 1, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_classes": 3}
    model = FlashDiT.from_size("nano", **sizes, **options)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(parameter, std=0.15)
    one = torch.ones(1, 1, 1, 1)
    return ImageGenerator(model.eval(), LatentSpace(0 * one, one, LatentOptions(), vae), NAMES)


@pytest.fixture(scope="module")
def generator():
    return make_generator()


def images(generator, labels, **options):
    settings = SamplingOptions(**({"steps": 3, "cfg_scale": 1.5} | options))
    batches = list(generator.generate(torch.tensor(labels), settings))
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(len(labels)))
    assert torch.cat([batch.labels for batch in batches]).tolist() == labels
    return torch.cat([batch.images for batch in batches])


def test_images_are_uint8_at_the_size_of_the_vae(generator):
    made = images(generator, [0, 2])
    assert made.shape == (2, 3, 32, 32)
    assert made.dtype == torch.uint8


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("sampler", SAMPLERS.names())
def test_an_image_depends_on_seed_and_number_alone(generator, sampler, batch_size):
    labels = [0, 1, 2, 0]
    together = images(generator, labels, seed=5, sampler=sampler)
    apart = images(generator, labels, seed=5, sampler=sampler, batch_size=batch_size)
    # the same noise and the same formulas; another batch may round a grey level otherwise
    assert (together.int() - apart.int()).abs().max() <= 1
    assert generator.noise(torch.tensor([4]), 5).equal(generator.noise(torch.arange(7), 5)[4:5])


def test_chosen_samples_equal_those_of_the_whole(generator):
    labels, ids = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([3, 1])
    for sampler in ("euler", "sde-euler"):
        options = SamplingOptions(steps=3, sampler=sampler, batch_size=4)
        whole = torch.cat([batch.images for batch in generator.generate(labels, options)])
        (some,) = generator.generate(labels, options, ids)
        assert some.ids.equal(ids)
        assert some.labels.tolist() == [0, 1]
        assert (some.images.int() - whole[ids].int()).abs().max() <= 1
    assert list(generator.generate(labels, options, ids[:0])) == []


def test_seeds_and_numbers_give_different_noise(generator):
    noise = torch.stack([generator.noise(torch.arange(3), seed) for seed in (0, 1)]).flatten(0, 1).flatten(1)
    assert torch.cdist(noise, noise)[~torch.eye(6, dtype=torch.bool)].min() > 1


def test_scale_one_is_the_conditional_model_and_zero_the_unconditional(generator):
    conditional = images(generator, [0, 1], cfg_scale=1.0)
    nearly = images(generator, [0, 1], cfg_scale=1.0 + 1e-6)  # takes the path of two forwards
    assert (conditional.int() - nearly.int()).abs().max() <= 1
    zero, two = images(generator, [0], cfg_scale=0.0), images(generator, [2], cfg_scale=0.0)
    assert zero.equal(two)
    nearly = images(generator, [0], cfg_scale=1e-6)
    assert (zero.int() - nearly.int()).abs().max() <= 1
    assert (conditional[:1].int() - zero.int()).abs().max() > 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampler": "euler", "steps": 10}, 10),
        ({"sampler": "heun", "steps": 10}, 20),
        ({"sampler": "dpm++2m", "steps": 10}, 10),
        ({"sampler": "unipc", "steps": 10, "cfg_scale": 0.0}, 10),
        ({"sampler": "sde-euler", "steps": 10, "cfg_scale": 2.0}, 20),
        ({"sampler": "euler", "steps": 10, "cfg_scale": 2.0}, 20),
        ({"sampler": "euler", "steps": 10, "cfg_scale": 2.0, "cfg_interval": (0.25, 0.75)}, 15),
        ({"sampler": "heun", "steps": 10, "cfg_scale": 2.0, "cfg_interval": (0.25, 0.75)}, 30),
    ],
)
def test_nfe_counts_what_the_model_is_asked(generator, options, expected):
    assert SamplingOptions(**options).nfe == expected
    assert evaluations_and_nfe(generator, options, [0, 2]) == (2 * expected, [expected, expected])


def dopri5(tolerance):
    return {"name": "dopri5", "atol": tolerance, "rtol": tolerance}


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_nfe_of_an_adaptive_sampler_is_measured_for_each_image(generator, scale):
    options = {"sampler": dopri5(1e-2), "cfg_scale": scale, "cfg_interval": (0.3, 0.6)}
    assert SamplingOptions(**options).nfe is None
    asked, nfe = evaluations_and_nfe(generator, options, [0, 2])
    assert asked == sum(nfe)
    tight, _ = evaluations_and_nfe(generator, options | {"sampler": dopri5(1e-6)}, [0, 2])
    assert tight >= asked > 2 * 7


def test_the_steps_of_an_adaptive_sampler_depend_on_no_other_image(generator):
    options = SamplingOptions(sampler=dopri5(1e-1), cfg_scale=3.0)
    ids, labels = torch.tensor([0, 1]), torch.tensor([0, 2])
    together, _ = generator.latents(ids, labels, options)
    assert generator.latents(ids[:1], labels[:1], options)[0].equal(together[:1])
    assert generator.latents(ids[1:], labels[1:], options)[0].equal(together[1:])


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_an_adaptive_sampler_steps_onto_the_ends_of_the_guidance_interval(scale):
    options, times = SamplingOptions(sampler="dopri5", cfg_scale=scale, cfg_interval=(0.3, 0.6)), []

    def v(x, t):
        times.append(round(t, 6))
        return torch.cos(3 * x)

    options.make_sampler(torch.zeros)(v, torch.zeros(1, 1), options.times)
    assert ({0.3, 0.6} <= set(times)) == (scale != 1)


def test_every_update_of_a_stochastic_sampler_draws_its_own_noise(generator, monkeypatch):
    drawn, noise = [], generator.noise

    def record(ids, seed, shape=None, purpose="noise"):
        drawn.append(purpose)
        return noise(ids, seed, shape, purpose)

    monkeypatch.setattr(generator, "noise", record)
    images(generator, [0], sampler="sde-euler", steps=4)
    assert drawn == ["noise", "sde 0", "sde 1", "sde 2"]


def evaluations_and_nfe(generator, options, labels=(0,)):
    """Returns how many rows the model was given, and what the batch says of each image."""
    asked = []
    hook = generator.model.register_forward_hook(lambda _m, args, _out: asked.append(len(args[0])))
    (batch,) = generator.generate(torch.tensor(labels), SamplingOptions(**options))
    hook.remove()
    return sum(asked), batch.nfe.tolist()


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"attention": {"name": "window", "window": 3}},
        {"attention": {"name": "global", "rope": True}},
        {"attention": {"name": "global", "rope": False}, "position_embedding": "sincos"},
    ],
)
def test_any_multiple_of_factor_and_patch_is_a_size(model):
    generator = make_generator(**model)
    for height, width in ((44, 24), (16, 72), (4, 8), (None, 40)):
        made = images(generator, [0, 1], height=height, width=width)
        assert made.shape == (2, 3, height or 32, width)
        assert generator.image_size(SamplingOptions(height=height, width=width)) == (height or 32, width)
    native = images(generator, [0, 1], height=32, width=32)
    assert native.equal(images(generator, [0, 1]))


def test_a_size_that_no_patch_divides_is_named(generator):
    with pytest.raises(ValueError, match=r"height must be a multiple of 4 pixels \(the VAE's factor 2 × the"):
        images(generator, [0], height=30)


def test_a_size_of_pixels_speaks_of_no_autoencoder(generator):
    space = LatentSpace(
        torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), LatentOptions(space="pixels"), Pixels()
    )
    with pytest.raises(
        ValueError, match=r"width must be a multiple of 2 pixels \(the patch size 2\), got 33"
    ):
        latent_shape(generator.model, space, None, 33)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_a_little_off_and_stays_near(generator, precision):
    full, low = images(generator, [0, 1]), images(generator, [0, 1], precision=precision)
    assert 0 < (full.int() - low.int()).abs().max() <= 8


@pytest.mark.parametrize(
    ("options", "title"),
    [
        ({}, "euler 50, guidance 1"),
        ({"sampler": "heun", "steps": 9, "cfg_scale": 1.5}, "heun 9, guidance 1.5"),
        ({"sampler": "dopri5"}, "dopri5, guidance 1"),
        ({"cfg_scale": 4.0, "cfg_interval": (0.2, 1.0)}, "euler 50, guidance 4 for t in 0.2 to 1"),
    ],
)
def test_a_title_says_how_pictures_were_sampled(options, title):
    assert str(SamplingOptions(**options)) == title


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be from 0 to below 2\^63, got -1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"cfg_interval": (0.7, 0.2)}, "cfg_interval must be 0 ≤ low ≤ high ≤ 1 in time, got 0.7 0.2"),
        ({"sampler": "rk4"}, "unknown sampler 'rk4'"),
        ({"cfg_scale": float("inf")}, "cfg_scale must be finite, got inf"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"sampler": {"name": "dopri5", "rtol": 0.0}}, "atol and rtol must be positive, got 1e-05 and 0.0"),
    ],
)
def test_invalid_sampling_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)


def one_buffer(model, **_):
    """Stands for a CUDA graph: every run of one size returns the same memory."""
    outputs = {}

    def run(x, t, y):
        v = model(x, t, y)
        return outputs.setdefault(v.shape, torch.empty_like(v)).copy_(v)

    return run


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("sampler", SAMPLERS.names())
def test_a_graph_that_overwrites_its_output_changes_no_image(monkeypatch, sampler, scale):
    generator = make_generator()
    expected = images(generator, [0, 1, 2], sampler=sampler, cfg_scale=scale, batch_size=2)
    monkeypatch.setattr(torch, "compile", one_buffer)
    generator.compile()
    made = images(generator, [0, 1, 2], sampler=sampler, cfg_scale=scale, batch_size=2)
    assert made.equal(expected)


def test_compiled_sampling_gives_the_same_images():
    generator = make_generator()
    expected = images(generator, [0, 1, 2], cfg_interval=(0.4, 1.0))
    generator.compile()
    made = images(generator, [0, 1, 2], cfg_interval=(0.4, 1.0))  # both sizes: guided and not
    assert (made.int() - expected.int()).abs().max() <= 1


def broken(generator, change):
    """Returns the generator with a changed copy of its model."""
    other = copy.copy(generator)
    other.model = other.velocity = copy.deepcopy(generator.model)
    change(other.model)
    return other


def test_weights_that_are_not_finite_are_named_with_the_samples(generator):
    def spoil(model):
        model.blocks[0].mlp.w3.weight.data[0, 0] = torch.nan

    other = broken(generator, spoil)
    rule = r"sampled latents must be finite .* in samples 3, 5: 1 of .* not finite, blocks\.0\.mlp\.w3"
    with pytest.raises(InvalidPixels, match=rule):
        list(other.generate(torch.zeros(9).long(), SamplingOptions(steps=1), torch.tensor([3, 5])))


@pytest.mark.parametrize("scale", [1e10, 1e30])
def test_guidance_beyond_all_latents_is_refused_and_not_one_grey(generator, scale):
    options = SamplingOptions(steps=2, cfg_scale=scale)
    with pytest.raises(InvalidPixels, match=r"weights are finite, so look at cfg_scale=1e\+"):
        list(generator.generate(torch.tensor([0, 1]), options))


def test_pixels_that_are_not_finite_name_the_autoencoder():
    pixels = torch.zeros(8, 3, 2, 2)
    pixels[1:7, 0, 0, 0] = torch.inf
    with pytest.raises(InvalidPixels, match=r"in samples 11, 12, 13, 14, 15 and 1 more: .* autoencoder"):
        to_uint8(pixels, range(10, 18))
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0]).reshape(4, 1, 1, 1)).flatten().tolist() == [
        0,
        0,
        128,
        255,
    ]


@pytest.mark.parametrize(("dropped", "scale", "warned"), [(0.0, 3.0, 1), (0.0, 1.0, 0), (0.1, 3.0, 0)])
def test_guidance_by_a_label_that_was_never_trained_is_warned_of_once(
    generator, caplog, dropped, scale, warned
):
    warn_of_guidance.cache_clear()
    other = broken(generator, lambda model: setattr(model, "class_dropout_prob", dropped))
    for _ in range(2):
        list(other.generate(torch.tensor([0]), SamplingOptions(steps=1, cfg_scale=scale)))
    found = [
        record for record in caplog.records if "guidance requires a model that trained" in record.message
    ]
    assert len(found) == warned


def test_pictures_are_decoded_without_tf32_whatever_the_process_allows(generator):
    seen = []
    hook = generator.space.vae.module.decoder.register_forward_pre_hook(
        lambda *_: seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
    )
    try:
        list(generator.generate(torch.tensor([0]), SamplingOptions(steps=1, precision="tf32")))
    finally:
        hook.remove()
    assert seen == [(False, "highest")]


@pytest.mark.parametrize(
    ("sampler", "said"),
    [("euler", [0, 1, 2, 2, 2.5, 3]), ("heun", [0, 1, 1, 2, 2, 2, 2.5, 2.5, 3, 3])],
)
def test_who_watches_is_given_how_many_images_are_sampled_within_a_batch_too(generator, sampler, said):
    given = []
    options = SamplingOptions(sampler=sampler, steps=2, batch_size=2)
    with watching(generator, given.append):
        list(generator.generate(torch.tensor([0, 1, 2]), options))
    assert given == said
    list(generator.generate(torch.tensor([0]), options))
    assert given == said, "nobody watches any more"


def test_an_adaptive_sampler_is_watched_image_by_image(generator):
    given = []
    with watching(generator, given.append):
        list(generator.generate(torch.tensor([0, 1]), SamplingOptions(sampler=dopri5(1e-2))))
    assert given[0] == 0
    assert given[-1] == 2
    assert {int(images) for images in given} == {0, 1, 2}
