"""The wheel, installed where neither the checkout nor its editable installation is seen, does the work."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "flashdit",
    "iwin_core",
    "iwin_tasks",
    "configs",
)
TINY = ["training.steps=10", "training.preview_every=10", "model.hidden_size=16", "model.depth=1"]


def run(*command, cwd, **options):
    """Returns the output of a process, which must have succeeded."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Returns the wheel of a copy of the sources."""
    pytest.importorskip("setuptools", "77")
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", out, copy, cwd=copy)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Returns the commands' folder of an environment with the wheel, its dependencies by a .pth file."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    tests = sysconfig.get_path("purelib")
    (site / "a_tests.pth").write_text(f"{tests}\n")  # a folder alone: the .pth files in it are not read
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet")
    python = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        *options,
        "--ignore-installed",
        wheel,
        cwd=folder,
    )
    return folder / "bin"


def test_every_package_and_shipped_file_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("flashdit", "iwin_core", "iwin_tasks"):
        files = [
            path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        missing = {path.relative_to(ROOT).as_posix() for path in files} - names
        assert missing == set()
        assert f"{package}/py.typed" in names
    shipped = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    assert {f"flashdit/configs/{path}" for path in shipped if path.parts[0] != "accelerate"} <= names


def test_the_default_run_trains_samples_and_scores_from_another_folder(installed, tmp_path):
    flashdit = installed / "flashdit"
    where = run(installed / "python", "-c", "import flashdit; print(flashdit.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "  sample " in run(flashdit, "--help", cwd=tmp_path)
    assert "trained to step 10: runs/digits" in run(flashdit, "train", *TINY, cwd=tmp_path)
    run(flashdit, "sample", "--num-images", 3, "--steps", 1, "--output", "out", cwd=tmp_path)
    assert len(list((tmp_path / "out").glob("0*.png"))) == 3
    run(flashdit, "eval", "--num-images", 20, "--steps", 1, "--output", "scores", cwd=tmp_path)
    assert (tmp_path / "scores" / "metrics.json").is_file()
    letters = run(flashdit, "train", "--config", "glyphs", *TINY[2:], "training.steps=2", cwd=tmp_path)
    assert "trained to step 2: runs/glyphs" in letters


def test_shipped_configurations_are_found_by_name(installed, tmp_path):
    code = "from flashdit.shared.settings import find_config; print(*map(find_config, {names}), sep='\\n')"
    names = ["flashdit_b", "iwin/tiny_224.yaml"]
    found = run(installed / "python", "-c", code.format(names=names), cwd=tmp_path).split()
    assert [Path(path).name for path in found] == ["flashdit_b.yaml", "tiny_224.yaml"]
    assert all(Path(path).is_relative_to(installed.parent) for path in found)
    assert "usage: iwin reach" in run(installed / "iwin", "reach", "--help", cwd=tmp_path)
