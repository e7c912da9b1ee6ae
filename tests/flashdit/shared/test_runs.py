"""Where a run's files lie: the latest checkpoint, the newest run, and no torch to find them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashdit.shared.files import write_json
from flashdit.shared.runs import (
    LATENTS,
    find_checkpoint,
    list_checkpoints,
    newest_run,
    read_state,
    step_folder,
)


def test_a_run_is_found_without_torch():
    code = "import sys, flashdit.shared.runs; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def make_checkpoint(run, step):
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    write_json(folder / "state.json", {"format": 1, "step": step})
    return folder


def test_latest_is_by_step_and_unfinished_ones_are_passed_over(tmp_path):
    made = [make_checkpoint(tmp_path / "run", step) for step in (100, 20, 3)]
    step_folder(tmp_path / "run", 999).mkdir()
    assert list_checkpoints(tmp_path / "run") == made[::-1]
    assert find_checkpoint(tmp_path / "run") == made[0]
    assert find_checkpoint(made[1]) == made[1]


def test_newest_run_is_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no run with a checkpoint in runs: train one first"):
        find_checkpoint(None)
    make_checkpoint(tmp_path / "runs" / "a", 5)
    newest = make_checkpoint(tmp_path / "runs" / "b", 3)
    os.utime(newest, (2e9, 2e9))
    assert newest_run().name == "b"
    assert find_checkpoint(None).name == "step_00000003"
    (newest.parents[2] / "a" / "checkpoints" / "step_00000005" / "latents.safetensors").touch()
    assert newest_run(holding="latents.safetensors").name == "a", "a classifier's run holds none"


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"checkpoint must be a run or a folder step_XXXXXXXX .* got .*absent"
    ):
        find_checkpoint(tmp_path / "absent")
    folder = make_checkpoint(tmp_path, 1)
    write_json(folder / "state.json", {"format": 99})
    with pytest.raises(ValueError, match=r"unknown checkpoint format of .* '99'"):
        read_state(folder)


def test_a_run_whose_latest_checkpoint_lacks_the_file_is_passed_over(tmp_path):
    for step in (5, 6):
        make_checkpoint(tmp_path / "run", step)
    (step_folder(tmp_path / "run", 5) / LATENTS).write_text("")
    assert newest_run(tmp_path).name == "run"
    with pytest.raises(ValueError, match="no run with a checkpoint"):
        newest_run(tmp_path, LATENTS)
