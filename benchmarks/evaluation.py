"""Scores beside torch-fidelity's, NumPy's and SciPy's: `python -m benchmarks.evaluation`."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from tqdm import tqdm

from benchmarks.side_by_side import machine, save
from flashdit.evaluation.features.inception import InceptionExtractor
from flashdit.evaluation.images.folders import FolderSource
from flashdit.evaluation.images.npz import NpzSource
from flashdit.evaluation.metrics import frechet_distance, inception_score, precision_recall
from flashdit.shared.moments import Moments

DIMENSIONS, CLASSES = 2048, 1008
BATCH = 64
PIXELS, NUM_PICTURES = 256, 512
Runs = Mapping[str, Callable[[], Any]]
Times = dict[str, list[tuple[float, float]]]  # wall and processor seconds of each round


def make_features(seed: int, count: int, scale: float) -> np.ndarray:
    """Returns (count, 2048) float32, none negative: variance that falls as 1 / rank, and noise.

    They stand in for Inception's in the range of norms and the nearness of neighbours.
    """
    falling = np.arange(1, 257)[:, None] ** -0.5 * 0.3
    mixing = np.random.default_rng(99).standard_normal((256, DIMENSIONS)) * falling * scale
    draws = np.random.default_rng(seed)
    features = np.empty((count, DIMENSIONS), np.float32)
    for rows in np.array_split(features, max(1, count // 500)):
        noise = 0.1 * draws.standard_normal(rows.shape)
        rows[:] = np.maximum(draws.standard_normal((len(rows), 256)) @ mixing + noise + 0.3, 0)
    return features


def covariance_runs(rows: torch.Tensor) -> Runs:
    """Returns ways to the mean and covariance of float32 rows (n, d)."""

    def streamed() -> tuple[torch.Tensor, torch.Tensor]:
        moments = Moments(rows.shape[1])
        for batch in rows.split(BATCH):
            moments.add(batch)
        return moments.mean, moments.covariance

    return {
        f"ours, in batches of {BATCH}": lambda: streamed()[1],
        "numpy.cov, all rows at once": lambda: np.cov(rows.numpy(), rowvar=False),
        "torch-fidelity, all rows at once": lambda: fid_features_to_statistics(rows)["sigma"],
    }


def frechet_runs(real: np.ndarray, fake: np.ndarray) -> Runs:
    """Returns ways from the float64 statistics of both sets to the Fréchet distance."""
    (mu1, sigma1), (mu2, sigma2) = (
        (rows.mean(axis=0, dtype=np.float64), np.cov(rows, rowvar=False)) for rows in (real, fake)
    )
    sides = {"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}

    def by_square_root() -> float:
        root = np.trace(sqrtm(sigma1 @ sigma2)).real
        return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root

    return {
        "ours": lambda: frechet_distance(mu1, sigma1, mu2, sigma2, len(real), len(fake)),
        "scipy.linalg.sqrtm": by_square_root,
        "torch-fidelity": lambda: fid_statistics_to_metric(*sides, verbose=False)[
            "frechet_inception_distance"
        ],
    }


def manifold_runs(real: np.ndarray, fake: np.ndarray) -> Runs:
    """Returns ways to precision and recall; torch-fidelity's are its two modes, with its own batch size."""
    real_rows, fake_rows = torch.from_numpy(real), torch.from_numpy(fake)
    options = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "verbose": False}

    def theirs(save_cpu_ram: bool) -> tuple[float, float]:
        result = prc_features_to_metric(fake_rows, real_rows, save_cpu_ram=save_cpu_ram, **options)
        return result["precision"], result["recall"]

    return {
        "ours": lambda: precision_recall(real_rows, fake_rows),
        "torch-fidelity": lambda: theirs(False),
        "torch-fidelity, save_cpu_ram": lambda: theirs(True),
    }


