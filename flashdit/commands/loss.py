"""Prints a checkpoint's flow-matching loss on a data set: `flashdit eval loss --data '{name: …}'`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flashdit.commands.arguments import add_weights, path, path_text
from flashdit.shared.command import CommandParser, add_device, resolve_device
from flashdit.shared.registry import counted

LOSS_EXAMPLES = 1000


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values, checked."""
    parser = CommandParser(
        description="Prints the mean flow-matching loss of a checkpoint and its standard error, as it was "
        "trained but without dropped labels. Images, noise and times are the same for every checkpoint, so "
        "that those of one latent space and one flow.times compare.",
    )
    add = parser.add_argument
    add("--checkpoint", type=path, metavar="PATH", help="a run or a checkpoint (default: the newest run's)")
    add(
        "--data",
        type=path_text,
        metavar="DATA",
        help="a data set, its name or '{name: NAME, option: value}' (default: what it was trained on)",
    )
    add("--num-images", type=int, default=LOSS_EXAMPLES, metavar="N", help=f"default: {LOSS_EXAMPLES:,}")
    add("--batch-size", type=int, default=100, help="images at a time (default: 100)")
    add_weights(parser)
    add_device(parser)
    arguments = parser.parse_args(argv)
    for name in ("num_images", "batch_size"):
        value = getattr(arguments, name)
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the loss and its terms."""
    arguments = parse(argv)
    arguments.device = resolve_device(arguments.device)

    from flashdit.config import load
    from flashdit.data.encode import open_latents
    from flashdit.data.fit import check_fit
    from flashdit.data.sources import parse_spec
    from flashdit.evaluation.loss import held_out_loss
    from flashdit.sampling.checkpoint import load_generator
    from flashdit.shared.process import keep_freed_memory

    if arguments.device.startswith("cpu"):
        keep_freed_memory()
    generator = load_generator(arguments.checkpoint, arguments.device, arguments.vae, arguments.ema)
    config = load(generator.checkpoint / "config.yaml")
    spec = config.data if arguments.data is None else parse_spec(arguments.data)
    data, made = open_latents(spec, generator.space.options, generator.model.device)
    generator.space.check_made_by(made, f"the data set {spec['name']}")
    check_fit(generator.model.config, data, generator.space.vae)
    if generator.num_classes and data.class_names and data.class_names != generator.class_names:
        raise ValueError(
            f"the data must have the classes of {generator.run_dir}, {spec['name']} has others: "
            f"{', '.join(data.class_names[:3])}, …"
        )
    losses = held_out_loss(
        generator.model,
        generator.space,
        data,
        times=config.flow.times,
        options=config.flow.loss,
        num_images=arguments.num_images,
        batch_size=arguments.batch_size,
    )
    for name, values in losses.items():
        error = f" ± {values.std() / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
        print(f"{name}: {values.mean():.4f}{error}")
    count = counted(arguments.num_images, "image")
    print(f"{count} of {spec['name']}, step {generator.step}, {generator.weights} weights")
