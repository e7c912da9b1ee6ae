"""Public names: those that others import exist, and each means one thing in the whole code base."""

import ast
import importlib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROMISED = {  # what other projects and scripts import
    "iwin_core": (
        *("rearrange", "restore", "partition", "merge", "IwinAttention", "IwinTransformer", "IwinConfig"),
        "IwinFeatures",
        "load_official_checkpoint",
    ),
    "flashdit": ("FlashDiT", "FlashDiTPipeline"),
    "iwin_tasks.detection": ("build_detector",),
    "iwin_tasks.segmentation": ("build_segmenter",),
    "flashdit.config": ("RunConfig", "load"),
    "flashdit.models.dit": ("FlashDiT",),  # named by exported pipelines
    "flashdit.trainer": ("Trainer",),
    "flashdit.evaluation.features": ("EXTRACTORS", "Extractor", "build_extractor"),
    "flashdit.evaluation.metrics": (
        *("frechet_distance", "inception_score", "kernel_distance"),
        *("precision", "precision_recall", "recall"),
    ),
    "flashdit.evaluation.request": ("EvaluationRequest", "open_plan"),
    "flashdit.data.sources": ("DATASETS",),
    "flashdit.flow.samplers": ("SAMPLERS",),
    "flashdit.flow.times": ("TIMES",),
    "flashdit.models.attention": ("ATTENTIONS",),
    "flashdit.evaluation.metrics.metric": ("METRICS",),
}
SHARED_BY_DESIGN = {  # a convention of its kind of file, not a second meaning
    "COMMANDS",  # of each console entry
    "parse",  # of each command
    "main",  # of each command
    "logger",
}
TWINS = ROOT / "iwin_core" / "kernels"  # a fused kernel and its eager twin have one name


@pytest.mark.parametrize("module", PROMISED)
def test_promised_names_import(module):
    imported = importlib.import_module(module)
    assert [name for name in PROMISED[module] if not hasattr(imported, name)] == []


def defined(path):
    """Yields the public names that a file defines at its top level."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [
                name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)
            ]
        else:
            names = [node.target.id] if isinstance(node, ast.AnnAssign) else []
        yield from (name for name in names if not name.startswith("_"))


def test_each_public_name_is_defined_in_one_file():
    homes = defaultdict(set)
    for package in ("flashdit", "iwin_core", "iwin_tasks"):
        for path in (ROOT / package).rglob("*.py"):
            for name in defined(path) if TWINS not in path.parents else ():
                homes[name].add(str(path.relative_to(ROOT)))
    doubled = {name: sorted(files) for name, files in homes.items() if len(files) > 1}
    assert {name: files for name, files in doubled.items() if name not in SHARED_BY_DESIGN} == {}
