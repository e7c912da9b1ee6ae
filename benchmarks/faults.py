"""Faults that training must survive: processes really killed, disks full, data broken. `make faults`.

Each run is a tiny model on shards made here; after each fault the same command is given again, and the end
must equal that of a run that nothing happened to: every tensor of the last checkpoint, and metrics.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from flashdit import config
from flashdit.data.shards import write_shard, write_statistics
from flashdit.shared.files import TEMPORARY
from flashdit.shared.runs import list_checkpoints
from flashdit.trainer import Trainer
from flashdit.training.meter import TIMINGS

ROOT = Path(__file__).parents[1]
STEPS = 40
TINY = [
    "data.name=shards",
    "latents.vae=null",
    "model.sample_size=8",
    "model.in_channels=3",
    "model.num_classes=3",
    "model.hidden_size=16",
    "model.depth=1",
    f"training.steps={STEPS}",
    "training.global_batch_size=8",
    "training.save_every=1",
    "training.keep_last=3",
    "training.log_every=3",
]


def make_shards(folder: Path, poisoned: bool = False) -> Path:
    """Writes two shards of 20 and 17 latents in 3 classes; a poisoned one has a row that is not a number."""
    generator = torch.Generator().manual_seed(0)
    for number, rows in enumerate((20, 17)):
        latents = torch.randn(rows, 3, 8, 8, generator=generator)
        if poisoned and number == 1:
            latents[5] = float("nan")
        write_shard(folder, 0, number, latents, latents.flip(-1), torch.arange(rows) % 3)
    write_statistics(folder, torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1))
    return folder


def start(overrides: list[str], limit_bytes: int | None = None) -> int:
    """Starts training in a process of its own and returns its id.

    It exits as the script does: 0, or 2 after a sentence. `limit_bytes` is the largest file that the kernel
    lets it write.
    """
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        if limit_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        Trainer(config.load(None, overrides)).fit()
        status = 0
    except (ValueError, OSError, FloatingPointError):
        status = 2
    finally:
        os._exit(status)


def wait(process: int) -> int:
    """Returns the exit status, negative for the signal that ended the process."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(run_dir: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Returns every tensor of the last checkpoint, and the records without their timings."""
    last = list_checkpoints(run_dir)[-1]
    found = {}
    for path in sorted(last.rglob("*.safetensors")):
        found |= {f"{path.relative_to(last)}/{name}": value for name, value in load_file(path).items()}
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    found |= {f"{name}/{key}": v for name, state in optimizer.items() for key, v in state.items()}
    found["step"] = torch.tensor(json.loads((last / "state.json").read_text())["step"])
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return found, [{name: v for name, v in line.items() if name not in TIMINGS} for line in lines]


def same_end(run_dir: Path, reference: Path) -> bool:
    """Returns whether two runs ended in the same bits."""
    (mine, my_records), (theirs, their_records) = content(run_dir), content(reference)
    equal = mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)
    return equal and my_records == their_records


@contextlib.contextmanager
def started(overrides: list[str]) -> Iterator[int]:
    """Starts training and kills it, if it still lives, at the end."""
    process = start(overrides)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


