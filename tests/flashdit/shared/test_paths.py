import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flashdit.commands.arguments import path
from flashdit.shared.paths import expanded
from flashdit.shared.settings import read_settings


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("AT_HOME", "~/data")
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("~/x", "/home/ann/x"),
        ("~", "/home/ann"),
        ("$DATA/x", "/data/x"),
        ("${DATA}x", "/datax"),
        ("$AT_HOME/x", "/home/ann/data/x"),
        ("a~b/5$", "a~b/5$"),
        ("plain", "plain"),
    ],
)
def test_home_and_variables_are_expanded(text, meant):
    assert expanded(text) == meant


def test_a_variable_that_is_not_set_is_named():
    with pytest.raises(
        ValueError, match=re.escape("the environment variable UNSET must be set for $UNSET/x")
    ):
        expanded("$UNSET/x")


@dataclass(kw_only=True)
class Place:
    dir: str = ""


@dataclass(kw_only=True)
class Places:
    run: Place = field(default_factory=Place)
    data: dict[str, str] = field(default_factory=dict)


def test_texts_of_a_configuration_are_expanded(tmp_path):
    (tmp_path / "c.yaml").write_text("run: {dir: ~/runs}\n")
    config = read_settings(tmp_path / "c.yaml", ["data.path=$DATA/x"], Places)
    assert config == Places(run=Place(dir="/home/ann/runs"), data={"path": "/data/x"})
    with pytest.raises(ValueError, match=r"^data\.path: the environment variable UNSET must be set"):
        read_settings(tmp_path / "c.yaml", ["data.path=$UNSET"], Places)


def test_options_of_commands_are_expanded(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=path)
    assert parser.parse_args(["--output", "~/x"]).output == Path("/home/ann/x")
    with pytest.raises(SystemExit):
        parser.parse_args(["--output", "$UNSET/x"])
    assert "--output: the environment variable UNSET must be set for $UNSET/x" in capsys.readouterr().err
