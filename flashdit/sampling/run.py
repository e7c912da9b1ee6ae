"""A folder of samples opened and filled, each process making its share."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from flashdit.sampling.checkpoint import CheckpointGenerator
from flashdit.sampling.folder import RECIPE, SampleFolder, least_bytes
from flashdit.sampling.generator import watching
from flashdit.sampling.options import SamplingOptions
from flashdit.sampling.recipe import digest, make_recipe
from flashdit.sampling.records import reading
from flashdit.shared.locks import only_writer
from flashdit.shared.paths import check_disk, check_outside, check_writable
from flashdit.shared.progress import move_to, progress_bar


def open_folder(
    generator: CheckpointGenerator,
    labels: Tensor,
    options: SamplingOptions,
    output: Path | None = None,
    *,
    order: str = "balanced",
    form: str = "both",
) -> SampleFolder:
    """Returns the folder to fill, checked; nothing is written yet.

    Args:
        generator: The model.
        labels: (N,) int64, the label of every sample.
        options: How to sample.
        output: The folder; None names one after the recipe, in the run's `samples`.
        order: How the labels were chosen, `balanced` or `random`.
        form: One of `flashdit.sampling.folder.FORMATS`.

    Raises:
        ValueError: If the folder holds something else, or lies in the images that the model was trained on.
    """
    recipe = make_recipe(generator, labels, options, order=order, form=form)
    name = f"cfg_{options.cfg_scale:g}_seed_{options.seed}_{digest(recipe, labels)}"
    path = output or generator.run_dir / "samples" / name
    check_writable(path, "--output")
    if not (path / RECIPE).exists():
        room = least_bytes(len(labels), *generator.image_size(options), form)
        check_disk(path, room, "--output", f"{len(labels):,} pictures")
    check_outside(path, generator.images_path, "--output", f"the run {generator.run_dir}")
    return SampleFolder(path, recipe, labels, generator.class_names)


def check_one_recipe(recipe: Mapping[str, Any]) -> None:
    """Raises ValueError, on every process, unless all sample by one recipe.

    Beside a training that goes on, each could find another checkpoint to be the newest of a run.
    """
    first, *others = gather_object([recipe])
    for other in others:
        if other != first:
            read = f"{reading(first)} and {reading(other)}"
            raise ValueError(f"all processes must read one checkpoint, got {read}: give its folder")


def fill(
    folder: SampleFolder, generator: CheckpointGenerator, options: SamplingOptions, state: PartialState
) -> None:
    """Makes what is missing of the folder, each process its share, and puts it together.

    Raises:
        ValueError: If another process writes the folder, or the processes have different recipes.
    """
    check_one_recipe(folder.recipe)
    with only_writer(folder.path) if state.is_main_process else nullcontext():
        if state.is_main_process:
            folder.check()  # another process may have written it meanwhile
            folder.remove_damaged()
            if not folder.is_finished:
                folder.open()
        state.wait_for_everyone()
        missing = folder.missing()
        state.wait_for_everyone()  # no process adds to the folder before all know what is missing
        mine = missing[state.process_index :: state.num_processes]
        total = len(folder.labels)
        bar = progress_bar(
            total=total,
            initial=total - len(missing),
            desc="sample",
            unit="image",
            disable=not state.is_main_process,
        )

        def show(images: float) -> None:  # the first process counts for all: their shares are equal
            move_to(bar, total - len(missing) + images * state.num_processes)

        with bar, watching(generator, show):
            for batch in generator.generate(folder.labels, options, mine):
                folder.add(batch)
        state.wait_for_everyone()
        if state.is_main_process:
            folder.finish()
