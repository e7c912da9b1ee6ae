"""`flashdit export RUN OUT` as a user runs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from flashdit import FlashDiT, FlashDiTPipeline
from flashdit.commands import export
from flashdit.sampling.checkpoint import load_generator
from flashdit.shared.locks import only_writer

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
            "reference": {"name": f"{tmp_path}/digits"},
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
    for path in (tmp_path / "out").rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path


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
        ("absent", "out", "RUN: absent does not exist"),
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


def test_what_is_replaced_is_said(run_dir, tmp_path, capsys):
    export.main([str(run_dir), str(tmp_path / "out")])
    assert "replaced the earlier" not in capsys.readouterr().out
    shutil.copytree(run_dir, tmp_path / "fish")
    export.main([str(tmp_path / "fish"), str(tmp_path / "out")])
    assert "out: replaced the earlier export (FlashDiT birds, step 7)\n" in capsys.readouterr().out
    assert "# FlashDiT fish\n" in (tmp_path / "out" / "README.md").read_text()


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("index", "other", "message"),
    [
        (
            '{"_class_name": "StableDiffusionPipeline"}',
            None,
            "OUT must be a new folder or an earlier export, got",
        ),
        ("{broken", None, "OUT must be a new folder or an earlier export, got"),
        ("[]", None, "OUT must be a new folder or an earlier export, got"),
        (None, "mine.png", "earlier export alone, which is replaced, {out} holds mine.png too"),
        (None, "transformer/notes.txt", "which is replaced, {out} holds transformer/notes.txt too"),
        (None, "README.md", "which is replaced, {out} was edited since in README.md"),
        (None, ".git", "earlier export alone, which is replaced, {out} holds .git too"),
    ],
)
def test_what_is_no_export_of_ours_alone_is_kept(run_dir, tmp_path, exit_message, index, other, message):
    out = tmp_path / "out"
    export.main([str(run_dir), str(out)])
    if index is not None:
        (out / "model_index.json").write_text(index)
    if other is not None:
        (out / other).write_text("mine")
    before = contents(tmp_path)
    assert message.format(out=out) in exit_message(export, run_dir, out)
    assert contents(tmp_path) == before


def test_weights_of_an_export_that_are_not_as_written_are_refused_by_name(run_dir, tmp_path):
    out = tmp_path / "out"
    export.main([str(run_dir), str(out)])
    (out / "README.md").write_text("mine")
    assert FlashDiT.from_pretrained(out / "transformer").num_classes == 3, "another file of it may be edited"
    weights = next((out / "transformer").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-100] ^= 64
    weights.write_bytes(content)
    said = rf"another transformer/{weights.name}: damaged, or edited \(without checksums\.json"
    for load in (FlashDiTPipeline, DiffusionPipeline):
        with pytest.raises(ValueError, match=said):
            load.from_pretrained(out)
    (out / "checksums.json").write_text("{")
    with pytest.raises(ValueError, match=r"the checksums of an export must be as written, .*json is not: "):
        FlashDiT.from_pretrained(out / "transformer")
    (out / "checksums.json").unlink()
    assert FlashDiT.from_pretrained(out / "transformer").num_classes == 3


def test_a_second_writer_is_told_who_the_first_is(run_dir, tmp_path, exit_message):
    with only_writer(tmp_path / "out", is_file=True):
        message = exit_message(export, run_dir, tmp_path / "out")
    assert f"out must have one writer at a time, it is written by process {os.getpid()} on host" in message
    assert not (tmp_path / "out").exists()
    export.main([str(run_dir), str(tmp_path / "out")])


@pytest.mark.parametrize("is_replaced", [False, True])
def test_an_export_that_is_interrupted_leaves_what_was_there(run_dir, tmp_path, monkeypatch, is_replaced):
    out = tmp_path / "exports" / "out"
    out.parent.mkdir()
    if is_replaced:
        export.main([str(run_dir), str(out)])
    before = contents(out.parent)

    def interrupted(self, folder):
        (folder / "half").write_text("written")
        raise KeyboardInterrupt

    monkeypatch.setattr(FlashDiTPipeline, "_complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.main([str(run_dir), str(out)])
    assert contents(out.parent) == before
    assert [path.name for path in out.parent.iterdir()] == (["out"] if is_replaced else [])


def test_an_export_into_the_working_folder_replaces_it(run_dir, tmp_path, monkeypatch):
    export.main([str(run_dir), str(tmp_path / "out"), "--name", "old"])
    monkeypatch.chdir(tmp_path / "out")
    export.main([str(run_dir), "."])
    assert "# FlashDiT birds\n" in (tmp_path / "out" / "README.md").read_text()


def test_another_sampler_of_the_run_and_damaged_scores_are_said(run_dir, tmp_path, caplog):
    state = run_dir / "checkpoints" / "step_00000007" / "state.json"
    content = json.loads(state.read_text())
    content["sampling"]["sampler"] = {"name": "dopri5", "atol": 1e-3, "rtol": 1e-3}
    state.write_text(json.dumps(content))
    (run_dir / "eval" / "first" / "metrics.json").write_text('{"metrics": ')
    export.main([str(run_dir), str(tmp_path / "out")])
    assert "the run samples by dopri5, its pipeline by Euler steps" in caplog.text
    assert (
        f"scores must be readable as JSON, {run_dir / 'eval/first/metrics.json'} is left out" in caplog.text
    )
    assert "The run samples by dopri5; this pipeline takes" in (tmp_path / "out" / "README.md").read_text()


def test_usage_names_the_command_as_it_is_typed():
    command = [sys.executable, "-m", "flashdit", "export", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("usage: flashdit export [")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(run_dir, tmp_path, no_room, exit_message):
    with no_room():
        said = exit_message(export, run_dir, tmp_path / "out")
    assert "could not be written: Error while serializing: I/O error: File too large" in said
    assert "File too large" in said
    assert [path.name for path in tmp_path.iterdir()] == ["birds"]
