from dataclasses import dataclass

import pytest

from flashdit.shared.registry import Registry, unknown


@dataclass(kw_only=True)
class CakeOptions:
    eggs: int
    sugar: float = 0.5


CAKES = Registry("cake")


@CAKES.register("sponge", CakeOptions)
def sponge(options, *context):
    return options.eggs, options.sugar, context


def test_a_spec_builds_its_part_from_options_and_context():
    assert CAKES.build({"name": "sponge", "eggs": 3}, "oven") == (3, 0.5, ("oven",))
    assert CAKES.names() == ["sponge"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spong", "unknown cake 'spong'; did you mean 'sponge'.*known: sponge"),
        ({"name": "sponge", "egs": 3}, "unknown option of cake 'sponge' 'egs'; did you mean 'eggs'"),
        ({"name": "sponge"}, "cake 'sponge' needs the option 'eggs'"),
        ({"eggs": 3}, "a cake needs a 'name'"),
    ],
)
def test_specs_that_cannot_be_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        CAKES.build(spec)


def test_a_name_far_from_all_known_ones_gets_no_hint():
    assert str(unknown("cake", "xyz", ["sponge"])) == "unknown cake 'xyz' (known: sponge)"
