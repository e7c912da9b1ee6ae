"""Which attention gives the better pictures in equal training time: `python -m benchmarks.attention_study`.

Letters of 64×64 pixels in patches of 4, 2 and 1, which is 16², 32² and 64² tokens; one recipe, small models,
one thread. Pieces are made one after the other, each a JSON file in benchmarks/results/attention_study:

  timing_SIDE_PROCESSOR.json   seconds of a step of all kinds, in turn; and timing_blocks_PROCESSOR.json
  points_SIDE.json             the steps at which each kind is scored, from the first timing
  rate_KIND.json               losses of short runs at 16² by learning rate; the best holds at all sizes
  run_SIDE_KIND_seedN.json     scores of one run at its points

What is there is not made again, and a run that was killed goes on from its last checkpoint in --work.
`--plan` prints what is left and what it costs, `--report` makes table and figure of what is there.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_kinds import RECIPE, SEEDS, SIZES, register_convolution, run_config
from benchmarks.attention_pieces import (
    EARLY,
    LOSS_IMAGES,
    RATE_SIDE,
    SAMPLED_FROM,
    SPLITS,
    Pieces,
    Run,
    next_rate,
    part_of,
    plan,
    points_of,
    step_seconds,
    this_machine,
)
from benchmarks.attention_report import write_report
from benchmarks.attention_timing import measure_blocks, measure_size
from benchmarks.side_by_side import RESULTS, machine
from flashdit.config import RunConfig
from flashdit.data.encode import open_latents
from flashdit.data.latents import LatentOptions
from flashdit.data.sources import spec_of
from flashdit.evaluation.evaluate import Plan, evaluate
from flashdit.evaluation.features.ranks import Ranks
from flashdit.evaluation.loss import held_out_loss
from flashdit.evaluation.request import EvaluationRequest, open_plan
from flashdit.sampling.checkpoint import CheckpointGenerator
from flashdit.shared.command import run_script
from flashdit.shared.process import keep_freed_memory
from flashdit.shared.runs import list_checkpoints, step_folder, step_of
from flashdit.trainer import Trainer

logger = logging.getLogger(__name__)
METRICS = ("fid", "precision", "recall", "accuracy")
FOLDER = RESULTS / "attention_study"
TEXT, FIGURE = RESULTS / "attention_study.md", RESULTS.parents[1] / "docs" / "which_attention.png"


@cache
def split_latents(split: str) -> tuple[Any, Any]:
    """Returns pixels of a split and the space that normalises them."""
    data = {**RECIPE["data"], "split": split}
    return open_latents(data, LatentOptions(**RECIPE["latents"]), torch.device("cpu"), progress=False)


def losses_of(checkpoint: Path, config: RunConfig) -> dict[str, float]:
    """Returns the EMA's mean flow-matching loss on each split that it was not trained on."""
    model, losses = CheckpointGenerator(checkpoint, "cpu").model, {}
    for split in SPLITS:
        data, space = split_latents(split)
        found = held_out_loss(
            model, space, data, times=config.flow.times, options=config.flow.loss, num_images=LOSS_IMAGES
        )
        losses[split] = found["loss"].mean().item()
    return losses


