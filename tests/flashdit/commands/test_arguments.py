"""What the commands of sampling import before they have work, and the names that help lists."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "diffusers", "numpy", "PIL", "gradio", "accelerate")
SAMPLER = '''
from dataclasses import dataclass
from itertools import pairwise

from flashdit.flow.samplers import SAMPLERS


@dataclass(kw_only=True)
class RalstonOptions:
    """Options of `ralston`."""

    place: float = 2 / 3
    """Where in a step the second slope is taken."""


@SAMPLERS.register("ralston", RalstonOptions)
def ralston(v, x, times, *, options):
    """Returns x at the last time by Ralston's method."""
    for t, t_next in pairwise(times):
        step, a = t_next - t, options.place
        slope = v(x, t)
        x = x + step * ((1 - 0.5 / a) * slope + 0.5 / a * v(x + a * step * slope, t + a * step))
    return x
'''


def run(code, *paths):
    """Returns what a fresh process prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths)))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", ["sample", "app", "export"])
def test_help_is_printed_before_anything_heavy_is_imported(name):
    code = f"""
import sys
from flashdit.commands.{name} import main
try:
    main(["--help"])
except SystemExit:
    print("heavy:", [module for module in {HEAVY} if module in sys.modules])
"""
    printed = run(code)
    assert "usage:" in printed
    assert "heavy: []" in printed


@pytest.fixture
def ralston(tmp_path):
    """Returns a folder that is on the path, with a package that announces a sampler with an option."""
    (tmp_path / "ralston.py").write_text(SAMPLER)
    (tmp_path / "ralston-1.dist-info").mkdir()
    (tmp_path / "ralston-1.dist-info" / "METADATA").write_text("Name: ralston\nVersion: 1\n")
    (tmp_path / "ralston-1.dist-info" / "entry_points.txt").write_text(
        "[flashdit.samplers]\nralston = ralston\n"
    )
    return tmp_path


def test_a_sampler_of_another_package_is_listed_and_takes_its_option(ralston, tiny_checkpoint, tmp_path):
    helped = "from flashdit.commands.sample import parse\ntry:\n parse(['-h'])\nexcept SystemExit: pass"
    assert "heun, ralston, sde-euler" in " ".join(run(helped, ralston).split())
    out = tmp_path / "out"
    argv = ["--checkpoint", tiny_checkpoint, "--num-images", 1, "--output", out, "--sampler", "ralston"]
    argv += ["--sampler-option", "place=0.5"]
    run(f"from flashdit.commands.sample import main\nmain({[*map(str, argv)]})", ralston)
    recipe = (out / "recipe.json").read_text()
    assert '"place": 0.5' in recipe
    assert '"nfe": 12' in recipe, "two evaluations a step, each with and without the class"
