"""`flashdit export RUN OUT` as a user runs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from flashdit import FlashDiTPipeline
from flashdit.commands import export
from flashdit.sampling.checkpoint import load_generator

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run_dir(tiny_checkpoint, tmp_path):
    """Returns a run with scores of its weights, and newer ones of others."""
    shutil.copytree(tiny_checkpoint.parents[1], tmp_path / "birds")
    weights = load_generator(tiny_checkpoint).recipe()["weights_sha256"]
    for age, (name, of) in enumerate({"first": weights, "old": weights, "new": "0" * 64}.items()):
        path = tmp_path / "birds" / "eval" / name / "metrics.json"
        path.parent.mkdir(parents=True)
        content = {
            "metrics": {"fd_1000": abs(age - 1) + 0.5, "recall": None},
            "labels": {"fd_1000": "FD[digits]"},
            "num_images": 1000,
            "reference": {"name": "digits"},
            "samples": {"weights_sha256": of, "sampling": {"sampler": "heun", "steps": 9, "cfg_scale": 2.0}},
        }
        path.write_text(json.dumps(content))
        os.utime(path, (age, age))
    return tmp_path / "birds"


def test_a_run_becomes_a_pipeline_that_loads_in_a_fresh_process(run_dir, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "flashdit", "export", run_dir, tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(str(tmp_path / "out"))
    pipe = FlashDiTPipeline.from_pretrained(tmp_path / "out")
    assert pipe.class_names == ["cat", "golden retriever", "hen"]
    native = load_generator(run_dir)
    assert pipe.config["latents_multiplier"] == native.space.options.multiplier
    assert torch.tensor(pipe.config["latents_std"]).equal(native.space.std.flatten())


def test_the_card_tells_use_scores_and_provenance(run_dir, tmp_path):
    export.main([str(run_dir), str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "# FlashDiT birds\n" in card
    assert "3 classes: cat, golden retriever, hen." in card
    assert "'cat', guidance_scale=1.5, guidance_interval=(0.0, 1.0), num_inference_steps=3" in card
    assert "| FD[digits] | 0.5 |" in card, "scores of other weights are not told"
    assert "1000 images against digits; heun 9, guidance 2." in card
    assert load_generator(run_dir).recipe()["weights_sha256"] in card
    assert str(tmp_path) not in card
    assert str(tmp_path) not in (tmp_path / "out" / "model_index.json").read_text()


def test_the_hub_reads_the_scores_from_the_front_matter(run_dir, tmp_path):
    export.main([str(run_dir), str(tmp_path / "out")])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
    assert card.data.tags == ["flashdit", "class-conditional", "flow-matching", "iwin-attention"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("fd", 0.5)
    assert result.metric_name == "FD[digits], 1,000 images"
    assert (result.task_type, result.dataset_name) == ("unconditional-image-generation", "digits")
    assert card.data.model_name == "FlashDiT birds"


def test_an_earlier_export_is_replaced_and_raw_weights_are_on_offer(run_dir, tmp_path):
    for weights in ("ema", "model"):
        export.main([str(run_dir), str(tmp_path / "out"), "--ema", weights, "--name", "Birds"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Birds\n" in card
    assert "- weights: model" in card
    assert "## Scores" not in card


@pytest.mark.parametrize(
    ("run", "out", "message"),
    [
        ("absent", "out", "checkpoint must be a run or a folder step_XXXXXXXX"),
        ("birds", "kept", "OUT must be a new folder or an earlier export, got kept"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    run, out, message, run_dir, tmp_path, monkeypatch, exit_message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export.py"])
    (tmp_path / "kept").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert message in exit_message(export, run, out)
    assert sorted(tmp_path.rglob("*")) == before
