"""Signals to training as a terminal, a scheduler and a launcher send them; and two runs in one folder."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashdit.shared.runs import list_checkpoints, read_state

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
LONG = [
    *(
        "training.steps=100000",
        "training.save_every=100000",
        "training.log_every=1",
        "optimizer.decay_steps=null",
    ),
    *("training.preview_every=0", "model.hidden_size=16", "model.depth=1", "sampling.steps=2"),
]
TRAIN = [sys.executable, "train.py"]
LAUNCH_2 = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    "train.py",
]


def start(run_dir, *more, command=TRAIN, ready="metrics.jsonl", **options):
    """Returns a run in a process group of its own that has made steps."""
    log = (run_dir.parent / f"{run_dir.name}.log").open("w")
    process = subprocess.Popen(
        [*command, f"run.dir={run_dir}", *LONG, *more],
        **{"cwd": ROOT, "env": ENVIRONMENT, "start_new_session": True, "stdout": log, "stderr": log}
        | options,
    )
    log.close()
    path = run_dir / ready
    while process.poll() is None and not (path.exists() and (path.is_dir() or path.stat().st_size)):
        time.sleep(0.05)
    return process


def ended(process, run_dir):
    """Returns the exit status and what was printed."""
    status = process.wait(timeout=60)
    return status, (run_dir.parent / f"{run_dir.name}.log").read_text()


def assert_saved(run_dir, printed, name):
    (checkpoint,) = list_checkpoints(run_dir)
    step = read_state(checkpoint)["step"]
    assert f"stopped at step {step} of 100000 by {name}: run the same command again to go on" in printed
    assert "Traceback" not in printed
    logged = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1] == step
    assert not [path for path in run_dir.rglob(".*")]


@pytest.mark.parametrize(("name", "workers"), [("SIGINT", 2), ("SIGTERM", 2), ("SIGHUP", 0), ("SIGUSR1", 0)])
def test_a_signal_to_the_group_saves_and_ends_with_0(tmp_path, name, workers):
    run_dir = tmp_path / "run"
    process = start(run_dir, f"training.workers={workers}")
    os.killpg(process.pid, getattr(signal, name))
    status, printed = ended(process, run_dir)
    assert status == 0, printed
    assert_saved(run_dir, printed, name)


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, command=["nohup", *TRAIN], stdin=subprocess.DEVNULL)
    process.send_signal(signal.SIGHUP)
    path, before = run_dir / "metrics.jsonl", (run_dir / "metrics.jsonl").stat().st_size
    while path.stat().st_size < before + 1000 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, printed = ended(process, run_dir)
    assert status == 0
    assert_saved(run_dir, printed, "SIGTERM")


SLOW_SAVE = """
import sys, time
from flashdit.training import position
from flashdit.commands import train
from flashdit.shared.command import run_script
def slow(*arguments):
    print("saving", flush=True)
    time.sleep(60)
position.write_checkpoint = slow
run_script(lambda: train.main(sys.argv[1:]))
"""


def test_a_second_interrupt_ends_the_process_at_once_with_130(tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, "training.workers=1", command=[sys.executable, "-c", SLOW_SAVE])
    os.killpg(process.pid, signal.SIGINT)
    while "saving" not in (tmp_path / "run.log").read_text():
        time.sleep(0.05)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    status, printed = ended(process, run_dir)
    assert status == 130
    assert time.monotonic() - started < 20, "it waited for the save"
    assert "Traceback" not in printed
    assert "ended at once by a second Ctrl-C: what is newer than the last" in printed


def test_two_processes_under_a_launcher_save_the_same_step(tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, command=LAUNCH_2)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    for _ in range(2):  # as a terminal sends it, and the launcher again
        for child in children:
            os.kill(int(child), signal.SIGINT)
        time.sleep(0.02)
    status, printed = ended(process, run_dir)
    assert status == 0, printed
    assert_saved(run_dir, printed, "SIGINT")
    assert printed.count("SIGINT: the run is saved") == 1


def test_an_interrupt_before_the_first_step_is_one_line(tmp_path):
    code = (
        "import sys, os, signal\n"
        "from flashdit import trainer\n"
        "from flashdit.commands import train\n"
        "from flashdit.shared.command import run_script\n"
        "sys.argv[0] = 'train.py'\n"
        "trainer.open_latents = lambda *a: os.kill(os.getpid(), signal.SIGINT)\n"
        "run_script(lambda: train.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.strip() == "train.py: interrupted"
    assert not (tmp_path / "run").exists()


def test_a_run_in_use_is_refused_and_free_again_when_its_process_is_killed(tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, "training.workers=1")
    again = [*TRAIN, f"run.dir={run_dir}", *LONG]
    second = subprocess.run(again, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert re.fullmatch(
        r"train.py: error: .*run must have one writer at a time, it is written by "
        rf"process {process.pid} on host \S+\n",
        second.stderr,
    )
    process.kill()
    process.wait()
    third = subprocess.run(
        [*again, "training.steps=1"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert third.returncode == 0, third.stderr
