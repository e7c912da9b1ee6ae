"""From a folder of images to a configuration: `flashdit new --images DIR --out my.yaml`.

Looks at the folder, chooses a model that suits the number and the size of the images, writes a commented
configuration that is yours to change, says what it will cost on this machine, and prints the commands that
train, sample and score.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flashdit.commands.arguments import path, path_text
from flashdit.shared.command import CommandParser
from flashdit.shared.paths import check_writable, printable
from flashdit.shared.registry import counted

if TYPE_CHECKING:
    from flashdit.commands.budget import Machine
    from flashdit.commands.draft import Draft
    from flashdit.commands.survey import Survey
    from flashdit.config import RunConfig
    from flashdit.data.fit import DataFacts

SCORED_ON_CPU, SCORED_ON_GPU = 1_000, 50_000  # samples at most
LONG_S = 86_400  # above which a CPU gets a smaller model, and a GPU's user a word
MEMORY_SHARE = 0.8  # of the device's that a step may take
MEMORISED = 500  # epochs, above which a model has seen each image often enough to repeat it
MANY_LATENTS_GIB = 1.0  # in memory, above which they are better kept on the disk


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values, checked as far as no image must be read."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=path, required=True, metavar="DIR", help="folder whose sub-folders are the classes")
    add("--out", type=path, required=True, metavar="YAML", help="the configuration to write")
    add(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the squares that are trained on, in pixels (default: the largest of 32, 64, 128, 256 "
        "that half of the images have)",
    )
    add(
        "--latents",
        type=path_text,
        default="pixels",
        metavar="NAME",
        help="what is trained on: pixels (default), or the latents of an autoencoder, as latents.vae has it",
    )
    add("--name", help="of the run: its folder is runs/NAME (default: the name of --out)")
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    if out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--out must be a .yaml file, got {out}")
    check_writable(out.parent, "--out")
    if out.exists():
        raise ValueError(f"--out must be a new file, {out} exists: delete it or give another name")
    arguments.name = out.stem if arguments.name is None else arguments.name
    if arguments.name in ("", ".", "..") or Path(arguments.name).name != arguments.name:
        raise ValueError(f"--name must be the name of a folder in runs, got '{arguments.name}'")
    if arguments.image_size is not None:
        from flashdit.data.sources import MOST_PIXELS

        if not 1 <= arguments.image_size <= MOST_PIXELS:
            raise ValueError(f"--image-size must be from 1 to {MOST_PIXELS}, got {arguments.image_size}")
    run_dir = Path("runs", arguments.name)
    if run_dir.exists():
        raise ValueError(f"--name must be that of a new run, {run_dir} exists: give another --name")
    if "$" in arguments.name:
        raise ValueError(f"a new name with $ stands for a variable in a configuration, got {arguments.name}")
    for text in (str(arguments.images.absolute()), arguments.latents):
        if "${" in text:
            raise ValueError(
                f"a path with ${{ stands for another key of a configuration: rename it, got {text}"
            )
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Looks at the folder, writes the configuration and prints what it costs and what comes next."""
    arguments = parse(argv)
    from flashdit.commands.survey import survey_folder
    from flashdit.shared.files import write_atomically

    survey = survey_folder(arguments.images)
    print(survey.found.describe(len(survey.found.unreadable) + len(survey.unreadable)), flush=True)
    draft = first_draft(survey, arguments)
    print("\n".join(survey.describe(draft.image_size)), flush=True)
    draft, costs = with_costs(draft)
    text = draft.to_yaml(header(draft, arguments.out, costs))
    write_atomically(arguments.out, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"wrote {arguments.out}; on this machine:")
    print("\n".join(f"  {name:12} {text}" for name, text in costs.items()))
    print("next:")
    if survey.unreadable:
        print("  take the images that cannot be read out of the folder, as scoring refuses them")
    for about, command in next_commands(draft, arguments.out):
        print(f"  {command}" + (f"  # {about}" if about else ""))


