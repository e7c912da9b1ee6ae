"""The documentation is true: links lead to files, commands, options and keys exist, the code runs."""

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from pages import FENCE, fenced
from test_architecture import LAYERS

import flashdit.__main__
import iwin_tasks.__main__
from flashdit import config
from flashdit.evaluation.metrics.metric import METRICS
from flashdit.flow.samplers import SAMPLERS
from flashdit.shared.settings import describe
from iwin_core import IwinConfig
from iwin_tasks.classification.config import ClassifierConfig, load_classifier_config
from iwin_tasks.detection.config import DetectionConfig, load_detection_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
from generated import help_of  # noqa: E402 - the documentation's own reading of help

TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in TOP), *sorted(DOCS.glob("*.md"))]
PROGRAMS = {"flashdit": flashdit.__main__.COMMANDS, "iwin": iwin_tasks.__main__.COMMANDS}
SCRIPTS = {
    "train.py": "flashdit train",
    "sample.py": "flashdit sample",
    "eval_fid.py": "flashdit eval",
    "encode_latents.py": "flashdit encode",
    "train_classifier.py": "iwin classify",
}
LOADERS = {  # of the configuration of a command
    "train": config.load,
    "estimate": config.load,
    "classify": load_classifier_config,
    "detect": load_detection_config,
}
FOLDERS = ("flashdit", "iwin_core", "iwin_tasks", "configs", "docs", "tests", "tools", "benchmarks")
GROUPS = ("flashdit.samplers", "flashdit.metrics", "flashdit.data", "flashdit.extractors")


def blocks(path, language):
    """Returns the fenced blocks of a language."""
    return fenced(path.read_text(), language)


def prose(path):
    """Returns a page without its fenced blocks."""
    return FENCE.sub("", path.read_text())


def shell(path):
    """Returns the shell blocks of a page."""
    return "".join(blocks(path, "sh"))


def command_lines(path):
    """Returns the words of each `flashdit …`, `iwin …` or script line of a page's shell blocks."""
    found = []
    for line in shell(path).splitlines():
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if word in SCRIPTS:
                found.append([*SCRIPTS[word].split(), *words[place + 1 :]])
                break
            if word in PROGRAMS and (place == 0 or words[place - 1] == "-m"):
                found.append(words[place:])
                break
    return found


@cache
def help_text(words):
    """Returns what the `--help` of a command prints."""
    return help_of(" ".join(words))


def broken_links(path):
    """Returns the relative targets of links, pictures and includes that do not exist."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(path))
    targets += re.findall(r"\{include\} (\S+)", path.read_text())
    relative = [target for target in targets if not re.match(r"[a-z]+:", target)]
    return [target for target in relative if not (path.parent / target).exists()]


def unknown_commands(path):
    """Returns the `flashdit X` and `iwin X` that do not exist."""
    named = re.findall(r"`(flashdit|iwin) ([a-z][\w-]*)", prose(path))
    named += [tuple(words[:2]) for words in command_lines(path) if not words[1].startswith("-")]
    return [f"{program} {name}" for program, name in named if name not in PROGRAMS[program]]


def unknown_targets(path):
    """Returns the `make X` that the Makefile does not have."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"`make ([a-z]+)`", prose(path)) + re.findall(
        r"^make ([a-z]+)", shell(path), re.MULTILINE
    )
    return sorted({*named} - {*targets})


def unknown_options(path):
    """Returns the options of shell lines that the command's help does not have."""
    found = []
    for words in command_lines(path):
        command = words[: 3 if words[2:3] in (["make-reference"], ["compare"], ["loss"]) else 2]
        text = help_text(tuple(word for word in command if not word.startswith("-")))
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        found += [f"{words[1]} {option}" for option in options if not re.search(rf"{option}\b", text)]
    return found


def invalid_configurations(path):
    """Returns what is wrong with `--config NAME` and `key=value` of shell lines."""
    found = []
    for words in command_lines(path):
        if words[1] not in LOADERS:
            continue
        keys = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
        if "data.name=discs" in keys:  # of the package of docs/extending.md, whose test runs the line
            continue
        named = words[words.index("--config") + 1] if "--config" in words else None
        shipped = None if named in ("my.yaml", "latents.yaml") else named  # which flashdit new writes
        embedded = shipped is None or any(name in shipped for name in ("digits", "glyphs", "scenes"))
        if not embedded and not any(key.startswith("data.path=") for key in keys):
            keys.append("data.path=not-read")
        try:
            LOADERS[words[1]](shipped, keys)
        except ValueError as error:
            found.append(str(error))
    return found


def unknown_keys(path):
    """Returns the configuration keys of the running text that do not exist; the changelog names old ones."""
    if path.name.lower() == "changelog.md":
        return []
    known = {key.name for key in config.configuration_keys()}
    sections = "|".join({name.partition(".")[0] for name in known if "." in name})
    known |= {key.rpartition(".")[0] for key in known}  # sections in sections, whose keys are named in full
    named = re.findall(rf"`((?:{sections})\.[a-z_]+)(?=[`.= ])", prose(path))
    return sorted({*named} - known)


