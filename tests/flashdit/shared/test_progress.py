"""Bars in log files: lines at long intervals, no codes that move a cursor."""

import io
import sys
import time

from flashdit.shared import progress
from flashdit.shared.progress import busy_with, progress_bar


def log_file(monkeypatch, interval_s):
    """Returns what takes the place of stderr: no terminal."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", interval_s)
    return sys.stderr


def test_each_state_is_a_line_and_none_is_written_twice(monkeypatch):
    log = log_file(monkeypatch, 0.0)
    options = {"bar_format": "{desc}: {n_fmt}/{total_fmt}", "miniters": 1}
    with progress_bar(total=2, desc="outer", **options) as outer:
        for _ in range(2):
            for _ in progress_bar(range(1), desc="inner", position=1, leave=False, **options):
                pass
            outer.update()
    inner = "inner: 0/1\ninner: 1/1\n"
    assert log.getvalue() == f"outer: 0/2\n{inner}outer: 1/2\n{inner}outer: 2/2\n"


def test_long_work_leaves_few_lines_and_short_work_none(monkeypatch):
    log = log_file(monkeypatch, 0.2)
    for _ in progress_bar(range(40), desc="read"):
        time.sleep(0.02)
    assert 2 <= len(log.getvalue().splitlines()) <= 5
    assert "40/40" in log.getvalue()
    log = log_file(monkeypatch, 60.0)
    assert list(progress_bar(range(5))) == list(range(5))
    assert log.getvalue() == ""


def test_in_a_terminal_a_bar_is_tqdms_own(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert progress_bar(range(2)).mininterval == 0.1
    assert "\r" in terminal.getvalue()


def test_a_bar_in_a_terminal_says_what_keeps_it_from_moving(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(total=1, desc="train", file=written) as bar:
        bar.update()
        with busy_with(bar, "saving"):
            assert "train, saving: 100%" in written.getvalue()
        assert written.getvalue().rpartition("\r")[2].startswith("train: 100%")


def test_a_bar_in_a_log_writes_no_line_for_what_it_waits_for(capsys):
    for hidden in (False, True):
        bar = progress_bar(total=1, desc="train", mininterval=99, disable=hidden)
        with bar, busy_with(bar, "saving"):
            pass
    assert "saving" not in capsys.readouterr().err
