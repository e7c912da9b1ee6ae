"""Do the tests notice a fault? Single faults are put into a copy of the code one by one, and tests run on it.

`python -m tools.mutate` tries every fault of tools/mutations.toml; `--folder flashdit/flow` of one folder.
A fault is killed when a test fails. Results are kept after each fault, so that a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FAULTS = Path(__file__).with_name("mutations.toml")
COPIED = ("flashdit", "iwin_core", "iwin_tasks", "tests", "configs", "tools", "benchmarks", "docs")
PRELOADED = ("torch", "torchvision", "diffusers.models.modeling_utils", "accelerate", "timm", "scipy.linalg")
COMMANDS = ["tests/flashdit/commands", "tests/test_commands.py", "tests/test_scripts.py"]
TESTS = {  # folders whose faults other folders' tests are meant to notice too, in the order they are run
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
    "flashdit/digits": [
        "tests/flashdit/digits",
        "tests/flashdit/evaluation",
        "tests/flashdit/commands/test_evaluate.py",
    ],
    "flashdit/shared": ["tests/flashdit/shared", "tests/flashdit/data", "tests/flashdit/training", *COMMANDS],
    "flashdit/web": ["tests/flashdit/web", "tests/flashdit/commands/test_app.py"],
    "flashdit/commands": COMMANDS,
    "flashdit/trainer.py": [
        "tests/flashdit/training",
        "tests/flashdit/test_trainer.py",
        "tests/test_scripts.py",
    ],
    "flashdit/config.py": ["tests/flashdit/test_config.py", *COMMANDS],
    "iwin_core": ["tests/iwin_core"],
    "iwin_tasks": ["tests/iwin_tasks"],
}
TIMEOUT_S = 600


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


def read_faults(path: Path, folder: str = "") -> list[Fault]:
    """Returns the faults of a TOML file, each checked to fit the code as it is.

    Args:
        path: Holds `[[fault]]` tables with `file`, `old`, `new` and, where need be, `tests`.
        folder: Beginning of the files that are meant.

    Raises:
        ValueError: If a text to replace is not in its file exactly once.
    """
    faults = []
    for table in tomllib.loads(path.read_text())["fault"]:
        if not table["file"].startswith(folder):
            continue
        fault = Fault(
            table["file"], table["old"], table["new"], tuple(table.get("tests", tests_of(table["file"])))
        )
        times = (ROOT / fault.file).read_text().count(fault.old)
        if times != 1:
            raise ValueError(f"a fault's old text must be in its file once, got {times} times: {fault.key}")
        faults.append(fault)
    return faults


def tests_of(file: str) -> Sequence[str]:
    """Returns the tests of a file: its own and its folder's first, then those of its part in TESTS."""
    path = Path(file)
    own = Path("tests", *path.parts[:-1], f"test_{path.name}"), Path("tests", *path.parts[:-1])
    nearest = next(TESTS[str(part)] for part in (path, *path.parents) if str(part) in TESTS)
    return [*(str(test) for test in own if (ROOT / test).exists()), *nearest]


def run_tests(copy: str, tests: Sequence[str], log: str) -> None:
    """Runs tests in a copy of the repository, in a process that has the heavy libraries already."""
    os.chdir(copy)
    sys.path[:] = [copy, *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import pytest

    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))


def try_fault(fault: Fault, copy: Path, context: Any) -> dict[str, object]:
    """Returns what the tests made of a fault: whether it was killed, by which test, in how many seconds."""
    path, log = copy / fault.file, copy / "fault.log"
    whole = path.read_text()
    path.write_text(whole.replace(fault.old, fault.new))
    started = time.perf_counter()
    process = context.Process(target=run_tests, args=(str(copy), fault.tests, str(log)))
    process.start()
    process.join(TIMEOUT_S)
    hung = process.is_alive()
    if hung:
        process.kill()
        process.join()
    path.write_text(whole)
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    by = next((line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR "))), "")
    if not hung and bool(process.exitcode) != bool(by):
        raise RuntimeError(f"pytest ended with {process.exitcode} for {fault.key}: " + "\n".join(lines[-20:]))
    return {
        "killed": hung or process.exitcode != 0,
        "by": "timeout" if hung else by,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Tries the faults and prints those that survive; exits with 1 if any do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="", help="beginning of the files whose faults are tried")
    parser.add_argument("--faults", type=Path, default=FAULTS, metavar="TOML")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "mutations.json", metavar="JSON")
    parser.add_argument(
        "--share", default="0/1", metavar="I/N", help="every Nth fault from the Ith (default: all)"
    )
    arguments = parser.parse_args(argv)
    first, step = map(int, arguments.share.split("/"))
    faults = read_faults(arguments.faults, arguments.folder)[first::step]
    results = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    for name in PRELOADED:
        __import__(name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
        for path in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / "Makefile"]:
            shutil.copy(path, copy)
        for number, fault in enumerate(faults, start=1):
            if fault.key not in results or not results[fault.key]["killed"]:
                results[fault.key] = try_fault(fault, copy, multiprocessing.get_context("fork"))
                arguments.results.parent.mkdir(parents=True, exist_ok=True)
                arguments.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            result = results[fault.key]
            verdict = f"killed by {result['by']}" if result["killed"] else "SURVIVED"
            print(f"{number}/{len(faults)} {verdict}, {result['seconds']} s: {fault.key}", flush=True)
    tried = Counter(results[fault.key]["killed"] for fault in faults)
    print(f"{len(faults)} faults tried, {tried[True]} killed, {tried[False]} survived")
    sys.exit(1 if tried[False] else 0)


if __name__ == "__main__":
    main()
