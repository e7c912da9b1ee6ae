"""What the web page asks for: the images of sample.py, a film of what the sampler saw, the recipe."""

import itertools
import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from flashdit.commands import sample
from flashdit.flow.guidance import guide
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.recipe import identity
from flashdit.web.plan import PageRequest, Work, plan_page
from flashdit.web.studio import (
    FRAMES,
    KEPT_REQUESTS,
    Closed,
    Studio,
    film_times,
    load_generators,
    watched_batches,
)

GOOD = PageRequest(classes=["hen", "0"], num_images=3)


@pytest.fixture(scope="module")
def generator(tiny_checkpoint):
    return load_generator(tiny_checkpoint)


@pytest.fixture(scope="module")
def lively(tiny_checkpoint):
    """Returns a generator whose velocity moves the noise by several standard deviations."""
    generator = load_generator(tiny_checkpoint)
    generator.model.final_layer.linear.weight.mul_(40)
    return generator


@pytest.fixture
def studio(generator, tmp_path):
    (tmp_path / "made").mkdir()
    return Studio({"tiny": generator}, tmp_path / "made", vae=None, max_work=100)


def make(studio, request, *say):
    (sheet,), work = studio.sheets(["tiny"], request)
    return studio.make(sheet, work, *say)


def watch(plan, say=lambda *_: None):
    return watched_batches(plan, Work([plan], 100), say)


def run(command, out):
    """Runs a command that the page shows and returns the pixels of the picture it is about."""
    line, about = command.split("\n")
    words = shlex.split(line)
    assert words[:2] == ["flashdit", "sample"]
    sample.main([*words[2:], "--output", str(out), "--device", "cpu"])
    return pixels(out / about.removeprefix("# this picture: "))


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).copy()


@pytest.mark.parametrize("sampler", ["euler", "dopri5", "sde-euler"])
def test_images_are_those_of_sample_py(studio, tiny_checkpoint, tmp_path, sampler):
    request = replace(GOOD, sampler=sampler, steps=4, cfg_scale=2.0, cfg_low=0.1, cfg_high=0.6, seed=5)
    made = make(studio, replace(request, height=24, width=44))
    options = [
        "--class",
        "hen",
        "0",
        "--num-images",
        "3",
        "--sampler",
        sampler,
        "--seed",
        "5",
        *(() if sampler == "dopri5" else ("--steps", "4")),
    ]
    options += ["--cfg-scale", "2", "--cfg-interval", "0.1", "0.6", "--height", "24", "--width", "44"]
    out = tmp_path / "out"
    sample.main(["--checkpoint", str(tiny_checkpoint), "--output", str(out), "--format", "png", *options])
    assert [name for _, name in made.images] == ["hen", "hen", "cat"]
    for path, _ in made.images:
        assert np.array_equal(pixels(path), pixels(out / path.name))
    assert np.array_equal(pixels(made.grid), pixels(out / "grid.png"))
    assert identity(made.recipe) == identity(json.loads((out / "recipe.json").read_text()))


def test_every_png_carries_its_recipe(studio):
    made = make(studio, GOOD)
    for path in (made.grid, *(path for path, _ in (*made.images, *made.film))):
        with Image.open(path) as picture:
            recipe = json.loads(picture.text["recipe"])
        assert recipe["weights_sha256"] == made.recipe["weights_sha256"]
        assert recipe["sampling"] == made.recipe["sampling"]


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("batch_size", [2, 100])
def test_the_film_is_where_the_guided_velocity_leads(lively, scale, batch_size):
    checked = plan_page(lively, replace(GOOD, steps=5, cfg_scale=scale, cfg_low=0.2, cfg_high=0.6, seed=3))
    checked.options.batch_size = batch_size
    _, predictions = watch(checked)
    v = guide(lively.model, checked.labels[:1], lively.num_classes, scale, (0.2, 0.6))
    x_t = lively.noise(torch.tensor([0]), 3)
    for t, t_next in ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0)):
        v_t = v(x_t, t)
        nearest = min(predictions, key=lambda time, t=t: abs(time - t))
        torch.testing.assert_close(predictions[nearest], x_t + (1 - t) * v_t, rtol=1e-3, atol=1e-4)
        x_t = x_t + (t_next - t) * v_t
    assert len(predictions) == 5


