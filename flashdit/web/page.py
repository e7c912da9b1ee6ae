"""The layout of the web page: controls on the left, the pictures of one or two models on the right."""

from __future__ import annotations

import html
import json
import random
from dataclasses import dataclass
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
from gradio.themes import Default  # pyright: ignore[reportMissingImports]

from flashdit.flow.samplers import SAMPLERS
from flashdit.sampling.checkpoint import CheckpointGenerator
from flashdit.web.studio import (
    FRAMES,
    MAX_IMAGES,
    PageRequest,
    Pictures,
    Studio,
    class_choices,
)

TITLE = "FlashDiT"
SIDES = 2
NOBODY = "nothing"
SEEDS = 2**31
IMAGES, GRID_COLUMNS = 10, 5
CACHE_S = (600, 3600)  # every ten minutes, what is an hour old goes
THEME = Default(
    primary_hue="indigo",
    # the reader's own fonts: none comes over the net
    font=("system-ui", "sans-serif"),
    font_mono=("ui-monospace", "monospace"),
)
CSS = """
.pictures .grid-wrap {min-height: 0; max-height: none; overflow: visible}
.pictures .grid-container {padding: 0; grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr))}
.pictures .grid-container {grid-template-rows: auto; grid-auto-rows: auto}
.pictures .thumbnail-item {aspect-ratio: auto; height: auto}
.pictures .caption-label {position: static; padding: 0.1rem; max-width: none; text-align: center}
.pictures .caption-label {border: none; background: none}
.pictures img {height: auto; image-rendering: pixelated}
footer {display: none !important}
"""  # captions below the pictures, not on them; a gallery as high as what it holds


@dataclass(kw_only=True)
class PageSide:
    """Where the pictures of one model go."""

    column: gr.Column
    heading: gr.Markdown
    images: gr.Gallery
    film: gr.Gallery
    download: gr.DownloadButton
    recipe: gr.Code

    def parts(self) -> list[Any]:
        """Returns the components, in the order of what `side_updates` and `hide` return."""
        return [self.column, self.heading, self.images, self.film, self.download, self.recipe]


