"""Line plots in one style: axes to draw on, and files that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flashdit.shared.files import DRAWN, write_atomically

COLOURS = ("#2f5d9b", "#d9822b", "#3a8f5c", "#9b3f7a")  # distinct for the colour-blind too
PANEL_INCHES = (4.0, 2.9)  # inches
DPI = 150


def new_axes(
    titles: Sequence[str], x_label: str, columns: int = 3, heading: str = ""
) -> tuple[Figure, list[Axes]]:
    """Returns a figure and one panel per title, row by row.

    The figure belongs to no window and no global state: it is drawn when it is saved, wherever that is.

    Args:
        titles: Of the panels.
        x_label: What runs along the x axis of each.
        columns: Panels side by side at the most.
        heading: A line above all panels, empty for none.
    """
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), layout="constrained")
    if heading:
        figure.suptitle(heading, fontsize=11, x=0.01, ha="left")
    panels = []
    for place, title in enumerate(titles):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(x_label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e3e7ee", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        panels.append(axes)
    return figure, panels


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of the path's suffix, whole or not at all; it holds the text `DRAWN`."""
    kind = path.suffix.removeprefix(".")
    about = {"Software" if kind == "png" else "Creator": DRAWN}
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=DPI, metadata=about))
