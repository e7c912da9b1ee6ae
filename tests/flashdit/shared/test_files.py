import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashdit.shared.files import (
    file_sha256,
    mend,
    read_checked_json,
    write_atomically,
    write_checked_json,
    write_json,
)
from flashdit.shared.locks import only_writer


@pytest.mark.parametrize("old", [None, "file", "folder"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, old):
    target = tmp_path / "target"
    if old == "file":
        target.write_text("old")
    elif old == "folder":
        target.mkdir()
        (target / "kept").write_text("old")

    def fail(path):
        path.mkdir()
        (path / "half").write_text("new")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match=r"no space"):
        write_atomically(target, fail)
    assert [path.name for path in tmp_path.iterdir()] == ([] if old is None else ["target"])
    if old == "folder":
        assert [path.name for path in target.iterdir()] == ["kept"]
        write_atomically(target, lambda path: path.mkdir())
        assert list(target.iterdir()) == []


def test_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "w.safetensors", lambda path: save_file({"w": torch.zeros(1)}, path))
    finally:
        os.umask(old)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o640


ROOT = Path(__file__).parents[3]
WRITER = """
import os, sys
from pathlib import Path
from flashdit.shared import files
target, kind, calls = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
real, left = os.replace, [calls]

def killed(source, destination):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
    real(source, destination)

def write(path):
    (path.mkdir(), (path / "content").write_text("new")) if kind == "folder" else path.write_text("new")

os.replace = killed
files.write_atomically(target, write)
"""


def write_and_die(target, kind, renames):
    """Writes the target in a process that is killed at a rename, or lives; returns its exit status."""
    command = [sys.executable, "-c", WRITER, str(target), kind, str(renames)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def content(target):
    return (target / "content" if target.is_dir() else target).read_text()


@pytest.mark.parametrize(("kind", "renames"), [("file", 1), ("folder", 3)])
def test_a_writer_killed_at_any_rename_loses_nothing_and_leaves_nothing(tmp_path, kind, renames):
    target = tmp_path / "target"
    for renames_before in range(renames):
        if kind == "folder":
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            (target / "content").write_text("old")
        else:
            target.write_text("old")
        assert write_and_die(target, kind, renames_before) == 9
        mend(tmp_path)
        assert content(target) == ("new" if renames_before == 2 else "old")
        assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert write_and_die(target, kind, renames) == 0, "there is no rename that was not tried"
    assert content(target) == "new"


def test_the_next_write_mends_what_a_kill_left(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "content").write_text("old")
    assert write_and_die(tmp_path / "target", "folder", 1) == 9
    assert not (tmp_path / "target").exists()
    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "target", fail_for_want_of_space)
    assert content(tmp_path / "target") == "old"
    write_atomically(tmp_path / "target", lambda path: (path.mkdir(), (path / "content").write_text("new")))
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert content(tmp_path / "target") == "new"


def fail_for_want_of_space(path):
    raise OSError("no space left on device")


REFUSED = """
import resource, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from flashdit.shared.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
tensors = {"x": np.zeros(10_000, dtype=np.uint8)}
try:
    write_atomically(Path(sys.argv[1]), lambda path: save_file(tensors, path))
except OSError as error:
    print(error)
"""


def test_what_safetensors_cannot_write_is_an_error_of_the_system_that_names_the_file(tmp_path):
    command = [sys.executable, "-c", REFUSED, str(tmp_path / "x.safetensors")]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert told.startswith(f"{tmp_path / 'x.safetensors'} could not be written: ")
    assert "File too large" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "must hold a mapping, got list"),
        ("[" * 100_000, "its parts lie too deep in one another"),
        ('{"a": 1, "b": [2.5, "ü"]}', None),
        ("{", "Expecting property name"),
    ],
)
def test_json_is_checked_before_it_is_used(tmp_path, text, reason):
    (tmp_path / "f.json").write_text(text)
    if reason is None:
        assert read_checked_json(tmp_path / "f.json") == {"a": 1, "b": [2.5, "ü"]}
    else:
        with pytest.raises(ValueError, match=reason):
            read_checked_json(tmp_path / "f.json")


