"""Does the page's road from a folder of pictures to scores run as it is written?"""

import json
from pathlib import Path

import numpy as np
import pytest
from pages import fenced, run_command
from PIL import Image

PAGE = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
SECTION = PAGE.partition("## Scoring your own pictures")[2].partition("\n## ")[0]
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
SHORT = {
    "iwin classify": [
        *("training.steps=4", "optimizer.decay_steps=4", "optimizer.warmup_steps=1"),
        *("training.global_batch_size=12", "augmentation.rand_augment=null", "training.preview_every=0"),
        *("model.embed_dim=8", "model.depths=[1,1]", "model.num_heads=[1,2]"),
    ],
    "flashdit eval --checkpoint": ["--steps", "2"],
}


def run(line):
    """Runs a command of the page, with less work."""
    line = line.removeprefix("PYTHONPATH=. ")
    run_command(line.replace(" 500", " 12") if line.startswith(tuple(SHORT)) else line, SHORT)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Makes PICTURES in an empty working directory: eight of each of three classes, of several sizes."""
    draws = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for number in range(8):
            pixels = np.array(colour) * 0.8 + draws.normal(25, 9, (30 + number, 36, 3))
            path = tmp_path / "PICTURES" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("sys.argv", ["test"])


def test_the_section_runs_as_it_is_written(pictures, capsys):
    halves, judge = fenced(SECTION, "python")
    exec(compile(halves, "evaluation.md", "exec"), {})
    Path("judges.py").write_text(judge)
    run(
        "flashdit train --config pixels_64 data.path=PICTURES data.image_size=32 run.dir=runs/mine "
        "model.hidden_size=12 model.depth=1 training.steps=2 optimizer.warmup_steps=0 training.workers=0 "
        "training.global_batch_size=4 training.preview_every=0 training.save_every=2"
    )
    for block in fenced(SECTION, "sh"):
        for line in block.splitlines():
            run(line)
    floor, mine = (
        json.loads(Path("runs", name).read_text())
        for name in ("floor/metrics.json", "mine/eval/metrics.json")
    )
    assert floor["samples"]["cropped_to"] == 32
    assert floor["num_images"] == mine["num_images"] == 12
    for result in (floor, mine):
        assert result["extractor"]["name"] == "classifier"
        assert 0 <= result["metrics"]["accuracy"] <= 1
        assert result["image_size"] == [32, 32]
        assert result["reference"]["num_images"] == 12
    assert "real image" in Path("runs/mine/eval/metrics.html").read_text()
    assert "no Fréchet distance by class" not in Path("runs/mine/eval/metrics.html").read_text()
    assert "FD[brightness]" in Path("half_1.metrics.md").read_text()
    assert "all of them are comparable" in capsys.readouterr().out
