"""The pieces of the attention study: their files, the steps at which runs are scored, what is left to do."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.attention_kinds import BASELINE, RATES, RECIPE, SEEDS, Size, model_arguments
from benchmarks.side_by_side import machine
from flashdit.glyphs.dataset import COMPARED
from flashdit.models.costs import forward_flops
from flashdit.shared.files import write_atomically

SPLITS = ("held-out", "families")
LOSS_IMAGES = 1040  # 40 of each letter, in each split
EARLY = (1 / 6, 1 / 3, 2 / 3)
"""Scored are the budget of steps, these parts of it, and the step that ends the budget of time;
the first is where the learning rate is chosen."""
SAMPLED_FROM = 1
"""Samples are drawn from this part of the budget of steps on; the loss is computed at every point."""
RATE_SIDE = 16


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the study."""

    side: int
    kind: str
    seed: int

    @property
    def name(self) -> str:
        """Of its JSON."""
        return f"run_{self.side}_{self.kind}_seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The JSON files of the study."""

    folder: Path
    sizes: dict[int, Size]

    def read(self, name: str) -> dict[str, Any] | None:
        """Returns a piece that was made, None where it was not."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Writes a piece, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(self.folder / f"{name}.json", lambda path: path.write_text(text))

    def timings(self, side: int) -> dict[str, dict[str, Any]]:
        """Returns the timings of a size by processor."""
        prefix = f"timing_{side}_"
        names = sorted(path.stem for path in self.folder.glob(f"{prefix}*.json"))
        found = {name.removeprefix(prefix): self.read(name) for name in names}
        return {name: timing for name, timing in found.items() if timing}

    def points(self, side: int) -> dict[str, list[int]]:
        """Returns the steps at which each kind is scored, nothing where they are not chosen yet."""
        return (self.read(f"points_{side}") or {"points": {}})["points"]

    def is_made(self, run: Run) -> bool:
        """Returns whether a run has all its scores."""
        record, points = self.read(run.name), self.points(run.side).get(run.kind)
        if record is None or points is None:
            return False
        return all(str(step) in record["points"] for step in points)

    def runs(self) -> list[Run]:
        """Returns all runs in the order in which they are made."""
        return [
            Run(side=side, kind=kind, seed=seed)
            for side, size in self.sizes.items()
            for seed in SEEDS
            for kind in size.kinds
        ]


def this_machine() -> str:
    """Returns this machine's processor as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", machine()["processor"]).strip("-")


def points_of(seconds: dict[str, float], steps: int) -> dict[str, list[int]]:
    """Returns the steps at which each kind is scored.

    Args:
        seconds: Of a step, by kind.
        steps: Budget of steps; that of time is what the baseline takes for as many.
    """
    budget_s = steps * seconds[BASELINE]
    early = [part_of(steps, part) for part in (*EARLY, 1)]
    return {kind: sorted({*early, round(budget_s / taken)}) for kind, taken in seconds.items()}


def next_rate(losses: dict[str, float]) -> float | None:
    """Returns the learning rate that is tried next; None where the best one has worse ones on both sides.

    Args:
        losses: Of what was tried, by the rate as text.
    """
    tried = {float(rate): loss for rate, loss in losses.items()}
    best = min(tried, key=lambda rate: tried[rate], default=RATES[0])
    left = [rate for rate in RATES if rate not in tried]
    if best == max(tried, default=best):
        left.append(2 * best)
    if best == min(tried, default=best):
        left.append(best / 2)
    return left[0] if left else None


def part_of(steps: int, part: float) -> int:
    """Returns a part of a budget of steps, at least one step."""
    return max(1, round(part * steps))


def step_seconds(timing: dict[str, Any]) -> dict[str, float]:
    """Returns the median processor seconds of a step, by kind, of a timing."""
    return {kind: found["step"]["median_s"] for kind, found in timing["kinds"].items()}


def expected(known: dict[str, Any], size: Size) -> dict[str, Any]:
    """Returns seconds of a size that is not timed: those of another one, by multiply-adds.

    Args:
        known: A timing.
        size: That is not timed.
    """
    base = known["kinds"][BASELINE]
    per_mac = base["step"]["median_s"] / (known["batch"] * base["multiply_adds"])
    forward_share = known["batch"] / base["images_per_s"] / base["step"]["median_s"]
    kinds = {}
    for kind in size.kinds:
        step_s = per_mac * size.batch * forward_flops(model_arguments(size, kind)) / 2
        kinds[kind] = {"step": {"median_s": step_s}, "images_per_s": size.batch / (step_s * forward_share)}
    return {"kinds": kinds}


def cost(pieces: Pieces, run: Run, timing: dict[str, Any]) -> float:
    """Returns the processor seconds that are left of a run."""
    kind, size = timing["kinds"][run.kind], pieces.sizes[run.side]
    points = pieces.points(run.side).get(run.kind) or points_of(step_seconds(timing), size.steps)[run.kind]
    made = {int(step) for step in (pieces.read(run.name) or {"points": {}})["points"]}
    left = [step for step in points if step not in made]
    if not left:
        return 0.0
    drawn = sum(step >= part_of(size.steps, SAMPLED_FROM) for step in left)
    evaluations = len(left) * len(SPLITS) * LOSS_IMAGES + drawn * COMPARED * RECIPE["sampling"]["steps"]
    steps = max(left) - max(made, default=0)
    return steps * kind["step"]["median_s"] + evaluations / kind["images_per_s"]


def plan(pieces: Pieces, timings: dict[int, dict[str, Any]]) -> str:
    """Returns what is made, what is left and what that costs, a line for each size and seed.

    Args:
        pieces: Of the study.
        timings: By size; that of 16² tokens at least.
    """
    lines, total, known = [], 0.0, timings[RATE_SIDE]
    for side, size in pieces.sizes.items():
        timing = timings.get(side) or expected(known, size)
        told = "" if side in timings else " (not timed: by multiply-adds)"
        for seed in SEEDS:
            runs = [run for run in pieces.runs() if (run.side, run.seed) == (side, seed)]
            hours = sum(cost(pieces, run, timing) for run in runs) / 3600
            made = sum(map(pieces.is_made, runs))
            lines.append(
                f"{side}² tokens, seed {seed}: {made} of {len(runs)} runs made, "
                f"{hours:.1f} core-hours left{told}"
            )
            total += hours
    left = [kind for kind in pieces.sizes[RATE_SIDE].kinds if pieces.read(f"rate_{kind}") is None]
    steps = (len(RATES) - 1) * part_of(pieces.sizes[RATE_SIDE].steps, EARLY[0])  # the best one becomes a run
    hours = sum(steps * known["kinds"][kind]["step"]["median_s"] for kind in left) / 3600
    lines.append(f"learning rates: {len(left)} kinds left, {hours:.1f} core-hours")
    return "\n".join([*lines, f"in all {total + hours:.1f} core-hours left"])