def test_a_mapping_with_a_checksum_is_what_was_written_however_it_is_laid_out(tmp_path):
    path, content = tmp_path / "f.json", {"a": (1, 2), "b": {3: 0.1}}
    write_checked_json(path, content)
    assert read_checked_json(path) == {"a": [1, 2], "b": {"3": 0.1}}
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert read_checked_json(path) == {"a": [1, 2], "b": {"3": 0.1}}
    path.write_text(path.read_text().replace("0.1", "0.3"))
    with pytest.raises(ValueError, match=r"its checksum is not the one that it was written with \(without"):
        read_checked_json(path)


def test_what_is_being_written_is_no_leftover(tmp_path):
    def write(path):
        mend(tmp_path)
        write_atomically(tmp_path / "target", lambda inner: inner.write_text("of another"))
        path.write_text("whole")

    write_atomically(tmp_path / "target", write)
    assert (tmp_path / "target").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_hidden_files_of_the_users_are_left_alone(tmp_path):
    names = {".vimrc.old", ".f.old", ".f.a1b2.tmp", ".x.tmp", ".hidden", ".lock", ".f.lock"}
    for name in names:
        (tmp_path / name).write_text("of the user's")
    mend(tmp_path)
    write_atomically(tmp_path / "f", lambda path: path.write_text("whole"))
    with only_writer(tmp_path), only_writer(tmp_path / "f", is_file=True):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*names, "f"}
    assert {(tmp_path / name).read_text() for name in names} == {"of the user's"}


def test_data_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    happened = []
    sync, replace = os.fsync, os.replace

    def note_sync(descriptor):
        happened.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", lambda *paths: (happened.append("rename"), replace(*paths)))
    write_atomically(tmp_path / "f", lambda path: (path.mkdir(), (path / "inner").write_text("whole")))
    assert happened[:4] == ["f", "inner", "rename", tmp_path.name]


def test_a_discarded_folder_is_gone_and_one_killed_meanwhile_is_removed_by_the_next(tmp_path):
    (tmp_path / "folder").mkdir()
    code = (
        "import os, shutil; from pathlib import Path; from flashdit.shared import files\n"
        "shutil.rmtree = lambda *a, **k: os._exit(9)\n"
        f"files.discard(Path({str(tmp_path / 'folder')!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 9
    assert not (tmp_path / "folder").exists()
    mend(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folders_above_are_made(tmp_path):
    write_json(tmp_path / "a" / "b" / "c.json", {"one": [1, None]})
    assert json.loads((tmp_path / "a" / "b" / "c.json").read_text()) == {"one": [1, None]}
    assert (tmp_path / "a" / "b" / "c.json").read_text().endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "nan.json", {"value": float("nan")})
    assert not (tmp_path / "nan.json").exists()


def test_writers_of_one_path_have_names_of_their_own(tmp_path):
    names = []
    for _ in range(2):
        write_atomically(tmp_path / "f", lambda path: names.append(path) or path.write_text("whole"))
    assert names[0] != names[1]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, is_there):
    (tmp_path / "disk").mkdir()
    if is_there:
        (tmp_path / "disk" / "f").write_text("old")
    (tmp_path / "f").symlink_to("disk/f")
    write_atomically(tmp_path / "f", lambda path: path.write_text("new"))
    assert (tmp_path / "f").is_symlink()
    assert (tmp_path / "disk" / "f").read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "f", "f"]


def test_a_link_that_leads_to_itself_is_named(tmp_path):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(OSError, match=r"/(one|two) must be a file, a folder or new, and is a link that"):
        write_atomically(tmp_path / "one", lambda path: path.write_text("new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_killed_reader_is_no_fault_of_the_file_that_is_written_meanwhile(tmp_path):
    def killed(path):
        raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. ")

    with pytest.raises(RuntimeError, match=r"^DataLoader worker"):
        write_atomically(tmp_path / "f", killed)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "f" / "kept").mkdir(parents=True)
    with pytest.raises(OSError, match=r"f must be a file, and there is a folder of that name"):
        write_atomically(tmp_path / "f", lambda path: path.write_text("new"))
    assert [path.name for path in tmp_path.rglob("*")] == ["f", "kept"]
