"""The faults that `tools.mutate` tries fit the code as it is."""

import tomllib
from pathlib import Path

from tools.mutate import FAULTS

ROOT = Path(__file__).parents[1]


def test_every_fault_names_a_text_that_its_file_has_once():
    faults = tomllib.loads(FAULTS.read_text())["fault"]
    others = [
        f"{fault['file']}: {fault['old'].strip()!r}"
        for fault in faults
        if not (ROOT / fault["file"]).is_file() or (ROOT / fault["file"]).read_text().count(fault["old"]) != 1
    ]
    assert len(faults) > 500
    assert others == []
