import pytest
import torch
from torch import nn

from flashdit import FlashDiT
from flashdit.generate import ImageGenerator, SamplingOptions, balanced_labels, class_ids, nfe
from flashdit.latents import LatentOptions, LatentSpace, load_vae

NAMES = ["cat", "golden retriever", "hen"]


@pytest.fixture(scope="module")
def generator():
    """Returns a generator of three classes: the digits' VAE behind a small model far from zero."""
    torch.manual_seed(0)
    vae = load_vae("digits")
    channels = vae.config["latent_channels"]
    model = FlashDiT.from_size(
        "nano", in_channels=channels, patch_size=2, hidden_size=16, depth=2, num_classes=3
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    one = torch.ones(1, channels, 1, 1)
    space = LatentSpace(0 * one, one, LatentOptions(), vae)
    return ImageGenerator(model.eval(), space, NAMES)


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


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_an_image_depends_on_seed_and_number_alone(generator, batch_size):
    labels = [0, 1, 2, 0, 1, 2, 0]
    together = images(generator, labels, seed=5)
    apart = images(generator, labels, seed=5, batch_size=batch_size)
    # the same noise and the same formulas; another batch may round a grey level otherwise
    assert (together.int() - apart.int()).abs().max() <= 1
    assert generator.noise(torch.tensor([4]), 5).equal(generator.noise(torch.arange(7), 5)[4:5])


def test_seeds_and_numbers_give_different_noise(generator):
    noise = torch.stack([generator.noise(torch.arange(3), seed) for seed in (0, 1)]).flatten(0, 1).flatten(1)
    assert torch.cdist(noise, noise)[~torch.eye(6, dtype=torch.bool)].min() > 1


def test_scale_one_is_the_conditional_model_and_zero_the_unconditional(generator):
    conditional = images(generator, [0, 1], cfg_scale=1.0)
    nearly = images(generator, [0, 1], cfg_scale=1.0 + 1e-6)  # takes the path of two forwards
    assert (conditional.int() - nearly.int()).abs().max() <= 1
    zero, two = images(generator, [0], cfg_scale=0.0), images(generator, [2], cfg_scale=0.0)
    assert (zero.int() - two.int()).abs().max() <= 1
    assert (conditional[:1].int() - zero.int()).abs().max() > 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampler": "euler", "steps": 10}, 10),
        ({"sampler": "heun", "steps": 10}, 20),
        ({"sampler": "euler", "steps": 10, "cfg_scale": 2.0}, 20),
        ({"sampler": "euler", "steps": 10, "cfg_scale": 2.0, "cfg_interval": (0.25, 0.75)}, 15),
        ({"sampler": "heun", "steps": 10, "cfg_scale": 2.0, "cfg_interval": (0.25, 0.75)}, 30),
    ],
)
def test_nfe_counts_what_the_model_is_asked(generator, options, expected):
    assert nfe(SamplingOptions(**options)) == expected
    asked = []
    hook = generator.model.register_forward_hook(lambda _m, args, _out: asked.append(len(args[0])))
    images(generator, [0], **({"cfg_scale": 1.0} | options))
    hook.remove()
    assert sum(asked) == expected


@pytest.mark.parametrize(
    ("options", "title"),
    [
        ({}, "euler 50, guidance 1"),
        ({"sampler": "heun", "steps": 9, "cfg_scale": 1.5}, "heun 9, guidance 1.5"),
        ({"cfg_scale": 4.0, "cfg_interval": (0.2, 1.0)}, "euler 50, guidance 4 for t in 0.2–1"),
    ],
)
def test_a_title_says_how_pictures_were_sampled(options, title):
    assert str(SamplingOptions(**options)) == title


def test_balanced_labels_are_balanced_shuffled_and_seeded():
    labels = balanced_labels(1003, 10, seed=1)
    assert labels.bincount().tolist() == [101, 101, 101] + [100] * 7
    assert labels.equal(balanced_labels(1003, 10, seed=1))
    assert not labels.equal(balanced_labels(1003, 10, seed=2))
    assert not labels.equal(labels.sort().values)


def test_classes_go_by_id_or_name():
    assert class_ids(["2", "golden retriever", "0"], NAMES) == [2, 1, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("207", r"class 207 is out of range for this 3-class model \(0–2\)"),
        ("-1", r"class -1 is out of range for this 3-class model \(0–2\)"),
        ("golden retreiver", "unknown class 'golden retreiver'; did you mean 'golden retriever'"),
    ],
)
def test_classes_that_cannot_be_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        class_ids([name], NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"cfg_interval": (0.7, 0.2)}, "guidance interval must be 0 ≤ low ≤ high ≤ 1 in time, got 0.7 0.2"),
        ({"sampler": "rk4"}, "unknown sampler 'rk4'"),
    ],
)
def test_sampling_options_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options).check()
