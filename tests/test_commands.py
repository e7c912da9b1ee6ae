"""The console entries: what each command imports before it has parsed its words, and what it prints."""

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from flashdit.__main__ import COMMANDS
from iwin_tasks.__main__ import COMMANDS as IWIN_COMMANDS

ROOT = Path(__file__).parents[1]
ENTRIES = {"flashdit": ("flashdit.__main__", COMMANDS), "iwin": ("iwin_tasks.__main__", IWIN_COMMANDS)}
EVERY = [(entry, name) for entry, (_, commands) in ENTRIES.items() for name in commands]
HEAVY = (
    "torch",
    "numpy",
    "PIL",
    "matplotlib",
    "diffusers",
    "accelerate",
    "timm",
    "sklearn",
    "omegaconf",
    "rich",
)
RUN = "import sys; sys.argv = {argv!r}; from {module} import main; main()"
MODULES = """
import atexit, json, sys
atexit.register(lambda: json.dump(sorted(sys.modules), open({path!r}, "w")))
"""


@pytest.fixture
def python(tmp_path):
    """Returns a function that runs Python code and gives the finished process and the modules it loaded."""

    def run(code, cwd=ROOT):
        record = tmp_path / "modules.json"
        words = [sys.executable, "-c", MODULES.format(path=str(record)) + code]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
        return done, set(json.loads(record.read_text()))

    return run


def code_of(entry, *words):
    return RUN.format(argv=[entry, *map(str, words)], module=ENTRIES[entry][0])


def test_flashdit_imports_nothing_heavy(python):
    done, modules = python("import flashdit")
    assert done.returncode == 0, done.stderr
    assert modules.isdisjoint(HEAVY)


def test_iwin_core_imports_no_more_than_torch_and_einops(python):
    _, alone = python("import torch, einops")
    done, modules = python("import iwin_core")
    assert done.returncode == 0, done.stderr
    assert {name for name in modules - alone if name.partition(".")[0] != "iwin_core"} == set()


