"""Draws losses and scores of runs side by side, over the images they saw: `flashdit plot RUN [RUN…]`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashdit.commands.arguments import path, path_text
from flashdit.commands.curves import (
    CURVES_MARK,
    Curve,
    RunCurves,
    read_reference,
    read_run,
    shipped_references,
    smooth,
    write_reference_curve,
)
from flashdit.shared.command import CommandParser
from flashdit.shared.files import DRAWN
from flashdit.shared.locks import only_writer
from flashdit.shared.paths import check_outside
from flashdit.shared.registry import unknown
from flashdit.shared.runs import images_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCE_COLOUR = "#3c4350"
STYLES = ("-", "--", ":")
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
TAIL = 0.1  # share of a run whose mean the legend gives
BEGINNING = 0.05  # share of the longest run that may leave the panel
LARGER = 1.4  # than a panel of a sweep


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values, checked."""
    parser = CommandParser(
        description="Draws the losses of runs over the images they have seen, and the scores of evaluations "
        "within training where there are some. Beside a run of a small preset's task stands the curve that "
        "ships with the preset, made by --write-reference from the preset's own run.",
    )
    add = parser.add_argument
    add("runs", type=path, nargs="+", metavar="RUN", help="a run's folder")
    add("--output", type=path, metavar="FILE", help="png, svg or pdf (default: curves.png in the first run)")
    add("--metric", default="loss", metavar="NAMES", help="of metrics.jsonl, with commas (default: loss)")
    add(
        "--smoothing",
        type=float,
        default=0.03,
        help="as a share of a run's length (default: 0.03); 0 for none",
    )
    add(
        "--reference",
        type=path_text,
        metavar="FILE|none",
        help="draw this reference, or none (default: those that fit)",
    )
    add(
        "--write-reference",
        type=path,
        metavar="FILE",
        help="write the first run's metrics and scores, thinned, as a reference instead of drawing",
    )
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.smoothing <= 1:
        raise ValueError(f"--smoothing must be from 0 to 1, got {arguments.smoothing}")
    if arguments.output is not None and arguments.output.suffix not in PLOT_SUFFIXES:
        raise ValueError(f"--output must end in {', '.join(PLOT_SUFFIXES)}, got {arguments.output}")
    return arguments


def pick_metrics(text: str, runs: Sequence[RunCurves]) -> list[str]:
    """Returns the metrics to draw: those named, then every score of the runs.

    Raises:
        ValueError: If no run has a metric that is named.
    """
    known = {name: None for run in runs for name in run.curves}
    named = [name.strip() for name in text.split(",")]
    for name in named:
        if name not in known:
            raise unknown("metric", name, known)
    return list(dict.fromkeys([*named, *(name for name in known if name in drawn_scores(runs))]))


def drawn_scores(runs: Sequence[RunCurves]) -> set[str]:
    """Returns which metrics are scores of evaluations in a run: few points, which are not smoothed."""
    return {name for run in runs for name in run.scores}


def distinct(runs: Sequence[RunCurves], paths: Sequence[Path]) -> list[RunCurves]:
    """Returns the runs, those that share a name named by their paths."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=str(path))
        for run, path in zip(runs, paths, strict=True)
    ]


def draw_runs(
    runs: Sequence[RunCurves],
    references: Sequence[RunCurves],
    metrics: Sequence[str],
    smoothing: float,
    path: Path,
) -> None:
    """Draws a panel for each metric and writes the figure.

    Args:
        runs: In colours.
        references: In grey, behind them.
        metrics: What to draw.
        smoothing: As a share of a run's length.
        path: Of the figure.
    """
    from matplotlib.ticker import EngFormatter

    from flashdit.shared.charts import COLOURS, new_axes, save_figure

    scores = drawn_scores([*runs, *references])
    figure, all_axes = new_axes(metrics, "images seen", columns=2)
    figure.set_size_inches(*(LARGER * figure.get_size_inches()))
    for axes, metric in zip(all_axes, metrics, strict=True):
        share = 0.0 if metric in scores else smoothing
        for place, run in enumerate(runs):
            colour, style = COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS) % len(STYLES)]
            if share and run.curves.get(metric):
                axes.plot(*zip(*run.curves[metric], strict=True), color=colour, linewidth=0.8, alpha=0.3)
            line: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": 1.7}
            draw_curve(axes, run.curves.get(metric), metric in scores, share, run.name, line)
        for reference in references:  # above the runs, for where it is the same
            line = {"color": REFERENCE_COLOUR, "linestyle": "--", "linewidth": 1.1}
            label = f"{reference.name}, reference"
            draw_curve(axes, reference.curves.get(metric), metric in scores, share, label, line)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        fit_values(axes, [run.curves[metric] for run in (*runs, *references) if metric in run.curves])
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def draw_curve(
    axes: Axes, curve: Curve | None, is_score: bool, smoothing: float, label: str, line: Mapping[str, Any]
) -> None:
    """Draws one curve, smoothed, or the points of a score; the label gives where it ends.

    Args:
        axes: The panel.
        curve: None draws nothing.
        is_score: Whether each point is marked and the last one, not the mean of the end, is in the label.
        smoothing: As a share of the curve's length.
        label: Name of the run.
        line: Colour and style.
    """
    if not curve:
        return
    tail = [value for images, value in curve if images >= (1 - TAIL) * curve[-1][0]]
    end = curve[-1][1] if is_score else sum(tail) / len(tail)
    marks = {"marker": "o", "markersize": 3.5} if is_score or len(curve) == 1 else {}
    axes.plot(*zip(*smooth(curve, smoothing), strict=True), label=f"{label}: {end:.4g}", **line, **marks)


def fit_values(axes: Axes, curves: Sequence[Curve]) -> None:
    """Fits the values' axis to what comes after the steep beginning, and to the later half of every curve."""
    longest = max(curve[-1][0] for curve in curves)
    values = [
        value
        for curve in curves
        for images, value in curve
        if images >= min(BEGINNING * longest, curve[-1][0] / 2)
    ]
    if len(set(values)) > 1:
        margin = 0.08 * (max(values) - min(values))
        axes.set_ylim(min(values) - margin, max(values) + margin)


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the runs, or writes the reference of one."""
    arguments = parse(argv)
    runs = distinct([read_run(path) for path in arguments.runs], arguments.runs)
    metrics = pick_metrics(arguments.metric, runs)
    if arguments.write_reference is not None:
        names = [name for name in metrics if name in runs[0].curves]
        with only_writer(
            arguments.write_reference, is_file=True, mark=CURVES_MARK, called="--write-reference"
        ):
            write_reference_curve(runs[0], names, arguments.write_reference)
        print(f"wrote {arguments.write_reference}")
        return
    if arguments.reference is None:
        references = shipped_references(runs)
    else:
        references = [] if arguments.reference == "none" else [read_reference(Path(arguments.reference))]
    output = arguments.output or arguments.runs[0] / "curves.png"
    for run in runs:
        check_outside(output, images_of(run.task), "--output", f"the run {run.name}")
    with only_writer(output, is_file=True, mark=DRAWN):
        draw_runs(runs, references, metrics, arguments.smoothing, output)
    print(f"wrote {output}")
