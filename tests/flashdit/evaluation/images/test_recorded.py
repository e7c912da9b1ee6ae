"""Is a folder of `flashdit sample` scored as its samples, in whichever format it was written?"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flashdit.evaluation.images.sources import open_source
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.classes import choose_labels
from flashdit.sampling.folder import SampleFolder
from flashdit.sampling.recipe import make_recipe
from flashdit.shared.pictures import save_png


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory):
    """Returns the same six samples of two classes in the three formats, by format."""
    generator = load_generator(tiny_checkpoint)
    labels = choose_labels(generator.class_names, ["hen", "cat"], 6, "random", seed=2)
    made = {}
    for form in ("png", "npz", "both"):
        path = tmp_path_factory.mktemp("samples") / form
        path.mkdir()
        recipe = make_recipe(generator, labels, generator.sampling, order="random", form=form)
        folder = SampleFolder(path, recipe, labels, generator.class_names)
        folder.open()
        for batch in generator.generate(labels, generator.sampling):
            folder.add(batch)
        folder.finish()
        made[form] = path
    return made


def copy_of(folders, form, tmp_path):
    return shutil.copytree(folders[form], tmp_path / form)


def test_every_format_gives_the_same_images_labels_and_names(folders, tmp_path):
    Image.new("RGB", (9, 9)).save(copy_of(folders, "png", tmp_path) / "000006.png")  # beside the samples
    sources = [open_source(path) for path in (tmp_path / "png", folders["npz"], folders["both"])]
    images = [torch.cat(list(source.batches(4))) for source in sources]
    expected = torch.from_numpy(np.load(folders["npz"] / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    for source, found in zip(sources, images, strict=True):
        assert torch.equal(found, expected)
        assert source.labels.tolist() == np.load(folders["npz"] / "samples.npz")["arr_1"].tolist()
        assert source.class_names == {0: "cat", 2: "hen"}
        assert source.recipe()["recipe"]["sampling"]["steps"] == 3
    assert open_source(folders["png"], limit=4).labels.tolist() == sources[0].labels[:4].tolist()


def test_a_folder_made_before_with_both_is_read_from_its_npz():
    source = open_source(Path(__file__).parents[3] / "made_before" / "samples")
    assert source.labels.tolist() == [7, 7, 3, 3]
    assert source.class_names is None  # its recipe did not name them yet


@pytest.mark.parametrize(
    ("form", "gone", "message"),
    [
        ("png", "000003.png", r"must be complete, .*png lacks 000003\.png: the same `flashdit sample`"),
        ("npz", "samples.npz", r"must be complete, .*npz lacks samples\.npz"),
        ("both", "samples.npz", r"must be complete, .*both lacks samples\.npz"),
    ],
)
def test_a_folder_that_lacks_a_sample_is_refused(folders, tmp_path, form, gone, message):
    folder = copy_of(folders, form, tmp_path)
    (folder / gone).unlink()
    with pytest.raises(ValueError, match=message):
        open_source(folder)


def test_a_sample_without_a_byte_counts_as_missing(folders, tmp_path):
    folder = copy_of(folders, "png", tmp_path)
    for name in ("000002.png", "000004.png"):  # a full disk leaves such files
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"lacks 000002\.png and 1 more: the same `flashdit sample`"):
        open_source(folder)


def test_a_folder_that_is_not_finished_is_refused(folders, tmp_path):
    folder = copy_of(folders, "png", tmp_path)
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(recipe | {"finished": False}))
    with pytest.raises(ValueError, match=r"must be finished, .*png is not"):
        open_source(folder)
    others = [recipe | {"num_images": "3"}, recipe | {"classes": 7}, recipe | {"class_names": ["one"] * 9}]
    for text in map(json.dumps, others):
        (folder / "recipe.json").write_text(text)
        with pytest.raises(ValueError, match=r"recipe\.json must be as `flashdit sample` wrote it: "):
            open_source(folder)
    for damaged in ("[]", "{}", None):
        (folder / "recipe.json").write_text(damaged) if damaged else (folder / "recipe.json").unlink()
        with pytest.raises(ValueError, match=r"must have the recipe\.json that `flashdit sample` wrote"):
            open_source(folder)
    (folder / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"recipe\.json must be as `flashdit sample` wrote it"):
        open_source(folder)


def test_arrays_of_other_samples_are_refused(folders, tmp_path):
    folder = copy_of(folders, "both", tmp_path)
    np.savez(folder / "samples.npz", np.zeros((5, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"must have the 6 samples of its recipe\.json, got 5"):
        open_source(folder)


def test_pictures_that_tell_no_class_have_no_labels_and_that_is_said(folders, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = copy_of(folders, "png", tmp_path)
    with Image.open(folder / "000000.png") as picture:
        picture.save(folder / "000000.png")  # without its text
    assert open_source(folder).labels is None
    assert "6 samples of `flashdit sample`; the pictures do not tell their classes apart" in caplog.text


def test_pictures_whose_classes_are_not_the_recipes_have_no_labels(folders, tmp_path):
    folder = copy_of(folders, "png", tmp_path)
    labels = open_source(folder).labels.tolist()
    hen, cat = (folder / f"{labels.index(label):06d}.png" for label in (2, 0))
    for file, other in ((hen, "cat"), (cat, "hen")):
        with Image.open(file) as picture:
            save_png(torch.from_numpy(np.array(picture)).permute(2, 0, 1), file, {"class": other})
    assert open_source(folder).labels is None


def test_an_npz_among_other_pictures_is_read_and_that_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    np.savez(tmp_path / "samples.npz", np.zeros((5, 8, 8, 3), np.uint8))
    assert open_source(tmp_path).count == 5
    assert "samples.npz is read, and no picture beside it" in caplog.text


def test_a_run_and_what_holds_folders_of_samples_are_refused_by_name(folders, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    previews = tmp_path / "run" / "samples"
    previews.mkdir()
    Image.new("RGB", (90, 60)).save(previews / "step_00000001.png")
    with pytest.raises(ValueError, match=r"got the run .*run: give --checkpoint"):
        open_source(tmp_path / "run")
    with pytest.raises(ValueError, match="holds previews of training and no samples"):
        open_source(previews)
    copy_of(folders, "png", previews)
    with pytest.raises(ValueError, match="holds folders of samples, give one of them: png"):
        open_source(previews)
    assert open_source(previews / "png").count == 6