@pytest.mark.parametrize(("entry", "name"), EVERY)
def test_help_is_printed_before_anything_heavy_is_imported(python, entry, name):
    done, modules = python(code_of(entry, name, "--help"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {entry} {name} ")
    assert modules.isdisjoint(HEAVY)


@pytest.mark.parametrize(("entry", "name"), EVERY)
def test_an_unknown_option_is_refused_before_anything_heavy_is_imported(python, entry, name):
    done, modules = python(code_of(entry, name, "--nonsense"))
    assert done.returncode == 2
    assert f"{entry} {name}: error: " in done.stderr
    assert modules.isdisjoint(HEAVY)


@pytest.mark.parametrize("entry", ENTRIES)
def test_without_a_command_all_are_listed_and_an_unknown_one_names_the_nearest(python, entry):
    listed, modules = python(code_of(entry))
    assert all(f"  {name} " in listed.stdout for name in ENTRIES[entry][1])
    first = next(iter(ENTRIES[entry][1]))
    unknown, _ = python(code_of(entry, first + "x"))
    assert unknown.returncode == 2
    assert unknown.stderr.startswith(f"{entry}: error: unknown command '{first}x'; did you mean '{first}'?")
    assert modules.isdisjoint(HEAVY)


def test_plot_draws_without_torch(python, tmp_path):
    lines = [{"step": n, "images_seen": 8 * n, "loss": 1 / n} for n in (1, 2, 3)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done, modules = python(code_of("flashdit", "plot", tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert modules.isdisjoint({"torch", "diffusers", "accelerate", "sklearn", "scipy"})


def test_the_scripts_of_the_checkout_name_themselves(python):
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("usage: train.py ")


def test_a_module_run_by_python_is_the_console_entry(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for module, entry in (("flashdit", "flashdit"), ("iwin_tasks", "iwin")):
        words = [sys.executable, "-m", module]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout.startswith(f"usage: {entry} COMMAND")


def test_the_project_declares_the_entries_and_every_extra_that_tests_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {entry: f"{module}:main" for entry, (module, _) in ENTRIES.items()}
    extras = project["optional-dependencies"]
    assert f"flashdit[{','.join(sorted(set(extras) - {'dev'}))}]" in extras["dev"]


def test_help_config_prints_every_key_with_type_default_and_meaning(python):
    done, _ = python(code_of("flashdit", "train", "--help-config"))
    assert "training.steps: int = 80000\n    When training ends; may grow on resume.\n" in done.stdout
    assert "model.depth: int = 28\n    Number of blocks.\n" in done.stdout


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("samplers", "heun: "),
        ("metrics", "kid: "),
        ("data", "    image_size: int = 256  Images are cropped to a square of this side, in pixels."),
        ("extractors", "inception: "),
        ("attention", "    window: int = 4  Window side M in tokens."),
        ("times", "    mean: float = 0.0  Below 0, more noise."),
        ("predictions", "data: The output is x̂_1; v = (x̂_1 − x_t) / max(1 − t, 0.05), computed in float32."),
    ],
)
def test_the_parts_of_each_kind_are_listed_with_their_options(python, kind, line):
    done, _ = python(code_of("flashdit", "list", kind))
    assert done.returncode == 0, done.stderr
    assert line in done.stdout


def test_an_unknown_kind_of_part_names_the_nearest(python):
    done, _ = python(code_of("flashdit", "list", "sampler"))
    assert done.stderr.startswith(
        "flashdit list: error: unknown kind of part 'sampler'; did you mean 'samplers'?"
    )


@pytest.mark.parametrize(
    "words", [("eval", "make-reference"), ("eval", "compare"), ("eval", "loss"), ("eval", "sweep")]
)
def test_the_sub_commands_of_scoring_name_themselves(python, words):
    done, modules = python(code_of("flashdit", *words, "--help"))
    assert done.stdout.startswith(f"usage: flashdit {' '.join(words)} ")
    assert modules.isdisjoint(HEAVY)
    script = [sys.executable, "eval_fid.py", words[1], "--help"]
    shim = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert shim.stdout.startswith(f"usage: eval_fid.py {words[1]} ")


def defaults_of_options():
    """Returns by command and option what is meant where the option is not given, as help has to state it."""
    from flashdit.autoencoder.config import DEFAULT_AUTOENCODER
    from flashdit.commands.budget import H100_TFLOPS, MFU, Machine
    from flashdit.commands.survey import IMAGE_SIZES
    from flashdit.config import DEFAULT_CONFIG
    from flashdit.data.encode_folder import EncodingOptions
    from flashdit.evaluation.metrics.scoring import METRICS
    from flashdit.evaluation.reference import write_reference
    from flashdit.evaluation.request import EvaluationRequest
    from flashdit.sampling.classes import PER_CLASS
    from iwin_tasks.classification.config import DEFAULT_CLASSIFIER

    left_out = ", ".join(name for name in METRICS.names() if not METRICS[name].by_default)
    return {
        "new": {"image_size": f"the largest of {', '.join(map(str, IMAGE_SIZES))} that half"},
        "train": {"config": DEFAULT_CONFIG},
        "sample": {"num_images": f"{PER_CLASS} a class"},
        "eval": signature_defaults(EvaluationRequest) | {"metrics": f"all that apply, but {left_out}"},
        "sweep": signature_defaults(EvaluationRequest),
        "eval make-reference": signature_defaults(write_reference),
        "autoencoder": {"config": DEFAULT_AUTOENCODER},
        "encode": signature_defaults(EncodingOptions),
        "estimate": {
            "config": DEFAULT_CONFIG,
            "gpus": Machine.devices,
            "peak_tflops": H100_TFLOPS,
            "mfu": f"{MFU['cuda']}; on a CPU {MFU['cpu']}",
        },
        "classify": {"config": DEFAULT_CLASSIFIER},
    }


def signature_defaults(function):
    """Returns the defaults by name, but for the device, which every command chooses."""
    parameters = inspect.signature(function).parameters.items()
    return {name: item.default for name, item in parameters if name != "device"}


@pytest.mark.parametrize(
    ("entry", "words"), [*((entry, name) for entry, name in EVERY), ("flashdit", "eval make-reference")]
)
def test_the_defaults_that_help_states_are_those_of_the_options(entry, words, monkeypatch):
    parsers = []

    def parse(parser, argv):
        parsers.append(parser)
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse)
    name, *rest = words.split()
    with pytest.raises(KeyboardInterrupt):
        import_module(ENTRIES[entry][1][name].module).main(rest)
    meant = defaults_of_options().get(words, {})
    for action in parsers[0]._actions:
        about = re.sub(r"(?<=\d),(?=\d)", "", action.help or "")
        given = (action.default, meant.get(action.dest))
        values = {value for value in given if isinstance(value, str | int | float) and value is not False}
        assert len(values) <= 1, (action.dest, values)
        if "default" not in about:
            assert not values or action.default is not None, f"{action.dest}: what is its default?"
            continue
        for value in values:
            text = re.escape(f"{value:g}" if isinstance(value, float) else str(value))
            assert re.search(rf"default: {text}(?!\w)|\b{text}\b(?:(?! or )[^(;])*\(default\)", about), about
        assert values or not re.search(r"default: [^)]*\d", about), f"{about}: which default is that?"
