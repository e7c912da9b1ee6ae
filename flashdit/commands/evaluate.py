"""Scores images, or samples of a checkpoint: `flashdit eval --samples NPZ|FOLDER --reference …`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from flashdit.commands.arguments import SAMPLING_ARGUMENTS, open_generator, path, path_text
from flashdit.commands.scoring import add_evaluation, add_reading, make_request
from flashdit.shared.command import CommandParser, open_console, resolve_device
from flashdit.shared.paths import check_outside, resolved
from flashdit.shared.registry import counted

if TYPE_CHECKING:
    from flashdit.evaluation.evaluate import Evaluation, Plan
    from flashdit.evaluation.features.ranks import Ranks


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the command line; what is not given is None.

    Raises:
        ValueError: If options do not go together.
    """
    parser = CommandParser(
        description="Scores images: Fréchet distances, inception score, precision, recall, accuracy.",
        epilog="Also: flashdit eval make-reference | compare | loss and flashdit sweep, with --help. One or "
        "many processes (accelerate launch, torchrun) give the same numbers.",
    )
    what = add_evaluation(parser)
    what.add_argument("--samples", type=path, metavar="NPZ|FOLDER", help="images that exist already")
    written = parser.add_argument_group("what is written")
    written.add_argument(
        "--output", type=path, help="folder or .json file (default: the run's eval/, or beside --samples)"
    )
    written.add_argument("--csv", type=path, metavar="FILE", help="append the scores to this table too")
    written.add_argument(
        "--html", action="store_true", help="write metrics.html too: the numbers in pictures"
    )
    arguments = parser.parse_args(argv)
    if arguments.samples is None:
        return arguments
    if arguments.checkpoint is not None:
        raise ValueError(
            f"give --samples or --checkpoint, got {arguments.samples} and {arguments.checkpoint}"
        )
    for option in (*SAMPLING_ARGUMENTS, "guide", "guide_ema", "vae", "compile", "labels"):
        if getattr(arguments, option) is not None:
            raise ValueError(
                f"--{option.replace('_', '-')} is for sampling from a --checkpoint, got it with --samples"
            )
    return arguments


def output_file(given: Path | None, default: Path) -> Path:
    """Returns the JSON file to write: the given one, or metrics.json in the given folder."""
    output = default if given is None else given if given.suffix == ".json" else given / "metrics.json"
    if output.is_dir() or (output.parent.exists() and not output.parent.is_dir()):
        raise ValueError(f"--output must be a folder or a .json file, got {given}")
    return output


def open_all(arguments: argparse.Namespace, ranks: Ranks) -> tuple[Plan, Path]:
    """Returns the plan of a command line, opened, and the file to write; the table of --csv must fit it."""
    from flashdit.evaluation.metrics.scoring import score_names
    from flashdit.evaluation.reports.csv import read_columns
    from flashdit.evaluation.request import open_plan

    with ranks.agree():
        samples, generator = arguments.samples, None
        if samples is None:
            generator = open_generator(arguments)
            default = generator.run_dir / "eval" / "metrics.json"
        else:
            default = samples.with_name(f"{samples.stem}.metrics.json")
        output = output_file(arguments.output, default)
        request = make_request(arguments, generator, samples)
        if not output.parent.exists():  # a new folder below images would be a class without any
            check_outside(output, samples or request.data_path, "--output", "--samples or --checkpoint")
    plan = open_plan(request, ranks)
    with ranks.agree():
        if arguments.csv is not None:
            names = score_names(plan.metrics, plan.extractor).values()
            read_columns(arguments.csv, names, plan.samples.recipe())
    return plan, output


def score_images(argv: Sequence[str]) -> None:
    """Scores, writes the report and prints the table."""
    arguments = parse(argv)
    arguments.device = resolve_device(arguments.device)

    from flashdit.evaluation.evaluate import evaluate_fully
    from flashdit.evaluation.features.ranks import processes

    with processes(arguments.device) as ranks, ExitStack() as outputs:
        plan, output = open_all(arguments, ranks)
        with ranks.agree():
            if ranks.is_main:
                hold_outputs(outputs, output, arguments)
        done = evaluate_fully(plan, ranks, {"pool", "logits"} if arguments.html else ())
        if ranks.is_main:
            write_all(plan, done, output, arguments)


def hold_outputs(outputs: ExitStack, output: Path, arguments: argparse.Namespace) -> None:
    """Makes this process the only writer of what the command line asks for, before anything is scored."""
    from flashdit.evaluation.reports.html import HTML_MARK
    from flashdit.evaluation.reports.report import JSON_MARK, MARKDOWN_MARK
    from flashdit.shared.locks import only_writer
    from flashdit.shared.paths import check_replaceable, check_writable

    outputs.enter_context(only_writer(output, mark=JSON_MARK, is_file=True))
    check_replaceable(output.with_suffix(".md"), MARKDOWN_MARK, "--output")
    if arguments.html:
        check_replaceable(output.with_suffix(".html"), HTML_MARK, "--html")
    if arguments.csv:
        check_writable(arguments.csv.parent, "--csv")


