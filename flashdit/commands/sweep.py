"""`flashdit sweep`: one checkpoint scored over guidance scales; what is known is not computed again."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashdit.commands.arguments import open_generator, path
from flashdit.commands.scoring import add_evaluation, make_request
from flashdit.shared.command import CommandParser, open_console, resolve_device
from flashdit.shared.registry import counted

if TYPE_CHECKING:
    from flashdit.evaluation.evaluate import Plan
    from flashdit.evaluation.reports.report import EvalResult
    from flashdit.evaluation.reports.sweeps import Sweep
    from flashdit.sampling.checkpoint import CheckpointGenerator
    from flashdit.sampling.options import SamplingOptions

MOST_SCALES = 1000


def parse_scales(text: str) -> list[float]:
    """Returns the scales of `LOW:HIGH:STEP`, both ends included, or of `A,B,C`: sorted, each once.

    Raises:
        ValueError: If the text is neither.
    """
    is_range = ":" in text
    try:
        numbers = [float(number) for number in text.split(":" if is_range else ",")]
    except ValueError:
        numbers = []
    if not numbers or (is_range and len(numbers) != 3) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"--cfg-scale must be LOW:HIGH:STEP or finite numbers with commas, got '{text}'")
    if is_range:
        low, high, step = numbers
        if step <= 0 or low > high or (high - low) / step > MOST_SCALES:
            raise ValueError(
                f"--cfg-scale LOW:HIGH:STEP must have LOW ≤ HIGH, STEP > 0 and at most {MOST_SCALES:,} "
                f"steps, got '{text}'"
            )
        count = math.floor((high - low) / step + 1e-9) + 1  # 1:4:0.1 has 31 scales, whatever 0.1 is in binary
        numbers = [round(low + index * step, 9) for index in range(count)]
    if min(numbers) < 0:
        raise ValueError(f"--cfg-scale must not be negative, got '{text}'")
    return sorted(set(numbers))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line; what is not given is None."""
    parser = CommandParser(
        description="Scores one checkpoint over guidance scales.",
        epilog="Writes sweep.json, sweep.md and sweep.png; called again, computes only the new scales.",
        conflict_handler="resolve",  # here --cfg-scale takes several
    )
    add_evaluation(parser)
    add = parser.add_argument
    add("--cfg-scale", dest="scales", required=True, metavar="LOW:HIGH:STEP|A,B,...", help="scales to score")
    add("--output", type=path, metavar="FOLDER", help="default: the run's eval/sweep")
    return parser.parse_args(argv)


def output_folder(given: Path | None, generator: CheckpointGenerator) -> Path:
    """Returns the folder to write, checked."""
    from flashdit.evaluation.reports.sweeps import check_sweep_folder
    from flashdit.shared.paths import check_outside

    output = given or generator.run_dir / "eval" / "sweep"
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a folder, got {output}")
    check_outside(output, generator.images_path, "--output", f"the run {generator.run_dir}")
    check_sweep_folder(output)
    return output


def recipe_of(plan: Plan) -> dict[str, Any]:
    """Returns what two points of a plot must have in common."""
    from flashdit.sampling.records import current_sampling

    samples = {name: value for name, value in plan.samples.identity().items() if name != "code"}
    sampling = current_sampling(samples["sampling"])
    samples["sampling"] = {name: value for name, value in sampling.items() if name != "cfg_scale"}
    return {
        "samples": samples,
        "reference": plan.reference.recipe(),
        "extractor": {"name": plan.extractor.name, "fingerprint": plan.extractor.fingerprint},
        "metrics": plan.metrics,
    }


def sweep_title(plan: Plan, generator: CheckpointGenerator, options: SamplingOptions) -> str:
    """Returns what a plot says of its recipe."""
    from flashdit.sampling.records import guided_by

    sampler, _, _ = str(options).partition(", guidance")
    low, high = options.cfg_interval
    channels = "" if options.cfg_channels is None else f", {options.cfg_channels} channels guided"
    times = "" if (low, high) == (0, 1) else f", guidance for t in {low:g}–{high:g}"
    run = f"{generator.run_dir.name}, step {generator.step}, {generator.weights} weights"
    run += guided_by(generator.recipe())
    images = counted(plan.samples.count, "image")
    return f"{run}: {images}, {sampler}{channels}{times}, against {plan.reference.spec}"


def add_result(sweep: Sweep, scale: float, result: EvalResult) -> None:
    """Adds the scores of one scale."""
    sweep.labels = {key: name.label for key, name in result.names.items()}
    sweep.floor = dict(result.floor.values) if result.floor else None
    sweep.add(
        {
            "cfg_scale": scale,
            "nfe": result.samples["nfe"],
            "metrics": dict(result.scores.values),
            "reasons": dict(result.scores.reasons),
            "warnings": list(result.warnings),
            "elapsed_s": round(sum(result.timings_s.values()), 3),
        }
    )


def print_sweep(sweep: Sweep) -> None:
    """Prints the table, an asterisk at the best of each score."""
    from rich.markup import escape
    from rich.table import Table

    from flashdit.evaluation.reports.sweeps import sweep_rows

    header, *rows = sweep_rows(sweep)
    table = Table(caption="* the best of its column", caption_justify="left")
    for title in header:
        table.add_column(escape(title), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(f"{cell.strip('*')}*" if cell.startswith("**") else cell) for cell in row))
    open_console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Scores the scales that are not known yet, and writes after each of them.

    Args:
        argv: The command's words; None means those of this process.
    """
    arguments = parse(argv)
    scales = parse_scales(arguments.scales)
    arguments.device = resolve_device(arguments.device)
    arguments.cfg_scale = max(scales)  # each of them is scored

    from flashdit.evaluation.evaluate import evaluate
    from flashdit.evaluation.features.ranks import processes
    from flashdit.evaluation.reports.sweeps import read_sweeps, write_sweep
    from flashdit.evaluation.request import open_plan
    from flashdit.shared.locks import only_writer

    with processes(arguments.device) as ranks, ExitStack() as outputs:
        with ranks.agree():
            generator = open_generator(arguments)
            output = output_folder(arguments.output, generator)
            if ranks.is_main:
                outputs.enter_context(only_writer(output))
            request = make_request(arguments, generator)
        plan = open_plan(request, ranks)
        with ranks.agree():
            sweep, others = read_sweeps(output / "sweep.json", recipe_of(plan))
        assert request.sampling is not None
        sweep.title = sweep_title(plan, generator, request.sampling)
        missing = [scale for scale in scales if scale not in sweep.scales()]
        if ranks.is_main and len(missing) < len(scales):
            print(f"{len(scales) - len(missing)} of {len(scales)} scales are in {output / 'sweep.json'}")
        for number, scale in enumerate(missing, 1):
            if ranks.is_main:
                print(f"guidance {scale:g} ({number} of {len(missing)})")
            options = replace(request.sampling, cfg_scale=scale)
            add_result(sweep, scale, evaluate(plan.redrawn(options=options), ranks))
            if ranks.is_main:
                write_sweep(output, sweep, others)
        if ranks.is_main:
            write_sweep(output, sweep, others)  # again: its table and plot may have been lost
            print_sweep(sweep)
            print(f"wrote {output / 'sweep.png'}, sweep.md and sweep.json")
