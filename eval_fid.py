"""How good are these images? `eval_fid.py --samples NPZ|FOLDER --reference ...` or `--checkpoint PATH`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from flashdit.cli import SAMPLING, add_device, add_sampling, run_script, sampling_options
from flashdit.evaluation.evaluate import Plan, evaluate
from flashdit.evaluation.features import EXTRACTORS, Extractor
from flashdit.evaluation.reference import Reference
from flashdit.evaluation.report import print_table, write_report
from flashdit.evaluation.scoring import METRICS, check_accuracy, check_names, knows_classes
from flashdit.evaluation.sources import GeneratedSource, open_source
from flashdit.generate import CheckpointGenerator, balanced_labels, load_generator


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line; what is not given is None."""
    parser = argparse.ArgumentParser(
        description="Scores images: Fréchet distances, inception score, precision, recall, accuracy.",
        epilog="Writes metrics.json and metrics.md. Example: eval_fid.py --samples s.npz --reference digits",
    )
    what = parser.add_argument_group("what is scored (default: the newest run's checkpoint)")
    what.add_argument("--samples", type=Path, metavar="NPZ|FOLDER", help="images that exist already")
    what.add_argument("--checkpoint", type=Path, metavar="PATH", help="a checkpoint to sample from")
    what.add_argument(
        "--num-images", type=int, help="default: 1,000 for digits, 50,000 otherwise; all of --samples"
    )
    how = parser.add_argument_group("how it is scored")
    how.add_argument(
        "--reference", metavar="NPZ|FOLDER|digits", help="default: digits for a checkpoint of digits"
    )
    how.add_argument("--extractor", help="inception, or digits (default for the digits reference)")
    how.add_argument("--inception-weights", metavar="PATH", help="torch-fidelity's weights file")
    how.add_argument(
        "--metrics",
        type=lambda text: [name.strip() for name in text.split(",")],
        help=f"comma-separated, of {','.join(METRICS)} (default: all that apply)",
    )
    how.add_argument(
        "--batch-size", type=int, default=100, help="images at a time; changes no number (default: 100)"
    )
    how.add_argument(
        "--output", type=Path, help="folder or .json file (default: the run's eval/, or beside --samples)"
    )
    add_device(how)
    add_sampling(parser)
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuses what no file needs to be opened for."""
    check_names(arguments.metrics or ())
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be positive, got {arguments.batch_size}")
    if arguments.samples is None:
        return
    if arguments.checkpoint is not None:
        raise ValueError(
            f"give --samples or --checkpoint, got {arguments.samples} and {arguments.checkpoint}"
        )
    for option in (*SAMPLING, "vae"):
        if getattr(arguments, option) is not None:
            raise ValueError(
                f"--{option.replace('_', '-')} is for sampling from a --checkpoint, got it with --samples"
            )


def make_plan(arguments: argparse.Namespace) -> tuple[Plan, Path]:
    """Opens samples or generator, extractor and reference; returns them and the file to write."""
    check_arguments(arguments)
    here = arguments.device
    generator = None if arguments.samples else load_generator(arguments.checkpoint, here, arguments.vae)
    is_digits = generator is not None and generator.data_name == "digits"
    reference_name = arguments.reference or ("digits" if is_digits else None)
    if reference_name is None:
        raise ValueError("this needs a --reference: an ADM npz, a folder of images, or 'digits'")
    extractor = make_extractor(arguments, reference_name).to(here).eval()
    classes = extractor.class_names if generator is None else generator.class_names
    metrics = arguments.metrics or default_metrics(extractor, classes)
    check_accuracy(metrics, extractor, classes)
    if generator is None:
        samples = open_source(arguments.samples, arguments.num_images, extractor.class_names or ())
        default_output = arguments.samples.with_name(f"{arguments.samples.stem}.metrics.json")
    else:
        samples = generated_source(arguments, generator, 1000 if reference_name == "digits" else 50_000)
        default_output = generator.run_dir / "eval" / "metrics.json"
    output = output_file(arguments.output, default_output)
    return Plan(samples, extractor, Reference(reference_name, extractor), metrics), output


def make_extractor(arguments: argparse.Namespace, reference_name: str) -> Extractor:
    """Builds the extractor that was asked for, or the reference's own."""
    name = arguments.extractor or ("digits" if reference_name == "digits" else "inception")
    options = {"weights": arguments.inception_weights} if arguments.inception_weights else {}
    return EXTRACTORS.build({"name": name, **options})


def default_metrics(extractor: Extractor, classes: Sequence[str] | None) -> list[str]:
    """Returns every metric, accuracy only where the extractor knows the classes of the samples."""
    knows = knows_classes(extractor, classes)
    return [name for name in METRICS if name != "accuracy" or knows]


def generated_source(
    arguments: argparse.Namespace, generator: CheckpointGenerator, default_count: int
) -> GeneratedSource:
    """Returns the source that samples from a generator, its options checked."""
    options = sampling_options(arguments, generator)
    count = default_count if arguments.num_images is None else arguments.num_images
    if count < 1:
        raise ValueError(f"--num-images must be positive, got {count}")
    return GeneratedSource(generator, balanced_labels(count, generator.num_classes, options.seed), options)


def output_file(given: Path | None, default: Path) -> Path:
    """Returns the JSON file to write: the given one, or metrics.json in the given folder."""
    output = default if given is None else given if given.suffix == ".json" else given / "metrics.json"
    if output.is_dir() or (output.parent.exists() and not output.parent.is_dir()):
        raise ValueError(f"--output must be a folder or a .json file, got {given}")
    return output


def main(argv: Sequence[str] | None = None) -> None:
    """Scores, writes the report and prints the table."""
    arguments = parse_arguments(argv)
    plan, output = make_plan(arguments)
    result = evaluate(plan, arguments.batch_size, arguments.device)
    write_report(result, output)
    print_table(result, Console())
    print(f"wrote {output} and {output.with_suffix('.md').name}")


if __name__ == "__main__":
    run_script(main)
