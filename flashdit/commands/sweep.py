"""`eval_fid.py sweep`: one checkpoint scored over guidance scales; what is known is not computed again."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashdit.commands.arguments import (
    add_sampling,
    add_weights,
    check_batch_size,
    chosen_metrics,
    generated_source,
    open_extractor,
    open_generator,
    reference_name,
)
from flashdit.evaluation.evaluate import Plan, evaluate
from flashdit.evaluation.features.cache import FeatureCache
from flashdit.evaluation.features.ranks import processes
from flashdit.evaluation.images.sources import GeneratedSource
from flashdit.evaluation.metrics.scoring import METRICS, check_names
from flashdit.evaluation.reference import KeptReference
from flashdit.evaluation.reports.report import EvalResult
from flashdit.evaluation.reports.sweeps import Sweep, read_sweeps, table_rows, write_sweep
from flashdit.shared.command import add_device, resolve_device

MOST_SCALES = 1000
LABELS = ("balanced", "random")


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
        numbers = [round(low + place * step, 9) for place in range(count)]
    if min(numbers) < 0:
        raise ValueError(f"--cfg-scale must not be negative, got '{text}'")
    return sorted(set(numbers))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line; what is not given is None."""
    parser = argparse.ArgumentParser(
        prog="eval_fid.py sweep",
        description="Scores one checkpoint over guidance scales.",
        epilog="Writes sweep.json, sweep.md and sweep.png; called again, computes only the new scales.",
        conflict_handler="resolve",  # here --cfg-scale takes several
    )
    add_sampling(parser)
    add = parser.add_argument
    add("--cfg-scale", dest="scales", required=True, metavar="LOW:HIGH:STEP|A,B,...", help="scales to score")
    add("--checkpoint", type=Path, metavar="PATH", help="a checkpoint or run (default: the newest run)")
    add_weights(parser)
    add("--num-images", type=int, help="at each scale (default: 1,000 for digits, 50,000 otherwise)")
    add("--labels", choices=LABELS, help="equal shares (default), or drawn; in random order")
    add("--reference", metavar="NPZ|FOLDER|digits", help="default: digits for a checkpoint of digits")
    add("--extractor", help="as in eval_fid.py (default: digits for that reference, otherwise inception)")
    add("--extractor-weights", "--inception-weights", metavar="PATH", help="the extractor's weights file")
    add(
        "--metrics",
        type=lambda text: [name.strip() for name in text.split(",")],
        help=f"comma-separated, of {','.join(METRICS)} (default: all that apply, but kid)",
    )
    add("--batch-size", type=int, default=100, help="images at a time; changes no number (default: 100)")
    add("--no-cache", action="store_true", help="keep no features and read none")
    add("--output", type=Path, metavar="FOLDER", help="default: the run's eval/sweep")
    add_device(parser)
    parser.set_defaults(cfg_scale=None)
    return parser.parse_args(argv)


def make_plan(arguments: argparse.Namespace) -> tuple[Plan, Path]:
    """Returns what every scale shares, its samples at the checkpoint's own scale, and the folder to write."""
    check_names(arguments.metrics or ())
    check_batch_size(arguments)
    generator = open_generator(arguments)
    name = reference_name(arguments, generator)
    extractor = open_extractor(arguments, name)
    metrics = chosen_metrics(arguments, extractor, generator.class_names)
    samples = generated_source(arguments, generator, name)
    output = arguments.output or generator.run_dir / "eval" / "sweep"
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a folder, got {output}")
    cache = None if arguments.no_cache else FeatureCache()
    return Plan(samples, extractor, KeptReference(name, extractor), metrics, cache), output


def at_scale(plan: Plan, scale: float) -> Plan:
    """Returns the plan with its samples drawn at another guidance scale."""
    samples = plan.samples
    assert isinstance(samples, GeneratedSource)
    options = replace(samples.options, cfg_scale=scale)
    return plan._replace(samples=GeneratedSource(samples.generator, samples.labels, options))


def recipe_of(plan: Plan) -> dict[str, Any]:
    """Returns what two points of a plot must have in common."""
    samples = {name: value for name, value in plan.samples.identity().items() if name != "code"}
    samples["sampling"] = {name: value for name, value in samples["sampling"].items() if name != "cfg_scale"}
    return {
        "samples": samples,
        "reference": plan.reference.recipe(),
        "extractor": {"name": plan.extractor.name, "fingerprint": plan.extractor.fingerprint},
        "metrics": plan.metrics,
    }


def title_of(plan: Plan) -> str:
    """Returns what a plot says of its recipe."""
    samples = plan.samples
    assert isinstance(samples, GeneratedSource)
    how, _, _ = str(samples.options).partition(", guidance")
    low, high = samples.options.cfg_interval
    times = "" if (low, high) == (0, 1) else f", guidance for t in {low:g}–{high:g}"
    made = samples.generator
    run = f"{made.run_dir.name}, step {made.step}, {made.weights} weights"
    return f"{run}: {samples.count:,} images, {how}{times}, against {plan.reference.spec}"


def add_result(sweep: Sweep, scale: float, result: EvalResult) -> None:
    """Adds the scores of one scale."""
    sweep.labels = dict(result.labels)
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


def print_table(sweep: Sweep, console: Console) -> None:
    """Prints the table, an asterisk at the best of each score."""
    header, *rows = table_rows(sweep)
    table = Table(caption="* the best of its column", caption_justify="left")
    for title in header:
        table.add_column(escape(title), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(f"{cell.strip('*')}*" if cell.startswith("**") else cell) for cell in row))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Scores the scales that are not known yet, and writes after each of them."""
    arguments = parse_arguments(argv)
    arguments.device = resolve_device(arguments.device)
    scales = parse_scales(arguments.scales)
    with processes(arguments.device) as ranks:
        with ranks.agree():
            plan, output = make_plan(arguments)
            sweep, others = read_sweeps(output / "sweep.json", recipe_of(plan))
        sweep.title = title_of(plan)
        missing = [scale for scale in scales if scale not in sweep.scales()]
        if ranks.is_main and len(missing) < len(scales):
            print(f"{len(scales) - len(missing)} of {len(scales)} scales are in {output / 'sweep.json'}")
        for place, scale in enumerate(missing):
            if ranks.is_main:
                print(f"guidance {scale:g} ({place + 1} of {len(missing)})")
            result = evaluate(at_scale(plan, scale), arguments.batch_size, arguments.device, ranks)
            add_result(sweep, scale, result)
            if ranks.is_main:
                write_sweep(output, sweep, others)
        if ranks.is_main:
            write_sweep(output, sweep, others)  # again: its table and plot may have been lost
            print_table(sweep, Console())
            print(f"wrote {output / 'sweep.png'}, sweep.md and sweep.json")
