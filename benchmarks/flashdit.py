"""FlashDiT beside LightningDiT: `python -m benchmarks.flashdit`.

LightningDiT is our global-attention configuration (RoPE, sin-cos table, PyTorch's scaled dot-product
attention), which golden numbers hold equal to the released model. Both run in turn in one process. Where a
CUDA device is, the defaults are XL in bf16, eager and compiled; else B in float32 on one thread.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.dit_runs import DTYPES, FORWARD, MODELS, PARTS, Clock, Subject
from benchmarks.side_by_side import machine, results_path, save
from flashdit.models.sizes import SIZES
from flashdit.shared.charts import COLOURS, new_axes, save_figure
from flashdit.shared.command import add_device, resolve_device, run_script
from flashdit.shared.process import keep_freed_memory
from flashdit.training.meter import matmul_peak

Rows = list[dict[str, Any]]
SIDES = (16, 32, 64, 128)
SETTING = ("size", "depth", "dtype", "device", "batch", "threads", "memory_kept", "processor", "gpu", "torch")
LARGE_BYTES = 100 * 2**30  # of a GPU on which four XL models with optimisers and a batch of 128 fit
FORWARD_ALONE = 128  # from this side on, nothing is trained
BASELINE = "LightningDiT"


def in_turn(subjects: dict[str, Subject], part: str, rounds: int, clock: Clock) -> dict[str, Any]:
    """Returns (seconds by the device, by the wall) of each subject, all taken in turn after one warm-up."""
    runs = {name: subject.run(part) for name, subject in subjects.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in tqdm(range(rounds + 1), part, unit="round", leave=False):
        for name, run in runs.items():
            taken = clock.time(run)
            if number:
                times[name].append(taken)
    return times


def summarise(times: dict[str, Any], batch: int) -> dict[str, dict[str, Any]]:
    """Returns for each subject medians, spread, and its time over LightningDiT's, round by round."""
    rows = {}
    for name, taken in times.items():
        seconds, wall = ([pair[i] for pair in taken] for i in (0, 1))
        theirs = [pair[0] for pair in times[name.replace("FlashDiT", BASELINE)]]
        ratios = [ours / other for ours, other in zip(seconds, theirs, strict=True)]
        rows[name] = {
            "median_s": statistics.median(seconds),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "median_wall_s": statistics.median(wall),
            "images_per_s": batch / statistics.median(seconds),
            "time_over_lightningdit": statistics.median(ratios),
            "ratio_spread": (min(ratios), max(ratios)),
        }
    return rows


