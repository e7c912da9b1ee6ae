import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flashdit import config
from flashdit.commands.arguments import path
from flashdit.shared.paths import (
    check_length,
    check_outside,
    check_replaceable,
    check_writable,
    expanded,
    resolved,
)
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


def test_a_name_with_a_dollar_that_is_there_comes_before_a_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("b", "variable")
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert expanded(f"{tmp_path}/a$b/c") == f"{tmp_path}/avariable/c"
    (tmp_path / "a$b").mkdir()
    (tmp_path / "a$b" / "c$UNSET.png").touch()
    assert expanded("$PLACE/a$b/c$UNSET.png") == f"{tmp_path}/a$b/c$UNSET.png"
    assert expanded("$PLACE/a$b/new") == f"{tmp_path}/a$b/new"
    assert expanded("$PLACE/x$b") == f"{tmp_path}/xvariable"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/a$b") == f"{tmp_path}/a$b"
    monkeypatch.chdir(tmp_path)
    assert expanded("a$b/x") == "a$b/x"


def test_only_a_file_of_the_same_kind_or_an_empty_one_is_replaceable(tmp_path):
    path = tmp_path / "out"
    check_replaceable(path, "mark", "--output")
    path.touch()
    check_replaceable(path, "mark", "--output")
    path.write_bytes(b"\xff" * 2**20 + b"mark")
    check_replaceable(path, "mark", "--output")
    for content in (b"mar", b"m\0ark"):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"^--csv must be a new file or an earlier one .*, got .*out: give"
        ):
            check_replaceable(path, "mark", "--csv")
    with pytest.raises(ValueError, match="must be a new file"):
        check_replaceable(tmp_path, "mark", "--output")


def test_what_lies_in_a_folder_of_images_is_told_through_links_and_dots(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "link").symlink_to(images)
    check_outside(tmp_path / "images2", images, "--output", "the run")
    check_outside(images / ".." / "out", images, "--output", "the run")
    check_outside(images / "x", None, "--output", "the run")
    for inside in (images, images / "x" / "y", tmp_path / "link" / "x"):
        with pytest.raises(
            ValueError, match=r"^--output must not lie in the images of the run, .*images, got"
        ):
            check_outside(inside, images, "--output", "the run")


def test_a_place_that_cannot_be_written_is_named_and_nothing_is_left_of_the_attempt(tmp_path):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "deep", "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for place, why in ((tmp_path / "file" / "x", "Not a directory"), (Path("/proc/x/y"), "No such file")):
        with pytest.raises(ValueError, match=rf"^run\.dir must be where files can be written, got .*: {why}"):
            check_writable(place, "run.dir")


def test_a_link_to_itself_or_to_nothing_is_no_place_to_write(tmp_path):
    loop, dangling = tmp_path / "loop", tmp_path / "dangling"
    loop.symlink_to(loop)
    dangling.symlink_to("nowhere")
    for place, link in ((loop, loop), (loop / "a" / "b", loop), (dangling, dangling)):
        message = f"^run.dir must be where files can be written, got {place}: {link} is a link to nothing$"
        with pytest.raises(ValueError, match=message):
            check_writable(place, "run.dir")
        assert resolved(place).name == (place.name if link == loop else "nowhere")
        check_outside(place, tmp_path / "pics", "OUT", "the run")
    check_writable(tmp_path / "new" / "folder", "run.dir")


def test_a_name_that_no_file_system_takes_is_named_by_its_option(tmp_path, capsys):
    long = tmp_path / ("x" * 300) / "y"
    for check in (check_writable, check_length):
        with pytest.raises(ValueError, match=r"^OUT .*/y: File name too long$"):
            check(long, "OUT")
    with pytest.raises(ValueError, match=r"^run.dir must be a shorter path, got .*: File name too long$"):
        config.load(None, [f"run.dir={long}"])
    with pytest.raises(ValueError, match=r"^data.path must be a shorter path, got .*: File name too long$"):
        config.load(None, ["data.name=images", f"data.path={long}"])
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=path)
    for given, message in ((str(long), "it must be a shorter path"), ("", "it must not be empty")):
        with pytest.raises(SystemExit):
            parser.parse_args(["--out", given])
        assert f"argument --out: {message}" in capsys.readouterr().err
