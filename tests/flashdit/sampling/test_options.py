import pytest

from flashdit import config
from flashdit.sampling.options import SamplingOptions
from flashdit.sampling.records import change_sampler, current_sampling

DOPRI5 = {"name": "dopri5", "atol": 1e-5, "rtol": 1e-5}


def test_a_sampler_is_written_with_all_its_options_or_by_name_alone():
    assert SamplingOptions(sampler={"name": "heun"}).sampler == "heun"
    assert SamplingOptions(sampler="dopri5").sampler == DOPRI5
    assert SamplingOptions(sampler={"name": "dopri5", "rtol": 0.1}).sampler == DOPRI5 | {"rtol": 0.1}


def test_times_are_those_of_steps_and_shift():
    assert SamplingOptions(steps=4).times == [0, 0.25, 0.5, 0.75, 1]
    assert SamplingOptions(steps=2, shift=3.0).times == [0, 0.75, 1]


@pytest.mark.parametrize(
    ("name", "texts", "expected"),
    [
        (None, [], {"name": "dopri5", "atol": 0.1}),
        (None, ["rtol=1e-3"], {"name": "dopri5", "atol": 0.1, "rtol": 1e-3}),
        ("dopri5", ["atol=2"], {"name": "dopri5", "atol": 2}),
        ("euler", [], {"name": "euler"}),
        ("heun", ["order=2"], {"name": "heun", "order": 2}),
    ],
)
def test_a_changed_sampler_keeps_its_options_and_another_one_drops_them(name, texts, expected):
    assert change_sampler({"name": "dopri5", "atol": 0.1}, name, texts) == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"sampler": "euler", "dtype": "bf16", "atol": 1.0, "rtol": 2.0}, {"precision": "bf16"}),
        (
            {"sampler": "dopri5", "atol": 1e-3, "rtol": 1e-2},
            {"sampler": DOPRI5 | {"atol": 1e-3, "rtol": 1e-2}},
        ),
        ({"sampler": {"name": "dopri5", "rtol": 1.0}, "atol": 1e-5}, {"sampler": DOPRI5 | {"rtol": 1.0}}),
        ({"atol": 1.0, "steps": 3}, {"steps": 3}),
    ],
)
def test_records_of_before_have_todays_keys(record, expected):
    kept = {"sampler": record["sampler"]} if "sampler" in record else {}
    assert current_sampling(record) == kept | expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sampling.cfg_interval=[0.5,0.2]"],
            r"^sampling.cfg_interval must be 0 ≤ low ≤ high ≤ 1",
        ),
        (["sampling.steps=0"], r"^sampling.steps must be at least 1, got 0"),
        (["sampling.sampler=huen"], r"^sampling: unknown sampler 'huen'; did you mean 'heun'"),
        (
            ["sampling.sampler.name=dopri5", "sampling.sampler.atol=0"],
            "^sampling: atol and rtol must be",
        ),
        (
            ["sampling.sampler.name=heun", "sampling.sampler.atol=1"],
            "option of sampler 'heun' 'atol'",
        ),
        (["sampling.precision=fp8"], r"^sampling: unknown precision 'fp8'"),
        (["sampling.sampler=3"], r"^sampling.sampler must be a name or a mapping with 'name', got 3"),
    ],
)
def test_an_invalid_option_in_a_configuration_is_named_by_its_key(overrides, message):
    with pytest.raises(ValueError, match=message):
        config.load(None, overrides)


def test_a_configuration_takes_a_sampler_by_name_or_with_options():
    assert config.load(None, ["sampling.sampler=heun"]).sampling.sampler == "heun"
    given = ["sampling.sampler.name=dopri5", "sampling.sampler.atol=1e-6"]
    assert config.load(None, given).sampling.sampler == DOPRI5 | {"atol": 1e-6}
    assert config.load(None, ["sampling.sampler=dopri5", "sampling.dtype=fp16"]).sampling.precision == "fp16"
