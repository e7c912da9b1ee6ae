"""The direction of imports: each folder imports only those of earlier lines, and no file stands loose."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = """
iwin_core
flashdit/shared
flashdit/flow
flashdit/models flashdit/data flashdit/training
flashdit/sampling flashdit/autoencoder
flashdit/evaluation
flashdit/teachers flashdit/digits flashdit/glyphs
flashdit/config.py
flashdit/memory.py
flashdit/trainer.py
flashdit/web
flashdit/commands
iwin_tasks/scenes
iwin_tasks/classification iwin_tasks/detection iwin_tasks/segmentation
iwin_tasks/commands
""".strip().splitlines()
LEVEL = {part: level for level, line in enumerate(LAYERS) for part in line.split()}
FILES = sorted(
    path for package in ("iwin_core", "flashdit", "iwin_tasks") for path in Path(ROOT, package).rglob("*.py")
)
IWIN_CORE_NEEDS = {"torch", "einops", "triton", "timm", "safetensors"}  # the latter three loaded when used


def imported(path):
    """Returns the full names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def part_of(module):
    """Returns the folder, or the file at a package's top, that a module of ours lies in; None for others'."""
    return next(
        (part for part in LEVEL if f"{module}.".startswith(part.removesuffix(".py").replace("/", ".") + ".")),
        None,
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_folders_import_only_those_before_them(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    own = part_of(name)
    if own is None:
        assert path.name in ("__init__.py", "__main__.py"), f"{path.relative_to(ROOT)} stands loose"
        return
    others = {part_of(module) for module in imported(path)} - {None, own}
    assert all(LEVEL[other] < LEVEL[own] for other in others), f"{own} imports {sorted(others)}"


@pytest.mark.parametrize("name", ["digits", "glyphs"])
def test_only_an_embedded_data_set_knows_itself(name):  # but for the name of the default configuration
    known = re.compile(rf"flashdit\.{name}\b|[=!]= [\"']{name}")
    for path in (ROOT / "flashdit").rglob("*.py"):
        text = path.read_text().replace(
            'DEFAULT_CONFIG = "digits"', ""
        )  # the configuration of a run without one
        assert path.parent.name == name or not known.search(text), path


def test_iwin_core_needs_torch_and_einops_alone():
    for path in (ROOT / "iwin_core").rglob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names - {"iwin_core"}
        assert outside <= IWIN_CORE_NEEDS, path
