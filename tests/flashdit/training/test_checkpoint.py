"""Whether a checkpoint is what was written: bits that flipped, files that are gone, none to compare with."""

import json
import logging

import pytest
from safetensors.torch import load_file

from flashdit import config
from flashdit.sampling.checkpoint import load_generator
from flashdit.shared.runs import list_checkpoints
from flashdit.trainer import Trainer

WEIGHTS = "ema/diffusion_pytorch_model.safetensors"
KEPT = {
    *(f"{name}/{file}" for name in ("ema", "model") for file in ("config.json", WEIGHTS.partition("/")[2])),
    *("latents.safetensors", "optimizer.pt", "processes.pt"),
}


@pytest.fixture
def newest(tiny_overrides, tmp_path):
    """Returns the newest of the two checkpoints of a run of 4 steps."""
    Trainer(config.load(None, [*tiny_overrides, "training.steps=4"])).fit()
    return list_checkpoints(tmp_path / "run")[-1]


def flip_a_bit(path):
    """Changes one bit in the middle of a file's last tenth, where tensors lie."""
    content = bytearray(path.read_bytes())
    content[-len(content) // 20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", sorted(KEPT))
def test_a_bit_that_flipped_is_named_and_the_run_goes_on_from_the_checkpoint_before(
    newest, tiny_overrides, caplog, file
):
    assert json.loads((newest / "state.json").read_text())["crc32"].keys() == KEPT
    flip_a_bit(newest / file)
    if file == WEIGHTS:
        assert load_file(newest / file), "it reads as if nothing had happened"
    run = Trainer(config.load(None, tiny_overrides))
    assert run.step == 2
    (named,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "is damaged" in named
    assert named.endswith("; the run goes on from step_00000002")


@pytest.mark.parametrize("file", ["state.json", WEIGHTS, "ema/config.json", "processes.pt"])
def test_a_file_that_is_gone_is_named_and_the_run_goes_on_from_the_checkpoint_before(
    newest, tiny_overrides, caplog, file
):
    (newest / file).unlink()
    run = Trainer(config.load(None, tiny_overrides))
    assert run.step == 2
    assert f"{newest} is damaged: it has no {file}; the run goes on from step_00000002" in caplog.text
    run.fit()
    assert (newest.parent / f"damaged_{newest.name}").is_dir()


def test_a_checkpoint_of_before_checksums_is_gone_on_from(newest, tiny_overrides):
    state = json.loads((newest / "state.json").read_text())
    del state["crc32"]
    (newest / "state.json").write_text(json.dumps(state))
    flip_a_bit(newest / "ema" / "config.json")
    assert Trainer(config.load(None, tiny_overrides)).step == 4


def test_nothing_is_sampled_from_damaged_weights(newest):
    again = r": give an earlier one by its folder, or train on from the newest whole one"
    (newest / "model" / "config.json").unlink()
    with pytest.raises(ValueError, match=rf"step_00000004 is damaged: it has no model/config\.json{again}"):
        load_generator(newest, weights="model")
    flip_a_bit(newest / WEIGHTS)
    with pytest.raises(ValueError, match=rf"ema/diff.* is damaged: its checksum is not the one.*{again}"):
        load_generator(newest.parents[1])


def test_missing_parts_of_a_checkpoint_without_checksums_are_named(newest):
    (newest / "ema" / "config.json").unlink()
    state = json.loads((newest / "state.json").read_text())
    del state["crc32"]
    (newest / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"step_00000004 is damaged: it has no ema/config\.json: give an"):
        load_generator(newest)
