"""The layout of the web page: controls on the left, the pictures of one or two models on the right."""

from __future__ import annotations

import html
import json
import random
import warnings
from dataclasses import dataclass
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import torch
from gradio.themes import Default  # pyright: ignore[reportMissingImports]

from flashdit.flow.samplers import SAMPLERS
from flashdit.sampling.checkpoint import CheckpointGenerator
from flashdit.shared.registry import counted
from flashdit.web.plan import AXES, MAX_IMAGES, PageRequest, class_choices
from flashdit.web.studio import FRAMES, Pictures, Studio

TITLE = "FlashDiT"
SIDES = 2
NOBODY = "nothing"
SEEDS = 2**31
IMAGES, GRID_COLUMNS = 10, 5
EXAMPLES, EXAMPLES_NAME = 12, "examples"
HINT = "# click a picture for the command that makes it"
MAX_SENTENCE = 500  # characters: a message repeats what came
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
.pictures .caption-label {border: none; background: none; white-space: normal}
.pictures img {height: auto; image-rendering: pixelated}
.pictures:has(.preview) .grid-wrap {min-height: 22rem}
.command .cm-scroller, .command .cm-content {min-height: 3rem !important}
#examples {background: var(--block-background-fill); padding: var(--block-padding)}
#examples .gallery-item {border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg)}
footer {display: none !important}
@media (max-width: 640px) {.film .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr))}}
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
    command: gr.Code
    commands: gr.State
    """The command of each picture."""

    def parts(self) -> list[Any]:
        """Returns the components, in the order of what `side_updates` and `hide` return."""
        shown = [self.column, self.heading, self.images, self.film, self.download, self.recipe]
        return [*shown, self.command, self.commands]


def make_page(studio: Studio) -> gr.Blocks:
    """Returns the page of a studio, ready to serve."""
    names = list(studio.generators)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {TITLE}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                button = gr.Button("Generate", variant="primary", elem_id="generate")
                with gr.Group():
                    model = gr.Dropdown(names, value=names[0], label="Model", elem_id="model")
                    beside = gr.Dropdown(
                        [NOBODY, *names],
                        value=NOBODY,
                        label="Beside it",
                        elem_id="beside",
                        visible=len(names) > 1,
                    )
                    controls, examples = make_controls(studio.generators[names[0]])
            with gr.Column(scale=3, min_width=320), gr.Row():
                sides = [make_side(place) for place in range(SIDES)]

        def generate(model: str, beside: str, *values: Any, progress: gr.Progress = gr.Progress()) -> list:  # noqa: B008
            """Returns what each side shows; a mistake becomes one sentence on the page."""
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                made = answer(studio, [model, beside], dict(zip(controls, values, strict=True)), progress)
            for sentence in dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning):
                gr.Warning(as_html(sentence))
            updates = [side_updates(name, pictures) for name, pictures in made]
            return [value for side in (*updates, *[hide()] * (SIDES - len(updates))) for value in side]

        outputs = [part for side in sides for part in side.parts()]
        button.click(
            generate,
            [model, beside, *controls.values()],
            outputs,
            api_name="generate",
            preprocess=False,  # what the API is sent is checked by PageRequest
            show_progress_on=[side.heading for side in sides],
        )
        fitted = model_controls(studio.generators[names[0]])
        model.change(
            lambda name: [
                gr.update(**properties) for properties in model_controls(studio.generators[name]).values()
            ],
            model,
            [examples if name == EXAMPLES_NAME else controls[name] for name in fitted],
            api_visibility="private",
        )
    return page


def answer(studio: Studio, names: list[Any], values: dict[str, Any], progress: Any) -> list:
    """Returns (name, pictures) of each model that is asked, or raises gradio's error with one sentence."""
    chosen = [name for place, name in enumerate(names) if place == 0 or name not in (NOBODY, None)]
    values |= {name: None for name in ("across", "down") if values[name] in (NOBODY, "")}
    try:
        sheets, work = studio.sheets(chosen, PageRequest(**values))
        made = [studio.make(sheet, work, lambda share, text: progress(share, text)) for sheet in sheets]
    except torch.OutOfMemoryError:
        raise gr.Error("the device's memory is too small for this request", print_exception=False) from None
    except (ValueError, OSError) as error:
        raise gr.Error(as_html(str(error)), print_exception=False) from None
    return list(zip(chosen, made, strict=True))