def first_draft(survey: Survey, arguments: argparse.Namespace) -> Draft:
    """Returns what suits the images, before the speed of this machine is known."""
    from flashdit.commands.draft import LEAST_GRID, Draft
    from flashdit.data.autoencoders import lasting_name
    from flashdit.data.latents import LatentOptions
    from flashdit.shared.command import resolve_device

    pixels = arguments.latents == "pixels"
    options = LatentOptions(space="pixels") if pixels else LatentOptions(vae=arguments.latents)
    try:
        space = options.autoencoder()
    except ValueError as error:
        raise ValueError(f"--latents: {error}") from error
    assert space is not None
    size = arguments.image_size or space.image_side or survey.image_size(LEAST_GRID * space.factor)
    return Draft(
        images=str(arguments.images.absolute()),
        num_images=survey.num_images,
        num_classes=len(survey.found.class_names),
        image_size=size,
        latents=None if pixels else lasting_name(arguments.latents),
        space=space,
        run_dir=f"runs/{arguments.name}",
        device=resolve_device(None),
        workers=max(1, min(8, (os.cpu_count() or 1) // 2)) if pixels else 0,
    )


def with_costs(draft: Draft) -> tuple[Draft, dict[str, str]]:
    """Returns the draft with what depends on this machine, and what the run costs here, name → text.

    Raises:
        ValueError: If training would refuse the configuration or the data.
    """
    import torch

    from flashdit.commands import budget
    from flashdit.config import with_sizes
    from flashdit.memory import activations_on, count_parameters, memory_bytes
    from flashdit.models.costs import forward_flops
    from flashdit.shared.process import device_memory

    machine = budget.this_machine(parsed(draft.to_yaml("")).training)
    draft, seconds, costs = affordable(draft, machine)
    config, data = budget.with_data(parsed(draft.to_yaml("")))
    assert data is not None
    counts, multiply_adds = count_parameters(config), forward_flops(config.model_arguments) / 2
    saved = activations_on(config, draft.device)["all kept"]
    memory, batch, parts = device_memory(torch.device(draft.device)), config.training.global_batch_size, 1
    needed = memory_bytes(config, counts, saved, 1, False)["sum"]
    while memory is not None and needed > MEMORY_SHARE * memory and batch % (2 * parts) == 0:
        parts *= 2
        config.training.accumulation = parts
        needed = memory_bytes(config, counts, saved, 1, False)["sum"]
    draft = replace(draft, pace=draft.paced(seconds, parts))
    config = with_sizes(parsed(draft.to_yaml("")), data)
    found = budget.facts(config, counts, multiply_adds, machine, data, draft.num_images)
    costs |= {key: found[key] for key in ("assumed", "length", "parameters", "checkpoints")}
    epochs = draft.steps * config.training.global_batch_size / draft.num_images
    if epochs > MEMORISED:
        costs["few images"] = f"each is seen {epochs:,.0f} times, so samples will resemble them"
    costs["memory"] = f"{budget.size(needed)} for the model and its step, beside what libraries take"
    if memory is not None and needed > MEMORY_SHARE * memory:
        costs["memory"] += (
            f"; of {budget.size(memory)} here: set training.gradient_checkpointing, or hidden_size"
        )
    return draft, costs | latents_in_memory(data)


def affordable(draft: Draft, machine: Machine) -> tuple[Draft, float, dict[str, str]]:
    """Returns the draft, on a CPU with a smaller model where the one that suits takes more than a day.

    Returns:
        The draft, the expected seconds of a step, and what is to be said of the time, name → text.
    """
    from flashdit.commands import budget
    from flashdit.commands.draft import SCALES
    from flashdit.models.costs import forward_flops

    def seconds_of(draft: Draft) -> float:
        config = parsed(draft.to_yaml(""))
        flops = budget.train_flops(config, forward_flops(config.model_arguments | draft.sizes) / 2)
        batch = config.training.global_batch_size
        return budget.train_seconds(flops, batch, 1, machine.peak_tflops, machine.mfu)

    seconds, about = seconds_of(draft), {}
    suits, whole_s = draft.scale, seconds * draft.steps
    while draft.device == "cpu" and seconds * draft.steps > LONG_S and draft.scale is not SCALES[0]:
        draft = replace(draft, smaller=draft.smaller + 1)
        seconds = seconds_of(draft)
    if draft.scale is not suits:
        larger = f"hidden_size {suits.model['hidden_size']}, depth {suits.model['depth']}"
        about["model"] = f"smaller than suits so many images: {larger} would take {budget.duration(whole_s)}"
    elif whole_s > LONG_S:
        about["for less"] = "a smaller --image-size, or model.hidden_size, model.depth, training.steps"
    total = f"about {budget.duration(seconds * draft.steps)} at the speed this machine has now"
    return draft, seconds, {"time": f"{total}, previews not counted"} | about


def latents_in_memory(data: DataFacts) -> dict[str, str]:
    """Returns a word on latents that take much memory, which training encodes before its first step."""
    held_gib = 2 * 4 * len(data.labels) * math.prod(data.shape) / 2**30  # float32, and mirrored
    if data.vae is None or data.vae.factor == 1 or held_gib < MANY_LATENTS_GIB:
        return {}
    return {
        "latents": f"{held_gib:.1f} GiB in memory, encoded at each start; `flashdit encode` writes them once"
    }


def parsed(text: str) -> RunConfig:
    """Returns the checked configuration of a YAML text."""
    from flashdit.commands.budget import read_config

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "new.yaml")
        file.write_text(text, encoding="utf-8")
        return read_config(file, ())


def header(draft: Draft, out: Path, costs: Mapping[str, str]) -> str:
    """Returns the lines of comment that open the configuration: its command and its cost."""
    what = f"{counted(draft.num_images, 'image')} at {draft.image_size}×{draft.image_size}"
    on = "pixels" if draft.latents is None else f"latents of {draft.latents}"
    return "\n".join(
        printable(line)
        for line in (
            f"# {what}, trained on as {on}; written by flashdit new, yours to change.",
            f"#   {train_command(out)}",
            f"# {costs['parameters']} parameters; {costs['time']}, on the {draft.device} it was written on.",
        )
    )


def train_command(out: Path) -> str:
    """Returns the command that trains."""
    is_option = str(out).startswith("-")
    return shlex.join(["flashdit", "train", "--config", f"./{out}" if is_option else str(out)])


def next_commands(draft: Draft, out: Path) -> list[tuple[str, str]]:
    """Returns the commands that come next, each with a word on it: train, sample and score."""
    run, images, size = draft.run_dir, draft.images, str(draft.image_size)
    scored = min(draft.num_images, SCORED_ON_CPU if draft.device == "cpu" else SCORED_ON_GPU)
    score = ["flashdit", "eval", "--checkpoint", run, "--reference", images, "--image-size", size]
    score += ["--num-images", str(scored)]
    score += ["--labels", "reference"] if draft.num_classes > 1 else []  # classes are seldom of one size
    commands = [("", train_command(out)), ("", shlex.join(["flashdit", "sample", "--checkpoint", run]))]
    if has_inception():
        return [*commands, ("", shlex.join(score))]
    if draft.num_classes == 1:  # nothing to classify
        from flashdit.evaluation.features.inception import INCEPTION_FILE

        file = [*score, "--extractor-weights", "INCEPTION.pth"]
        return [*commands, (f"fetch {INCEPTION_FILE} first", shlex.join(file))]
    classifier = f"{run}_classifier"
    recipe = (
        ["--config", "iwin/small_64"] if draft.image_size > 32 else ["data.name=images", "data.held_out=0.1"]
    )
    given = {"run.dir": classifier, "data.path": images, "model.num_classes": draft.num_classes}
    train = ["iwin", "classify", *recipe, *(f"{key}={value}" for key, value in given.items())]
    about = "what scores are measured by, as there are no Inception weights"
    return [*commands, (about, shlex.join(train)), ("", shlex.join([*score, "--extractor", classifier]))]


def has_inception() -> bool:
    """Returns whether Inception's weights are where scoring finds them."""
    from flashdit.evaluation.features.inception import inception_weights_path

    try:
        return inception_weights_path(None).is_file()
    except ValueError:
        return False
