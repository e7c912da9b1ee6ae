"""What a guidance sweep found: a file that can be added to, a table and a plot with the best marked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from flashdit.evaluation.metrics.metric import Score
from flashdit.evaluation.metrics.scoring import scores_of
from flashdit.sampling.records import current_sampling
from flashdit.shared.charts import COLOURS, new_axes, save_figure
from flashdit.shared.files import DRAWN, read_checked_json, write_atomically, write_json
from flashdit.shared.paths import check_replaceable
from flashdit.shared.registry import is_number

SWEEP_SCHEMA = 1
SWEEP_MARK = "| guidance | NFE |"
"""Text that every table of a sweep holds."""


@dataclass(kw_only=True)
class Sweep:
    """The scores of one checkpoint over guidance scales, under one recipe.

    Attributes:
        recipe: Everything that the points share: samples but for the scale, reference, extractor, metrics.
        title: What the plot says of it.
        labels: What each score is called.
        floor: Scores of real training images; None where there are none.
        points: {cfg_scale, nfe, metrics, reasons, warnings, elapsed_s}, by rising scale.
    """

    recipe: dict[str, Any]
    title: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    floor: dict[str, float | None] | None = None
    points: list[dict[str, Any]] = field(default_factory=list)

    def scales(self) -> list[float]:
        """Returns the scales that have been scored."""
        return [point["cfg_scale"] for point in self.points]

    def add(self, point: dict[str, Any]) -> None:
        """Adds the scores of one scale."""
        self.points = sorted([*self.points, point], key=lambda known: known["cfg_scale"])

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Returns the scales and values of a score, where it could be had."""
        known = [point for point in self.points if point["metrics"].get(key) is not None]
        return [point["cfg_scale"] for point in known], [point["metrics"][key] for point in known]

    def scores(self) -> list[Score]:
        """Returns the scores of the recipe's metrics that can be better or worse."""
        return [score for score in scores_of(self.recipe.get("metrics", ())) if score.better]

    def panels(self) -> list[list[Score]]:
        """Returns the scores of each plot, as far as they could be had."""
        found: dict[str, list[Score]] = {}
        for score in self.scores():
            if self.curve(score.key)[0]:
                found.setdefault(score.panel or score.key, []).append(score)
        return list(found.values())

    def best(self) -> dict[str, float]:
        """Returns the scale at which each score is best; of equal ones the smallest scale."""
        found = {}
        for score in self.scores():
            scales, values = self.curve(score.key)
            if scales:
                best = min(values) if score.better == "lower" else max(values)
                found[score.key] = scales[values.index(best)]
        return found


def check_sweep_folder(folder: Path) -> None:
    """Raises ValueError if a folder without a sweep has other files of the names that a sweep's have."""
    if not (folder / "sweep.json").is_file():
        check_replaceable(folder / "sweep.md", SWEEP_MARK, "--output")
        check_replaceable(folder / "sweep.png", DRAWN, "--output")


