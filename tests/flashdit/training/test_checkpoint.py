"""Whether a checkpoint is what was written: bits that flipped, files that are gone, none to compare with."""

import json
import logging

import pytest
from safetensors.torch import load_file

from flashdit import config
from flashdit.sampling.checkpoint import load_generator
from flashdit.shared.files import OWN_CHECKSUM, read_checked_json, write_json
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


@pytest.mark.parametrize(
    ("written", "flipped"),
    [('"images_seen": 32', '"images_seen": 33'), ('"crc32"', '"crc33"'), ('"step": 4', '"step": "4"')],
)
def test_a_changed_state_is_named_and_may_be_taken_without_its_checksum(
    newest, tiny_overrides, caplog, written, flipped
):
    path = newest / "state.json"
    assert path.read_text().count(written) == 1
    path.write_text(path.read_text().replace(written, flipped))
    assert Trainer(config.load(None, tiny_overrides)).step == 2
    assert "state.json is damaged: its checksum is not the one that it was written with" in caplog.text
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        load_generator(newest)
    if written != '"step": 4':
        state = json.loads(path.read_text())
        del state[OWN_CHECKSUM]
        path.write_text(json.dumps(state))
        assert Trainer(config.load(None, tiny_overrides)).step == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": "20"}, "step must be a whole number, 0 or more, got '20'"),
        ({"step": True}, "step must be a whole number"),
        ({"crc32": None}, "crc32 must be checksums by name, got None"),
        ({"crc32": ["ema"]}, "crc32 must be checksums by name"),
        ({"images_seen": -5}, "it has no whole number, 0 or more, as images_seen"),
        ({"ema_updates": 1.5}, "it has no whole number, 0 or more, as ema_updates"),
    ],
)
def test_a_state_of_other_values_is_damaged(newest, tiny_overrides, caplog, change, reason):
    path = newest / "state.json"
    write_json(path, read_checked_json(path) | change)
    assert Trainer(config.load(None, tiny_overrides)).step == 2
    assert f"state.json is damaged: {reason}" in caplog.text


def test_a_checkpoint_of_before_checksums_is_gone_on_from(newest, tiny_overrides):
    state = read_checked_json(newest / "state.json")
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
    state = read_checked_json(newest / "state.json")
    del state["crc32"]
    (newest / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"step_00000004 is damaged: it has no ema/config\.json: give an"):
        load_generator(newest)
