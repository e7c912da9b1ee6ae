import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from flashdit.shared import registry
from flashdit.shared.registry import Registry, check_type, unknown


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
        (3, "cake must be a name or a mapping with 'name', got 3"),
        ({"name": "sponge", "eggs": "x"}, "option 'eggs' of cake 'sponge' must be a whole number, got 'x'"),
        ({"name": "sponge", "eggs": True}, "option 'eggs' of cake 'sponge' must be a whole number, got True"),
        ({"name": "sponge", "eggs": 3, "sugar": "x"}, "'sugar' of cake 'sponge' must be a number, got 'x'"),
    ],
)
def test_specs_that_cannot_be_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        CAKES.build(spec)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, int),
        (1, float),
        (0.5, float),
        (True, bool),
        ("x", str),
        (None, str | None),
        ([1, 0.5], tuple[float, float]),
        ((1, 2, 3), list[int]),
        ([1, 2, 3], tuple[int, ...]),
        ([], list[str]),
        ([1], int | Sequence[int]),
        ({"a": 1}, dict[str, Any]),
        ({"a": 1}, Mapping[str, Any]),
        (object(), Any),
    ],
)
def test_values_of_a_type_are_taken(value, expected):
    check_type("key", value, expected)


@pytest.mark.parametrize(
    ("value", "expected", "name"),
    [
        (1.0, int, "a whole number"),
        (True, float, "a number"),
        (1, bool, "true or false"),
        (1, str | None, "text or null"),
        ([1], tuple[int, int], r"\[a whole number, a whole number\]"),
        ([1, "x"], list[int], "a list, each a whole number"),
        ("12", Sequence[str], "a list, each text"),
        ([1], dict[str, Any], "a mapping of keys"),
    ],
)
def test_values_of_another_type_are_refused_in_words(value, expected, name):
    with pytest.raises(ValueError, match=f"^key must be {name}, got "):
        check_type("key", value, expected)


def test_a_name_far_from_all_known_ones_gets_no_hint():
    assert str(unknown("cake", "xyz", ["sponge"])) == "unknown cake 'xyz' (known: sponge)"


@pytest.fixture
def announcing(monkeypatch, tmp_path):
    """Returns a registry whose group has pieces in modules that are not imported yet."""
    (tmp_path / "late_pie.py").write_text(
        "import sys\nregistry = sys.modules['__late_registry__']\nregistry.add('pie', 'a pie')\n"
    )
    (tmp_path / "late_nothing.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "late_broken.py").write_text("raise SystemExit(3)")
    pieces = {"pie": "late_pie", "tart": "late_nothing", "gone": "late_absent", "burnt": "late_broken"}
    monkeypatch.setattr(registry, "announced", lambda group: pieces)
    made = Registry("cake", "cakes")
    monkeypatch.setitem(sys.modules, "__late_registry__", made)
    yield made
    for name in pieces.values():
        sys.modules.pop(name, None)


def test_announced_pieces_are_listed_without_importing_and_imported_when_named(announcing):
    assert announcing.names() == ["burnt", "gone", "pie", "tart"]
    assert "late_pie" not in sys.modules
    assert announcing["pie"] == "a pie"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tart", "announces cake 'tart' must register it on import, late_nothing does not"),
        ("gone", "cake 'gone' must import, late_absent does not: No module named"),
        ("burnt", "cake 'burnt' must import, late_broken does not: SystemExit: 3"),
        ("pi", "unknown cake 'pi'; did you mean 'pie'"),
    ],
)
def test_announcements_that_lead_nowhere_are_named(announcing, name, message):
    with pytest.raises(ValueError, match=message):
        announcing[name]


def test_a_checkout_announces_what_its_pyproject_says():
    assert registry.announced("console_scripts").keys() >= {"pytest"}
    assert registry.announced("flashdit.nothing") == {}


def test_an_outside_package_cannot_take_a_name_of_ours(monkeypatch):
    def point(module, package):
        dist = type("Distribution", (), {"name": package})
        return type("Point", (), {"name": "fid", "module": module, "dist": dist})

    points = [point("flashdit.ours", "flashdit"), point("theirs", "other")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert registry.announced.__wrapped__("a.group")["fid"] == "flashdit.ours"
