"""Prints what a run will cost, before anyone pays for it: `flashdit estimate --config YAML`.

P parameters, N GPUs, b images of one GPU and one accumulated part:

  multiply-adds    counted by torch's FlopCounterMode on a model without memory; matrix products alone
  FLOPs            3 × 2 × multiply-adds an image, since the backward pass counts twice; × 4/3 where matrix
                   products are recomputed; 3 × those of alignment's projector; and once those of what is
                   frozen: distillation.teacher, and alignment.extractor, with decoding the images it sees
                   where latents lie in a folder
  time             images × FLOPs / (N × --peak-tflops × --mfu); peak and MFU are assumed, not measured;
                   with --here the peak is measured on this machine
  weights, EMA     4 P bytes each (float32), and 4 P for each of ema.power_widths
  AdamW            8 P bytes (two moments, float32); with optimizer.name=muon 4 bytes (one) for each weight of
                   linear layers in blocks
  gradients        4 P bytes; under DDP as much again for the buckets that processes exchange
  teacher          4 bytes a parameter, whole on each GPU; the extractor likewise
  projector        16 bytes a parameter (weight, gradient, two moments), under DDP 20, and four numbers of
                   alignment.width for each token; a checkpoint holds 12
  activations      b × what autograd saves for an image, and beside them low-precision copies of the weights:
                   both read off a model of full size without memory, as it runs without torch.compile; and
                   the gradients of the widest map of one block's MLP and of its input; recomputed, they
                   are the inputs of all blocks and everything of one block; and of all blocks the
                   products, where those are kept
  FSDP2            weights, EMA, AdamW and gradients / N, but gradients whole where batches are accumulated;
                   gathered: what is in no block and two blocks, at 2 bytes a parameter in bf16 and fp16 and
                   4 in fp32, and the gradients of one at 4; muon refuses it
  checkpoint       weights + EMA + AdamW; how many are kept follows from training.steps, save_every, keep_last
                   and keep_every
  snapshots        4 P bytes for each of ema.power_widths every ema.snapshot_every steps

On one device the sum is within 10 % of the measured peak where activations outweigh gradients, and at most
the gradients above it where they do not (measured on a CPU by its tests; the shares of DDP and
FSDP2 are not measured). A GPU holds more beside it: the CUDA context, gaps of the allocator,
workspaces of kernels, a VAE for previews.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flashdit.commands.arguments import path_text
from flashdit.shared.command import CommandParser, open_console, resolve_device

if TYPE_CHECKING:
    from flashdit.commands.budget import Machine
    from flashdit.training.options import TrainingOptions


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values, checked."""
    parser = CommandParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", type=path_text, metavar="YAML|NAME", help="a file or a shipped one (default: digits)")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="as for training; data.path may stay open unless model sizes are null, and is read and checked "
        "as training does where it is there",
    )
    add(
        "--here",
        action="store_true",
        help="on one device of this machine, whose matrix products are timed, instead of --gpus and "
        "--peak-tflops",
    )
    add("--gpus", type=int, help="how many share the batch (default: 8)")
    add("--images", type=int, help="of an epoch (default: those of the data, or ImageNet's)")
    add("--peak-tflops", type=float, help="of one GPU (default: 989, an H100's or H200's in bf16)")
    add(
        "--mfu",
        type=float,
        help="assumed share of that peak; metrics.jsonl says what it is (default: 0.4; on a CPU 0.2)",
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.here and (arguments.gpus is not None or arguments.peak_tflops is not None):
        raise ValueError("--here is for one device of this machine, give no --gpus and no --peak-tflops")
    for name in ("gpus", "images"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
        if value is not None and value >= 2**63:
            raise ValueError(f"--{name} must be below 2^63, got {value}")
    mfu, peak = arguments.mfu, arguments.peak_tflops
    if not (0 < (1 if mfu is None else mfu) <= 1 and 0 < (1 if peak is None else peak) < float("inf")):
        rule = "--mfu must be above 0 and at most 1, and --peak-tflops positive"
        raise ValueError(f"{rule}, got {mfu} and {peak}")
    return arguments


def machine_of(arguments: argparse.Namespace, training: TrainingOptions) -> Machine:
    """Returns what the command line says of the machine."""
    from flashdit.commands.budget import Machine, this_machine

    if arguments.here:
        return this_machine(training, arguments.mfu)
    given = {"devices": arguments.gpus, "peak_tflops": arguments.peak_tflops, "mfu": arguments.mfu}
    return Machine(**{name: value for name, value in given.items() if value is not None})


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the estimate."""
    arguments = parse(argv)
    from rich.table import Table

    from flashdit.commands.budget import facts, memory_table, read_config, with_data
    from flashdit.memory import activations_on, count_parameters
    from flashdit.models.costs import forward_flops
    from flashdit.shared.process import AUTO, precision_here
    from flashdit.training.optim import MUON

    config = read_config(arguments.config, arguments.overrides)
    if config.training.precision == AUTO:
        here = precision_here(resolve_device(None))
        config.training.precision = here if arguments.here else "bf16"  # as the GPUs that are assumed
    machine = machine_of(arguments, config.training)
    config, data = with_data(config)
    counts, multiply_adds = count_parameters(config), forward_flops(config.model_arguments) / 2
    about = Table(show_header=False, title=arguments.config or "the default run")
    for name, text in facts(config, counts, multiply_adds, machine, data, arguments.images).items():
        about.add_row(name, text)
    console = open_console()
    console.print(about)
    ways = activations_on(config, machine.measured or "cuda")
    can_shard = machine.devices > 1 and config.optimizer.name != MUON
    for sharded in (False, True) if can_shard else (False,):
        console.print(memory_table(config, counts, ways, machine.devices, sharded))
    console.print(
        "recomputed: training.gradient_checkpointing=true; products kept: training.keep_matmuls=true too"
    )
    console.print("the formulas: flashdit estimate --help", style="dim")
