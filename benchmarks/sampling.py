"""Sampling beside LightningDiT's scheme, what each saving brings and costs: `python -m benchmarks.sampling`.

The baseline runs both halves of the guided batch at each of 250 Euler updates. Every other row samples from
the same checkpoint and noise: its speed is taken in turn with the baseline's, its quality from 1,000 images
against the held-out digits. `over` is the Fréchet distance over that of 250 guided Euler updates.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.side_by_side import interleaved, machine, save, summary
from flashdit.evaluation.evaluate import Plan, evaluate
from flashdit.evaluation.features.extractors import build_extractor
from flashdit.evaluation.images.sources import GeneratedSource
from flashdit.evaluation.reference import Reference
from flashdit.flow.guidance import scale_at
from flashdit.sampling import generator as generate
from flashdit.sampling.checkpoint import CheckpointGenerator, load_generator
from flashdit.sampling.classes import balanced_labels
from flashdit.sampling.options import SamplingOptions
from flashdit.shared.command import add_device, resolve_device

BASELINE, EXACT = "both halves, euler 250", "euler 250"
CHOSEN = ("euler 25", "dpm++2m 15", "unipc 10")
"""Solvers that are measured in bfloat16 and with the compiled model too."""
Way = tuple[CheckpointGenerator, SamplingOptions]
METRICS = ["fid", "accuracy"]
SOLVERS = (
    ("euler", 250),
    ("euler", 100),
    ("euler", 50),
    ("euler", 25),
    ("heun", 25),
    ("heun", 12),
    ("dpm++2m", 25),
    ("dpm++2m", 15),
    ("dpm++2m", 10),
    ("unipc", 25),
    ("unipc", 15),
    ("unipc", 10),
    ("unipc", 8),
)


def guide_always(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Tensor,
    null_label: int,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: None = None,
    guiding: None = None,
) -> Callable[[Tensor, float], Tensor]:
    """Returns the guided velocity as LightningDiT computes it: both halves run at every time.

    It takes what `flashdit.flow.guidance.guide` takes, of the last two None alone.
    """
    assert channels is None
    assert guiding is None
    both_labels = torch.cat([labels, torch.full_like(labels, null_label)])

    def v(x_t: Tensor, t: float) -> Tensor:
        times = torch.full((2 * len(x_t),), t, device=x_t.device)
        v_cond, v_uncond = model(torch.cat([x_t, x_t]), times, both_labels).chunk(2)
        return v_uncond + scale_at(t, scale, interval) * (v_cond - v_uncond)

    return v


@contextmanager
def guided_always() -> Iterator[None]:
    """Samples by LightningDiT's scheme within."""
    kept, generate.guide = generate.guide, guide_always
    try:
        yield
    finally:
        generate.guide = kept


def draw(generator: CheckpointGenerator, options: SamplingOptions, count: int) -> None:
    """Draws so many images and drops them."""
    for _ in generator.generate(balanced_labels(count, generator.num_classes, options.seed), options):
        pass


def quality(
    generator: CheckpointGenerator, options: SamplingOptions, count: int, reference: Reference
) -> Any:
    """Returns Fréchet distance and accuracy of so many images."""
    labels = balanced_labels(count, generator.num_classes, options.seed)
    samples = GeneratedSource(generator, labels, options)
    device = str(generator.space.mean.device)
    return evaluate(Plan(samples, reference.extractor, reference, METRICS, device=device)).scores.values


def measure(
    generator: CheckpointGenerator, compiled: CheckpointGenerator | None, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Returns a record for each way to sample."""
    base = replace(generator.sampling, cfg_scale=arguments.cfg_scale, batch_size=arguments.batch)
    reference = Reference("digits", build_extractor("digits").to(arguments.device))
    ways: dict[str, Way] = {
        f"{name} {steps}": (generator, replace(base, sampler=name, steps=steps))
        for name, steps in SOLVERS
        if not arguments.quick or f"{name} {steps}" in CHOSEN
    }
    if not arguments.quick:
        ways[f"{EXACT}, guided always"] = generator, replace(ways[EXACT][1], cfg_interval=(0.0, 1.0))
    ways |= {f"{name}, bf16": (generator, replace(ways[name][1], precision="bf16")) for name in CHOSEN}
    if compiled is not None:
        ways |= {f"{name}, compiled": (compiled, ways[name][1]) for name in CHOSEN}

    def baseline() -> None:
        with guided_always():
            draw(*ways[EXACT], arguments.batch)

    runs: dict[str, Callable[[], object]] = {} if arguments.quick else {BASELINE: baseline}
    for name, way in ways.items():
        runs[name] = lambda way=way: draw(*way, arguments.batch)
    seconds = interleaved(runs, arguments.rounds, "sampling")
    speeds = {name: summary(taken, seconds[next(iter(runs))]) for name, taken in seconds.items()}
    found = {name: quality(*way, arguments.num_images, reference) for name, way in ways.items()}
    return [
        {
            "way": name,
            "evaluations": options.nfe,
            "images_per_s": arguments.batch / speeds[name]["median_s"],
            "speed": speeds[name],
            "frechet": found[name]["fid"],
            "over": found[name]["fid"] / found[next(iter(ways))]["fid"],
            "accuracy": found[name]["accuracy"],
        }
        for name, (_, options) in ways.items()
    ]


def to_markdown(records: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Returns the table."""
    first = records[0]["way"]
    than = first if arguments.quick else "LightningDiT's 250 Euler updates of both halves"
    lines = [
        f"Guidance {arguments.cfg_scale:g}; times as fast as {than}.",
        "",
        f"| way | evaluations | images/s | times as fast | Fréchet | over {first} | accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        cells = [
            record["way"],
            str(record["evaluations"]),
            f"{record['images_per_s']:.3g}",
            f"{record['speed']['times_as_fast']:.1f}",
            f"{record['frechet']:.4f}",
            f"{record['over']:.3f}",
            f"{record['accuracy']:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measures every way to sample and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_device(parser)
    parser.add_argument("--checkpoint", help="a run on digits (default: the newest run)")
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--batch", type=int, default=50, help="images of a timed draw")
    parser.add_argument("--num-images", type=int, default=1000, help="images that quality is taken of")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="measure the compiled model as well")
    parser.add_argument("--quick", action="store_true", help="the chosen solvers alone, in both precisions")
    arguments = parser.parse_args()
    arguments.device = resolve_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    generator, compiled = load_generator(arguments.checkpoint, arguments.device), None
    if arguments.compile:
        compiled = load_generator(arguments.checkpoint, arguments.device)
        compiled.compile()
    content = {"machine": machine(), "options": vars(arguments)}
    records = measure(generator, compiled, arguments)
    content |= {"records": records, "load_after": os.getloadavg()[0]}
    save("sampling_quick" if arguments.quick else "sampling", content, to_markdown(records, arguments))


if __name__ == "__main__":
    main()
