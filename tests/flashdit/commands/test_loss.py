import re

import pytest

from flashdit import config
from flashdit.commands import evaluate
from flashdit.sampling.checkpoint import load_generator
from flashdit.trainer import Trainer

GLYPHS = [
    *("data.name=glyphs", "data.image_size=32", "latents.space=pixels", "model.patch_size=8"),
    *("model.sample_size=null", "model.in_channels=null", "model.num_classes=null"),
    *("model.hidden_size=16", "model.depth=1", "training.steps=3", "training.global_batch_size=4"),
    *("training.preview_every=0", "flow.times={name: uniform}", "flow.loss.cosine_weight=0"),
]


@pytest.fixture
def run(tmp_path):
    Trainer(config.load("glyphs", [f"run.dir={tmp_path / 'run'}", *GLYPHS])).fit()
    return tmp_path / "run"


def printed(capsys):
    return {
        name: float(value) for name, value in re.findall(r"^(\w+): ([\d.]+)", capsys.readouterr().out, re.M)
    }


def test_the_loss_on_a_split_is_printed_for_a_run(run, capsys):
    words = ["loss", "--checkpoint", str(run), "--num-images", "52"]
    evaluate.main(words)
    own = printed(capsys)
    assert own["loss"] == own["mse"]
    evaluate.main([*words, "--data", "{name: glyphs, image_size: 32, split: families}"])
    families = printed(capsys)
    assert families["loss"] != own["loss"]
    evaluate.main([*words, "--data", "{name: glyphs, image_size: 32}", "--batch-size", "7"])
    assert printed(capsys) == own, "without --data it is the data that the run was trained on"
    # A new model predicts hardly anything: v is then (0 − x_t) / (1 − t), which is far from the velocity.
    assert 0.5 < own["loss"] < 20
    assert load_generator(run).step == 3


def test_what_does_not_fit_the_run_is_named(run, exit_message):
    def message(*words):
        return exit_message(evaluate, "loss", "--checkpoint", str(run), *words)

    assert "--num-images must be at least 1, got 0" in message("--num-images", "0")
    assert "the data's latents must be what the model takes" in message("--data", "glyphs")
    assert "unknown data 'glyph'; did you mean 'glyphs'?" in message("--data", "glyph")
