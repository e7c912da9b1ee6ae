"""`make gpu` keeps a record after each part, makes what is left, and ends in time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import flashdit
from benchmarks.gpu import PARTS, WHOLE_S, Part, make_all

ABOUT = {"gpu": "card", "torch": "2", "code": "a"}


def python(name, code, limit_s=60):
    return Part(name, ["-c", code], limit_s)


def statuses(found):
    return {name: record["status"] for name, record in found.items()}


def test_parts_that_passed_are_kept_and_the_rest_is_made_again(tmp_path):
    path, made = tmp_path / "gpu.json", tmp_path / "made"
    good = python("good", f"open({str(made)!r}, 'a').write('x'); print('fine')")
    bad = python("bad", "raise SystemExit('wrong numbers')")
    slow = python("slow", "print('begun', flush=True); import time; time.sleep(60)", limit_s=3)
    found = make_all([good, bad, slow], path, ABOUT, 600)
    assert statuses(found) == {"good": "passed", "bad": "exit status 1", "slow": "cut off after 3 s"}
    assert "wrong numbers" in found["bad"]["printed"]
    assert "begun" in found["slow"]["printed"]
    assert json.loads(path.read_text())["parts"] == found
    assert statuses(make_all([good, python("bad", "")], path, ABOUT, 600))["bad"] == "passed"
    assert made.read_text() == "x", "made once"
    make_all([good], path, ABOUT | {"code": "b"}, 600)
    assert made.read_text() == "xx", "another code is tried anew"


def test_no_part_is_begun_without_time_for_it(tmp_path):
    found = make_all([python("late", "")], tmp_path / "gpu.json", ABOUT, 1)
    assert statuses(found) == {"late": "not tried: no time was left"}


def test_every_part_is_a_command_of_this_repository_and_the_first_fit_the_time():
    root = Path(__file__).parents[2]
    for part in PARTS:
        assert part.command[0] == "-m"
        named = [word for word in part.command if word.startswith("tests/")]
        assert all((root / word).is_file() for word in named)
        if not named:
            assert (root / f"{part.command[1].replace('.', '/')}.py").is_file()
    assert sum(part.limit_s for part in PARTS[:6]) <= WHOLE_S


@pytest.mark.parametrize("part", ["attention", "features", "sampling"])
def test_parts_run_on_small_sizes_without_a_gpu(part):
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_parts",
        part,
        "--quick",
        "--rounds",
        "1",
        "--device",
        "cpu",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)


def test_the_benchmark_of_steps_needs_no_options(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flashdit"])
    arguments = flashdit.parse()
    assert arguments.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert flashdit.file_name(arguments).startswith("flashdit_")
