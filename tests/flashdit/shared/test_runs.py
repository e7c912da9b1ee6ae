"""Where a run's files lie: the latest checkpoint, the newest run, and no torch to find them."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from flashdit.shared.runs import (
    LATENTS,
    DamagedCheckpoint,
    check_whole,
    checksums,
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


def test_checkpoints_are_listed_by_step_and_nothing_else_is(tmp_path):
    late, early = make_checkpoint(tmp_path, 20), make_checkpoint(tmp_path, 9)
    latest = make_checkpoint(tmp_path, 100_000_000)  # a digit more than names are padded to
    for name in ("step_00000030.tmp", "damaged_step_00000040", "50"):
        (early.parent / name).mkdir()
    (early.parent / "step_00000060").touch()
    assert early.name == "step_00000009"
    assert list_checkpoints(tmp_path) == [early, late, latest]


def test_a_checkpoint_without_its_state_is_listed_and_named_when_it_is_read(tmp_path):
    folder = make_checkpoint(tmp_path, 9)
    (folder / "state.json").unlink()
    assert find_checkpoint(tmp_path) == find_checkpoint(folder) == folder
    with pytest.raises(DamagedCheckpoint, match=r"step_00000009 is damaged: it has no state\.json"):
        read_state(folder)


def test_a_file_that_is_missing_or_another_one_is_named_and_only_where_it_is_read(tmp_path):
    files = {"ema/weights": b"averaged", "model/weights": b"raw", "optimizer.pt": b"moments"}
    folder = step_folder(tmp_path, 3)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    known = {name: f"{zlib.crc32(content):08x}" for name, content in files.items()}
    (folder / "state.json").write_text(json.dumps({"format": 1, "crc32": known}))
    assert checksums(folder) == known
    check_whole(folder)
    (folder / "model/weights").write_bytes(b"rav")
    (folder / "optimizer.pt").unlink()
    check_whole(folder, "ema")
    with pytest.raises(DamagedCheckpoint, match=r"model/weights is damaged: its checksum is not the one"):
        check_whole(folder, "model")
    with pytest.raises(DamagedCheckpoint, match=r"step_00000003 is damaged: it has no optimizer\.pt"):
        check_whole(folder, "optimizer.pt")


def test_a_run_stands_for_its_latest_checkpoint_and_a_checkpoint_for_itself(tmp_path):
    early, late = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 20)
    assert find_checkpoint(tmp_path) == late
    assert find_checkpoint(str(early)) == early


def test_what_holds_no_checkpoint_is_told_apart(tmp_path):
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "else").mkdir()
    with pytest.raises(ValueError, match=r"^--checkpoint: .*absent does not exist$"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"^RUN: .*begun holds no checkpoint yet: .*training\.save_every"):
        find_checkpoint(tmp_path / "begun", "RUN")
    with pytest.raises(ValueError, match=r"^--checkpoint must be a run or a folder step_X.*, got .*else"):
        find_checkpoint(tmp_path / "else")


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
