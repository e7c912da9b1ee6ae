"""What commands may write over: files of their own kind, and never into the images of a run."""

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from flashdit.commands import evaluate, export, plot, posthoc, sample, sweep
from flashdit.shared.locks import only_writer
from iwin_tasks.commands import reach, visualise

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
WRITERS = {
    "eval": ("out.json", evaluate, ["--samples", "{npz}", "--reference", "{npz}", "--extractor", "digits"]),
    "compare": ("out.md", evaluate, ["compare", "{made}/run/eval/cfg_1.0/metrics.json"]),
    "make-reference": ("out.npz", evaluate, ["make-reference", "{npz}", "{out}", "--extractor", "digits"]),
    "plot png": ("out.png", plot, ["{made}/run"]),
    "plot svg": ("out.svg", plot, ["{made}/run"]),
    "plot pdf": ("out.pdf", plot, ["{made}/run"]),
    "write-reference": ("out.json", plot, ["{made}/run", "--write-reference", "{out}"]),
    "reach": ("out.png", reach, ["--size", "8", "--window", "4", "--blocks", "1"]),
    "visualise": ("out.png", visualise, ["--model", "resnet10t", "--layer", "layer1", "--size", "32", "32"]),
}


@pytest.fixture
def written(tmp_path, request):
    """Returns a function that runs a command of `WRITERS` and returns the file that it is asked to write."""
    np.savez(tmp_path / "images.npz", IMAGES)
    places = {
        "made": str(request.config.rootpath / "tests" / "made_before"),
        "npz": str(tmp_path / "images.npz"),
    }

    def run(name):
        file, command, words = WRITERS[name]
        out = tmp_path / file
        argv = [word.format(out=out, **places) for word in words]
        if not any("{out}" in word for word in words):
            argv += ["--output", str(out)]
        if name == "eval":
            argv += ["--metrics", "fid", "--no-cache"]
        command.main(argv)
        return out

    return run


def foreign(path, kind):
    """Writes what a mistyped path may name, and returns its bytes."""
    if kind == "photograph":
        Image.fromarray(IMAGES[0]).save(path, format="png")
    else:
        path.write_text("# flashdit train --config this\ntraining: {steps: 100}\nmetrics: [fid]\n")
    return path.read_bytes()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["photograph", "configuration"])
def test_a_file_of_another_kind_is_never_replaced(written, tmp_path, name, kind):
    path = tmp_path / WRITERS[name][0]
    content = foreign(path, kind)
    with pytest.raises(ValueError, match=r"must be a new file or an earlier one of the same kind, .*out\."):
        written(name)
    assert path.read_bytes() == content
    assert not list(tmp_path.glob(".*")), "no lock is left"


@pytest.mark.parametrize("name", WRITERS)
def test_a_commands_own_file_is_replaced_and_has_one_writer(written, tmp_path, name):
    path = written(name)
    path.write_bytes(path.read_bytes() + b"\nx")
    written(name)
    assert not path.read_bytes().endswith(b"\nx")
    with (
        only_writer(path, is_file=True),
        pytest.raises(ValueError, match=r"out.* must have one writer at a time"),
    ):
        written(name)


def test_the_table_and_the_page_beside_a_result_are_not_replaced_where_they_are_others(written, tmp_path):
    content = foreign(tmp_path / "out.md", "configuration")
    with pytest.raises(ValueError, match=r"--output must be a new file .*out\.md"):
        written("eval")
    assert (tmp_path / "out.md").read_bytes() == content
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("name", ["eval", "plot png", "compare", "make-reference", "visualise"])
def test_a_place_where_nothing_can_be_written_is_named_with_its_option(written, tmp_path, monkeypatch, name):
    monkeypatch.setitem(WRITERS, name, (f"/proc/nowhere/{WRITERS[name][0]}", *WRITERS[name][1:]))
    option = r"OUT\.npz" if name == "make-reference" else "--output"
    with pytest.raises(ValueError, match=rf"^{option} must be where files can be written, got /proc/nowhere"):
        written(name)


