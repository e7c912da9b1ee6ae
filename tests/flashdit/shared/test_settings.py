import os
from dataclasses import dataclass, field

import pytest

from flashdit.shared.settings import (
    Key,
    describe,
    find_config,
    merge_settings,
    read_settings,
    shipped_configs,
    to_yaml,
)


@dataclass(kw_only=True)
class OvenOptions:
    """Options of an oven."""

    degrees: int = 180
    """In
    Celsius."""
    racks: tuple[int, int] = (1, 2)

    def __post_init__(self):
        if self.degrees < 0:
            raise ValueError(f"degrees must not be negative, got {self.degrees}")


@dataclass(kw_only=True)
class HotOvenOptions(OvenOptions):
    racks: tuple[int, int] = (1, 2)
    """From below."""
    fan: bool = True
    """Whether air is moved."""


@dataclass(kw_only=True)
class Recipe:
    name: str
    """Of the cake."""
    layers: dict[str, int] = field(default_factory=dict)
    oven: HotOvenOptions = field(default_factory=HotOvenOptions)


@pytest.fixture
def recipe(tmp_path):
    """Returns a function that reads a recipe of a YAML text and overrides."""

    def read_text(text, *overrides):
        (tmp_path / "cake.yaml").write_text(text)
        return read_settings(tmp_path / "cake.yaml", overrides, Recipe)

    return read_text


def test_a_file_and_overrides_become_the_dataclass(recipe):
    made = recipe("name: sponge\noven: {degrees: 200, racks: [2, 3]}", "oven.fan=false")
    assert made == Recipe(name="sponge", oven=HotOvenOptions(degrees=200, racks=(2, 3), fan=False))
    assert isinstance(made.oven, HotOvenOptions)


def test_a_value_may_stand_for_that_of_another_key_also_where_that_is_a_default(recipe):
    assert recipe("name: a${oven.degrees}", "oven.degrees=7").name == "a7"
    assert recipe("name: ${oven.degrees}b").name == "180b"
    assert recipe("name: a\nlayers: {b: '${layers.c}', c: 3}").layers == {"b": 3, "c": 3}


def test_a_pipe_is_read_and_nothing_in_a_file_states_nothing():
    reader, writer = os.pipe()
    os.write(writer, b"name: sponge")
    os.close(writer)
    assert read_settings(f"/dev/fd/{reader}", [], Recipe).name == "sponge"
    os.close(reader)
    assert read_settings(os.devnull, ["name=b"], Recipe) == Recipe(name="b")


def test_what_options_give_comes_before_overrides_and_is_no_yaml(recipe, tmp_path):
    (tmp_path / "empty.yaml").write_text("oven: {degrees: 3, fan: false}")
    made = read_settings(
        tmp_path / "empty.yaml", ["oven.degrees=5"], Recipe, {"name": "[a #b", "oven.degrees": 4}
    )
    assert made == Recipe(name="[a #b", oven=HotOvenOptions(degrees=5, fan=False))


def test_an_override_wins_over_the_file(recipe):
    assert recipe("{name: sponge, oven: {degrees: 200}}", "oven.degrees=150").oven.degrees == 150


def test_an_override_given_twice_is_told_by_the_first_process(recipe, caplog, monkeypatch):
    given = ("oven.fan=true", "oven.degrees=3", "oven.degrees=5")
    assert recipe("name: a", *given).oven.degrees == 5
    assert caplog.messages == ["oven.degrees is given 2 times, the last one counts: 5"]
    monkeypatch.setenv("RANK", "1")
    recipe("name: a", *given)
    assert len(caplog.messages) == 1