def make_page(studio: Studio) -> gr.Blocks:
    """Returns the page of a studio, ready to launch."""
    names = list(studio.generators)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=CACHE_S, fill_width=True) as page:
        gr.Markdown(f"# {TITLE}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                button = gr.Button("Generate", variant="primary", elem_id="generate")
                with gr.Group():
                    model = gr.Dropdown(names, value=names[0], label="Model", elem_id="model")
                    beside = gr.Dropdown(
                        [NOBODY, *names], label="Beside it", elem_id="beside", visible=len(names) > 1
                    )
                    controls = make_controls(studio.generators[names[0]])
            with gr.Column(scale=3, min_width=480), gr.Row():
                sides = [make_side(place) for place in range(SIDES)]

        def generate(model: str, beside: str, *values: Any) -> list[Any]:
            """Returns what each side shows; a mistake becomes one sentence on the page."""
            chosen = [model] if beside == NOBODY else [model, beside]
            request = PageRequest(**dict(zip(controls, values, strict=True)))
            try:
                made = [studio.make(plan) for plan in studio.plans(chosen, request)]
            except ValueError as error:
                gr.Warning(html.escape(str(error), quote=False))
                return [gr.skip()] * len(outputs)  # what was there stays
            shown = [side_updates(name, pictures) for name, pictures in zip(chosen, made, strict=True)]
            return [value for side in (*shown, *[hide()] * (SIDES - len(shown))) for value in side]

        outputs = [part for side in sides for part in side.parts()]
        button.click(generate, [model, beside, *controls.values()], outputs, api_name="generate")
        fitted = model_controls(studio.generators[names[0]])
        model.change(
            lambda name: [
                gr.update(**properties) for properties in model_controls(studio.generators[name]).values()
            ],
            model,
            [controls[name] for name in fitted],
            api_visibility="private",
        )
    return page


def model_controls(generator: CheckpointGenerator) -> dict[str, dict[str, Any]]:
    """Returns the properties of controls that depend on the model: its classes and the size it knows."""
    choices = class_choices(generator.class_names)
    height, width = generator.image_size(generator.sampling)
    return {
        "classes": {"choices": choices, "visible": bool(choices)},
        "height": {"value": height},
        "width": {"value": width},
    }


def make_controls(generator: CheckpointGenerator) -> dict[str, Any]:
    """Returns the controls by the names of `PageRequest`, as the model's configuration has them.

    Numbers have no bounds here: an invalid one is refused with the message of `flashdit sample`.
    """
    options, fitted = generator.sampling, model_controls(generator)
    low, high = options.cfg_interval
    controls: dict[str, Any] = {
        "classes": gr.Dropdown(
            **fitted["classes"],
            value=[],
            multiselect=True,
            allow_custom_value=True,  # an id will do; for a wrong name the message has the nearest
            label="Classes",
            info="By name or id; none: the first ten.",
            elem_id="classes",
        ),
        "num_images": gr.Slider(1, MAX_IMAGES, IMAGES, step=1, label="Images", elem_id="num_images"),
        "cfg_scale": gr.Slider(0, 10, options.cfg_scale, step=0.1, label="Guidance", elem_id="cfg_scale"),
    }

    def number(name: str, label: str, value: float, **more: Any) -> None:
        controls[name] = gr.Number(value, label=label, min_width=100, elem_id=name, **more)

    with gr.Row():
        number("cfg_low", "Guided from t", low, step=0.05)
        number("cfg_high", "until t", high, step=0.05)
    with gr.Row():
        controls["sampler"] = gr.Dropdown(
            SAMPLERS.names(), value=options.sampler_name, label="Sampler", min_width=100, elem_id="sampler"
        )
        number("steps", "Steps", options.steps, precision=0)
    with gr.Row():
        number("height", "Height", **fitted["height"], precision=0)
        number("width", "Width", **fitted["width"], precision=0)
    another = gr.Button("Another seed", elem_id="another", render=False)
    number("seed", "Seed", options.seed, precision=0, buttons=[another])
    another.click(lambda: random.randrange(SEEDS), None, controls["seed"], api_visibility="private")
    return controls


def make_side(place: int) -> PageSide:
    """Returns the empty components of one model's pictures."""
    with gr.Column(visible=place == 0, min_width=320, elem_id=f"side-{place}") as column:
        heading = gr.Markdown("### Choose, then *Generate*", elem_id=f"heading-{place}")
        images = gr.Gallery(
            label="Images",
            show_label=False,
            columns=GRID_COLUMNS,
            object_fit="contain",
            elem_classes="pictures",
            elem_id=f"images-{place}",
        )
        gr.Markdown("**The first image** as predicted at time t, from 0 (noise) to 1 (data)")
        film = gr.Gallery(
            label="Film",
            show_label=False,
            columns=FRAMES,
            object_fit="contain",
            elem_classes=["pictures", "film"],
            elem_id=f"film-{place}",
        )
        download = gr.DownloadButton(
            "Download all as one PNG with its recipe", interactive=False, elem_id=f"download-{place}"
        )
        with gr.Accordion("Recipe", open=False):
            recipe = gr.Code(language="json", show_label=False, elem_id=f"recipe-{place}")
    return PageSide(
        column=column, heading=heading, images=images, film=film, download=download, recipe=recipe
    )


def side_updates(name: str, pictures: Pictures) -> list[Any]:
    """Returns what a side shows of a model's pictures."""
    recipe = pictures.recipe
    return [
        gr.update(visible=True),
        f"### {name}\n{recipe['title']}; {recipe['nfe']:g} model evaluations an image",
        pictures.images,
        pictures.film,
        gr.update(value=str(pictures.grid), interactive=True),
        json.dumps(recipe, indent=2),
    ]


def hide() -> list[Any]:
    """Returns what a side without a model shows."""
    return [gr.update(visible=False), "", [], [], gr.update(value=None, interactive=False), ""]
