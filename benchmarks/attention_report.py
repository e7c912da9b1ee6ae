"""Table and figure of the attention study, from its pieces alone; runs that are not made are named."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.attention_kinds import BASELINE, KINDS, SEEDS, Size
from benchmarks.attention_pieces import Pieces, Run, step_seconds
from flashdit.evaluation.reports.report import markdown_table
from flashdit.shared.charts import COLOURS, new_axes, save_figure
from flashdit.shared.files import write_atomically

Record = dict[str, Any]
SCORES = {
    "loss, unseen drawings": ("loss", "held-out"),
    "loss, unseen families": ("loss", "families"),
    "Fréchet distance": ("scores", "fid"),
    "precision": ("scores", "precision"),
    "recall": ("scores", "recall"),
    "accuracy": ("scores", "accuracy"),
}
FRECHET = "Fréchet distance"
OVER_FLOOR = "… over the floor"
TITLES = {"loss, unseen families": "loss, unseen families", OVER_FLOOR: "Fréchet distance over the floor"}
POSITIONS = "_sincos"
MORE_COLOURS = ("#7d6b5d", "#c0392b", "#5bb0c4", "#222222", "#8d8d1f", "#8a7fc7")


def records(pieces: Pieces, side: int, kind: str) -> list[Record]:
    """Returns the runs of a kind, one a seed; some may be unfinished."""
    found = (pieces.read(Run(side=side, kind=kind, seed=seed).name) for seed in SEEDS)
    return [record for record in found if record is not None]


def curve(run: Record, score: str) -> list[tuple[int, float]]:
    """Returns the steps at which a run has a score, and the score."""
    if score == OVER_FLOOR:
        return [
            (int(step), point["scores"]["fid"] / point["floor"]["fid"])
            for step, point in run["points"].items()
            if "scores" in point
        ]
    part, key = SCORES[score]
    return [(int(step), point[part][key]) for step, point in run["points"].items() if part in point]


def value_at(points: Sequence[tuple[int, float]], step: float) -> float | None:
    """Returns the value at a step, between two points linear in the logarithm of the step.

    Args:
        points: Steps and values, by step.
        step: May lie between two; half a step beyond an end counts as that end.

    Returns:
        None outside of the points.
    """
    for at, value in points:
        if abs(at - step) <= 0.5:
            return value
    for (left, before), (right, after) in pairwise(points):
        if left < step < right:
            share = math.log(step / left) / math.log(right / left)
            return before + share * (after - before)
    return None


def steps_in(seconds: float, baseline_s: float, steps: int) -> float:
    """Returns how many steps a kind makes in the time that the baseline takes for so many."""
    return steps * baseline_s / seconds


def shown(values: Iterable[float | None], digits: str = ".4f") -> str:
    """Returns the mean of the seeds and the values that it is of; empty where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = format(statistics.mean(known), digits)
    if len(known) == 1:
        return f"{mean} (one seed)"
    return f"{mean} ({min(known):{digits}}–{max(known):{digits}})"


def digits_of(score: str) -> str:
    """Returns how a score is written."""
    return ".4f" if score.startswith("loss") else {FRECHET: ".2f", OVER_FLOOR: ".1f"}.get(score, ".3f")


def comparison(pieces: Pieces, size: Size, timing: Record | None = None) -> str:
    """Returns the scores of a size at the budget of steps; empty without runs.

    Args:
        pieces: Of the study.
        size: Token count.
        timing: That the budget of time is read from, for the scores at that one instead.
    """
    scores = ["loss, unseen drawings", "loss, unseen families", FRECHET, OVER_FLOOR]
    scores += ["precision", "recall", "accuracy"]
    rows = []
    for kind in size.kinds:
        if not (runs := records(pieces, size.side, kind)):
            continue
        step: float = size.steps
        if timing is not None:
            seconds = step_seconds(timing)
            if kind not in seconds:
                rows.append([KINDS[kind].label, "not timed", *[""] * len(scores)])
                continue
            step = steps_in(seconds[kind], seconds[BASELINE], size.steps)
        cells = [
            shown((value_at(curve(run, name), step) for run in runs), digits_of(name)) for name in scores
        ]
        if any(cells):
            rows.append([KINDS[kind].label, f"{step:,.0f}", *cells])
    return markdown_table([["attention", "steps", *scores], *rows]) if rows else ""


