"""Pictures of what a model uses: the tokens that a token reaches, receptive fields, Grad-CAM."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from flashdit.shared.files import DRAWN, write_atomically
from flashdit.shared.pictures import panel_grid, png_text
from iwin_core.analysis.mixing import KINDS, spread
from iwin_core.analysis.saliency import share_of_pixels
from iwin_tasks.commands.panels import colour_bar, colour_key, colours, to_picture

NEVER, BEFORE, NEW, START = (234, 234, 234), (158, 194, 230), (31, 88, 156), (214, 39, 40)
DECADES = 4  # of the receptive field's colour scale
PANEL_HEIGHT = 280


def reached_pixels(reached: Tensor, before: Tensor, token: Sequence[int]) -> Tensor:
    """Returns uint8 (h, w, 3): what this block added, what was reached before, what is not, and the start."""
    palette = torch.tensor([NEVER, BEFORE, NEW, START], dtype=torch.uint8)
    index = reached.long() * 2 - (reached & before).long()
    index[tuple(token)] = 3
    return palette[index]


def draw_reach(
    grid: Sequence[int], window: int, kernel: int, blocks: int, tokens: Sequence[Sequence[int]]
) -> Image:
    """Returns the picture: a row per kind of block; for each token a column per number of blocks.

    Args:
        grid: H and W.
        window: Window side M.
        kernel: Kernel side K.
        blocks: Columns for each token.
        tokens: Where to start from, each (row, column).
    """
    rows = []
    for name, kind in KINDS.items():
        panels = []
        for token in tokens:
            before = torch.zeros(*grid, dtype=torch.bool)
            for reached in itertools.islice(spread(grid, window, kernel, name, token), blocks):
                panels.append(to_picture(reached_pixels(reached[0], before, token), height=170))
                before = reached[0]
        rows.append((kind.label, panels))
    heads = [f"({i}, {j}), {n} block{'s' * (n > 1)}" for i, j in tokens for n in range(1, blocks + 1)]
    key = colour_key(
        [(START, "start"), (NEW, "reached in this block"), (BEFORE, "reached before"), (NEVER, "not reached")]
    )
    title = f"What one token reaches: {grid[0]} x {grid[1]} tokens, window {window}, kernel {kernel}"
    return panel_grid(rows, heads, title=title, legend=key)


def save_drawing(picture: Image, path: Path) -> None:
    """Writes a drawing as a PNG, whole or not at all; it holds the text `DRAWN`."""
    about = png_text({"Software": DRAWN})
    write_atomically(path, lambda temporary: picture.save(temporary, format="png", pnginfo=about))


def draw_fields(title: str, fields: Sequence[tuple[str, Tensor]]) -> Image:
    """Returns receptive fields (H, W) side by side, each relative to its largest pixel, in powers of ten."""
    panels = []
    for _, field in fields:
        decades = (field / field.max().clamp_min(torch.finfo().tiny)).clamp_min(10.0**-DECADES).log10()
        panels.append(to_picture(colours(1 + decades / DECADES), PANEL_HEIGHT))
    heads = [f"{name}: half in {share_of_pixels(field, 0.5):.2%} of pixels" for name, field in fields]
    bar = colour_bar(f"1e-{DECADES} or less", f"1e-{DECADES // 2}", "largest gradient")
    return panel_grid([("", panels)], heads, title=title, legend=bar)


def draw_cams(title: str, layers: Sequence[str], images: Tensor, cams: Sequence[Sequence[Tensor]]) -> Image:
    """Returns a row per image: the image, then each layer's map over it, relative to its largest value.

    Args:
        title: The line at the top.
        layers: Names for the columns.
        images: (N, 3, H, W) in [0, 1].
        cams: For each image and layer a map (h, w).
    """
    rows = []
    for image, maps in zip(images, cams, strict=True):
        photograph = image.permute(1, 2, 0) * 255  # (h, w, 3)
        panels = [photograph]
        for cam in maps:
            cam = F.interpolate(cam[None, None], image.shape[1:], mode="bilinear")[0, 0]
            heat = colours(cam / cam.max().clamp_min(torch.finfo().tiny))
            panels.append(0.45 * photograph + 0.55 * heat)
        rows.append(("", [to_picture(panel.round().to(torch.uint8), PANEL_HEIGHT) for panel in panels]))
    legend = colour_bar("0", "half", "largest")
    return panel_grid(rows, ["image", *layers], title=title, legend=legend)
