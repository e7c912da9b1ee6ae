import os

import pytest
import torch
from safetensors.torch import save_file

from flashdit.shared.files import write_atomically


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