def read_sweeps(path: Path, recipe: Mapping[str, Any]) -> tuple[Sweep, list[dict[str, Any]]]:
    """Returns the sweep of a recipe, as far as earlier calls came, and what the file holds of other recipes.

    Raises:
        ValueError: If there is a file that no sweep wrote.
    """
    plain = json.loads(json.dumps(recipe))  # tuples as lists, as they come back
    if not path.is_file():
        return Sweep(recipe=plain), []
    try:
        content = read_checked_json(path)
        if content.get("schema") != SWEEP_SCHEMA:
            raise ValueError(f"schema {content.get('schema')}")
        known: list[dict[str, Any]] = [
            {name: sweep[name] for name in Sweep.__dataclass_fields__}
            | {"recipe": _current_recipe(sweep["recipe"])}
            for sweep in (content, *content["others"])
        ]
        for sweep in known:
            tables = [sweep["floor"] or {}, *(point["metrics"] for point in sweep["points"])]
            if not all(isinstance(table, Mapping) for table in tables):
                raise TypeError("scores that are no mapping")
            if not all(is_number(point["cfg_scale"]) for point in sweep["points"]):
                raise TypeError("guidance scales that are no numbers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"{path} must be a sweep's JSON of schema {SWEEP_SCHEMA}"
        raise ValueError(f"{rule}, got {error}: give another --output") from error
    mine = [sweep for sweep in known if sweep["recipe"] == plain]
    return Sweep(**mine[0]) if mine else Sweep(recipe=plain), [other for other in known if other not in mine]


def _current_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recipe on disk with its sampling options under today's keys."""
    samples = recipe.get("samples", {})
    sampling = {"sampling": current_sampling(samples["sampling"])} if "sampling" in samples else {}
    return {**recipe, "samples": {**samples, **sampling}}


def sweep_rows(sweep: Sweep) -> list[list[str]]:
    """Returns the header, a row per scale with the best of each score in asterisks, and the real images'."""
    best, keys = sweep.best(), [score.key for score in sweep.scores() if score.key in sweep.labels]
    rows = [["guidance", "NFE", *(sweep.labels[key] for key in keys)]]
    for point in sweep.points:
        row = [f"{point['cfg_scale']:g}", "varies" if point["nfe"] is None else str(point["nfe"])]
        for key in keys:
            text = number(point["metrics"].get(key))
            row.append(f"**{text}**" if best.get(key) == point["cfg_scale"] else text)
        rows.append(row)
    if sweep.floor:
        rows.append(["real train", "", *(number(sweep.floor.get(key)) for key in keys)])
    return rows


def number(value: float | None) -> str:
    """Returns a score as text; a distance that rounding left below zero is shown as zero."""
    return "n/a" if value is None else f"{max(value, 0.0):.4f}"


def sweep_markdown(sweep: Sweep) -> str:
    """Returns the table, then what is missing and why, warnings and the recipe."""
    header, *rows = sweep_rows(sweep)
    table = [f"| {' | '.join(line)} |" for line in (header, ["---:"] * len(header), *rows)]
    missing = [
        f"{sweep.labels[key]}: {why}" for point in sweep.points for key, why in point["reasons"].items()
    ]
    warnings = [warning for point in sweep.points for warning in point["warnings"]]
    recipe = [f"{name}: `{json.dumps(value)}`" for name, value in sweep.recipe.items()]
    notes = dict.fromkeys([*missing, *warnings, *recipe])  # each once, in order
    return "\n".join([sweep.title, "", *table, "", *(f"- {note}" for note in notes), ""])


def draw_sweep(sweep: Sweep, path: Path) -> None:
    """Draws every score over the scale, with a star at its best and a dashed line at real images' value."""
    panels = sweep.panels()
    if not panels:
        return
    titles = [", ".join(sweep.labels[score.key] for score in scores) for scores in panels]
    figure, all_axes = new_axes(titles, "guidance scale", heading=sweep.title)
    for axes, scores in zip(all_axes, panels, strict=True):
        for score, colour in zip(scores, COLOURS, strict=False):
            draw_score(axes, sweep, score, colour)
        axes.margins(x=0.14, y=0.2)
        if len(scores) > 1 or (sweep.floor or {}).get(scores[0].key) is not None:
            axes.legend(fontsize=8, frameon=False, loc="best")
    save_figure(figure, path)


def draw_score(axes: Axes, sweep: Sweep, score: Score, colour: str) -> None:
    """Draws one score."""
    key = score.key
    scales, values = sweep.curve(key)
    best = sweep.best()[key]
    axes.plot(scales, values, color=colour, marker="o", markersize=3.5, label=sweep.labels[key])
    value = values[scales.index(best)]
    axes.plot([best], [value], marker="*", markersize=13, color=colour)
    below = score.better == "lower"
    axes.annotate(
        f"{value:.4g} at {best:g}",
        (best, value),
        (0, -8 if below else 8),
        textcoords="offset points",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        ha="center",
        va="top" if below else "bottom",
    )
    floor = (sweep.floor or {}).get(key)
    if floor is not None:
        axes.axhline(
            floor, color=colour, linestyle="--", linewidth=0.9, label=f"{sweep.labels[key]} of real train"
        )


def write_sweep(folder: Path, sweep: Sweep, others: Sequence[Mapping[str, Any]]) -> None:
    """Writes sweep.json, sweep.md and sweep.png, each whole or not at all.

    Args:
        folder: Where to.
        sweep: What is shown.
        others: Sweeps of other recipes, which the JSON keeps.
    """
    content = {"schema": SWEEP_SCHEMA, "best": sweep.best(), **asdict(sweep), "others": list(others)}
    write_json(folder / "sweep.json", content)
    write_atomically(folder / "sweep.md", lambda temporary: temporary.write_text(sweep_markdown(sweep)))
    draw_sweep(sweep, folder / "sweep.png")
