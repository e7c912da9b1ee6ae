"""Letters drawn per second, beside what a small FlashDiT trains on: `python -m benchmarks.glyphs`."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import machine, save
from flashdit.config import load
from flashdit.glyphs.dataset import Glyphs, GlyphsOptions
from flashdit.glyphs.drawing import GROUNDS
from flashdit.trainer import Trainer

TOKENS = 16  # of a side
WARM_UP = 2000  # drawings: each letter of each face is made a distance field once
WANTED = 20  # times what training consumes


def drawn_per_s(image_size: int, ground: str, count: int) -> float:
    """Returns how many images one process draws in a second."""
    glyphs = Glyphs(GlyphsOptions(image_size=image_size, ground=ground))
    for index in range(WARM_UP):
        glyphs.image(index)
    started = time.perf_counter()
    for index in range(WARM_UP, WARM_UP + count):
        glyphs.image(index)
    return count / (time.perf_counter() - started)


def trained_per_s(image_size: int, steps: int) -> float:
    """Returns how many images a second `configs/glyphs.yaml` trains on at 16×16 tokens, without waiting."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = {
            "run.dir": folder,
            "data.image_size": image_size,
            "model.patch_size": image_size // TOKENS,
            "training.steps": steps,
            "training.log_every": steps // 2,  # the first half warms up
            "training.save_every": steps,
            "training.preview_every": 0,
        }
        Trainer(load("glyphs", [f"{key}={value}" for key, value in overrides.items()])).fit()
        last = json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[-1])
    return last["images_per_s"] / (1 - last["data_wait"])


def table(records: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Returns the Markdown table."""
    lines = [
        "# Letters drawn in the loader",
        "",
        f"One thread. Training is `configs/glyphs.yaml` at {TOKENS}×{TOKENS} tokens, without the time that "
        f"it waits for images; wanted is {WANTED} times that.",
        "",
        "| image | ground | drawn/s | trained on/s | × training |",
        "|---|---|---|---|---|",
    ]
    for record in records:
        size, drawn, trained = record["image_size"], record["drawn_per_s"], record["trained_per_s"]
        lines.append(
            f"| {size}×{size} | {record['ground']} | {drawn:,.0f} | {trained:,.0f} | {drawn / trained:.1f} |"
        )
    load_before = f"load {about['load_before']:.1f} before the run"
    return "\n".join([*lines, "", f"{about['processor']}, {about['cores']} cores, {load_before}."]) + "\n"


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--count", type=int, default=3000, help="drawings that are timed")
    parser.add_argument("--steps", type=int, default=80, help="of training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about, records = machine(), []
    for size in arguments.sizes:
        trained = trained_per_s(size, arguments.steps)
        for ground in GROUNDS[:2]:
            drawn = drawn_per_s(size, ground, arguments.count)
            sizes = {"image_size": size, "ground": ground}
            records.append(sizes | {"drawn_per_s": drawn, "trained_per_s": trained})
    save("glyphs", {"machine": about, "options": vars(arguments), "records": records}, table(records, about))


if __name__ == "__main__":
    main()
