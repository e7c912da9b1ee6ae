import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from flashdit.shared.files import file_sha256, write_atomically, write_json


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


def test_leftovers_of_a_kill_are_removed_by_the_next_write(tmp_path):
    (tmp_path / ".target.tmp").mkdir()
    (tmp_path / ".target.tmp" / "half").write_text("half")
    (tmp_path / ".target.old").mkdir()
    (tmp_path / "target").mkdir()
    write_atomically(tmp_path / "target", lambda path: path.mkdir())
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_folders_above_are_made(tmp_path):
    write_json(tmp_path / "a" / "b" / "c.json", {"one": [1, None]})
    assert json.loads((tmp_path / "a" / "b" / "c.json").read_text()) == {"one": [1, None]}
    assert (tmp_path / "a" / "b" / "c.json").read_text().endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "nan.json", {"value": float("nan")})
    assert not (tmp_path / "nan.json").exists()


def test_writers_of_one_path_have_names_of_their_own(tmp_path, monkeypatch):
    names = []
    for process in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        write_atomically(
            tmp_path / "f", lambda path: names.append(path.name) or path.write_text("whole"), contested=True
        )
    assert names[0] != names[1]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()
