"""Checkpoints of FlashDiT-XL saved and loaded, beside the disk's speed: `python -m benchmarks.checkpoint`."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.data import write_random_shards
from benchmarks.side_by_side import machine, save, summary
from flashdit import config
from flashdit.shared.runs import step_folder
from flashdit.trainer import Trainer
from flashdit.training.position import save_checkpoint
from flashdit.training.resume import newest_whole

BLOCK = 2**24


def write_plainly(path: Path, size: int) -> None:
    """Writes a file of so many bytes through to the disk."""
    content = os.urandom(BLOCK)
    with path.open("wb") as file:
        for start in range(0, size, BLOCK):
            file.write(content[: size - start])
        file.flush()
        os.fsync(file.fileno())


def read_plainly(path: Path) -> None:
    """Reads a file to its end."""
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK):
            pass


def forget(folder: Path) -> None:
    """Drops the pages of all files below a folder, so that reading asks the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(work: Callable[[], object]) -> float:
    """Returns the seconds that work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Times both in turn and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="flashdit_xl", help="configuration of a FlashDiT on latents")
    parser.add_argument("--depth", type=int, help="blocks, where memory is short (default: the model's)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="on the disk that is measured (default: where temporary files lie)")
    arguments = parser.parse_args()
    about = {"machine": machine(), "options": vars(arguments)}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        write_random_shards(folder / "shards", 64, torch.float32)
        overrides = [f"run.dir={folder / 'run'}", f"data.path={folder / 'shards'}", "latents.vae=null"]
        overrides += ["training.global_batch_size=1", "training.workers=0", "training.precision=fp32"]
        overrides += [f"model.depth={arguments.depth}"] if arguments.depth else []
        loop = Trainer(config.load(arguments.config, overrides))
        for parameter in loop.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        loop.optimizer.step()  # makes the moments
        loop.optimizer.zero_grad()
        checkpoint = step_folder(loop.run_dir, 0)
        seconds: dict[str, list[float]] = {"save": [], "write": [], "load": [], "read": []}
        size = 0
        for _ in range(arguments.rounds):
            seconds["save"].append(timed(lambda: save_checkpoint(loop, loop.ema.state(), {})))
            size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
            seconds["write"].append(timed(partial(write_plainly, folder / "plain", size)))
            forget(folder)
            seconds["load"].append(timed(lambda: newest_whole(loop.run_dir, loop.accelerator)))
            forget(folder)
            seconds["read"].append(timed(lambda: read_plainly(folder / "plain")))
    rows = {
        "save": summary(seconds["save"], seconds["write"]),
        "load": summary(seconds["load"], seconds["read"]),
    }
    lines = ["| | a checkpoint, s | as many bytes plainly, s | speed over plain |", "|---|---|---|---|"]
    for (what, row), plain in zip(rows.items(), (seconds["write"], seconds["read"]), strict=True):
        span = f"{row['median_s']:.1f} ({row['min_s']:.1f} to {row['max_s']:.1f})"
        plainly = f"{statistics.median(plain):.1f} ({min(plain):.1f} to {max(plain):.1f})"
        lines.append(f"| {what} | {span} | {plainly} | {row['times_as_fast']:.2f} |")
    lines += ["", f"{size / 2**30:.2f} GiB, {arguments.rounds} rounds: medians and spread.", ""]
    save("checkpoint", about | {"bytes": size, "seconds": seconds, "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