def costs(timing: Record) -> str:
    """Returns what the kinds of a timing cost."""
    header = [
        "attention",
        "trained parameters",
        "multiply-adds",
        "ms a step",
        "spread",
        "steps to one of LightningDiT's",
    ]
    header += ["images/s, forward", "memory of a step"]
    rows = [
        [
            KINDS[kind].label,
            f"{found['trained_parameters']:,}",
            f"{found['multiply_adds'] / 1e6:,.1f} M",
            f"{found['step']['median_s'] * 1e3:.0f}",
            f"{found['step']['min_s'] * 1e3:.0f}–{found['step']['max_s'] * 1e3:.0f}",
            f"{found['step']['times_as_fast']:.2f}",
            f"{found['images_per_s']:,.0f}",
            f"{found['peak_memory_gib'] * 1024:,.0f} MiB",
        ]
        for kind, found in timing["kinds"].items()
    ]
    return markdown_table([header, *rows])


def shares(pieces: Pieces) -> str:
    """Returns how attention's time compares to the rest of its block's; empty where it was not measured."""
    rows = []
    for path in sorted(pieces.folder.glob("timing_blocks_*.json")):
        for row in json.loads(path.read_text())["rows"]:
            width = f"{row['channels']} ({row['width']})"
            times = [f"{row[key] * 1e3:.1f}" for key in ("attention_s", "block_s")]
            cells = [width, f"{row['side']}²", row["kind"], *times]
            rows.append([*cells, f"{row['attention_over_rest']:.2f}"])
    header = ["channels", "tokens", "attention", "ms of it", "ms of the block", "attention over the rest"]
    return markdown_table([header, *rows]) if rows else ""


def rates(pieces: Pieces) -> str:
    """Returns the losses by learning rate; empty where none was tried."""
    read = {kind: pieces.read(f"rate_{kind}") for kind in KINDS}
    found = {kind: content["losses"] for kind, content in read.items() if content}
    if not found:
        return ""
    tried = sorted({rate for losses in found.values() for rate in losses}, key=float)
    rows = []
    for kind, losses in found.items():
        best = min(losses.values())
        cells = [losses.get(rate) for rate in tried]
        rows.append(
            [KINDS[kind].label]
            + ["" if cell is None else f"**{cell:.4f}**" if cell == best else f"{cell:.4f}" for cell in cells]
        )
    return markdown_table([["attention", *tried], *rows])


def every_point(pieces: Pieces, size: Size) -> str:
    """Returns every score of every run of a size; empty without runs."""
    rows = []
    for kind in size.kinds:
        for run in records(pieces, size.side, kind):
            for step in map(int, run["points"]):
                values = {name: dict(curve(run, name)).get(step) for name in (*SCORES, OVER_FLOOR)}
                cells = [
                    "" if value is None else format(value, digits_of(name)) for name, value in values.items()
                ]
                rows.append([KINDS[kind].label, str(run["seed"]), f"{run['rate']:g}", f"{step:,}", *cells])
    header = ["attention", "seed", "rate", "steps", *SCORES, OVER_FLOOR]
    return markdown_table([header, *rows]) if rows else ""


def missing(pieces: Pieces) -> list[str]:
    """Returns a line for each size of which runs, or points of them, are not made."""
    lines = []
    for side in pieces.sizes:
        runs = [run for run in pieces.runs() if run.side == side]
        for seed in SEEDS:
            of_seed = [run for run in runs if run.seed == seed]
            left = [KINDS[run.kind].label for run in of_seed if not pieces.is_made(run)]
            if left:
                made = len(of_seed) - len(left)
                which = f"; not made: {'; '.join(left)}" if made else ""
                lines.append(f"- {side}² tokens, seed {seed}: {made} of {len(of_seed)} runs{which}")
    return lines


