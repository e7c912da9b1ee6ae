"""Does the road of docs/own_pictures.md run as it is written, on pictures that are hard to read?"""

import json
from pathlib import Path

import pytest
from hard_pictures import make_hard_pictures
from pages import fenced, run_command

PAGE = (Path(__file__).parents[1] / "docs" / "own_pictures.md").read_text()
LOOP = [f"training.{option}" for option in ("steps=2", "global_batch_size=4", "workers=0", "save_every=2")]
LOOP += ["training.preview_every=2", "optimizer.warmup_steps=0", "optimizer.decay_steps=null"]
MODEL = ["model.hidden_size=12", "model.depth=1", "model.num_heads=1"]
CLASSIFIER = ["model.embed_dim=8", "model.depths=[1,1]", "model.num_heads=[1,2]"]
SHORT = {
    "flashdit train": [*LOOP, *MODEL, "sampling.steps=2"],
    "flashdit autoencoder": [*LOOP, "autoencoder.width=8"],
    "flashdit sample": ["--num-images", "3", "--steps", "2"],
    "iwin classify": [*LOOP, *CLASSIFIER],
    "flashdit eval": ["--steps", "2"],
}


def run(line):
    """Runs a command of the page, with less work."""
    run_command(line, SHORT)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test"])
    return make_hard_pictures(tmp_path / "PICTURES")


def test_the_road_runs_as_it_is_written(pictures, capsys, caplog):
    looks, trains, autoencoder, scores = fenced(PAGE, "sh")
    of_the_look, of_the_training = fenced(PAGE, "text")
    run(looks.strip())
    printed = capsys.readouterr().out
    assert all(line in printed.splitlines() for line in of_the_look.splitlines())
    with caplog.at_level("INFO"):
        for line in trains.splitlines():
            run(line)
    assert of_the_training.strip() in [
        record.message.replace(str(pictures), "PICTURES") for record in caplog.records
    ]
    assert list(Path("runs/my/samples").glob("*.png"))
    for line in autoencoder.splitlines():
        run(line)
    assert "psnr" in Path("runs/autoencoder/metrics.jsonl").read_text()
    (pictures / "formes" / "broken.png").unlink()  # which scoring refuses
    for line in scores.splitlines():
        run(line)
    result = json.loads(Path("runs/my/eval/metrics.json").read_text())
    assert (result["num_images"], result["extractor"]["name"]) == (12, "classifier")
    assert result["metrics"]["fd_12"] > 0