def images(side: int, arguments: argparse.Namespace) -> int:
    """Returns the images of a batch of latents of this side: as many tokens as at 16²."""
    return max(1, arguments.batch * 256 // side**2)


def measure_side(side: int, arguments: argparse.Namespace, clock: Clock) -> Rows:
    """Returns one row for each part and subject at one latent size."""
    torch.compiler.reset()
    gc.collect()  # a compiled block refers to itself
    batch = images(side, arguments)
    ways = ("eager", "compiled") if arguments.compile else ("eager",)
    parts = [part for part in arguments.parts if side < FORWARD_ALONE or part.endswith(FORWARD)]
    subjects, memory = {}, {}
    for way in ways:
        for name in MODELS:
            subject = f"{name} {way}"
            held = torch.cuda.memory_allocated() if on_gpu(arguments) else 0
            subjects[subject] = Subject(name, side, batch, way == "compiled", arguments)
            if on_gpu(arguments) and arguments.memory:
                whole = [part for part in parts if subjects[subject].flops(part)]
                memory |= {(subject, part): gpu_memory(subjects[subject], part) - held for part in whole}
    rows = []
    for part in tqdm(parts, f"{side}²", unit="part"):
        found = summarise(in_turn(subjects, part, arguments.rounds, clock), batch)
        for name, row in found.items():
            flops = subjects[name].flops(part)
            row |= {"side": side, "batch": batch, "part": part, "subject": name}
            if flops:
                row["flops_per_s"] = flops * row["images_per_s"]
            if (name, part) in memory:
                row["peak_memory_gib"] = memory[name, part] / 2**30
            rows.append(row | {"load": os.getloadavg()[0]})
    return rows


def on_gpu(arguments: argparse.Namespace) -> bool:
    """Returns whether the models run on a GPU."""
    return torch.device(arguments.device).type == "cuda"


def gpu_memory(subject: Subject, part: str) -> int:
    """Returns the peak bytes allocated while a part runs, after one warm-up."""
    run = subject.run(part)
    run()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def add_cpu_memory(rows: Rows, arguments: argparse.Namespace) -> None:
    """Adds the peak memory of the parts of whole models, each run once in a fresh process."""
    for row in tqdm([row for row in rows if "flops_per_s" in row], "memory", unit="process"):
        name = f"{row['part']}:{row['subject']}:{row['side']}"
        command = [sys.executable, "-m", "benchmarks.flashdit", "--memory-of", name]
        for option in ("size", "device", "dtype", "batch", "depth", "threads"):
            command += [f"--{option}", str(getattr(arguments, option))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row["peak_memory_gib"] = float(done.stdout.split()[-1]) / 2**30


def cpu_memory(name: str, arguments: argparse.Namespace) -> int:
    """Returns the peak bytes of this process after the run `part:subject:side`."""
    part, subject, side = name.split(":")
    model, way = subject.split()
    batch = images(int(side), arguments)
    Subject(model, int(side), batch, way == "compiled", arguments).run(part)()
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory too
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def exponents(rows: Rows) -> dict[str, float]:
    """Returns for each part and subject the exponent of tokens in the time of an image, by least squares."""
    found = {}
    for part, subject in dict.fromkeys((row["part"], row["subject"]) for row in rows):
        points = [(row["side"] ** 2, 1 / row["images_per_s"]) for row in rows_of(rows, part, subject)]
        if len(points) > 1:
            tokens, seconds = np.log(np.array(points).T)
            found[f"{part}: {subject}"] = float(np.polyfit(tokens, seconds, 1)[0])
    return found


def rows_of(rows: Rows, part: str, subject: str) -> Rows:
    """Returns the rows of one part and subject."""
    return [row for row in rows if (row["part"], row["subject"]) == (part, subject)]


def table(content: dict[str, Any]) -> str:
    """Returns the Markdown."""
    about, peak = content["about"], content["matmul_peak_flops"]
    loads = [row["load"] for row in content["rows"]]
    kept = "freed memory is kept" if about["memory_kept"] else "freed memory goes back to the system"
    lines = [
        f"size {about['size']} of depth {about['depth']}, {about['dtype']}, {about['device']}, "
        f"{about['gpu'] or about['processor']}, {about['threads']} thread(s), {kept}; matmul peak "
        f"{peak / 1e12:.3g} TFLOP/s; load {min(loads):.1f}–{max(loads):.1f}; time by {about['clock']}, "
        f"medians of {about['rounds']} interleaved rounds; torch {about['torch']}",
        "",
        "| latents, batch | part | model | ms an image | spread | images/s | time over LightningDiT's | "
        "of matmul peak | peak memory |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in content["rows"]:
        scale = 1e3 / row["batch"]
        low, high = row["ratio_spread"]
        cells = [
            f"{row['side']}², {row['batch']}",
            row["part"],
            row["subject"],
            f"{row['median_s'] * scale:.4g}",
            f"{row['min_s'] * scale:.4g}–{row['max_s'] * scale:.4g}",
            f"{row['images_per_s']:.4g}",
            "1"
            if BASELINE in row["subject"]
            else f"{row['time_over_lightningdit']:.3f} ({low:.3f}–{high:.3f})",
            f"{row['flops_per_s'] / peak:.0%}" if "flops_per_s" in row else "",
            f"{row['peak_memory_gib']:.2f} GiB" if "peak_memory_gib" in row else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Time of an image grows with its tokens to the power of:", ""]
    lines += [f"- {name}: {exponent:.3f}" for name, exponent in content["exponents"].items()]
    return "\n".join(lines) + "\n"


def draw(rows: Rows, path: Path) -> None:
    """Draws seconds of an image against tokens, a panel for each part."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    figure, panels = new_axes(parts, "tokens")
    for axes, part in zip(panels, parts, strict=True):
        for subject, colour in zip(subjects, COLOURS, strict=False):
            of_subject = rows_of(rows, part, subject)
            tokens = [row["side"] ** 2 for row in of_subject]
            axes.loglog(
                tokens, [1 / row["images_per_s"] for row in of_subject], "o-", color=colour, label=subject
            )
        axes.set_ylabel("seconds an image", fontsize=9)
        axes.set_xticks([side**2 for side in SIDES], [f"{side}²" for side in SIDES])
        axes.minorticks_off()
    panels[0].legend(fontsize=7)
    save_figure(figure, path)


def parse() -> argparse.Namespace:
    """Returns the options, with what depends on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add_device(parser)
    add = parser.add_argument
    add("--size", choices=SIZES, help="default: XL on a GPU, B on a CPU")
    add("--dtype", choices=DTYPES, help="bfloat16 is autocast (default: bfloat16 on a GPU, float32 on a CPU)")
    add("--sides", type=int, nargs="+", default=list(SIDES), help="of the latents; 128 is forward alone")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add(
        "--batch",
        type=int,
        help="images at 16²; larger latents take as many tokens (GPU: 128, below 100 GiB 32; CPU: 16)",
    )
    add("--depth", type=int, help="blocks, where the size's own would take too long")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=1, help="of a CPU")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile as well (default: on a GPU)")
    add(
        "--keep-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="see flashdit.shared.process",
    )
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    add("--name", help="added to the names of the results")
    add("--quick", action="store_true", help="2 blocks, sides 16 and 32, peak memory not measured")
    add("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.device = resolve_device(arguments.device)
    gpu = on_gpu(arguments)
    defaults = {"size": "XL" if gpu else "B", "dtype": "bfloat16" if gpu else "float32"}
    is_large = gpu and torch.cuda.get_device_properties(arguments.device).total_memory > LARGE_BYTES
    defaults |= {"batch": 128 if is_large else 32 if gpu else 16, "compile": gpu}
    if arguments.quick:
        arguments.sides, arguments.memory, arguments.depth = [16, 32], False, arguments.depth or 2
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.depth = arguments.depth or SIZES[arguments.size]["depth"]
    return arguments


def file_name(arguments: argparse.Namespace) -> str:
    """Returns the name of the results; a depth that is not the size's own is in it."""
    name = f"flashdit_{arguments.size}_{torch.device(arguments.device).type}_{arguments.dtype}"
    if arguments.depth != SIZES[arguments.size]["depth"]:
        name += f"_depth{arguments.depth}"
    name += f"_{arguments.name}" if arguments.name else ""
    return name


def main() -> None:
    """Times both models in turn and writes JSON, table and plot."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(cpu_memory(arguments.memory_of, arguments))
        return
    clock, device = Clock(arguments.device), torch.device(arguments.device)
    about = machine() | vars(arguments) | {"clock": clock.unit}
    about["memory_kept"] = device.type == "cpu" and arguments.keep_memory and keep_freed_memory()
    peaks, rows = [matmul_peak(device, DTYPES[arguments.dtype])], []
    for side in arguments.sides:
        rows += measure_side(side, arguments, clock)
        peaks.append(matmul_peak(device, DTYPES[arguments.dtype]))
        write(rows, peaks, about, file_name(arguments))
    if arguments.memory and not on_gpu(arguments):
        add_cpu_memory(rows, arguments)
        write(rows, peaks, about, file_name(arguments))


def write(rows: Rows, peaks: list[float], about: dict[str, Any], name: str) -> None:
    """Writes JSON, table and plot of what has been measured so far, and at other sides before."""
    path = results_path(f"{name}.json")
    earlier = json.loads(path.read_text()) if path.is_file() else {"about": {}, "rows": []}
    if all(earlier["about"].get(key) == about[key] for key in SETTING):
        rows = rows + [row for row in earlier["rows"] if row["side"] not in about["sides"]]
        peaks = [*peaks, earlier["matmul_peak_flops"]]
    rows = sorted(rows, key=lambda row: row["side"])
    content = {"about": about, "matmul_peak_flops": max(peaks), "rows": rows, "exponents": exponents(rows)}
    save(name, content, table(content))
    draw(rows, results_path(f"{name}.png"))


if __name__ == "__main__":
    run_script(main)
