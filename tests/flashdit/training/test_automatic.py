"""What a run's start decides is written down and kept, whatever processor the run goes on with."""

import re

import pytest
import yaml

from flashdit import config
from flashdit.shared import process
from flashdit.shared.runs import list_checkpoints
from flashdit.trainer import Trainer
from iwin_core.kernels import cpu_attention

MEASURED = next(iter(cpu_attention.read_table()))


@pytest.fixture
def start(tiny_overrides, tmp_path, monkeypatch):
    """Returns a function that starts or resumes a run on a processor and gives what was written."""

    def on(processor, *overrides):
        monkeypatch.setattr(process, "this_processor", lambda: processor)
        monkeypatch.setattr(cpu_attention, "this_processor", lambda: processor)
        trainer = Trainer(config.load(None, [*tiny_overrides, *overrides]))
        trainer.fit()
        written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        return written["training"], written["sampling"]["precision"]

    return on


@pytest.mark.parametrize(
    ("processor", "precision", "attention"),
    [("Acme amx_tile", "bf16", "fused"), ("Acme avx2", "fp32", "fused"), (MEASURED, None, MEASURED)],
)
def test_auto_is_what_suits_the_processor_of_the_start_and_stays(start, processor, precision, attention):
    precision = precision or ("bf16" if "bf16" in processor or "amx" in processor else "fp32")
    auto = ("training.precision=auto", "sampling.precision=auto")
    for here, steps in ((processor, 1), ("Other avx2", 2), ("Other amx_tile", 3)):
        training, sampling = start(here, *auto, f"training.steps={steps}")
        assert (training["precision"], sampling) == (precision, precision)
        assert training["cpu_attention"] == attention


def test_a_precision_that_is_named_decides(start):
    training, sampling = start("Acme amx_tile", "training.steps=1")
    assert (training["precision"], sampling) == ("fp32", "fp32")


def test_training_asks_for_the_processor_that_it_began_on(start, monkeypatch):
    asked = []

    def choose(*case):
        asked.append(case[-1])
        return cpu_attention.FUSED

    monkeypatch.setattr(cpu_attention, "cpu_attention", choose)
    start(MEASURED, "training.steps=1")
    first = set(asked)
    start("Other avx2", "training.steps=2", "training.preview_every=0")
    assert MEASURED in first
    assert asked[-1] == MEASURED


def test_a_run_of_before_goes_on_with_the_fused_kernel(start, tmp_path):
    start(MEASURED, "training.steps=1")
    path = list_checkpoints(tmp_path / "run")[-1] / "config.yaml"
    path.write_text(re.sub(r" *cpu_attention:.*\n", "", path.read_text()))
    training, _ = start(MEASURED, "training.steps=2")
    assert training["cpu_attention"] == "fused"
