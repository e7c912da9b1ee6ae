"""What no GPU has run yet, in ten minutes: `make gpu`.

Tries the Triton kernels against eager code in float32, bfloat16 and float16, the tests that need a GPU, and
times attention, kernels, training steps, sampling and features on the card. Each part runs in a process of
its own; its record is kept after it, as benchmarks/results/gpu_CARD.json: a second call makes what is left.
Needs a CUDA device and no network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.side_by_side import machine, results_path
from flashdit.shared.command import run_script
from flashdit.shared.files import code_sha256, write_json

ROOT = Path(__file__).parents[1]
KEPT_CHARACTERS = 4_000  # of the end of what a part prints
WHOLE_S = 600
LEAST_S = 20  # that a part is begun with
QUIET = ("-q", "-p", "no:cacheprovider")
CODE = ("iwin_core", "flashdit", "benchmarks", "tests/iwin_core")  # which a record is of
GPU_TESTS = (
    "tests/flashdit/evaluation/metrics/test_manifold.py",
    "tests/flashdit/evaluation/metrics/test_scoring.py",
)


@dataclass(frozen=True)
class Part:
    """A command and the seconds that it may take."""

    name: str
    command: Sequence[str]
    limit_s: int
    kernels: str = "auto"
    """For IWIN_KERNELS."""


def module(name: str, *options: str) -> list[str]:
    """Returns the options of Python that run a module of the repository."""
    return ["-m", name, *options]


STEPS = module("benchmarks.flashdit", "--parts", "full step", "forward", "--rounds", "3")
PARTS = (
    Part("kernels equal eager code", module("pytest", "tests/iwin_core/kernel_checks.py", *QUIET), 120),
    Part("tests on a GPU", module("pytest", *GPU_TESTS, "-m", "gpu", *QUIET), 60),
    Part("attention", module("benchmarks.gpu_parts", "attention"), 60),
    Part("features", module("benchmarks.gpu_parts", "features"), 60),
    Part("kernels", module("benchmarks.kernels", "--rounds", "3"), 90),
    Part("steps at 16², kernels", [*STEPS, "--sides", "16"], 150, kernels="triton"),
    Part("steps at 16², eager code", [*STEPS, "--sides", "16", "--name", "no_kernels"], 150, kernels="eager"),
    Part("sampling", module("benchmarks.gpu_parts", "sampling"), 90),
    Part("steps at 32² and 64², kernels", [*STEPS, "--sides", "32", "64"], 240, kernels="triton"),
    Part(
        "steps at 32² and 64², eager code",
        [*STEPS, "--sides", "32", "64", "--name", "no_kernels"],
        240,
        kernels="eager",
    ),
)


def make(part: Part, limit_s: float) -> dict[str, Any]:
    """Returns the record of a part: whether it passed, its seconds, the end of what it printed."""
    started = time.perf_counter()
    environment = os.environ | {"IWIN_KERNELS": part.kernels, "PYTHONUNBUFFERED": "1"}
    try:
        ran = subprocess.run(
            [sys.executable, *part.command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
        )
        status, printed = ("passed" if ran.returncode == 0 else f"exit status {ran.returncode}"), ran.stdout
    except subprocess.TimeoutExpired as error:
        status, printed = f"cut off after {limit_s:.0f} s", error.stdout or b""
    seconds = round(time.perf_counter() - started, 1)
    text = printed.decode(errors="replace").replace("\r", "\n")
    return {"status": status, "seconds": seconds, "printed": text[-KEPT_CHARACTERS:]}


def make_all(parts: Sequence[Part], path: Path, about: dict[str, Any], whole_s: float) -> dict[str, Any]:
    """Makes the parts that have not passed, each within its limit and all within `whole_s` seconds.

    Args:
        parts: In the order of their worth.
        path: Of the record, which is written after each part.
        about: The machine; a record of another one is begun anew.
        whole_s: For all.

    Returns:
        The record of each part by name.
    """
    kept = json.loads(path.read_text()) if path.is_file() else {}
    same = all(kept.get("about", {}).get(key) == about[key] for key in ("gpu", "torch", "code"))
    found: dict[str, Any] = kept["parts"] if same and kept else {}
    started = time.perf_counter()
    for part in tqdm(parts, "gpu", unit="part"):
        left_s = whole_s - (time.perf_counter() - started)
        if found.get(part.name, {}).get("status") == "passed":
            continue
        if left_s < LEAST_S:
            found.setdefault(part.name, {"status": "not tried: no time was left"})
            continue
        found[part.name] = make(part, min(part.limit_s, left_s))
        write_json(path, {"about": about, "parts": found})
        tqdm.write(f"{found[part.name]['status']}, {found[part.name]['seconds']} s: {part.name}")
    write_json(path, {"about": about, "parts": found})
    return found


def main() -> None:
    """Makes what is left and says what passed; exits with 1 unless all did."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=WHOLE_S, help="for all parts of this call")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise ValueError("make gpu needs a CUDA device, got none")
    about = machine() | {"code": code_sha256(ROOT / folder for folder in CODE)[:16]}
    path = results_path("gpu.json")
    found = make_all(PARTS, path, about, arguments.seconds)
    for name, record in found.items():
        print(f"{record['status']}: {name}")
    print(f"{path}: a second call makes what is left")
    sys.exit(any(record["status"] != "passed" for record in found.values()))


if __name__ == "__main__":
    run_script(main)