def exists(name):
    """Returns whether a dotted name is a module, or an attribute of one."""
    module, _, attribute = name.rpartition(".")
    with contextlib.suppress(
        ModuleNotFoundError
    ):  # raised where what stands before the last dot is no package
        if importlib.util.find_spec(name):
            return True
    return bool(module) and exists(module) and hasattr(importlib.import_module(module), attribute)


def unknown_names(path):
    """Returns the files and dotted names of our packages that do not exist; the changelog names old ones."""
    if path.name.lower() == "changelog.md":
        return []
    files = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./*-]*)`", prose(path))
    names = re.findall(r"`((?:flashdit|iwin_core|iwin_tasks)(?:\.\w+)+)`", prose(path))
    found = [name for name in files if not any(ROOT.glob(name.rstrip("/")))]
    return found + [name for name in names if name not in GROUPS and not exists(name)]


CHECKS = {  # each with a page that it must find fault with
    broken_links: "[a](page.md) ![b](gone.png)",
    unknown_commands: "run `flashdit trian` or\n```sh\naccelerate launch -m iwin segment\n```",
    unknown_targets: "`make nothing`",
    unknown_options: "```sh\nflashdit sample --precisoin bf16\n```",
    invalid_configurations: "```sh\nflashdit train --config digits training.step=3  # a comment\n```",
    unknown_keys: "set `training.step`",
    unknown_names: "see `flashdit/plans.py` or `flashdit.flow.samplers.heunn`",
}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_pages_name_nothing_that_does_not_exist(check, path):
    assert check(path) == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_fault_of_a_page_is_found(check, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{CHECKS[check]}\n")
    assert check(page)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_has_its_section_and_help(program):
    text = (DOCS / "commands.md").read_text()
    for name in PROGRAMS[program]:
        assert f"\n## {program} {name}\n" in text
        assert f"{{command-help}} {program} {name}\n" in text


def test_every_configuration_key_says_what_it_means():
    keys = [
        *config.configuration_keys(),
        *describe(ClassifierConfig),
        *describe(DetectionConfig),
        *describe(IwinConfig),
    ]
    assert sorted({key.name for key in keys if not key.doc}) == []


def test_layers_of_the_page_on_contributing_are_the_tested_ones():
    (table,) = blocks(ROOT / "CONTRIBUTING.md", "text")
    assert [line.split() for line in table.splitlines()] == [line.split() for line in LAYERS]


def test_every_sampler_and_metric_has_its_row():
    semantics, evaluation = (DOCS / "semantics.md").read_text(), (DOCS / "evaluation.md").read_text()
    assert [name for name in SAMPLERS.names() if f"| `{name}` |" not in semantics] == []
    assert [name for name in METRICS.names() if f"`{name}`" not in evaluation] == []


def test_code_of_the_quick_start_runs(tmp_path, monkeypatch):
    exported = tmp_path / "digits-pipeline"
    shutil.copytree(ROOT / "tests" / "made_before" / "exported", exported)
    for weights in ROOT.glob("flashdit/digits/assets/autoencoder/*.safetensors"):
        shutil.copy(weights, exported / "vae")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(DOCS / "quickstart.md", "python"):
        exec(compile(block, "quickstart.md", "exec"), names)
    assert (tmp_path / "seven.png").is_file()


def test_code_of_the_page_on_segmentation_runs():
    names = {}
    for block in blocks(DOCS / "segmentation.md", "python"):
        exec(compile(block, "segmentation.md", "exec"), names)
    assert names["logits"].shape == (1, 150, 61, 75)
    assert names["whole"].shape == (1, 150, 80, 112)


def lay_out(folder):
    """Writes the package that the page builds, announced as an installer would."""
    package = folder / "discs"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    rest = []
    for block in blocks(DOCS / "extending.md", "python"):
        name = re.match(r"# (discs/\w+\.py)\n", block)
        if name:
            (folder / name[1]).write_text(block)
        else:
            rest.append(block)
    (project,) = map(tomllib.loads, blocks(DOCS / "extending.md", "toml"))
    lines = []
    for group, names in project["project"]["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {module}" for name, module in names.items())]
    about = folder / "discs-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: discs\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("\n".join(lines))
    return rest


def test_package_that_the_page_on_extending_builds_trains_samples_and_is_scored(tmp_path):
    code = lay_out(tmp_path / "outside")
    commands = [shlex.split(line) for line in shell(DOCS / "extending.md").splitlines()]
    calls = [f"print('$', {words}); main({words[1:]})" for words in commands]
    script = "\n".join([*code, "from flashdit.__main__ import main", *calls])
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path / 'outside'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "FLASHDIT_CACHE": str(tmp_path / "cache"),
        "COLUMNS": "200",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for part in ("FD[colours]", "|Δμ|²[colours]", "accuracy", "floor", "ralston", "stage"):
        assert part in done.stdout, done.stdout
