"""Latents read per second, beside what FlashDiT-XL consumes on one H200: `python -m benchmarks.data`."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.side_by_side import machine, save
from flashdit.data.shards import LatentShards, write_shard
from flashdit.flow.examples import Examples
from flashdit.flow.times import TIMES
from flashdit.shared.seeds import generator_for
from flashdit.training.batches import positions
from flashdit.training.task import Task

SHAPE = (32, 16, 16)
SHARDS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MULTIPLY_ADDS = 114.74e9  # of FlashDiT-XL's forward pass for one image
PEAK_FLOPS = 989e12  # bf16, dense, of one H200
ASSUMED_UTILISATION = 0.5
WANTED = 20  # times what FlashDiT-XL consumes


def consumption() -> float:
    """Returns the images per second that FlashDiT-XL trains on: an estimate, not a measurement.

    A multiply-add is two operations, and the backward pass costs twice the forward pass.
    """
    return PEAK_FLOPS * ASSUMED_UTILISATION / (MULTIPLY_ADDS * 2 * 3)


def write_random_shards(folder: Path, rows: int, dtype: torch.dtype) -> LatentShards:
    """Returns shards of random latents and their mirrors, `rows` in all, just written: in the page cache."""
    for number in range(SHARDS):
        latents = torch.randn(rows // SHARDS, *SHAPE).to(dtype)
        write_shard(folder, 0, number, latents, latents.flip(-1), torch.arange(len(latents)) % 1000)
    return LatentShards(folder)


def batches_read_alone(shards: LatentShards, batch: int, count: int) -> Iterable[object]:
    """Yields batches of random rows, nothing but read."""
    for _ in range(count):
        yield shards.read(torch.randint(len(shards), (batch,)), torch.rand(batch) < 0.5)


def batches_of_noise_alone(batch: int, count: int) -> Iterable[object]:
    """Yields what each example draws for itself: nothing is read."""
    for number in range(count):
        for item in range(batch):
            generator = generator_for(0, "example", number * batch + item)
            torch.randn(SHAPE, generator=generator)
        yield number


def batches_of_training(shards: LatentShards, batch: int, count: int, workers: int) -> Iterable[object]:
    """Returns the data loader of a training run."""
    shards.mirrors = True
    examples = Examples(shards, TIMES.build("logit_normal"), seed=0, class_dropout_prob=0.1)
    sampler = cast(Any, positions(0, count, batch, 1, rank=0, ranks=1))
    return DataLoader(examples, batch_sampler=sampler, num_workers=workers, collate_fn=Task.collate)


def measure(make: Callable[[int], Iterable[object]], batch: int, count: int) -> dict[str, float]:
    """Returns latents per second, and per second of processor time that all processes together took.

    The first quarter of the batches is not timed: workers start and read ahead in it.
    """
    warm_up, before = count // 4, os.times()
    for number, _ in enumerate(make(count)):
        if number == warm_up - 1:
            started = time.perf_counter()
    elapsed_s = time.perf_counter() - started
    processor_s = sum(after - early for after, early in zip(os.times()[:4], before[:4], strict=True))
    return {
        "latents_per_s": (count - warm_up) * batch / elapsed_s,
        "latents_per_processor_s": count * batch / processor_s,
    }


def measure_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns one record for each stored type and way of reading."""
    batch, count = arguments.batch, arguments.batches
    records = []
    for name, dtype in DTYPES.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            shards = write_random_shards(Path(folder), arguments.rows, dtype)
            ways: dict[str, Callable[[int], Iterable[object]]] = {
                "reading alone": lambda n, shards=shards: batches_read_alone(shards, batch, n),
                "noise alone": lambda n: batches_of_noise_alone(batch, n),
            }
            for workers in arguments.workers:
                ways[f"training's loader, workers: {workers}"] = lambda n, shards=shards, workers=workers: (
                    batches_of_training(shards, batch, n, workers)
                )
            for way, make in tqdm(ways.items(), name, unit="way", leave=False):
                records.append({"stored": name, "way": way} | measure(make, batch, count))
    return records


def table(records: list[dict[str, Any]], arguments: argparse.Namespace, about: dict[str, Any]) -> str:
    """Returns the Markdown table with the estimate it is held against."""
    consumed = consumption()
    lines = [
        f"# Reading {' × '.join(map(str, SHAPE))} latents, batches of {arguments.batch}",
        "",
        f"FlashDiT-XL on one H200, an estimate: {MULTIPLY_ADDS / 1e9:.1f} G multiply-adds × 2 × 3 (forward "
        f"and back) at {ASSUMED_UTILISATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s: {consumed:,.0f} "
        f"images/s. Wanted is {WANTED} times that, {WANTED * consumed:,.0f} latents/s.",
        "",
        "| stored | what | latents/s | × FlashDiT-XL | latents per processor second |",
        "|---|---|---|---|---|",
    ]
    for record in records:
        rate, per_processor = record["latents_per_s"], record["latents_per_processor_s"]
        cells = (
            record["stored"],
            record["way"],
            f"{rate:,.0f}",
            f"{rate / consumed:.1f}",
            f"{per_processor:,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    machine_line = (
        f"{about['processor']}, {about['cores']} cores, load {about['load_before']:.1f} before the run"
    )
    return "\n".join([*lines, "", f"{machine_line}; files in the page cache."]) + "\n"


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096, help="latents in the shards")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", help="where the shards are written (default: the temporary folder)")
    arguments = parser.parse_args()
    about = machine()
    records = measure_all(arguments)
    content = {
        "machine": about,
        "options": vars(arguments),
        "consumed_per_s": consumption(),
        "records": records,
    }
    save("data_reading", content, table(records, arguments, about))


if __name__ == "__main__":
    main()