def test_a_saved_configuration_reads_back(recipe):
    made = recipe("{name: sponge, layers: {cream: 2}}", "oven.degrees=7")
    assert recipe(to_yaml(made)) == made


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        (
            "name: a",
            "oven.degres=1",
            r"^unknown configuration key 'oven.degres'; .* 'oven.degrees'\?",
        ),
        ("name: a", "oven.racks=[1]", r"^oven.racks must be \[a whole number, a whole number\], got \[1\]"),
        ("name: a", "oven.racks=[1,b]", r"^oven.racks must be \[a whole number, a whole number\], got"),
        ("name: a", "oven.degrees=-1", r"^oven.degrees must not be negative, got -1"),
        ("name: a", "oven.degrees=hot", r"^oven.degrees must be a whole number, got 'hot'$"),
        ("name: ''", "seed=1", r"^name must not be empty, got '': null means none$"),
        ("name: a", "name=''", r"^name must not be empty, got ''"),
        ("name: a", "oven=hot", r"^oven must be a mapping of keys, got 'hot'"),
        ("name: a", "oven", r"^an override must be key=value, got 'oven'"),
        ("- a", "name=b", r"a configuration must be a mapping of keys, got list"),
        ("name: [a", "name=b", r"cake.yaml must be YAML: while parsing"),
        ("3", "name=b", r"cake.yaml must be a mapping of keys: Invalid loaded object type: int$"),
        ("name: 17", "oven.degrees=1", r"^name must be text, got 17: put it between quotes$"),
        ("name: 017", "oven.degrees=1", r"cake.yaml: a number must be decimal, .* got 017$"),
        ("name: a", "oven.degrees=???", r"^oven.degrees must be given a value, got \?\?\?$"),
        ("oven: {degrees: 1}", "oven.fan=true", r"^name must be given a value, got \?\?\?$"),
        ("null: 3", "name=b", r"^every key in .*cake.yaml must be text, got null$"),
        ("oven: {~: 3}", "name=b", r"^every key of oven in .*cake.yaml must be text, got null$"),
        ("3: 4", "name=b", r"^unknown configuration key '3' "),
        ("name: a\nname: b", "oven.fan=true", "(?s)cake.yaml must be YAML: .*found duplicate key name"),
        ('name: "a\\0b"', "oven.fan=true", r"^name must be UTF-8 without NUL, got a\\x00b$"),
        ("name: a", "name=\udc80", r"^name must be UTF-8 without NUL, got \\x80$"),
        (
            "name: a",
            "oven.degrees=${oven.degres}",
            "^oven.degrees: Interpolation key 'oven.degres' not found$",
        ),
        ("name: a", "oven.degrees=${oven.degrees}", "^oven.degrees: Recursive interpolation detected$"),
    ],
)
def test_an_invalid_value_is_named_by_its_key(recipe, text, override, message):
    with pytest.raises(ValueError, match=message):
        recipe(text, override)


@pytest.mark.parametrize(
    ("text", "override"),
    [
        ("[" * 5000 + "]" * 5000, "name=b"),
        ("a: " + "{a: " * 5000 + "}" * 5000, "name=b"),
        ("name: a", "oven=" + "[" * 5000 + "]" * 5000),
        ("name: a", "oven" + ".a" * 5000 + "=1"),
    ],
    ids=["list", "mapping", "value", "key"],
)
def test_what_is_nested_too_deeply_is_one_sentence(recipe, text, override):
    with pytest.raises(ValueError, match=r"cake.yaml and the overrides must be nested less deeply$"):
        recipe(text, override)


def test_another_name_drops_the_options_of_the_part_that_had_the_old_one():
    base = {"oven": {"name": "gas", "flame": 2}, "salt": 1}
    assert merge_settings(base, {"oven": {"name": "stone"}}) == {"oven": {"name": "stone"}, "salt": 1}
    assert merge_settings(base, {"oven": {"flame": 3}})["oven"] == {"name": "gas", "flame": 3}
    assert merge_settings(base, {"oven": {"name": "gas", "lit": 1}})["oven"] == {
        "name": "gas",
        "flame": 2,
        "lit": 1,
    }
    assert base["oven"] == {"name": "gas", "flame": 2}


def test_every_key_is_described_with_type_default_and_docstring():
    assert describe(Recipe) == [
        Key("name", "str", "", "Of the cake."),
        Key("layers", "dict[str, int]", "{}", ""),
        Key("oven.degrees", "int", "180", "In Celsius."),
        Key("oven.racks", "tuple[int, int]", "(1, 2)", "From below."),
        Key("oven.fan", "bool", "True", "Whether air is moved."),
    ]


def test_parameters_are_described_from_the_docstring():
    def bake(dough: str, minutes: "int" = 30, oven=None):
        """Bakes.

        Args:
            dough: What is
                baked.
            minutes: At least 1.

        Returns:
            oven: not a parameter's text.
        """

    assert describe(bake, "cake.") == [
        Key("cake.dough", "str", "", "What is baked."),
        Key("cake.minutes", "int", "30", "At least 1."),
        Key("cake.oven", "", "None", ""),
    ]


def test_shipped_configurations_are_found_by_name_and_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = find_config("digits")
    assert shipped.name == "digits.yaml"
    assert shipped.is_file()
    assert find_config("iwin/tiny_224.yaml").parts[-2:] == ("iwin", "tiny_224.yaml")
    (tmp_path / "digits").write_text("seed: 1")
    assert find_config("digits").read_text() == "seed: 1"
    assert {"digits", "iwin/tiny_224"} <= set(shipped_configs())
    assert not [name for name in shipped_configs() if name.startswith("accelerate")]


def test_an_unknown_configuration_names_the_nearest():
    message = (
        r"--config: flashdit_x does not exist, and is no shipped configuration; did you mean 'flashdit_xl'\?"
    )
    with pytest.raises(ValueError, match=message):
        find_config("flashdit_x")