class Study:
    """Makes the study's pieces.

    Args:
        pieces: Where they lie, and of which sizes.
        work: Folder of the runs.
    """

    def __init__(self, pieces: Pieces, work: Path):
        self.pieces, self.work = pieces, work
        self.scored: Plan | None = None

    def time(self, side: int) -> dict[str, Any]:
        """Returns the timing of a size on this processor, and makes it where it has not been made.

        The first timing of a kind, on whatever processor, decides at which steps its runs are scored.
        """
        name, size = f"timing_{side}_{this_machine()}", self.pieces.sizes[side]
        timing = self.pieces.read(name)
        if timing is None or list(timing["kinds"]) != list(size.kinds):
            self.pieces.write(name, timing := measure_size(size))
        points = self.pieces.points(side)
        if new := {*size.kinds} - {*points}:
            found = points_of(step_seconds(timing), size.steps)
            points |= {kind: found[kind] for kind in size.kinds if kind in new}
            self.pieces.write(f"points_{side}", {"processor": this_machine(), "points": points})
        return timing

    def time_blocks(self) -> None:
        """Times attention and the rest of a block, where this processor has not done so yet."""
        if self.pieces.read(name := f"timing_blocks_{this_machine()}") is None:
            self.pieces.write(name, measure_blocks())

    def rate(self, kind: str) -> float:
        """Returns the kind's learning rate: the one of the least loss after a short run at 16² tokens."""
        found = self.pieces.read(f"rate_{kind}") or {"side": RATE_SIDE, "seed": SEEDS[0], "losses": {}}
        found["steps"] = part_of(self.pieces.sizes[RATE_SIDE].steps, EARLY[0])
        run = Run(side=RATE_SIDE, kind=kind, seed=SEEDS[0])
        while (rate := next_rate(found["losses"])) is not None:
            checkpoint, config = self.train(run, rate, found["steps"])
            found["losses"][f"{rate:g}"] = losses_of(checkpoint, config)["held-out"]
            self.pieces.write(f"rate_{kind}", found)
        return float(min(found["losses"], key=lambda rate: found["losses"][rate]))

    def train(self, run: Run, rate: float, step: int) -> tuple[Path, RunConfig]:
        """Trains a run to a step, from where it stands, and returns the checkpoint and the configuration.

        Raises:
            SystemExit: If a signal ended it; what it has learned is saved.
        """
        folder = self.work / f"{run.side}_{run.kind}_{rate:g}_seed{run.seed}"
        config = run_config(folder, self.pieces.sizes[run.side], run.kind, run.seed, rate, step)
        if any(step_of(path) > step for path in list_checkpoints(folder)):  # its scores are lost
            shutil.rmtree(folder)
        trainer = Trainer(config)
        trainer.fit()
        if trainer.stopped_by is not None:
            raise SystemExit(trainer.outcome)
        return step_folder(folder, step), config

    def make_run(self, run: Run) -> None:
        """Trains and scores a run at the points that are left, and writes its JSON after each."""
        rate, size = self.rate(run.kind), self.pieces.sizes[run.side]
        new = {"side": run.side, "kind": run.kind, "seed": run.seed, "rate": rate, "points": {}}
        record = self.pieces.read(run.name) or new
        if record["rate"] != rate:  # of before another one was found to be better
            record = new
        if run.kind not in self.pieces.points(run.side):
            self.time(run.side)
        for step in self.pieces.points(run.side)[run.kind]:
            if str(step) in record["points"]:
                continue
            started = time.process_time()
            checkpoint, config = self.train(run, rate, step)
            trained = time.process_time()
            point: dict[str, Any] = {"loss": losses_of(checkpoint, config)}
            if step >= part_of(size.steps, SAMPLED_FROM):
                point |= self.scores_of(checkpoint, config)
            point |= {"train_s": trained - started, "score_s": time.process_time() - trained}
            record["points"][str(step)] = point
            record["machine"] = machine()
            self.pieces.write(run.name, record)
            logger.info("%s at step %d: %s", run.name, step, point)

    def scores_of(self, checkpoint: Path, config: RunConfig) -> dict[str, Any]:
        """Returns the scores of the EMA's samples, and those of real letters, which are the floor."""
        generator = CheckpointGenerator(checkpoint, "cpu")
        if self.scored is None:  # all runs share the reference
            request = EvaluationRequest(
                generator=generator, sampling=config.sampling, data=spec_of(config.data), metrics=METRICS
            )
            self.scored = open_plan(request, Ranks())
        result = evaluate(self.scored.redrawn(generator=generator))
        assert result.floor is not None
        return {"num_images": result.num_images, "scores": result.scores.values, "floor": result.floor.values}

    def plan(self) -> str:
        """Returns what is left and what it costs, by the timings of this processor."""
        self.time(RATE_SIDE)
        known = {side: self.pieces.timings(side).get(this_machine()) for side in self.pieces.sizes}
        return plan(self.pieces, {side: timing for side, timing in known.items() if timing})


def main() -> None:
    """Makes the pieces that are left, or prints the plan, or makes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, default=Path("/tmp/attention_study"), metavar="DIR", help="folder of the runs")
    add("--only", nargs="+", default=[""], metavar="NAME", help="pieces whose names begin so: run_16_iwin4")
    add("--plan", action="store_true", help="print what is left and what it costs; times 16² tokens first")
    add("--report", action="store_true", help="make table and figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    register_convolution()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    study, wanted = Study(Pieces(folder=FOLDER, sizes=SIZES), arguments.work), tuple(arguments.only)
    if arguments.plan:
        print(study.plan())
    if arguments.report:
        write_report(study.pieces, TEXT, FIGURE)
    if arguments.plan or arguments.report:
        return
    for side in SIZES:
        if f"timing_{side}".startswith(wanted):
            study.time(side)
    for run in study.pieces.runs():
        if run.name.startswith(wanted) and not study.pieces.is_made(run):
            study.make_run(run)
    if "timing_blocks".startswith(wanted):
        study.time_blocks()


if __name__ == "__main__":
    run_script(main)
