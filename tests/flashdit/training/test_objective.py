"""The training objective against plain torch: what a step of a real run reads, feeds, and minimises."""

import json
import math

import pytest
import torch
from torch import nn

from flashdit.data.autoencoders import Autoencoder, load_vae
from flashdit.data.encode import open_latents
from flashdit.data.latents import LatentOptions, LatentSpace, channel_statistics
from flashdit.flow.loss import LossOptions, flow_loss

MULTIPLIER, COSINE_WEIGHT, DROP, TIME_MEAN, TIME_STD = (
    0.75,
    0.7,
    0.3,
    -0.6,
    1.4,
)  # as `make_recorded` has them
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
DRAWN = 4000


@pytest.fixture(scope="module")
def run(make_recorded):
    """Returns a finished run of 24 steps of 16 images: ten epochs of 37 and a bit."""
    trainer = make_recorded("training.steps=24", "training.global_batch_size=16")
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def drawn(run):
    """Returns 4,000 examples as the run's own data set makes them."""
    return run.task.examples.__getitems__(range(DRAWN))


def plain_path(part, known):
    """Returns x_t and u_t of a part by the formulas, float64, from what the data set gave."""
    z, x_0, t = (part.batch[name].double() for name in ("latent", "noise", "time"))
    x_1 = (z - known.mean.double()) / known.std.double() * MULTIPLIER
    t = t[:, None, None, None]
    return t * x_1 + (1 - t) * x_0, x_1 - x_0


def plain_terms(v_t, u_t):
    """Returns the two terms of the loss, as two numbers."""
    mse = ((v_t - u_t) ** 2).mean()
    norm_v, norm_u = ((x**2).sum(1).sqrt() for x in (v_t, u_t))
    least = 0.1 * (norm_u**2).mean((1, 2), keepdim=True).sqrt()  # a new model's v is near zero
    lengths = norm_v.maximum(least) * norm_u
    return mse.item(), (1 - (v_t * u_t).sum(1) / lengths).mean().item()


def test_the_model_gets_normalised_data_on_the_straight_path_from_noise(run, known):
    assert len(run.parts) == 24
    for part in run.parts:
        x_t, _ = plain_path(part, known)
        torch.testing.assert_close(part.given["x"].double(), x_t, **CLOSE)
        assert part.given["t"].equal(part.batch["time"])
        assert part.given["y"].equal(part.batch["label"])
        assert part.given["drop"].equal(part.batch["drop"])


def test_the_loss_that_goes_backward_is_the_formula_in_plain_torch(run, known):
    for part in run.parts:
        mse, cosine = plain_terms(part.v_t.double(), plain_path(part, known)[1])
        assert part.loss == pytest.approx(mse + COSINE_WEIGHT * cosine, rel=1e-5)


def test_the_log_tells_that_loss_and_its_terms(run, known):
    lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    for part, line in zip(run.parts, lines, strict=True):
        mse, cosine = plain_terms(part.v_t.double(), plain_path(part, known)[1])
        assert [line["mse"], line["cosine"]] == pytest.approx([mse, cosine], rel=1e-5)
        assert line["loss"] == pytest.approx(part.loss, rel=1e-6)


def test_without_a_cosine_weight_the_loss_is_the_squared_error_alone(make_recorded, known):
    run = make_recorded("flow.loss.cosine_weight=0", "training.steps=2", "latents.multiplier=1")
    run.fit()
    for part in run.parts:
        z, x_0 = part.batch["latent"], part.batch["noise"]
        u_t = (z - known.mean) / known.std - x_0
        assert part.loss == pytest.approx(((part.v_t - u_t) ** 2).mean().item(), rel=1e-5)


def test_the_loss_is_per_sample_and_in_float32_whatever_the_model_computes_in():
    v_t, u_t = torch.randn(2, 3, 4, 2, 6, generator=torch.Generator().manual_seed(1))
    v_t = v_t.bfloat16()
    loss, terms = flow_loss(v_t, u_t, LossOptions(cosine_weight=0.25))
    for i in range(3):
        mse, cosine = plain_terms(v_t[i : i + 1].double(), u_t[i : i + 1].double())
        assert [terms["mse"][i].item(), terms["cosine"][i].item()] == pytest.approx([mse, cosine], rel=1e-5)
        assert loss[i].item() == pytest.approx(mse + 0.25 * cosine, rel=1e-5)


def test_dropped_labels_reach_the_model_as_the_last_row_of_the_table(run):
    for part in run.parts:
        rows = torch.tensor(
            [
                3 if drop else label
                for label, drop in zip(part.batch["label"], part.batch["drop"], strict=True)
            ]
        )
        assert part.table.shape == (4, 16)
        assert part.embedded.equal(part.table[rows])


def test_the_share_of_dropped_labels_is_the_configured_one_in_every_class(run, drawn):
    assert drawn["drop"].dtype == torch.bool
    for label in range(3):
        share = drawn["drop"][drawn["label"] == label].float().mean().item()
        assert share == pytest.approx(DROP, abs=0.06)  # four standard deviations of 1,000 draws
    assert drawn["drop"].float().mean().item() == pytest.approx(DROP, abs=0.03)
    assert run.stream("drop").equal(drawn["drop"][: 24 * 16])