@pytest.fixture
def own_run(tiny_checkpoint, tmp_path):
    """Returns a run that was trained on the folder `pictures`, whose one class is `cat`."""
    run = tmp_path / "run"
    shutil.copytree(tiny_checkpoint.parents[1], run)
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    data = {"name": "images", "path": str(tmp_path / "pictures")}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    record = {"step": 1, "images_seen": 8, "loss": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return run


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (sample, ["--checkpoint", "{run}", "--output", "{new}"]),
        (export, ["{run}", "{new}"]),
        (sweep, ["--checkpoint", "{run}", "--output", "{new}", "--cfg-scale", "1"]),
        (evaluate, ["--checkpoint", "{run}", "--output", "{new}", "--reference", "digits"]),
        (evaluate, ["make-reference", "{pictures}", "{new}/reference.npz"]),
        (plot, ["{run}", "--output", "{new}.png"]),
        (visualise, ["--model", "resnet10t", "--layer", "layer1", "--images", "{pictures}", "--output"]),
    ],
)
def test_nothing_is_written_into_the_images_of_a_run(own_run, tmp_path, command, words):
    pictures = tmp_path / "pictures"
    argv = [word.format(run=own_run, new=pictures / "new", pictures=pictures) for word in words]
    argv += [str(pictures / "cat" / "new.png")] if command is visualise else []
    with pytest.raises(
        ValueError, match=r"(--output|OUT|OUT\.npz) must not lie in the images of .*, got .*new"
    ):
        command.main(argv)
    assert [path.name for path in pictures.rglob("*")] == ["cat"]


def test_an_average_replaces_an_earlier_one_and_no_other_folder(tmp_path, tiny_overrides):
    from flashdit import config
    from flashdit.trainer import Trainer

    run, out = tmp_path / "run", tmp_path / "out"
    tracked = ["ema.power_widths=[0.05,0.1]", "ema.snapshot_every=2", "training.steps=4"]
    Trainer(config.load(None, [*tiny_overrides, *tracked])).fit()
    (out / "ema_0.080").mkdir(parents=True)
    (out / "ema_0.080" / "photograph.png").write_bytes(b"mine")
    argv = [str(run), "--width", "0.08", "--output", str(out)]
    with pytest.raises(
        ValueError, match=r"in which ema_0\.080 is new or an earlier average, .* is something"
    ):
        posthoc.main(argv)
    assert (out / "ema_0.080" / "photograph.png").read_bytes() == b"mine"
    (out / "ema_0.080" / "photograph.png").unlink()
    (out / "ema_0.080").rmdir()
    posthoc.main(argv)
    (out / "ema_0.080" / "config.json").unlink()
    posthoc.main(argv)
    assert (out / "ema_0.080" / "config.json").is_file()


def test_a_sweep_replaces_its_own_pictures_alone(tiny_checkpoint, tmp_path):
    np.savez(tmp_path / "images.npz", IMAGES)
    out = tmp_path / "out"
    argv = ["--checkpoint", str(tiny_checkpoint), "--reference", str(tmp_path / "images.npz")]
    argv += ["--extractor", "digits", "--metrics", "fid", "--num-images", "4", "--no-cache"]
    argv += ["--cfg-scale", "1", "--output", str(out)]
    out.mkdir()
    content = foreign(out / "sweep.png", "photograph")
    with pytest.raises(ValueError, match=r"--output must be a new file .*sweep\.png"):
        sweep.main(argv)
    assert (out / "sweep.png").read_bytes() == content
    (out / "sweep.png").unlink()
    sweep.main(argv)
    foreign(out / "sweep.png", "photograph")  # beside a sweep.json it is the plot of an earlier version
    with only_writer(out), pytest.raises(ValueError, match="out must have one writer at a time"):
        sweep.main(argv)
    sweep.main(argv)
    assert b"drawn by flashdit" in (out / "sweep.png").read_bytes()
