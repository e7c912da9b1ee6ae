"""An evaluation as one page for people: numbers, how they came about, and pictures; no script, no link."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from flashdit.evaluation.reports.by_class import ClassScore
from flashdit.evaluation.reports.gallery import Gallery, Picture
from flashdit.evaluation.reports.report import EvalResult, footnotes, table_rows
from flashdit.sampling.records import weights_of
from flashdit.shared.files import read_checked_json, write_atomically
from flashdit.shared.pictures import to_pil

logger = logging.getLogger(__name__)
TEMPLATE = "report.html.j2"
HTML_MARK = "<title>Evaluation of "
"""Text that every page holds."""
SMALLEST, LARGEST = 64, 128  # pixels of the longer side on the page
MAX_CLASSES = 30  # rows of the class table
SHOWN_ELSEWHERE = ("metrics", "reasons", "floor", "labels", "warnings")


def shown_size(height: int, width: int) -> tuple[int, int]:
    """Returns the (width, height) that an image has on the page: small ones are whole multiples."""
    longer = max(height, width)
    if longer > LARGEST:
        return max(1, round(width * LARGEST / longer)), max(1, round(height * LARGEST / longer))
    scale = max(1, -(-SMALLEST // longer))
    return width * scale, height * scale


def png_uri(image: Image.Image) -> str:
    """Returns a PNG as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return file_uri(buffer.getvalue())


def file_uri(png: bytes) -> str:
    """Returns the bytes of a PNG file as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def picture_fields(gallery: Gallery, picture: Picture) -> dict[str, Any]:
    """Returns what the template needs of a picture; pixels are sent once each, never enlarged."""
    image = to_pil(gallery.image_of(picture))
    width, height = shown_size(image.height, image.width)
    if width < image.width:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    name = f"{'real image' if picture.real else 'sample'} {picture.row}"
    return {
        "uri": png_uri(image),
        "width": width,
        "height": height,
        "alt": ", ".join([name, *picture.caption]),
        "caption": picture.caption,
        "kind": " ".join(["real"] * picture.real + ["doubtful"] * picture.doubtful),
    }


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted key, value as text) of nested dictionaries, in their order."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def page_title(result: EvalResult) -> str:
    """Returns what was evaluated, in a line."""
    samples = result.samples
    what = samples.get("checkpoint") or samples.get("path") or samples.get("source", "samples")
    return f"Evaluation of {what}"


def worst_classes(classes: list[ClassScore]) -> list[ClassScore]:
    """Returns the classes of the table: all of few, otherwise the worst by distance, or else by accuracy."""
    if len(classes) <= MAX_CLASSES:
        return classes
    order = sorted(classes, key=lambda score: (-(score.distance or 0.0), score.accuracy or 0.0))
    return order[:MAX_CLASSES]


def sweep_uri(folder: Path, result: EvalResult) -> str | None:
    """Returns the plot of the guidance sweep in a folder, if it is of the weights that were evaluated."""
    plot, content = folder / "sweep.png", folder / "sweep.json"
    if not (plot.is_file() and content.is_file()):
        return None
    try:
        swept = weights_of(read_checked_json(content)["recipe"]["samples"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is no sweep's JSON, so the page does without it: %s", content, error)
        return None
    same = swept[0] is not None and swept == weights_of(result.samples)
    return file_uri(plot.read_bytes()) if same else None


def to_html(result: EvalResult, gallery: Gallery, sweep: str | None = None) -> str:
    """Returns the page.

    Args:
        result: The evaluation.
        gallery: Its pictures.
        sweep: Data URI of a guidance sweep's plot; None leaves it out.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    header, *rows = table_rows(result)
    recipe = {key: value for key, value in result.to_dict().items() if key not in SHOWN_ELSEWHERE}
    shown = worst_classes(gallery.classes)
    return environment.get_template(TEMPLATE).render(
        title=page_title(result),
        header=header,
        rows=rows,
        notes=[note for note in footnotes(result) if note not in result.warnings],
        warnings=result.warnings,
        distance_name=result.names["fid"].label if "fid" in result.names else "Fréchet distance",
        classes=shown,
        num_classes=len(gallery.classes),
        largest_distance=max((score.distance or 0.0 for score in shown), default=0.0),
        class_notes=gallery.class_notes,
        sections=[
            (
                section,
                [
                    (label, [picture_fields(gallery, picture) for picture in pictures])
                    for label, pictures in section.rows
                ],
            )
            for section in gallery.sections
        ],
        reduced=any(max(image.shape[1:]) > LARGEST for image in gallery.images.values()),
        largest=LARGEST,
        sweep=sweep,
        recipe=list(flatten(recipe)),
    )


def write_html(path: Path, result: EvalResult, gallery: Gallery) -> None:
    """Writes the page, whole or not at all; a sweep of the same weights beside it is taken in.

    Args:
        path: The .html file.
        result: The evaluation.
        gallery: What `make_gallery` returns of it.
    """
    page = to_html(result, gallery, sweep_uri(path.parent / "sweep", result))
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