@pytest.mark.parametrize(("share", "dropped"), [("0", 0), ("1", 16)])
def test_no_label_or_every_label_is_dropped_where_the_share_says_so(make_recorded, share, dropped):
    run = make_recorded(f"model.class_dropout_prob={share}", "training.steps=2")
    run.fit()
    assert run.stream("drop").sum() == dropped
    expected = [part.table[[3] * 8] if dropped else part.table[part.batch["label"]] for part in run.parts]
    assert torch.cat([part.embedded for part in run.parts]).equal(torch.cat(expected))


def test_a_label_is_that_of_the_image_beside_it(run, known):
    rows, _ = known.rows(run.stream("latent"))
    assert run.stream("label").equal(known.labels[rows])
    assert len(known.labels.unique()) == 3


def test_half_of_the_images_are_mirrored_whatever_else_is_drawn(drawn, known):
    _, mirrored = known.rows(drawn["latent"])
    for some in (drawn["drop"], ~drawn["drop"], drawn["time"] < 0.3, drawn["time"] > 0.5):
        assert mirrored[some].float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_without_mirrors_every_latent_is_the_image_as_it_lies(make_recorded, known):
    run = make_recorded("data.mirrors=false")
    run.fit()
    rows, mirrored = known.rows(run.stream("latent"))
    assert not mirrored.any()
    assert run.stream("label").equal(known.labels[rows])


def test_every_epoch_of_a_run_is_another_permutation_of_the_images(run, known, make_recorded):
    rows, _ = known.rows(run.stream("latent"))
    epochs = [tuple(epoch.tolist()) for epoch in rows[: 10 * 37].split(37)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(range(37))}
    assert len({*epochs, tuple(range(37))}) == 11, "in the order of the files, or twice the same"
    other = make_recorded("seed=1", "training.steps=5")
    other.fit()
    assert tuple(known.rows(other.stream("latent"))[0][:37].tolist()) not in epochs


def test_the_noise_is_standard_normal_everywhere(drawn):
    noise = drawn["noise"].double()
    assert noise.shape == (DRAWN, 3, 4, 4)
    count = noise.numel()
    expected = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}  # E x^n, and the variance of x^n
    for power, (moment, variance) in expected.items():
        bound = 5 * math.sqrt(variance / count)
        assert noise.pow(power).mean().item() == pytest.approx(moment, abs=bound)
    pixels = noise.flatten(1)
    covariance = pixels.T @ pixels / DRAWN
    torch.testing.assert_close(covariance, torch.eye(48).double(), rtol=0, atol=6 * math.sqrt(2 / DRAWN))
    other = pixels[1:], pixels[:-1]
    assert (other[0] * other[1]).mean().abs() < 5 / math.sqrt(count), "one image's noise tells of the next"


def test_the_times_follow_the_configured_logit_normal_distribution(drawn):
    t = drawn["time"].double().sort().values
    assert t.min() > 0
    assert t.max() < 1
    cdf = torch.special.ndtr(((t / (1 - t)).log() - TIME_MEAN) / TIME_STD)
    steps = (torch.arange(DRAWN).double() + 0.5) / DRAWN
    assert (cdf - steps).abs().max() < 2 / math.sqrt(DRAWN)  # Kolmogorov: passed by all but 1 in 1,500
    torch.testing.assert_close((t / (1 - t)).log().mean().item(), TIME_MEAN, rtol=0, atol=0.1)
    torch.testing.assert_close((t / (1 - t)).log().std().item(), TIME_STD, rtol=0, atol=0.07)


def test_uniform_times_are_uniform(make_recorded):
    run = make_recorded(times="{name: uniform}")
    t = run.task.examples.__getitems__(range(DRAWN))["time"].double().sort().values
    steps = (torch.arange(DRAWN).double() + 0.5) / DRAWN
    assert (t - steps).abs().max() < 2 / math.sqrt(DRAWN)


def test_what_is_drawn_for_an_image_is_independent_and_of_the_seed(drawn, make_recorded):
    t, drop = drawn["time"], drawn["drop"]
    assert abs(t[drop].mean() - t[~drop].mean()) < 0.05
    brightness = drawn["noise"].flatten(1).mean(1)
    assert abs(torch.corrcoef(torch.stack([t, brightness]))[0, 1]) < 5 / math.sqrt(DRAWN)
    other = make_recorded("seed=1").task.examples.__getitems__(range(50))
    assert not (other["time"] == t[:50]).any()
    assert not (other["noise"] == drawn["noise"][:50]).any()


