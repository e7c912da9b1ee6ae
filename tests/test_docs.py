"""The documentation is true: links lead to files, commands, options and keys exist, the code runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import flashdit.__main__
import iwin_tasks.__main__
from flashdit import config
from flashdit.evaluation.metrics.metric import METRICS
from flashdit.flow.samplers import SAMPLERS
from iwin_tasks.classification import config as classifier_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
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
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OVERRIDE = re.compile(r"^[a-z_]+(\.[a-z_]+)*=")
IDS = [str(path.relative_to(ROOT)) for path in PAGES]


def blocks(path, language):
    """Returns the fenced blocks of a language."""
    return [text for name, text in FENCE.findall(path.read_text()) if name == language]


def prose(path):
    """Returns a page without its fenced blocks."""
    return FENCE.sub("", path.read_text())


def command_lines(path):
    """Returns the words of each `flashdit …`, `iwin …` or script line of a page's shell blocks."""
    found = []
    for line in "".join(blocks(path, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if word in SCRIPTS:
                found.append([*SCRIPTS[word].split(), *words[place + 1 :]])
                break
            if word in PROGRAMS and (place == 0 or words[place - 1] == "-m"):
                found.append(words[place:])
                break
    return found


ALL_LINES = [(path.name, words) for path in PAGES for words in command_lines(path)]
LINE_IDS = [f"{name}: {' '.join(words)}" for name, words in ALL_LINES]


def broken_links(path):
    """Returns the relative targets of a page's links, pictures and includes that do not exist."""
    text = path.read_text()
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(path)) + re.findall(r"\{include\} (\S+)", text)
    relative = [target for target in targets if not re.match(r"[a-z]+:", target)]
    return [target for target in relative if not (path.parent / target).exists()]


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_relative_link_leads_to_a_file(path):
    assert broken_links(path) == []


def test_a_link_to_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](page.md) ![b](gone.png) [c](https://example.org)\n```{include} ../gone.md\n```\n")
    assert broken_links(page) == ["gone.png", "../gone.md"]


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_command_that_is_named_exists(path):
    named = re.findall(r"`(flashdit|iwin) ([a-z][\w-]*)", prose(path))
    named += [(words[0], words[1]) for words in command_lines(path) if not words[1].startswith("-")]
    assert [f"{program} {name}" for program, name in named if name not in PROGRAMS[program]] == []


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_make_target_that_is_named_exists(path):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"\bmake ([a-z]+)(?=`|\s+#|$)", path.read_text(), re.MULTILINE)
    assert {*named} <= {*targets}


@pytest.fixture(scope="module")
def help_text():
    """Returns a function: the words of a command → what its `--help` prints, asked for once."""
    sys.path.insert(0, str(DOCS))
    from generated import help_of

    known = {}
    yield lambda *words: known.setdefault(words, known.get(words) or help_of(" ".join(words)))
    sys.path.remove(str(DOCS))


@pytest.mark.parametrize(("name", "words"), ALL_LINES, ids=LINE_IDS)
def test_every_option_of_a_shell_line_is_in_the_commands_help(name, words, help_text):
    command = words[:3] if words[2:3] in (["make-reference"], ["compare"]) else words[:2]
    options = {word.partition("=")[0] for word in words[1:] if word.startswith("--")} - {"--help"}
    text = help_text(*[word for word in command if not word.startswith("-")])
    assert {option for option in options if not re.search(rf"{option}\b", text)} == set()


@pytest.mark.parametrize(("name", "words"), ALL_LINES, ids=LINE_IDS)
def test_every_configuration_and_key_of_a_shell_line_is_known(name, words):
    given = [word for word in words if OVERRIDE.match(word)]
    named = words[words.index("--config") + 1] if "--config" in words else None
    if named == "my.yaml":
        named = None
    if words[1] not in ("train", "estimate", "classify") or "data.name=discs" in given:
        assert not named
        return
    load = classifier_config.load if words[1] == "classify" else config.load
    needs_path = named and "digits" not in named and not any(word.startswith("data.path") for word in given)
    load(named, [*given, *(["data.path=x"] if needs_path else [])])


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_key_in_running_text_is_known(path):
    known = {key.name for key in config.configuration_keys()}
    sections = "|".join({name.partition(".")[0] for name in known if "." in name})
    options = re.findall(rf"`((?:{sections})\.[a-z_]+)", prose(path))
    old = {"sampling.dtype", "sampling.atol", "sampling.rtol"} if path.name == "CHANGELOG.md" else set()
    assert {*options} - known - old == set()


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_has_its_section_and_help(program):
    text = (DOCS / "commands.md").read_text()
    for name in PROGRAMS[program]:
        assert f"\n## {program} {name}\n" in text
        assert f"{{command-help}} {program} {name}\n" in text


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
    commands = [shlex.split(line) for line in "".join(blocks(DOCS / "extending.md", "sh")).splitlines()]
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
