"""`iwin reach`: its table and picture, and one line for bad input."""

import pytest
from PIL import Image

from flashdit.shared.command import run_script
from iwin_core.analysis.mixing import KINDS
from iwin_tasks.commands import reach


def test_command_prints_the_table_and_draws_the_picture(tmp_path, capsys):
    picture = tmp_path / "reach.png"
    reach.main(["--size", "6", "8", "--window", "2", "--blocks", "2", "--output", str(picture)])
    printed = capsys.readouterr().out
    assert all(kind.label in printed for kind in KINDS.values())
    assert "Theorem 3 as printed, K*M >= max(H, W): 3*2 >= 8 does not hold" in printed
    with Image.open(picture) as image:
        assert image.width > 4 * 150


@pytest.mark.parametrize("size", [["0"], ["200"], ["4", "5", "6"]])
def test_command_ends_with_one_line(size, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_script(lambda: reach.main(["--size", *size]))
    assert exit_info.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("error: size must be one or two positive sides")
    assert printed.count("\n") == 1


def test_a_start_of_the_picture_without_a_picture_is_refused():
    with pytest.raises(ValueError, match=r"--token is for the picture that --output names, got \[1, 2\]"):
        reach.main(["--size", "8", "--token", "1", "2"])


def test_nothing_is_printed_before_the_picture_is_written(tmp_path, capsys):
    (tmp_path / "a.png").mkdir()
    with pytest.raises((OSError, ValueError), match=r"a.png"):
        reach.main(["--size", "8", "--output", str(tmp_path / "a.png")])
    assert capsys.readouterr().out == ""


def test_more_blocks_than_a_table_shows_are_refused():
    with pytest.raises(ValueError, match="--blocks must be at most 100, got 1000000000"):
        reach.main(["--blocks", "1000000000"])
