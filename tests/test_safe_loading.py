"""No file that is read can run code: the calls that unpickle, or that trust a folder's code, do not occur."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("flashdit", "iwin_core", "iwin_tasks", "tools", "benchmarks", "docs", "tests")
FILES = sorted([*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))])
UNPICKLING = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.hub.load", "joblib.load", "dill.load"),
    *("pd.read_pickle", "pandas.read_pickle", "yaml.unsafe_load", "marshal.load", "marshal.loads"),
}


def is_true(node):
    return isinstance(node, ast.Constant) and node.value is True


def dangerous(text):
    """Returns the calls of a Python text that could run what a file holds, as `line: call`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        refused = (
            name in UNPICKLING
            or (name == "torch.load" and not is_true(given.get("weights_only")))
            or (name == "yaml.load" and "SafeLoader" not in ast.unparse(node))
            or ("allow_pickle" in given and not is_false(given["allow_pickle"]))
            or (name in ("np.load", "numpy.load") and len(node.args) > 2)
            or "trust_remote_code" in given
        )
        found += [f"{node.lineno}: {name}"] if refused else []
    return found


def is_false(node):
    return isinstance(node, ast.Constant) and node.value is False


LOADS_AN_EXPORT = (
    "tests/flashdit/sampling/test_exported.py"  # whose code is ours, as a user of diffusers does
)
HIDDEN = re.compile(
    r"^ *(from (torch|pickle|numpy|joblib|yaml) import .*\b(load|loads|unsafe_load)\b"
    r"|import (torch|pickle|yaml) as|import numpy as (?!np\b))",
    re.MULTILINE,
)
"""Imports under which the calls would not be found."""


def test_no_call_runs_what_a_file_holds():
    found = {str(path.relative_to(ROOT)): dangerous(path.read_text()) for path in FILES}
    assert len(found) > 200
    exported = found.pop(LOADS_AN_EXPORT)
    assert {call.partition(": ")[2] for call in exported} == {"DiffusionPipeline.from_pretrained"}
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_torch_and_its_like_are_imported_by_the_names_that_are_looked_for():
    assert [path for path in FILES if HIDDEN.search(path.read_text())] == []
    assert HIDDEN.search("import os\nfrom torch import load, save\n")


@pytest.mark.parametrize(
    "call",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "pickle.load(file)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, None, True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "model.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_a_call_that_runs_code_is_found(call):
    assert dangerous(f"x = 1\n{call}\n") == [f"2: {call.partition('(')[0]}"]


def test_calls_that_run_none_are_not():
    assert dangerous("torch.load(path, weights_only=True)\nnp.load(path)\nyaml.safe_load(text)") == []
