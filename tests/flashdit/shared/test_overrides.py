from typing import Any

import pytest

from flashdit.shared.overrides import nested, parse_value, split_override

TEXTS = ["a #b", "017", "2024", " x ", "[x", "{a}", "true", "*x", "a: b", "a=b", "it's", "ü", "-x", "~", "'"]


@pytest.mark.parametrize("text", [*TEXTS, "a\nb", "2024-01-01", "!x", "'a' and b"])
@pytest.mark.parametrize("expected", [str, str | None])
def test_where_text_is_expected_it_is_the_text_as_it_stands(text, expected):
    assert parse_value("run.dir", text, expected) == text


@pytest.mark.parametrize(
    ("text", "expected", "value"),
    [
        ("null", str, "null"),
        ("null", str | None, None),
        ("", str, None),
        ("", str | None, None),
        ("'null'", str | None, "null"),
        ('"a\\tb"', str, "a\tb"),
        ("''", str, ""),
        ("0.17", Any, 0.17),
        ("0", int, 0),
        ("0x10", int, 16),
        ("['017', a:b]", Any, ["017", "a:b"]),
        ("null", int | None, None),
        ("[1, a]", list[str], [1, "a"]),
        ("${seed}", int, "${seed}"),
        ("2024", Any, 2024),
        ("'2024'", Any, "2024"),
    ],
)
def test_what_is_null_or_between_quotes_or_no_text_is_yaml(text, expected, value):
    assert parse_value("run.dir", text, expected) == value


@pytest.mark.parametrize(
    ("text", "expected", "message"),
    [
        ("[", int, r"^seed must be YAML, got '\[': did not find expected node content$"),
        ("${a", int, r"^seed must be YAML, got '\${a': no viable alternative at input '\${a'$"),
        ("'a'b'", str, r"^seed must be YAML, got ''a'b'': "),
        ("017", int, r"^seed: a number must be decimal, and a text of digits in quotes, got 017$"),
        ("[1, -0_17]", Any, r"^seed: a number must be decimal, .* got -0_17$"),
        ("{a: 1:30}", Any, r"^seed: a number must be decimal, .* got 1:30$"),
    ],
)
def test_what_is_no_yaml_is_named_by_its_key(text, expected, message):
    with pytest.raises(ValueError, match=message):
        parse_value("seed", text, expected)


def test_keys_are_nested_and_the_last_one_of_a_name_counts():
    assert nested([("a.b", 1), ("a.c", 2), ("d", 3), ("a.b", 4)]) == {"a": {"b": 4, "c": 2}, "d": 3}


def test_an_override_has_an_equals_sign():
    assert split_override("data.path=a=b") == ("data.path", "a=b")
    with pytest.raises(ValueError, match=r"^an override must be key=value, got 'seed'$"):
        split_override("seed")
