"""The direction of imports, DESIGN.md: each room may import only what stands before it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [  # of flashdit; rooms in one set never import each other
    {"registry", "seeds", "files", "vae_ldm", "heap", "tf32"},
    {"models", "flow", "latents", "data", "training", "classes"},
    {"encode", "generate", "pictures", "start", "charts", "card"},
    {"pipeline", "evaluation", "encode_folder", "samples"},
    {"config"},
    {"trainer", "cli", "assets", "classification"},
    {"plans"},
    {"sweep", "export", "budget", "curves", "studio"},
    {"plot", "posthoc", "estimate", "page"},
    {"app"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
IWIN_CORE_EXTRAS = {  # what iwin_core itself runs without
    "panels.py": {"PIL"},  # draws; loaded by the commands when there is something to draw
    "reach.py": {"PIL"},  # the type of what it returns
    "attention_kernels.py": {"triton"},  # loaded when a kernel first runs
    "conv_kernels.py": {"triton"},
    "tiles.py": {"triton"},
    "timm_models.py": {"timm"},  # loaded when timm is
    "weights.py": {"safetensors"},  # loaded for a file of that kind
    "visualise.py": {"PIL", "timm"},  # that type, and the models that the command builds by name
}
FILES = sorted((ROOT / "flashdit").rglob("*.py"))


def imported(path):
    """Returns the full names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def room_of(path):
    """Returns the room of a file of flashdit: its folder, or its own name at the top."""
    return path.relative_to(ROOT / "flashdit").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_what_stands_before_them(path):
    room = room_of(path)
    if room == "__init__":
        return
    assert room in LEVEL, f"{room} is not in LAYERS"
    others = {name.split(".")[1] for name in imported(path) if name.startswith("flashdit.")} - {room}
    allowed = {other for other in LEVEL if LEVEL[other] < LEVEL[room]}
    assert others <= allowed, f"{room} may not import {sorted(others - allowed)}"


def test_iwin_core_imports_neither_flashdit_nor_more_than_torch_and_einops():
    for path in (ROOT / "iwin_core").rglob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names
        extra = outside - {"torch", "einops", "iwin_core"}
        assert extra <= IWIN_CORE_EXTRAS.get(path.name, set()), path


def test_commands_of_iwin_core_load_no_picture_library_before_they_draw():
    code = "import sys, iwin_core.reach, iwin_core.visualise; print({'PIL', 'timm'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
