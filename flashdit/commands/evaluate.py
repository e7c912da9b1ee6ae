"""How good are these images? `eval_fid.py --samples NPZ|FOLDER --reference ...` or `--checkpoint PATH`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from flashdit.commands.arguments import (
    SAMPLING,
    add_sampling,
    add_weights,
    check_batch_size,
    chosen_metrics,
    generated_source,
    open_extractor,
    open_generator,
    reference_name,
)
from flashdit.evaluation.evaluate import Plan, evaluate_fully
from flashdit.evaluation.features.cache import CACHE_VARIABLE, FeatureCache
from flashdit.evaluation.features.extractors import build_extractor
from flashdit.evaluation.features.ranks import processes
from flashdit.evaluation.images.sources import DigitsSource, open_source
from flashdit.evaluation.metrics.scoring import METRICS, check_names
from flashdit.evaluation.reference import NUM_IMAGES, Reference, write_reference
from flashdit.evaluation.reports.compare import (
    column_names,
    comparison_rows,
    read_result,
    verdicts,
)
from flashdit.evaluation.reports.csv import append_csv, check_csv
from flashdit.evaluation.reports.report import (
    markdown_table,
    print_rows,
    print_table,
    write_report,
)
from flashdit.shared.command import add_device, resolve_device
from flashdit.shared.files import write_atomically

LABELS = ("balanced", "random")


def add_reading(parser: argparse._ActionsContainer) -> None:
    """Adds the options of everything that extracts features."""
    add = parser.add_argument
    add(
        "--extractor",
        help="inception, digits, a name of torch-fidelity's, or package.module:callable "
        "(default: digits where that is the reference, else inception)",
    )
    add("--extractor-weights", "--inception-weights", metavar="PATH", help="the extractor's weights file")
    add("--batch-size", type=int, default=100, help="images at a time; changes no number (default: 100)")
    add("--no-cache", action="store_true", help=f"neither read nor keep features (in ${CACHE_VARIABLE})")
    add_device(parser)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the command line; what is not given is None."""
    parser = argparse.ArgumentParser(
        description="Scores images: Fréchet distances, inception score, precision, recall, accuracy.",
        epilog="Other commands: eval_fid.py make-reference | compare | sweep, each with --help. One or many "
        "processes (accelerate launch, torchrun) give the same numbers.",
    )
    what = parser.add_argument_group("what is scored (default: the newest run's checkpoint)")
    what.add_argument("--samples", type=Path, metavar="NPZ|FOLDER", help="images that exist already")
    what.add_argument("--checkpoint", type=Path, metavar="PATH", help="a checkpoint to sample from")
    what.add_argument(
        "--num-images", type=int, help="default: 1,000 for digits, 50,000 otherwise; all of --samples"
    )
    add_weights(what)
    what.add_argument("--labels", choices=LABELS, help="equal shares (default), or drawn; in random order")
    how = parser.add_argument_group("how it is scored")
    how.add_argument(
        "--reference", metavar="NPZ|FOLDER|digits", help="default: digits for a checkpoint of digits"
    )
    how.add_argument(
        "--metrics",
        type=lambda text: [name.strip() for name in text.split(",")],
        help=f"comma-separated, of {','.join(METRICS)} (default: all that apply, but kid)",
    )
    add_reading(how)
    told = parser.add_argument_group("where it is told")
    told.add_argument(
        "--output", type=Path, help="folder or .json file (default: the run's eval/, or beside --samples)"
    )
    told.add_argument("--csv", type=Path, metavar="FILE", help="append the scores to this table too")
    told.add_argument("--html", action="store_true", help="write metrics.html too: the numbers in pictures")
    add_sampling(parser)
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuses what no image needs to be opened for."""
    check_names(arguments.metrics or ())
    if arguments.csv is not None:
        check_csv(arguments.csv)
    check_batch_size(arguments)
    if arguments.samples is None:
        return
    if arguments.checkpoint is not None:
        raise ValueError(
            f"give --samples or --checkpoint, got {arguments.samples} and {arguments.checkpoint}"
        )
    for option in (*SAMPLING, "vae", "compile", "labels"):
        if getattr(arguments, option) is not None:
            raise ValueError(
                f"--{option.replace('_', '-')} is for sampling from a --checkpoint, got it with --samples"
            )


def make_plan(arguments: argparse.Namespace) -> tuple[Plan, Path]:
    """Opens samples or generator, extractor and reference; returns them and the file to write."""
    check_arguments(arguments)
    generator = None
    if not arguments.samples:
        generator = open_generator(arguments)
    name = reference_name(arguments, generator)
    extractor = open_extractor(arguments, name)
    classes = extractor.class_names if generator is None else generator.class_names
    metrics = chosen_metrics(arguments, extractor, classes)
    if generator is None:
        samples = open_source(arguments.samples, arguments.num_images, extractor.class_names or ())
        default_output = arguments.samples.with_name(f"{arguments.samples.stem}.metrics.json")
    else:
        samples = generated_source(arguments, generator, name)
        default_output = generator.run_dir / "eval" / "metrics.json"
    output = output_file(arguments.output, default_output)
    cache = None if arguments.no_cache else FeatureCache()
    return Plan(samples, extractor, Reference(name, extractor), metrics, cache), output


def output_file(given: Path | None, default: Path) -> Path:
    """Returns the JSON file to write: the given one, or metrics.json in the given folder."""
    output = default if given is None else given if given.suffix == ".json" else given / "metrics.json"
    if output.is_dir() or (output.parent.exists() and not output.parent.is_dir()):
        raise ValueError(f"--output must be a folder or a .json file, got {given}")
    return output


def score(argv: Sequence[str]) -> None:
    """Scores, writes the report and prints the table."""
    arguments = parse_arguments(argv)
    arguments.device = resolve_device(arguments.device)
    with processes(arguments.device) as ranks:
        with ranks.agree():
            plan, output = make_plan(arguments)
        html = {"pool", "logits"} if arguments.html else ()
        done = evaluate_fully(plan, arguments.batch_size, arguments.device, ranks, html)
        if not ranks.is_main:
            return
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
        print_table(done.result, Console())
        print(f"wrote {', '.join(written[:-1])} and {written[-1]}")


def make_reference(argv: Sequence[str]) -> None:
    """Writes the reference file of an image set."""
    parser = argparse.ArgumentParser(
        prog="eval_fid.py make-reference",
        description="Writes mu, sigma, mu_s, sigma_s of all images and some of the images, under ADM's keys.",
    )
    parser.add_argument("images", metavar="FOLDER|NPZ|digits", help="the image set (digits: held-out ones)")
    parser.add_argument("output", type=Path, metavar="OUT.npz")
    parser.add_argument(
        "--num-images", type=int, default=NUM_IMAGES, help=f"images to keep (default: {NUM_IMAGES:,})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images (default: 0)")
    add_reading(parser)
    arguments = parser.parse_args(argv)
    arguments.device = resolve_device(arguments.device)
    with processes(arguments.device) as ranks:
        with ranks.agree():
            check_batch_size(arguments)
            if arguments.output.suffix != ".npz" or arguments.output.is_dir():
                raise ValueError(f"a reference must be written to an .npz file, got {arguments.output}")
            is_digits = arguments.images == "digits"
            source = DigitsSource("held-out") if is_digits else open_source(Path(arguments.images))
            name = arguments.extractor or ("digits" if is_digits else "inception")
            extractor = build_extractor(name, arguments.extractor_weights).to(arguments.device)
        write_reference(
            source,
            extractor,
            arguments.output,
            num_images=arguments.num_images,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            device=arguments.device,
            ranks=ranks,
            cache=None if arguments.no_cache else FeatureCache(),
        )
        if ranks.is_main:
            print(f"wrote {arguments.output}: {source.count:,} images under extractor {extractor.name}")


def compare(argv: Sequence[str]) -> None:
    """Prints results side by side and says which are not comparable."""
    parser = argparse.ArgumentParser(
        prog="eval_fid.py compare",
        description="Puts results side by side; says which are not comparable, and why.",
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="METRICS.json")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the table as Markdown too")
    arguments = parser.parse_args(argv)
    results = [read_result(path) for path in arguments.results]
    names = column_names(arguments.results)
    rows, notes = comparison_rows(names, results), verdicts(names, results)
    print_rows(rows, notes, Console())
    if arguments.output:
        text = "\n".join([markdown_table(rows), "", *(f"- {note}" for note in notes), ""])
        write_atomically(arguments.output, lambda temporary: temporary.write_text(text))
        print(f"wrote {arguments.output}")


def sweep(argv: Sequence[str]) -> None:
    """Scores a range of guidance scales."""
    from flashdit.commands.sweep import main  # matplotlib's second

    main(argv)


COMMANDS = {"make-reference": make_reference, "compare": compare, "sweep": sweep}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first word names; without one, scores."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in COMMANDS:
        COMMANDS[words[0]](words[1:])
    else:
        score(words)
