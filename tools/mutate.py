"""Do the tests notice a fault? Single faults are put into a copy of the code one by one, and tests run on it.

`python -m tools.mutate` tries every fault of tools/mutations.toml; `--folder flashdit/flow` those of one
folder, `--per-folder 6` six of each. A fault is killed when a test fails that passes without it. Results are
kept after each fault, so that a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = Path(__file__).with_name("mutations.toml")
COPIED = ("flashdit", "iwin_core", "iwin_tasks", "tests", "configs", "tools", "benchmarks", "docs")
PRELOADED = ("torch", "torchvision", "diffusers.models.modeling_utils", "accelerate", "timm", "scipy.linalg")
COMMANDS = ["tests/flashdit/commands", "tests/test_commands.py", "tests/test_scripts.py"]
IMAGES = ["tests/flashdit/data/test_images.py", "tests/flashdit/data/test_inspection.py"]
PIPELINE = ["tests/flashdit/sampling/test_pipeline.py", "tests/flashdit/sampling/test_exported.py"]
ATTENTION = ["tests/flashdit/models/test_attention.py", "tests/flashdit/models/test_lightningdit.py"]
TESTS = {  # files that tests elsewhere or without their name are for; folders that others' tests are for, too
    "flashdit/commands/survey.py": ["tests/flashdit/commands/test_new.py"],
    "flashdit/commands/encode.py": ["tests/flashdit/data/test_encode_folder.py", *COMMANDS[1:]],
    "flashdit/data/sources.py": ["tests/flashdit/data/test_sources.py", "tests/flashdit/glyphs"],
    "flashdit/data/walk.py": IMAGES,
    "flashdit/data/colours.py": [
        "tests/flashdit/data/test_colours.py",
        "tests/flashdit/data/test_tiff.py",
        IMAGES[0],
    ],
    "flashdit/data/encode_plan.py": ["tests/flashdit/data/test_encode_folder.py"],
    "flashdit/evaluation/images/datasets.py": ["tests/flashdit/evaluation", "tests/flashdit/glyphs"],
    "flashdit/evaluation/stored.py": [
        "tests/flashdit/evaluation/test_reference.py",
        "tests/flashdit/evaluation/test_stored.py",
        "tests/flashdit/evaluation/images/test_npz.py",
    ],
    "flashdit/evaluation/features/timm_models.py": ["tests/iwin_tasks/classification/test_extractor.py"],
    "flashdit/flow/examples.py": [
        "tests/flashdit/training/test_parts.py",
        "tests/flashdit/training/test_objective.py",
    ],
    "flashdit/sampling/schedulers.py": PIPELINE,
    "flashdit/training/position.py": [
        "tests/flashdit/training/test_task.py",
        "tests/flashdit/training",
        "tests/flashdit/test_trainer.py",
        "tests/iwin_tasks/classification/test_task.py",
    ],
    "flashdit/training/resume.py": [
        "tests/flashdit/training/test_resume.py",
        "tests/flashdit/test_trainer.py",
    ],
    "flashdit/sampling/card.py": ["tests/flashdit/commands/test_export.py"],
    "iwin_core/attention.py": ["tests/iwin_core/test_attention.py", *ATTENTION],
    "iwin_core/rotary.py": ATTENTION,
    "iwin_core/block.py": ["tests/iwin_core/backbone/test_backbone.py"],
    "iwin_core/kernels": ["tests/iwin_core/test_kernels.py"],
    "flashdit/flow": ["tests/flashdit/flow", "tests/flashdit/training", "tests/flashdit/sampling"],
    "flashdit/models": [
        "tests/flashdit/models",
        "tests/flashdit/training",
        "tests/flashdit/commands/test_estimate.py",
    ],
    "flashdit/data": ["tests/flashdit/data", "tests/flashdit/training", "tests/flashdit/test_trainer.py"],
    "flashdit/training": [
        "tests/flashdit/training",
        "tests/flashdit/test_trainer.py",
        "tests/flashdit/commands/test_posthoc.py",
    ],
    "flashdit/sampling": ["tests/flashdit/sampling", "tests/flashdit/commands", "tests/test_made_before.py"],
    "flashdit/evaluation": [
        "tests/flashdit/evaluation",
        "tests/flashdit/commands",
        "tests/flashdit/test_outside_package.py",
    ],
    "flashdit/autoencoder": ["tests/flashdit/autoencoder"],
    "flashdit/digits": [
        "tests/flashdit/digits",
        "tests/flashdit/evaluation",
        "tests/flashdit/commands/test_evaluate.py",
    ],
    "flashdit/glyphs": ["tests/flashdit/glyphs"],
    "flashdit/shared": ["tests/flashdit/shared", "tests/flashdit/data", "tests/flashdit/training", *COMMANDS],
    "flashdit/web": ["tests/flashdit/web", "tests/flashdit/commands/test_app.py"],
    "flashdit/commands/loss.py": ["tests/flashdit/commands/test_loss.py"],
    "flashdit/commands/autoencoder.py": ["tests/flashdit/autoencoder", *COMMANDS],
    "flashdit/commands": COMMANDS,
    "flashdit/memory.py": ["tests/flashdit/test_memory.py", "tests/flashdit/commands/test_estimate.py"],
    "flashdit/trainer.py": [
        "tests/flashdit/training",
        "tests/flashdit/test_trainer.py",
        "tests/test_scripts.py",
    ],
    "flashdit/config.py": ["tests/flashdit/test_config.py", *COMMANDS],
    "benchmarks": ["tests/benchmarks/test_attention_study.py"],
    "iwin_core": ["tests/iwin_core"],
    "iwin_tasks": ["tests/iwin_tasks"],
}
TIMEOUT_S = 1800


@dataclass(frozen=True)
class Fault:
    """A single change of the code."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def key(self) -> str:
        """What the results know it by."""
        return f"{self.file}: {self.old.strip()!r} → {self.new.strip()!r}"


