"""What the benchmarks share: interleaved runs, medians and ratios, the machine, and where results land."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from iwin_core.kernels.cpu_attention import this_processor

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Returns what the figures depend on: processor, threads, versions, and the load before the run."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    label: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Returns the seconds of each run, all taken in turn, `rounds` times after one warm-up.

    Each turn runs twice and times the second, so that none pays for the memory that its neighbour left.

    Args:
        runs: What to time, by name.
        rounds: Counted rounds.
        label: Of the progress bar.
        clock: Gives seconds: of the wall, or of the processor where one thread computes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in tqdm(range(rounds + 1), label, unit="round"):
        for name, run in runs.items():
            run()
            synchronise()
            started = clock()
            run()
            synchronise()
            if number:
                seconds[name].append(clock() - started)
    return seconds


def synchronise() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(seconds: list[float], baseline: list[float]) -> dict[str, float]:
    """Returns median seconds with their spread, and the median of round-by-round ratios baseline / this."""
    ratios = [theirs / ours for ours, theirs in zip(seconds, baseline, strict=True)]
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "times_as_fast": statistics.median(ratios),
    }


def results_path(name: str) -> Path:
    """Returns where a file of this machine's results lies: results/MACHINE/NAME.

    The machine is its GPU, else the maker of its processor and the fastest instructions of that.
    """
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else this_processor()
    folder = RESULTS / re.sub(r"[^A-Za-z0-9]+", "_", machine)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def save(name: str, content: dict[str, Any], table: str) -> None:
    """Writes NAME.json and NAME.md among this machine's results."""
    results_path(f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    results_path(f"{name}.md").write_text(table)
    print(table)
