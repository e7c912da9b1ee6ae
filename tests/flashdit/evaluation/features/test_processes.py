"""Several processes for real, by accelerate and torchrun: the same numbers, and no hang where one fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashdit.digits.images import digits

ROOT = Path(__file__).parents[4]
CPU_2 = ROOT / "configs" / "accelerate" / "cpu_2.yaml"
LAUNCHERS = {
    1: [],
    2: ["-m", "accelerate.commands.launch", "--config_file", str(CPU_2)],
    3: ["-m", "torch.distributed.run", "--nproc_per_node", "3"],
}
COUNT = 199  # divisible by neither 2 nor 3
# The moments agree to 1e-9; in near-empty dimensions a distance takes the root of their rounding.
RTOL = {"fd_199": 1e-7, "sfd_199": 1e-6}


def evaluate(world: int, folder: Path, samples: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *LAUNCHERS[world], "eval_fid.py", "--samples", str(samples)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [*command, "--extractor", "digits", "--output", str(folder), *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return digits("train")[0].permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture(scope="module")
def one(images, tmp_path_factory) -> tuple[list[str], Path, dict]:
    """Returns the reference as words, the samples, and the metrics of one process."""
    folder = tmp_path_factory.mktemp("one")
    np.savez(folder / "samples.npz", images[:COUNT])
    np.savez(folder / "reference.npz", images[500:700])
    words = ["--reference", str(folder / "reference.npz"), "--no-cache"]
    done = evaluate(1, folder, folder / "samples.npz", *words)
    assert done.returncode == 0, done.stderr
    return words, folder / "samples.npz", json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_gives_the_same_numbers(world, one, tmp_path):
    words, samples, expected = one
    done = evaluate(world, tmp_path, samples, *words, "--batch-size", "7")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["processes"] == world
    assert content["num_images"] == COUNT
    for key, tolerance in RTOL.items():
        assert content["metrics"][key] == pytest.approx(expected["metrics"][key], rel=tolerance)
    for key in ("precision", "recall", "is_mean"):
        assert content["metrics"][key] == expected["metrics"][key]
    assert done.stdout.count("wrote ") == 1, "one process alone tells"


def test_pictures_that_are_cropped_score_the_same_by_two_processes(images, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(9):
        Image.fromarray(images[number]).resize((40, 48 + number)).save(folder / f"{number}.png")
    scores = {}
    for world in (1, 2):
        words = ["--reference", "digits", "--metrics", "fid", "--image-size", "32", "--no-cache"]
        done = evaluate(world, tmp_path / f"eval_{world}", folder, *words)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("9 of 9 images are cropped to 32×32") == 1, "one process alone tells"
        scores[world] = json.loads((tmp_path / f"eval_{world}" / "metrics.json").read_text())["metrics"]
    assert scores[2]["fd_9"] == pytest.approx(scores[1]["fd_9"], rel=1e-7)


def test_a_failure_of_one_process_ends_all(images, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(images[number]).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no picture")  # the second process reads it, the first does not
    done = evaluate(2, tmp_path / "eval", folder, "--reference", "digits", "--metrics", "fid", "--no-cache")
    assert done.returncode != 0
    assert "error: process 1: every image must be readable," in done.stderr
    assert not (tmp_path / "eval").exists()