def read_faults(path: Path, folders: Sequence[str] = ("",), near: bool = False) -> list[Fault]:
    """Returns the faults of a TOML file, each checked to fit the code as it is.

    Args:
        path: Holds `[[fault]]` tables with `file`, `old`, `new` and, where need be, `tests`.
        folders: Beginnings of the files that are meant.
        near: As `tests_of` takes it.

    Raises:
        ValueError: If a text to replace is not in its file exactly once.
    """
    faults = []
    for table in tomllib.loads(path.read_text())["fault"]:
        if not table["file"].startswith(tuple(folders)):
            continue
        tests = tuple(table.get("tests", tests_of(table["file"], near)))
        fault = Fault(table["file"], table["old"], table["new"], tests)
        times = (ROOT / fault.file).read_text().count(fault.old)
        if times != 1:
            raise ValueError(f"a fault's old text must be in its file once, got {times} times: {fault.key}")
        faults.append(fault)
    return faults


def spread(faults: Sequence[Fault], count: int) -> list[Fault]:
    """Returns so many faults of each folder, evenly spread over its list; all of a folder that has fewer."""
    by_folder: dict[Path, list[Fault]] = {}
    for fault in faults:
        by_folder.setdefault(Path(fault.file).parent, []).append(fault)
    chosen = []
    for found in by_folder.values():
        number = min(count, len(found))
        chosen += [found[place * len(found) // number] for place in range(number)]
    return chosen


def tests_of(file: str, near: bool) -> list[str]:
    """Returns the files of a file's tests, its folder's and its part's in TESTS, first those that name it.

    Args:
        file: Which has the fault.
        near: Only those that TESTS has for it, or else that name it, or else its folder's, or else all.
    """
    path = Path(file)
    part = next(part for part in (path, *path.parents) if str(part) in TESTS)
    folder = [] if part == path else [ROOT / "tests" / path.parent]
    found: dict[Path, None] = {}
    for test in (*folder, *(ROOT / test for test in TESTS[str(part)])):
        found |= dict.fromkeys([test] if test.is_file() else sorted(test.rglob("test_*.py")))
    own = [test for test in found if test.name == f"test_{path.name}"]
    package, stem = ".".join(path.parent.parts), re.escape(path.stem)
    imported = re.compile(rf"{re.escape(package)}(\.{stem}\b| import .*\b{stem}\b)")
    naming = [test for test in found if imported.search(test.read_text())]
    home = [test for test in found if test.parent == ROOT / "tests" / path.parent]
    nearest = found if part == path else dict.fromkeys([*own, *naming] or home or found)
    return [str(test.relative_to(ROOT)) for test in (nearest if near else nearest | found)]


def run_tests(copy: str, tests: Sequence[str], log: str) -> None:
    """Runs tests in a copy of the repository, in a process that has the heavy libraries already."""
    os.chdir(copy)
    os.environ["PYTHONPATH"] = copy  # for the processes that tests start
    sys.path[:] = [copy, *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import pytest

    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))


def first_failure(tests: Sequence[str], copy: Path) -> str | None:
    """Returns the line of the first test that fails in a copy, empty if none does, None after TIMEOUT_S."""
    log = copy / "fault.log"
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(str(copy), tests, str(log)))
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    lines = log.read_text(errors="replace").splitlines()
    found = next((line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR "))), "")
    if bool(process.exitcode) != bool(found):
        raise RuntimeError(f"pytest ended with {process.exitcode}: " + "\n".join(lines[-20:]))
    return found


def try_fault(fault: Fault, copy: Path, sound: set[str]) -> dict[str, object]:
    """Returns what the tests made of a fault: whether it was killed, by which test, in how many seconds.

    Args:
        fault: The change.
        copy: Of the repository.
        sound: Tests that are known to pass without a fault; the one that kills is added.

    Raises:
        RuntimeError: If the test that fails does so without the fault too.
    """
    path = copy / fault.file
    whole = path.read_text()
    path.write_text(whole.replace(fault.old, fault.new))
    started = time.perf_counter()
    found = first_failure(fault.tests, copy)
    seconds = round(time.perf_counter() - started, 1)
    path.write_text(whole)
    by = "" if found is None else found.partition(" ")[2].partition("[")[0]
    if by and by not in sound:
        if first_failure([by], copy):
            raise RuntimeError(f"{by} fails without a fault: none can be tried")
        sound.add(by)
    return {"killed": bool(found), "by": "timeout" if found is None else found, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> None:
    """Tries the faults and prints those that survive; exits with 1 if any do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", nargs="+", default=[""], help="beginnings of the files whose faults are tried"
    )
    parser.add_argument("--faults", type=Path, default=FAULTS, metavar="TOML")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "mutations.json", metavar="JSON")
    parser.add_argument(
        "--per-folder", type=int, metavar="N", help="N faults of each folder, evenly spread (default: all)"
    )
    parser.add_argument("--near", action="store_true", help="only by tests that name the faulty module")
    arguments = parser.parse_args(argv)
    faults = read_faults(arguments.faults, arguments.folder, arguments.near)
    if arguments.per_folder is not None:
        faults = spread(faults, arguments.per_folder)
    results = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    for name in PRELOADED:
        __import__(name)
    with tempfile.TemporaryDirectory() as folder:
        copy, sound = Path(folder), set[str]()
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
        for path in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / "Makefile"]:
            shutil.copy(path, copy)
        for number, fault in enumerate(faults, start=1):
            if fault.key not in results or not results[fault.key]["killed"]:
                results[fault.key] = try_fault(fault, copy, sound)
                arguments.results.parent.mkdir(parents=True, exist_ok=True)
                arguments.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            result = results[fault.key]
            verdict = f"killed by {result['by']}" if result["killed"] else result["by"] or "SURVIVED"
            print(f"{number}/{len(faults)} {verdict}, {result['seconds']} s: {fault.key}", flush=True)
    tried = Counter(results[fault.key]["killed"] for fault in faults)
    print(f"{len(faults)} faults tried, {tried[True]} killed, {tried[False]} survived")
    sys.exit(1 if tried[False] else 0)


if __name__ == "__main__":
    main()