def write_all(plan: Plan, done: Evaluation, output: Path, arguments: argparse.Namespace) -> None:
    """Writes what the command line asks for, and prints the table."""

    from flashdit.evaluation.reports.csv import append_csv
    from flashdit.evaluation.reports.report import print_table, write_report

    before = scores_in(output)
    write_report(done.result, output)
    written = [str(output), output.with_suffix(".md").name]
    if arguments.html:
        from flashdit.evaluation.reports.gallery import make_gallery
        from flashdit.evaluation.reports.html import write_html

        page = output.with_suffix(".html")
        write_html(page, done.result, make_gallery(plan, done.samples, done.reference))
        written.append(page.name)
    if arguments.csv:
        append_csv(done.result, arguments.csv)
        written.append(str(arguments.csv))
    print_table(done.result, open_console())
    print(f"wrote {', '.join(written[:-1])} and {written[-1]}")
    if before:
        print(f"replaced what was there: {before}; --output keeps both")


def scores_in(output: Path) -> str:
    """Returns which scores a metrics.json holds and of how many images; empty where there is none."""
    try:
        content = json.loads(output.read_text())
        names = ", ".join(name for name, value in content["metrics"].items() if value is not None)
        return f"{names} of {counted(content['num_images'], 'image')}"
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError, TypeError, AttributeError):
        return "scores that cannot be read"


def make_reference(argv: Sequence[str]) -> None:
    """Writes the reference file of an image set."""
    parser = CommandParser(
        description="Writes mu, sigma, mu_s, sigma_s of all images and some of the images, under ADM's keys.",
    )
    parser.add_argument(
        "images", type=path_text, metavar="NPZ|FOLDER|DATA", help="the image set, or the one DATA brings"
    )
    parser.add_argument("output", type=path, metavar="OUT.npz")
    parser.add_argument("--num-images", type=int, default=10_000, help="images to keep (default: 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images (default: 0)")
    add_reading(parser)
    arguments = parser.parse_args(argv)
    if arguments.output.suffix != ".npz" or arguments.output.is_dir():
        raise ValueError(f"a reference must be written to an .npz file, got {arguments.output}")
    if resolved(arguments.output) == resolved(arguments.images):
        raise ValueError(f"a reference must not replace its images, got {arguments.output} for both")
    if not arguments.output.parent.exists():
        check_outside(arguments.output, arguments.images, "OUT.npz", arguments.images)
    if arguments.batch_size < 1:
        raise ValueError(f"the batch size must be positive, got {arguments.batch_size}")
    device = resolve_device(arguments.device)

    from flashdit.evaluation.features.cache import FeatureCache
    from flashdit.evaluation.features.ranks import processes
    from flashdit.evaluation.images.sources import open_reference
    from flashdit.evaluation.reference import REFERENCE_MARK, write_reference
    from flashdit.evaluation.request import check_bounds, open_extractor
    from flashdit.shared.locks import only_writer
    from flashdit.shared.seeds import check_seed

    with processes(device) as ranks, ExitStack() as outputs:
        with ranks.agree():
            check_seed(arguments.seed, "--seed")
            check_bounds(arguments.batch_size, arguments.image_size)
            source = open_reference(arguments.images, arguments.background, arguments.image_size)
            extractor = open_extractor(arguments.images, arguments.extractor, arguments.extractor_weights)
            extractor.to(device)
            if ranks.is_main:
                outputs.enter_context(
                    only_writer(arguments.output, is_file=True, mark=REFERENCE_MARK, called="OUT.npz")
                )
        write_reference(
            source,
            extractor,
            arguments.output,
            num_images=arguments.num_images,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            device=device,
            ranks=ranks,
            cache=None if arguments.no_cache else FeatureCache(),
        )
        if ranks.is_main:
            height, width = source.image_size
            print(
                f"wrote {arguments.output}: {counted(source.count, 'image')} of {width}×{height} under "
                f"extractor {extractor.name}"
            )


def compare(argv: Sequence[str]) -> None:
    """Prints results side by side and says which are not comparable."""
    parser = CommandParser(
        description="Puts results side by side; says which are not comparable, and why.",
    )
    parser.add_argument("results", type=path, nargs="+", metavar="METRICS.json")
    parser.add_argument("--output", type=path, metavar="FILE.md", help="write the table as Markdown too")
    arguments = parser.parse_args(argv)

    from flashdit.evaluation.reports.compare import (
        COMPARISON_MARK,
        column_names,
        comparison_rows,
        read_result,
        verdicts,
    )
    from flashdit.evaluation.reports.report import markdown_table, print_rows
    from flashdit.shared.files import write_atomically
    from flashdit.shared.locks import only_writer

    results = [read_result(path) for path in arguments.results]
    names = column_names(arguments.results)
    rows, notes = comparison_rows(names, results), verdicts(names, results)
    print_rows(rows, notes, open_console())
    if arguments.output:
        text = "\n".join([markdown_table(rows), "", *(f"- {note}" for note in notes), ""])
        with only_writer(arguments.output, is_file=True, mark=COMPARISON_MARK):
            write_atomically(arguments.output, lambda temporary: temporary.write_text(text))
        print(f"wrote {arguments.output}")


def sweep(argv: Sequence[str]) -> None:
    """Scores a range of guidance scales."""
    from flashdit.commands.sweep import main

    main(argv)


def loss(argv: Sequence[str]) -> None:
    """Prints a checkpoint's loss on a data set."""
    from flashdit.commands.loss import main

    main(argv)


SUBCOMMANDS = {"make-reference": make_reference, "compare": compare, "sweep": sweep, "loss": loss}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first word names; without one, scores."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in SUBCOMMANDS:
        if not sys.argv[0].endswith(f" {words[0]}"):
            sys.argv[0] += f" {words[0]}"  # what usage and errors begin with
        SUBCOMMANDS[words[0]](words[1:])
    else:
        score_images(words)