class Copying(nn.Module):
    """A VAE of no size: pixels are latents."""

    dtype, device, config = torch.float32, torch.device("cpu"), {"block_out_channels": (4,)}

    def __init__(self):
        super().__init__()
        self.calls = []

    def decode(self, latents):
        self.calls.append(latents)
        return type("Output", (), {"sample": latents})

    def encode(self, pixels):
        self.calls.append(pixels)
        return type("Output", (), {"latent_dist": type("P", (), {"mean": pixels, "std": 0.5 + pixels**2})})


MEAN = torch.tensor([0.3, -0.2, 0.1]).reshape(1, 3, 1, 1)
STD = torch.tensor([0.5, 2.0, 1.5]).reshape(1, 3, 1, 1)


def copying_space(multiplier=0.75):
    return LatentSpace(MEAN, STD, LatentOptions(multiplier=multiplier), Autoencoder(Copying()))


def model_latents(pixels, multiplier=0.75):
    """Returns the model's latents of pixels in [-1, 1], by plain arithmetic."""
    return torch.stack(
        [(pixels[:, c] - MEAN[0, c, 0, 0]) / STD[0, c, 0, 0] * multiplier for c in range(3)], dim=1
    )


def test_normalising_and_undoing_it_is_the_stated_arithmetic():
    z = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    space = copying_space()
    torch.testing.assert_close(space.normalise(z), model_latents(z), **CLOSE)
    torch.testing.assert_close(space.denormalise(model_latents(z)), z, **CLOSE)


@pytest.mark.parametrize("offset", [-0.49, -0.25, 0.0, 0.25, 0.49])
def test_decoding_takes_the_nearest_grey_level(offset):
    levels = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6) * 29 % 254 + 1
    pixels = (levels + offset) / 255 * 2 - 1
    images = copying_space().decode(model_latents(pixels.double()).float())
    assert images.dtype == torch.uint8
    assert images.tolist() == levels.tolist()  # (B, 3, H, W), nothing transposed


def test_decoding_maps_minus_one_to_black_one_to_white_and_clamps_beyond():
    values = [-9.0, -1.01, -1.0, -0.996, 0.0, 0.996, 1.0, 1.01, 9.0]
    pixels = torch.tensor(values).reshape(1, 1, 1, 9).expand(1, 3, 1, 9)
    images = copying_space().decode(model_latents(pixels))
    for channel in images[0, :, 0].tolist():
        assert channel[4] in (127, 128)
        assert channel[:4] + channel[5:] == [0, 0, 0, 1, 254, 255, 255, 255]


def test_many_images_are_decoded_in_their_order():
    levels = (torch.arange(70) + 100).reshape(70, 1, 1, 1).expand(70, 3, 1, 2)
    assert copying_space().decode(model_latents(levels / 127.5 - 1)).tolist() == levels.tolist()


def test_encoding_maps_black_to_minus_one_white_to_one_and_samples_the_posterior():
    images = torch.arange(0, 256, 5, dtype=torch.uint8)[:48].reshape(2, 3, 2, 4)
    pixels = 2 * images.float() / 255 - 1
    torch.testing.assert_close(Autoencoder(Copying()).encode(images), pixels, **CLOSE)
    noise = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(3))
    sampled = Autoencoder(Copying()).encode(images, noise)
    torch.testing.assert_close(sampled, pixels + (0.5 + pixels**2) * noise, **CLOSE)


def test_statistics_are_each_channels_own():
    latents = STD * torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(7)) + MEAN
    mean, std = channel_statistics(latents)
    assert mean.shape == std.shape == (1, 3, 1, 1)
    for c in range(3):
        values = latents[:, c].double()
        centre = values.sum() / values.numel()
        spread = ((values - centre).square().sum() / (values.numel() - 1)).sqrt()
        found = [mean[0, c].item(), std[0, c].item()]
        assert found == pytest.approx([centre.item(), spread.item()], rel=1e-5)


def test_images_become_latents_of_themselves_and_of_their_mirrors(tmp_path):
    from PIL import Image

    draws = torch.Generator().manual_seed(4)
    images = torch.randint(256, (5, 3, 8, 8), generator=draws, dtype=torch.uint8)
    for i, image in enumerate(images):
        folder = tmp_path / ("cat" if i < 2 else "hen")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    data = {"name": "images", "path": str(tmp_path), "image_size": 8}
    source, space = open_latents(data, LatentOptions(vae="digits"), torch.device("cpu"), progress=False)
    with torch.no_grad():
        pixels = 2 * images.float() / 255 - 1
        vae = load_vae("digits").module
        plain, flipped = (vae.encode(x).latent_dist.mean for x in (pixels, pixels.flip(3)))
    rows = torch.tensor([4, 0, 2])
    read = source.read(rows, torch.tensor([False, True, False]))
    torch.testing.assert_close(read, torch.stack([plain[4], flipped[0], plain[2]]), rtol=1e-4, atol=1e-5)
    assert source.labels.tolist() == [0, 0, 1, 1, 1]
    values = plain.transpose(0, 1).flatten(1)
    torch.testing.assert_close(space.mean.flatten(), values.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(space.std.flatten(), values.std(1), rtol=1e-4, atol=1e-5)
