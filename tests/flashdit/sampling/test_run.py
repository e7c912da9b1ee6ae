"""Filling a folder of samples: each process's share, and what the recipe says once all are there."""

import io
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flashdit.sampling import run
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.generator import SampleBatch
from flashdit.sampling.options import SamplingOptions
from flashdit.sampling.run import fill, open_folder
from flashdit.shared import progress


@pytest.fixture(scope="module")
def generator(tiny_checkpoint):
    return load_generator(tiny_checkpoint)


def process(index, count):
    """Returns what a process knows of itself and of the others."""
    return SimpleNamespace(
        process_index=index,
        num_processes=count,
        is_main_process=index == 0,
        wait_for_everyone=lambda: None,
    )


def test_a_process_makes_its_share_and_nothing_twice(generator, tmp_path):
    options = SamplingOptions(steps=1, batch_size=2)
    folder = open_folder(generator, torch.tensor([0, 1, 2, 0, 1]), options, tmp_path / "out")
    folder.open()
    fill(folder, generator, options, process(1, 2))
    assert folder.missing().tolist() == [0, 2, 4]
    fill(folder, generator, options, process(0, 1))
    assert folder.is_finished
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1]


def test_the_bar_advances_within_a_batch(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    options = SamplingOptions(steps=3, batch_size=3)
    folder = open_folder(generator, torch.zeros(6).long(), options, tmp_path / "out")
    fill(folder, generator, options, process(0, 1))
    counts = re.findall(r"(\d)/6", sys.stderr.getvalue())
    assert list(dict.fromkeys(counts)) == list("0123456")
    assert counts == sorted(counts)


def test_processes_that_read_different_checkpoints_are_refused(generator, tmp_path, monkeypatch):
    folder = open_folder(generator, torch.tensor([0]), SamplingOptions(steps=1), tmp_path / "out")
    monkeypatch.setattr(run, "gather_object", lambda mine: [*mine, mine[0] | {"checkpoint": "step_9"}])
    with pytest.raises(ValueError, match=r"one checkpoint, got .*step_00000007 and step_9:"):
        fill(folder, generator, SamplingOptions(steps=1), process(0, 2))
    assert not folder.path.exists()


def test_the_recipe_has_the_mean_and_the_most_evaluations_of_an_image(generator, tmp_path):
    labels = torch.tensor([0, 1, 2])
    folder = open_folder(generator, labels, SamplingOptions(sampler="dopri5"), tmp_path / "out")
    assert folder.recipe["nfe"] is None
    folder.open()
    images = torch.zeros(3, 3, 8, 4, dtype=torch.uint8)
    folder.add(SampleBatch(ids=torch.arange(3), labels=labels, images=images, nfe=torch.tensor([20, 32, 21])))
    folder.finish()
    recipe = folder.read_recipe()
    assert recipe["nfe"] == pytest.approx(73 / 3)
    assert recipe["nfe_max"] == 32