def test_the_last_frame_of_euler_is_the_image(lively, studio):
    studio.generators["tiny"] = lively
    made = make(studio, replace(GOOD, steps=9, cfg_scale=2.0))
    assert [t for _, t in made.film][:: FRAMES - 1] == ["0.00", "0.89"]
    assert len(made.film) == FRAMES
    last, image = pixels(made.film[-1][0]).astype(int), pixels(made.images[0][0]).astype(int)
    assert abs(last - image).max() <= 1
    assert abs(pixels(made.film[0][0]).astype(int) - image).max() > 20


def test_the_film_of_an_adaptive_sampler_is_of_the_first_image_alone(lively):
    wish = replace(GOOD, sampler="dopri5", cfg_scale=2.0)
    _, beside_others = watch(plan_page(lively, wish))
    _, alone = watch(plan_page(lively, replace(wish, classes=["hen"], num_images=1)))
    assert beside_others.keys() == alone.keys()
    assert all(beside_others[t].equal(alone[t]) for t in alone)


def test_watching_changes_no_generator(generator):
    before = generator.velocity
    watch(plan_page(generator, GOOD))
    assert generator.velocity is before


def test_film_times_are_even_and_keep_the_ends():
    assert film_times([0.5, 0.0, 0.25]) == [0.0, 0.25, 0.5]
    times = film_times([i / 100 for i in range(50)])
    assert (len(times), times[0], times[-1]) == (FRAMES, 0.0, 0.49)
    assert max(np.diff(times)) - min(np.diff(times)) < 0.011


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 100_000}, "steps must be at most 1000 on this page, got 100000"),
        ({"steps": 10**15}, "steps must be at most 1000 on this page"),
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"num_images": 65}, "num_images must be at most 64 on this page, got 65"),
        (
            {"cfg_low": 0.8, "cfg_high": 0.2},
            "cfg_interval must be 0 ≤ low ≤ high ≤ 1 in time, got 0.8 0.2",
        ),
        ({"sampler": "eular"}, "unknown sampler 'eular'; did you mean 'euler'"),
        ({"height": 30}, "height must be a multiple of 4 pixels"),
        ({"width": 4096}, "width must be at most 1024 on this page, got 4096"),
        ({"seed": -1}, r"seed must be from 0 to below 2\^63, got -1"),
        ({"classes": ["3"]}, r"class 3 is out of range for this 3-class model \(0–2\)"),
        (
            {"classes": ["goldn retriever"]},
            "unknown class 'goldn retriever'; did you mean 'golden retriever'",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is(studio, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(studio, replace(GOOD, **wrong))
    assert list(studio.folder.iterdir()) == []


def test_files_of_old_requests_go(studio):
    made = [make(studio, replace(GOOD, steps=1, num_images=1)) for _ in range(KEPT_REQUESTS + 1)]
    assert not made[0].grid.exists()
    assert all(pictures.grid.exists() for pictures in made[1:])
    assert len(list(studio.folder.iterdir())) == KEPT_REQUESTS


def test_checkpoints_are_named_by_run_and_step_or_by_path(tiny_checkpoint, tmp_path):
    other = tmp_path / "run0" / "checkpoints" / tiny_checkpoint.name
    other.parent.mkdir(parents=True)
    other.symlink_to(tiny_checkpoint)
    run = tiny_checkpoint.parent.parent
    names = list(load_generators([str(run), str(other)], "cpu", None, "ema"))
    expected = (
        [str(tiny_checkpoint), str(other)] if run.name == "run0" else [f"{run.name}, step 7", "run0, step 7"]
    )
    assert names == expected


@pytest.mark.parametrize("sampler", ["euler", "sde-euler"])
def test_the_command_of_each_picture_makes_it(studio, tmp_path, sampler):
    request = replace(GOOD, classes=["golden retriever", "0"], sampler=sampler, seed=3, cfg_low=0.1)
    made = make(studio, replace(request, steps=4, cfg_scale=2.3, height=24, width=44))
    for number in (0, 2):
        again = run(made.commands[number], tmp_path / str(number))
        assert np.array_equal(again, pixels(made.images[number][0]))


def test_a_grid_holds_the_pictures_of_its_commands_in_order(studio, tmp_path):
    axes = {
        "across": "guidance",
        "across_values": "1, 2.5",
        "down": "class",
        "down_values": "hen, 0, golden retriever",
    }
    made = make(studio, replace(GOOD, seed=4, **axes))
    assert made.columns == 2
    assert [text for _, text in made.images] == [
        f"{name}, guidance {scale}" for name in ("hen", "0", "golden retriever") for scale in ("1", "2.5")
    ]
    for number, (path, _) in enumerate(made.images):
        assert np.array_equal(run(made.commands[number], tmp_path / str(number)), pixels(path))
    recipes = json.loads(Image.open(made.grid).text["recipe"])
    assert [(recipe["classes"], recipe["sampling"]["cfg_scale"]) for recipe in recipes] == [
        ([label], scale) for label in (2, 0, 1) for scale in (1.0, 2.5)
    ]
    assert len(made.film) == 3


def test_progress_rises_to_the_end_and_names_the_images(studio):
    said = []
    make(studio, replace(GOOD, sampler="dopri5"), lambda share, text: said.append((share, text)))
    shares = [share for share, _ in said]
    assert max(b - a for a, b in itertools.pairwise(shares)) < 0.4
    assert min(b - a for a, b in itertools.pairwise(shares)) > -0.3  # a rejected step goes back
    assert (shares[0], round(max(shares), 6)) == (0, 1)
    assert {text.partition(",")[0] for _, text in said} == {f"{i} of 3 images" for i in range(3)}


def test_progress_goes_over_both_models_and_all_cells(studio, generator):
    studio.generators["other"] = generator
    sheets, work = studio.sheets(["tiny", "other"], replace(GOOD, across="seed", across_values="1,2"))
    said = []
    for sheet in sheets:
        studio.make(sheet, work, lambda share, text: said.append(share))
    assert said == sorted(said)
    assert [share for share in said if round(share * 4, 6).is_integer()] == [0, 0.25, 0.5, 0.75]


def test_an_adaptive_sampler_is_stopped_once_its_rate_is_known_to_be_too_high(studio):
    plan = plan_page(studio.generators["tiny"], replace(GOOD, num_images=1, sampler="dopri5"))
    (batch,), _ = watch(plan)
    one = int(batch.nfe) * 32 * 32 / 1e6
    studio.max_work = one * 10
    said = []
    with pytest.raises(ValueError, match=r"must be at most .* million .* got 64 × 1,024 × \d+ = \d+ million"):
        make(studio, replace(GOOD, num_images=64, sampler="dopri5"), lambda *word: said.append(word))
    assert said[-1][1].startswith("0 of 64"), "after the first image"
    assert list(studio.folder.iterdir()) == []
    studio.max_work = one * 0.5
    with pytest.raises(ValueError, match="must be at most"):
        make(studio, replace(GOOD, num_images=1, sampler="dopri5"))


def test_a_closed_page_stops_sampling(studio):
    def say(share, text):
        studio.is_closed = share > 0

    with pytest.raises(Closed):
        make(studio, replace(GOOD, steps=5), say)
    assert list(studio.folder.iterdir()) == []


def test_an_unknown_model_is_named(studio):
    with pytest.raises(ValueError, match="unknown model 'tini'; did you mean 'tiny'"):
        studio.sheets(["tini"], GOOD)
