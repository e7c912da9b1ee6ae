"""A folder of samples: what it knows to be there, how it is mended, who may write it."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.options import SamplingOptions
from flashdit.sampling.run import fill, open_folder
from flashdit.shared.locks import only_writer

LABELS = torch.tensor([0, 1, 2, 0, 1])
OPTIONS = SamplingOptions(steps=1, batch_size=2)
ALONE = SimpleNamespace(
    process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None
)


@pytest.fixture(scope="module")
def generator(tiny_checkpoint):
    return load_generator(tiny_checkpoint)


def fill_folder(generator, path, form="both"):
    folder = open_folder(generator, LABELS, OPTIONS, path, form=form)
    fill(folder, generator, OPTIONS, ALONE)
    return folder


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize(
    ("form", "lost"),
    [
        ("both", ["000003.png"]),
        ("both", ["samples.npz"]),
        ("both", ["samples.npz", "000000.png", "grid.png"]),
        ("both", ["grid.png"]),
        ("png", ["000001.png", "000002.png"]),
        ("png", ["grid.png"]),
        ("npz", ["samples.npz"]),
        ("npz", ["grid.png"]),
    ],
)
def test_what_is_deleted_from_finished_samples_is_made_again(generator, tmp_path, form, lost):
    whole = files(fill_folder(generator, tmp_path / "out", form).path)
    for name in lost:
        (tmp_path / "out" / name).unlink()
    fill_folder(generator, tmp_path / "out", form)
    assert files(tmp_path / "out") == whole


def test_an_emptied_picture_is_made_again_and_no_other(generator, tmp_path):
    folder = fill_folder(generator, tmp_path / "out")
    whole = files(tmp_path / "out")
    (tmp_path / "out" / "000003.png").write_bytes(b"")
    assert folder.missing().tolist() == [3]
    kept = (tmp_path / "out" / "000002.png").stat().st_mtime_ns
    fill_folder(generator, tmp_path / "out")
    assert files(tmp_path / "out") == whole
    assert (tmp_path / "out" / "000002.png").stat().st_mtime_ns == kept


def test_no_pixels_are_read_to_learn_what_is_there(generator, tmp_path, monkeypatch):
    folder = open_folder(generator, LABELS, OPTIONS, tmp_path / "out")
    folder.open()
    for batch in generator.generate(LABELS, OPTIONS, torch.tensor([1, 4])):
        folder.add(batch)
    read = []
    real = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(
        np.lib.npyio.NpzFile, "__getitem__", lambda self, key: (read.append(key), real(self, key))[1]
    )
    assert folder.missing().tolist() == [0, 2, 3]
    assert set(read) == {"ids"}


def test_a_damaged_part_is_named_and_its_samples_are_missing(generator, tmp_path, caplog):
    folder = open_folder(generator, LABELS, OPTIONS, tmp_path / "out")
    folder.open()
    for batch in generator.generate(LABELS, OPTIONS, torch.arange(4)):
        folder.add(batch)
    (tmp_path / "out/.parts/00000002.npz").write_bytes(b"half")
    assert folder.missing().tolist() == [2, 3, 4]
    assert "00000002.npz is damaged and its samples are made again" in caplog.text


def test_a_second_writer_is_refused(generator, tmp_path):
    with (
        only_writer(tmp_path / "out"),
        pytest.raises(ValueError, match=r"out must have one writer at a time"),
    ):
        fill_folder(generator, tmp_path / "out")
    fill_folder(generator, tmp_path / "out")


def test_the_recipe_names_the_classes_and_older_recipes_without_names_are_the_same(generator, tmp_path):
    folder = fill_folder(generator, tmp_path / "out")
    recipe = folder.read_recipe()
    assert recipe["class_names"] == ["cat", "golden retriever", "hen"]
    del recipe["class_names"]
    (tmp_path / "out" / "recipe.json").write_text(json.dumps(recipe))
    before = files(tmp_path / "out")
    fill_folder(generator, tmp_path / "out")
    assert files(tmp_path / "out") == before
    assert re.fullmatch(
        r"cfg_1.5_seed_0_\w{8}", open_folder(generator, LABELS, SamplingOptions(cfg_scale=1.5)).path.name
    )