class Trials:
    """Where the faults happen: a folder, good shards, and the run that nothing happens to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.overrides = [*TINY, f"data.path={make_shards(folder / 'shards')}"]
        self.reference = folder / "reference"
        begun = time.perf_counter()
        assert wait(start([*self.overrides, f"run.dir={self.reference}"])) == 0
        self.duration_s = time.perf_counter() - begun
        self.count = 0

    def run_dir(self) -> Path:
        """Returns a folder that no run has had."""
        self.count += 1
        return self.folder / f"run_{self.count}"

    def ends_equal(self, run_dir: Path) -> bool:
        """Gives the command again and returns whether the run ends as the reference."""
        return wait(start([*self.overrides, f"run.dir={run_dir}"])) == 0 and same_end(run_dir, self.reference)


def kill_at_random(trials: Trials, draw: random.Random, number: int) -> bool:
    """Kills a run once at a random moment between its first checkpoint and its end."""
    run_dir = trials.run_dir()
    process = start([*trials.overrides, f"run.dir={run_dir}"])
    while not list_checkpoints(run_dir):
        time.sleep(0.001)
    time.sleep(draw.random() * 0.6 * trials.duration_s)
    os.kill(process, number)
    status = wait(process)
    if number == signal.SIGTERM and status != 0:
        return False
    return trials.ends_equal(run_dir)


def sigkill(trials: Trials, draw: random.Random) -> bool:
    """SIGKILL at a random moment."""
    return kill_at_random(trials, draw, signal.SIGKILL)


def sigterm(trials: Trials, draw: random.Random) -> bool:
    """SIGTERM at a random moment: it must save and exit 0."""
    return kill_at_random(trials, draw, signal.SIGTERM)


def kill_in_save(trials: Trials, draw: random.Random) -> bool:
    """SIGKILL while a checkpoint is half written."""
    run_dir = trials.run_dir()
    step = draw.randrange(2, STEPS)
    half = f".step_{step:08d}.*{TEMPORARY}"
    with started([*trials.overrides, f"run.dir={run_dir}"]) as process:
        while not any((run_dir / "checkpoints").glob(half)):
            if os.waitpid(process, os.WNOHANG)[0]:
                return False  # it was too fast to be caught
    return any((run_dir / "checkpoints").glob(half)) and trials.ends_equal(run_dir)


def full_disk(trials: Trials, draw: random.Random) -> bool:
    """A disk that refuses the optimiser's file of the fourth step: exit 2, nothing lost."""
    run_dir = trials.run_dir()
    assert wait(start([*trials.overrides, f"run.dir={run_dir}", "training.steps=3"])) == 0
    size = (list_checkpoints(run_dir)[-1] / "optimizer.pt").stat().st_size
    refused = wait(start([*trials.overrides, f"run.dir={run_dir}"], limit_bytes=size // 2)) == 2
    left = list_checkpoints(run_dir)[-1].name == "step_00000003"
    return refused and left and trials.ends_equal(run_dir)


def nan_in_data(trials: Trials, draw: random.Random) -> bool:
    """A latent that is not a number: its steps are skipped, the weights stay finite."""
    run_dir = trials.run_dir()
    shards = make_shards(trials.folder / f"poisoned_{trials.count}", poisoned=True)
    done = wait(start([*TINY, f"data.path={shards}", f"run.dir={run_dir}"])) == 0
    state = json.loads((list_checkpoints(run_dir)[-1] / "state.json").read_text())
    tensors, _ = content(run_dir)
    finite = all(bool(value.isfinite().all()) for value in tensors.values())
    return done and finite and 0 < state["skipped"] < STEPS / 2


def truncated_shard(trials: Trials, draw: random.Random) -> bool:
    """A shard that ends early: the next start names it and exits 2; mended, the run goes on."""
    run_dir = trials.run_dir()
    assert wait(start([*trials.overrides, f"run.dir={run_dir}", "training.steps=6"])) == 0
    shard = max((trials.folder / "shards").glob("*shard*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: draw.randrange(1, len(whole) - 1)])
    refused = wait(start([*trials.overrides, f"run.dir={run_dir}"])) == 2
    shard.write_bytes(whole)
    return refused and trials.ends_equal(run_dir)


def rank_killed(trials: Trials, draw: random.Random) -> bool:
    """One of two processes is killed: the job ends with an error; resumed, it ends as if nothing had been."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "train.py"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def launch(run_dir: Path) -> subprocess.Popen:
        arguments = [*command, *trials.overrides, f"run.dir={run_dir}", "training.timeout_s=60"]
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=-3, stderr=-3)

    reference, run_dir = trials.run_dir(), trials.run_dir()
    assert launch(reference).wait() == 0
    job = launch(run_dir)
    while not list_checkpoints(run_dir):
        time.sleep(0.005)
    listed = subprocess.run(["ps", "--ppid", str(job.pid), "-o", "pid="], capture_output=True, text=True)
    ranks = [int(word) for word in listed.stdout.split()]
    os.kill(ranks[-1], signal.SIGKILL)
    ended_badly = job.wait(timeout=120) != 0
    return ended_badly and launch(run_dir).wait() == 0 and same_end(run_dir, reference)


FAULTS: dict[str, tuple[Callable[[Trials, random.Random], bool], int]] = {
    "SIGKILL at a random moment": (sigkill, 20),
    "SIGTERM at a random moment": (sigterm, 5),
    "SIGKILL while a checkpoint is being written": (kill_in_save, 5),
    "a full disk in a save": (full_disk, 2),
    "NaN in the data": (nan_in_data, 1),
    "a truncated shard": (truncated_shard, 2),
    "one of two processes killed": (rank_killed, 1),
}


def main() -> None:
    """Tries every fault so many times and prints how many were survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="try only the faults whose name has these"
    )
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    tried = survived = 0
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder))
        for name, (fault, times) in FAULTS.items():
            if arguments.only not in name:
                continue
            results = [fault(trials, draw) for _ in tqdm(range(times), desc=name)]
            tried, survived = tried + times, survived + sum(results)
            print(f"{name}: {sum(results)} of {times} survived")
    print(f"faults tried {tried}, survived {survived}")
    sys.exit(survived != tried)


if __name__ == "__main__":
    main()