def as_html(sentence: str) -> str:
    """Returns a message as the page shows it, which takes it for HTML."""
    line = " ".join(sentence.split())
    return html.escape(line if len(line) <= MAX_SENTENCE else f"{line[:MAX_SENTENCE]} …", quote=False)


def model_controls(generator: CheckpointGenerator) -> dict[str, dict[str, Any]]:
    """Returns the properties of controls that depend on the model: its classes and the size it knows."""
    choices = class_choices(generator.class_names)
    height, width = generator.image_size(generator.sampling)
    places = sorted({i * len(choices) // EXAMPLES for i in range(EXAMPLES)}) if choices else []
    return {
        "classes": {"choices": choices, "visible": bool(choices)},
        EXAMPLES_NAME: {
            "samples": [[choices[i][1]] for i in places],
            "sample_labels": [choices[i][0] for i in places],
            "visible": bool(choices),
        },
        "height": {"value": height},
        "width": {"value": width},
    }


def make_controls(generator: CheckpointGenerator) -> tuple[dict[str, Any], gr.Dataset]:
    """Returns the controls by the names of `PageRequest`, and the examples of classes.

    They are as the model's configuration has them.

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
        )
    }
    examples = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        **fitted[EXAMPLES_NAME],
        label="Or one of these",
        samples_per_page=EXAMPLES,
        elem_id="examples",
    )
    examples.click(
        lambda sample: sample, examples, controls["classes"], api_visibility="private", show_progress="hidden"
    )
    controls |= {
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
    with gr.Accordion("A grid over two options", open=False, elem_id="grid"):
        for name, label, values in (("across", "Columns", "1, 2, 4"), ("down", "Rows", "5, 10, 20")):
            with gr.Row():
                controls[name] = gr.Dropdown(
                    [NOBODY, *AXES], value=NOBODY, label=label, min_width=100, elem_id=name
                )
                controls[f"{name}_values"] = gr.Textbox(
                    label="Values", placeholder=values, max_lines=1, min_width=100, elem_id=f"{name}_values"
                )
    return controls, examples


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
            buttons=["fullscreen"],
            elem_id=f"images-{place}",
        )
        command = gr.Code(
            HINT,
            language="shell",
            label="Command",
            wrap_lines=True,
            show_line_numbers=False,
            lines=2,
            max_lines=12,
            interactive=False,
            elem_id=f"command-{place}",
            elem_classes="command",
        )
        commands = gr.State([])
        images.select(
            command_of, commands, command, api_visibility="private", show_progress="hidden", queue=True
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
        column=column,
        heading=heading,
        images=images,
        film=film,
        download=download,
        recipe=recipe,
        command=command,
        commands=commands,
    )


def command_of(commands: list[str], event: gr.SelectData) -> str:
    """Returns the command of the picture that was clicked."""
    return commands[event.index]


def side_updates(name: str, pictures: Pictures) -> list[Any]:
    """Returns what a side shows of a model's pictures."""
    recipe = pictures.recipe
    about = f"{recipe['title']}; {counted(recipe['nfe'], 'model evaluation')} an image"
    if pictures.columns:
        about = f"step {recipe['step']}, a grid of {len(pictures.images)} pictures"
    return [
        gr.update(visible=True),
        f"### {html.escape(name)}\n{html.escape(about)}",
        gr.update(value=pictures.images, columns=pictures.columns or GRID_COLUMNS),
        pictures.film,
        gr.update(value=str(pictures.grid), interactive=True),
        json.dumps(recipe, indent=2),
        HINT,
        pictures.commands,
    ]


def hide() -> list[Any]:
    """Returns what a side without a model shows."""
    return [gr.update(visible=False), "", [], [], gr.update(value=None, interactive=False), "", HINT, []]
