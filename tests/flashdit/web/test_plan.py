"""A request to the page: what it may take, the values of a grid, and how classes are named."""

from dataclasses import replace

import pytest

from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.classes import class_ids
from flashdit.web.plan import (
    AXES,
    PageRequest,
    Work,
    class_choices,
    plan_page,
    plan_sheet,
    sample_command,
)

GOOD = PageRequest(classes=["hen", "0"], num_images=3)


@pytest.fixture(scope="module")
def generator(tiny_checkpoint):
    return load_generator(tiny_checkpoint)


def test_what_is_not_given_is_as_the_checkpoint_has_it(generator):
    options = plan_page(generator, PageRequest(classes=["cat"], num_images=1)).options
    assert (options.steps, options.cfg_scale, options.cfg_interval) == (3, 1.5, (0.0, 1.0))
    assert plan_page(generator, replace(GOOD, cfg_high=0.5)).options.cfg_interval == (0.0, 0.5)


def test_a_grid_over_steps_of_a_sampler_that_chooses_them_is_refused(generator):
    request = replace(GOOD, across="steps", across_values="5, 10", sampler="dopri5")
    with pytest.raises(ValueError, match=r"a grid over steps requires samplers that do not .* got dopri5"):
        plan_sheet(generator, request)


def test_no_class_means_the_first_ones_as_in_sample_py(generator):
    assert plan_page(generator, replace(GOOD, classes=[])).labels.tolist() == [0, 1, 2]


def test_classes_that_share_a_name_go_by_id():
    assert class_choices(["crane", "hen", "crane"]) == [
        ("crane (0)", "0"),
        ("hen", "hen"),
        ("crane (2)", "2"),
    ]


def test_work_is_images_by_pixels_by_evaluations(generator):
    request = replace(GOOD, num_images=10, steps=50, cfg_scale=2.0, height=64, width=32)
    plan = plan_page(generator, request)
    millions = 10 * (64 * 32) * (50 * 2) / 1e6
    Work([plan], millions)
    sentence = r"must be at most 2.04 million on this page \(--max-work\), got 10 × 2,048 × 100 = 2 million"
    with pytest.raises(ValueError, match=sentence):
        Work([plan], millions - 0.008)
    Work([plan, plan], 2 * millions)
    with pytest.raises(ValueError, match="got 20 × 2,048 × 100 = 4 million"):
        Work([plan, plan], 2 * millions - 0.001)


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        (("size", "1", None, None), "unknown option of a grid 'size' .known: class, guidance"),
        (("guidance", "1, x", None, None), "the values of guidance must be numbers with commas .* got 'x'"),
        (("steps", "2.5", None, None), "the values of steps must be whole numbers with commas .* got '2.5'"),
        (("steps", " , ", None, None), "a grid over steps requires its values"),
        (("steps", None, None, None), "a grid over steps requires its values"),
        (("steps", "1", "steps", "2"), "columns and rows must be two options, got 'steps' for both"),
        ((None, "1", "steps", "2"), "a grid's rows require its columns"),
        (
            ("seed", "1,2,3,4,5,6,7,8,9", "steps", "1,2,3,4,5,6,7,8"),
            "must be at most 64 on this page, got 72",
        ),
        (("class", "cat, dog", None, None), "unknown class 'dog'"),
        (("guidance", "nan", None, None), "cfg_scale must be a number within"),
        (("sampler", "eular", None, None), "unknown sampler 'eular'; did you mean 'euler'"),
        (("steps", "1" * 150, None, None), "steps must be a number within"),
    ],
)
def test_a_grid_that_is_none_is_refused(generator, axes, sentence):
    names = ("across", "across_values", "down", "down_values")
    with pytest.raises(ValueError, match=sentence):
        plan_sheet(generator, replace(GOOD, **dict(zip(names, axes, strict=True))))


def test_a_grid_is_read_row_by_row_and_each_picture_is_one_image(generator):
    request = replace(GOOD, across="seed", across_values="5,6,7", down="sampler", down_values="heun, euler")
    sheet = plan_sheet(generator, request)
    assert (sheet.heads, sheet.rows) == (["seed 5", "seed 6", "seed 7"], ["heun", "euler"])
    assert [(plan.options.sampler, plan.options.seed) for plan in sheet.plans] == [
        (name, seed) for name in ("heun", "euler") for seed in (5, 6, 7)
    ]
    assert all(plan.labels.tolist() == [2] for plan in sheet.plans)


def test_every_option_of_a_grid_has_a_field():
    for field in AXES.values():
        assert hasattr(GOOD, field)


def test_commands_quote_what_a_shell_would_read_and_name_other_weights(tiny_checkpoint):
    generator = load_generator(tiny_checkpoint, weights="model")
    generator.class_names = ["$(rm x)", "a b", "a b"]
    plan = plan_page(generator, PageRequest(classes=[0, 1, 2], num_images=3))
    command = sample_command(plan, "my vae")
    assert "--ema model --vae 'my vae' --class '$(rm x)' 1 2 --num-images 3" in command


def test_one_of_a_thousand_classes_is_found(generator):
    generator.class_names, before = [f"kind {i:04d}, sort {i}" for i in range(1000)], generator.class_names
    try:
        for name, label in (("sort 999", 999), ("Kind 0500", 500), ("17", 17)):
            assert plan_page(generator, PageRequest(classes=[name], num_images=1)).labels.tolist() == [label]
        with pytest.raises(ValueError, match="did you mean 'sort 99"):
            plan_page(generator, PageRequest(classes=["sort 99x"], num_images=1))
    finally:
        generator.class_names = before


def test_every_class_of_imagenet_is_chosen_by_what_is_shown_of_it():
    names = [str(i) for i in range(1000)]
    choices = class_choices(names)
    assert choices[207] == ("golden retriever", "207")
    assert choices[134][0] == "crane (134)"
    assert len({shown for shown, _ in choices}) == 1000
    assert class_ids([value for _, value in choices], names) == list(range(1000))