def table(pieces: Pieces) -> str:
    """Returns the Markdown of everything that was made."""
    lines = ["# Which attention, in equal training time", ""]
    if unmade := missing(pieces):
        lines += ["**Partial.**", "", *unmade, ""]
    lines += [
        "Letters of 64×64 pixels on plain ground; means of the seeds, least and greatest in brackets. Equal "
        "time is that in which LightningDiT makes its budget of steps, by the interleaved processor seconds "
        "of a step in the table of costs. Loss of 1,040 drawings; scores of 1,300 samples by 10 steps of "
        "UniPC without guidance.",
        "",
    ]
    for side, size in pieces.sizes.items():
        parts = {f"After {size.steps:,} steps": comparison(pieces, size)}
        for timing in pieces.timings(side).values():
            about = timing["machine"]
            budget = f"In the time of {size.steps:,} steps of LightningDiT on {about['processor']}"
            load = f"one thread, load {about['load_before']:.1f} before the timing"
            parts[budget] = comparison(pieces, size, timing)
            parts[f"Costs on {about['processor']}, {load}"] = costs(timing)
        parts["Every point of every run"] = every_point(pieces, size)
        if not any(parts.values()):
            continue
        patch = f"patches of {size.patch_size}×{size.patch_size} pixels, batches of {size.batch}"
        lines += [f"## {side}² tokens", "", f"{patch[0].upper()}{patch[1:]}."]
        for title, text in parts.items():
            if text:
                lines += ["", f"### {title}", "", text]
        lines.append("")
    for title, text in {
        "Attention and the rest of a block, forward and backward": shares(pieces),
        "Loss of short runs at 16² tokens by learning rate": rates(pieces),
    }.items():
        if text:
            lines += [f"## {title}", "", text, ""]
    return "\n".join(lines)


def draw(pieces: Pieces, path: Path) -> None:
    """Draws loss and Fréchet distance against processor seconds, a column for each token count."""
    timings = {side: next(iter(pieces.timings(side).values()), None) for side in pieces.sizes}
    columns = [
        (pieces.sizes[side], step_seconds(timing))
        for side, timing in timings.items()
        if timing and any(records(pieces, side, kind) for kind in pieces.sizes[side].kinds)
    ]
    if not columns:
        return
    scores = ("loss, unseen families", OVER_FLOOR)
    titles = [f"{size.side}² tokens: {TITLES[score]}" for score in scores for size, _ in columns]
    figure, panels = new_axes(titles, "processor seconds", columns=len(columns))
    groups = list(dict.fromkeys(kind.removesuffix(POSITIONS) for kind in KINDS))
    colours = dict(zip(groups, (*COLOURS, *MORE_COLOURS), strict=False))
    places = [(score, *column) for score in scores for column in columns]
    for axes, (score, size, seconds) in zip(panels, places, strict=True):
        for kind in size.kinds:
            points = mean_curve([curve(run, score) for run in records(pieces, size.side, kind)])
            if not points or kind not in seconds:
                continue
            positioned = kind.endswith(POSITIONS) or kind == BASELINE
            axes.loglog(
                [step * seconds[kind] for step, _ in points],
                [value for _, value in points],
                "o-" if positioned else "o--",
                color=colours[kind.removesuffix(POSITIONS)],
                label=KINDS[kind].label,
                linewidth=1.2,
                markersize=2.5,
            )
    panels[0].legend(fontsize=5)
    save_figure(figure, path)


def mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Returns the mean over runs at the steps that all of them have."""
    by_run = [dict(points) for points in curves if points]
    steps = sorted(set.intersection(*map(set, by_run))) if by_run else []
    return [(step, statistics.mean(values[step] for values in by_run)) for step in steps]


def write_report(pieces: Pieces, text: Path, figure: Path) -> None:
    """Writes table and figure.

    Args:
        pieces: Of the study.
        text: The Markdown file.
        figure: The picture.

    Raises:
        ValueError: If nothing has been made.
    """
    if not any(pieces.folder.glob("*.json")):
        raise ValueError(f"a report requires a piece of the study, {pieces.folder} has none")
    content = table(pieces)
    write_atomically(text, lambda path: path.write_text(content))
    draw(pieces, figure)
