"""Where a run's files lie: the latest checkpoint, the newest run, and no torch to find them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashdit.shared.runs import (
    LATENTS,
    DamagedCheckpoint,
    find_checkpoint,
    list_checkpoints,
    newest_run,
    read_state,
    step_folder,
)


def test_a_run_is_found_without_torch():
    code = "import sys, flashdit.shared.runs; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def make_checkpoint(run, step, time=0, **files):
    """Writes what is looked for in a checkpoint, modified at a time."""
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    for name, text in ({"state.json": json.dumps({"format": 1, "step": step})} | files).items():
        (folder / name).write_text(text)
    os.utime(folder, (time, time))
    return folder


def test_checkpoints_are_listed_by_step_and_a_half_written_one_is_not(tmp_path):
    late, early = make_checkpoint(tmp_path, 20), make_checkpoint(tmp_path, 9)
    step_folder(tmp_path, 30).mkdir()
    assert early.name == "step_00000009"
    assert list_checkpoints(tmp_path) == [early, late]


def test_a_run_stands_for_its_latest_checkpoint_and_a_checkpoint_for_itself(tmp_path):
    early, late = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 20)
    assert find_checkpoint(tmp_path) == late
    assert find_checkpoint(str(early)) == early
    with pytest.raises(ValueError, match=r"checkpoint must be a run or a folder step_X.*, got .*absent"):
        find_checkpoint(tmp_path / "absent")


def test_the_newest_run_is_the_one_whose_latest_checkpoint_is_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no run with a checkpoint in runs: .* \(flashdit train\)"):
        find_checkpoint(None)
    make_checkpoint(tmp_path / "runs" / "old", 50, time=100, **{LATENTS: ""})
    make_checkpoint(tmp_path / "runs" / "new", 10, time=200)
    assert find_checkpoint(None).parent.parent.name == "new"
    assert newest_run(holding=LATENTS).name == "old"


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path, 3)
    assert read_state(folder) == {"format": 1, "step": 3}
    (folder / "state.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match=r"unknown checkpoint format of .* '9'.*\(known: 1\)"):
        read_state(folder)


@pytest.mark.parametrize("text", ["", "{", '["format"]', "1"])
def test_a_state_that_is_no_mapping_is_a_damaged_checkpoint(tmp_path, text):
    folder = make_checkpoint(tmp_path, 3, **{"state.json": text})
    with pytest.raises(DamagedCheckpoint, match=r"step_00000003/state\.json is damaged: "):
        read_state(folder)


def test_a_run_whose_latest_checkpoint_lacks_the_file_is_passed_over(tmp_path):
    for step in (5, 6):
        make_checkpoint(tmp_path / "run", step)
    (step_folder(tmp_path / "run", 5) / LATENTS).write_text("")
    assert newest_run(tmp_path).name == "run"
    with pytest.raises(ValueError, match="no run with a checkpoint"):
        newest_run(tmp_path, LATENTS)