def score_runs(logits: torch.Tensor) -> Runs:
    """Returns ways to the inception score in chunks of 5000 rows."""
    chunks = max(1, len(logits) // 5000)
    return {
        "ours": lambda: inception_score(logits, len(logits) // chunks)[0],
        "torch-fidelity": lambda: isc_features_to_metric(logits, splits=chunks, shuffle=False)[
            "inception_score_mean"
        ],
    }


def in_turn(runs: Runs, rounds: int, label: str) -> tuple[Times, dict[str, Any]]:
    """Returns wall and processor seconds of every run, all taken in turn, and what each last returned."""
    times: Times = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for _ in tqdm(range(rounds), label, unit="round"):
        for name, run in runs.items():
            started = time.perf_counter(), time.process_time()
            results[name] = run()
            times[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return times, results


def summaries(times: Times, results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns medians, medians of round-by-round ratios to ours, the first, and largest differences."""
    (name_of_ours, ours), *_ = times.items()
    rows = {}
    for name, theirs in times.items():
        ratios = [
            [other[kind] / own[kind] for own, other in zip(ours, theirs, strict=True)] for kind in (0, 1)
        ]
        gap = np.abs(np.asarray(results[name], dtype=float) - np.asarray(results[name_of_ours], dtype=float))
        rows[name] = {
            "median_s": statistics.median(wall for wall, _ in theirs),
            "min_s": min(wall for wall, _ in theirs),
            "max_s": max(wall for wall, _ in theirs),
            "median_processor_s": statistics.median(processor for _, processor in theirs),
            "times_as_long": statistics.median(ratios[0]),
            "times_as_long_by_processor": statistics.median(ratios[1]),
            "largest_difference": float(gap.max()),
        }
    return rows


def run_memory(name: str, folder: Path) -> None:
    """Prints the MiB that one way to precision and recall adds to the features, at its peak."""
    runs = manifold_runs(np.load(folder / "real.npy")[:64], np.load(folder / "fake.npy")[:64])
    runs[name]()  # libraries set themselves up
    run = manifold_runs(np.load(folder / "real.npy"), np.load(folder / "fake.npy"))[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    before = status_mib("VmRSS")
    run()
    print(status_mib("VmHWM") - before)


def status_mib(field: str) -> float:
    """Returns a figure of this process's memory; ru_maxrss would count the parent's memory too."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) / 1024


def peak_memory_mib(name: str, folder: Path, threads: int) -> float:
    """Returns what one way to precision and recall adds to memory in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.evaluation", "--threads", str(threads)]
    command += ["--memory-of", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def images_per_second(folder: Path) -> dict[str, float]:
    """Returns the images/s of reading an npz and a folder of PNGs, 256 px, beside those of Inception."""
    draws = np.random.default_rng(0)
    coarse = draws.integers(0, 256, (NUM_PICTURES, 16, 16, 3), np.uint8)
    sides = (PIXELS, PIXELS)
    pictures = np.stack([np.asarray(Image.fromarray(small).resize(sides)) for small in coarse])
    pictures += draws.integers(0, 8, pictures.shape, np.uint8)  # grain, which a PNG cannot leave out
    np.savez(folder / "pictures.npz", arr_0=pictures)
    (folder / "pictures").mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / "pictures" / f"{number}.png")
    sources = {
        "npz": NpzSource(folder / "pictures.npz"),
        "folder of PNGs": FolderSource(folder / "pictures"),
    }
    speeds = {}
    for name, source in sources.items():
        started = time.perf_counter()
        count = sum(len(images) for images in source.batches(BATCH))
        speeds[name] = count / (time.perf_counter() - started)
    extractor, images = random_inception(folder), next(iter(sources["npz"].batches(16)))
    extractor(images)
    started = time.perf_counter()
    extractor(images)
    return speeds | {"Inception": len(images) / (time.perf_counter() - started)}


def random_inception(folder: Path) -> InceptionExtractor:
    """Returns the Inception extractor with the weights it is born with, which take as long as any."""

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
            """Loads nothing."""

    path = folder / "inception.pth"
    torch.save({}, path)
    network = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return InceptionExtractor(path).eval()


def main() -> None:
    """Times every part in turn and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="rows of each set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        run_memory(arguments.memory_of, arguments.folder)
        return
    about = machine() | {"images": arguments.images, "rounds": arguments.rounds}
    real, fake = make_features(1, arguments.images, 1.0), make_features(2, arguments.images, 0.9)
    logits = torch.from_numpy(np.random.default_rng(3).standard_normal((arguments.images, CLASSES)) * 3)
    parts = {
        "moments": covariance_runs(torch.from_numpy(real)),
        "Fréchet distance": frechet_runs(real, fake),
        "inception score": score_runs(logits.float()),
        "precision and recall": manifold_runs(real, fake),
    }
    rows = {part: summaries(*in_turn(runs, arguments.rounds, part)) for part, runs in parts.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "real.npy", real)
        np.save(folder / "fake.npy", fake)
        for way, row in rows["precision and recall"].items():
            row["peak_memory_mib"] = peak_memory_mib(way, folder, arguments.threads)
        speeds = images_per_second(folder)
    content = {"about": about, "command": sys.argv[1:], "parts": rows, "images_per_second": speeds}
    save("evaluation", content, table(content))


def table(content: Mapping[str, Any]) -> str:
    """Returns the Markdown table."""
    about = content["about"]
    options = " ".join(["python -m benchmarks.evaluation", *content["command"]])
    lines = [
        f"`{options}`: {about['images']:,} + {about['images']:,} rows of {DIMENSIONS} synthetic features, "
        f"{about['threads']} thread(s) of {about['processor']}, load {about['load_before']:.1f} before; "
        f"medians of {about['rounds']} round(s) taken in turn; memory is the peak beyond the features",
        "",
        "| part | way | s | spread | times as long as ours | by processor time | peak memory | differs by |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for part, rows in content["parts"].items():
        for way, row in rows.items():
            memory = f"{row['peak_memory_mib']:,.0f} MiB" if "peak_memory_mib" in row else ""
            lines.append(
                f"| {part} | {way} | {row['median_s']:.2f} | {row['min_s']:.2f}–{row['max_s']:.2f} "
                f"| {row['times_as_long']:.2f} | {row['times_as_long_by_processor']:.2f} | {memory} "
                f"| {row['largest_difference']:.1e} |"
            )
    speeds = ", ".join(f"{name} {speed:,.1f}" for name, speed in content["images_per_second"].items())
    return "\n".join([*lines, "", f"Images of {PIXELS} px per second: {speeds}"]) + "\n"


if __name__ == "__main__":
    main()
