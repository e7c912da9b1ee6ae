"""A small package from outside, with a metric, a data set and an extractor, as a user installs one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
POINTS = """
[flashdit.metrics]
brightness = outside_pieces.metric
[flashdit.extractors]
colours = outside_pieces.extractor
[flashdit.data]
stripes = outside_pieces.data
"""
METRIC = '''
from flashdit.evaluation.metrics.metric import METRICS, Metric, Score, pool_rows


def brightness(samples, reference):
    """Returns the difference of the mean features."""
    return ((pool_rows(samples).mean() - pool_rows(reference).mean()).abs().item(),)


scores = (Score(key="brightness", label="Δ{extractor}", column="delta", counted=True, better="lower"),)
METRICS.add("brightness", Metric(compute=brightness, needs=("pool",), scores=scores))
'''
EXTRACTOR = """
from dataclasses import dataclass

from flashdit.evaluation.features import EXTRACTORS, Extractor


@dataclass(kw_only=True)
class ColoursOptions:
    weights: str | None = None


@EXTRACTORS.register("colours", ColoursOptions)
class Colours(Extractor):
    class_names = ["dark", "light", "other"]

    def __init__(self, options):
        super().__init__()
        self.weights_file = options.weights

    def forward(self, images):
        pool = images.float().mean((2, 3))
        return {"pool": pool, "spatial": None, "logits": pool}
"""
DATA = """
from dataclasses import dataclass
from pathlib import Path

import torch

from flashdit.data.sources import DATASETS, Companions

IMAGES = torch.arange(12 * 3 * 16 * 16).reshape(12, 3, 16, 16).remainder(251).to(torch.uint8)


class Stripes:
    name, count, image_size, labels, sha256 = "stripes", 12, (16, 16), torch.arange(12) % 3, "5" * 64

    def batches(self, batch_size, ids=None):
        yield from (IMAGES if ids is None else IMAGES[ids]).split(batch_size)

    def identity(self):
        return {"kind": "stripes"}

    def recipe(self):
        return {"source": "stripes", "num_images": self.count, "labels": "balanced"}


@dataclass(kw_only=True)
class StripesOptions:
    pass


@DATASETS.register("stripes", StripesOptions)
class StripesData:
    companions = Companions(
        autoencoder=Path("AUTOENCODER"), reference=Stripes, floor=Stripes, extractor="colours", num_images=7
    )
    class_names, mirrors = ["dark", "light", "other"], False

    def __init__(self, options):
        self.labels = Stripes.labels

    def image(self, index):
        return IMAGES[index]
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """The folder that the package lies in, with what an installer leaves beside it."""
    folder = tmp_path_factory.mktemp("outside")
    package, about = folder / "outside_pieces", folder / "outside_pieces-1.0.dist-info"
    package.mkdir()
    about.mkdir()
    autoencoder = ROOT / "flashdit" / "digits" / "assets" / "autoencoder"
    sources = {"__init__": "", "metric": METRIC, "extractor": EXTRACTOR, "data": DATA}
    for name, text in sources.items():
        (package / f"{name}.py").write_text(text.replace("AUTOENCODER", str(autoencoder)))
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-pieces\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    return folder


@pytest.fixture
def call(outside, tmp_path):
    """Runs a command with the package installed; returns what it prints."""

    def run(*words) -> str:
        environment = os.environ | {"PYTHONPATH": f"{outside}{os.pathsep}{ROOT}", "COLUMNS": "300"}
        command = [sys.executable, "-m", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def checkpoint(tiny_checkpoint):
    """The tiny checkpoint as that of a run on the outside data set."""
    state = tiny_checkpoint / "state.json"
    before = state.read_text()
    about = json.loads(before) | {"data_name": "stripes", "class_names": ["dark", "light", "other"]}
    state.write_text(json.dumps(about))
    yield tiny_checkpoint
    state.write_text(before)


def test_its_pieces_stand_in_the_help(call):
    shown = call("flashdit", "eval", "--help")
    assert "brightness" in shown
    assert "colours" in shown


def test_its_metric_stands_in_report_table_and_csv_and_its_data_set_brings_the_rest(
    call, checkpoint, tmp_path
):
    words = ["flashdit", "eval", "--checkpoint", checkpoint, "--device", "cpu", "--steps", 1]
    words += ["--height", 16, "--width", 16, "--output", tmp_path, "--csv", tmp_path / "scores.csv"]
    shown = call(*words)
    assert "Δcolours" in shown
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["extractor"]["name"] == "colours"
    assert content["reference"] == {"name": "stripes", "num_images": 12, "sha256": "5" * 64}
    assert content["num_images"] == 7
    assert list(content["metrics"])[-1] == "brightness_7"
    assert content["floor"]["brightness_12"] == 0
    header, row = (line.split(",") for line in (tmp_path / "scores.csv").read_text().splitlines())
    assert header[-1] == "delta"
    assert float(row[-1]) == content["metrics"]["brightness_7"]


def test_its_metric_is_a_panel_and_a_column_of_a_sweep(call, checkpoint, tmp_path):
    words = ["flashdit", "sweep", "--cfg-scale", "1,2", "--checkpoint", checkpoint]
    words += ["--height", 16, "--width", 16, "--metrics", "brightness,fid", "--steps", 1]
    shown = call(*words, "--device", "cpu", "--output", tmp_path)
    assert "Δcolours" in shown
    content = json.loads((tmp_path / "sweep.json").read_text())
    values = {point["metrics"]["brightness"]: point["cfg_scale"] for point in content["points"]}
    assert content["best"]["brightness"] == values[min(values)], "lower is better"


def test_a_run_on_its_data_set_is_encoded_scored_and_drawn(call, tmp_path):
    words = ["data.name=stripes", "latents.vae=stripes", "model.sample_size=8", "model.num_classes=3"]
    words += ["model.hidden_size=8", "model.depth=1", "training.steps=2", "training.global_batch_size=4"]
    words += ["training.log_every=1", "training.save_every=2", "training.preview_every=0", "sampling.steps=1"]
    words += ["evaluation.every=1", "evaluation.num_images=8", "evaluation.metrics=[brightness]"]
    call("flashdit", "train", *words, f"run.dir={tmp_path / 'run'}")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["scores"] for record in records] == [["brightness_8"]] * 2
    assert all("brightness_8" in record for record in records)
    call("flashdit", "plot", tmp_path / "run", "--metric", "brightness_8", "--output", tmp_path / "c.svg")
    assert "brightness" in (tmp_path / "c.svg").read_text()


def test_its_extractor_takes_a_weights_file(outside):
    code = "from flashdit.evaluation.features import build_extractor as build; e = build('colours', 'w.pt'); "
    code += "print(e.name, e.weights_file, e.pool_dimensions, e.spatial_dimensions, e.training)"
    environment = os.environ | {"PYTHONPATH": f"{outside}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["colours", "w.pt", "3", "0", "False"], done.stderr


def test_a_table_without_its_column_is_refused_and_kept(call, outside, tmp_path):
    np.savez(tmp_path / "s.npz", np.zeros((8, 16, 16, 3), np.uint8))
    words = ["flashdit", "eval", "--samples", tmp_path / "s.npz", "--reference", "stripes"]
    words += ["--output", tmp_path, "--csv", tmp_path / "old.csv", "--device", "cpu"]
    call(*words, "--metrics", "fid")
    before = (tmp_path / "old.csv").read_text()
    with pytest.raises(AssertionError, match=r"--csv must be a new file or .*old\.csv has none for delta"):
        call(*words, "--metrics", "brightness")
    assert (tmp_path / "old.csv").read_text() == before
