"""Reading a checkpoint beside a training that removes it."""

import hashlib
import shutil

import pytest

from flashdit.sampling import checkpoint
from flashdit.sampling.checkpoint import load_generator
from flashdit.shared.files import discard

READERS = ["check_weights", "read_state", "load_model", "hash_weights"]


@pytest.fixture
def run_dir(tiny_checkpoint, tmp_path):
    """Returns a run of one checkpoint, whose step is 1."""
    shutil.copytree(tiny_checkpoint, tmp_path / "run" / "checkpoints" / "step_00000001")
    return tmp_path / "run"


def prune_before(reader, run_dir, monkeypatch):
    """Has the next checkpoint take the place of the first, as training does, when a part of it is read."""
    first = run_dir / "checkpoints" / "step_00000001"
    real = getattr(checkpoint, reader)

    def read(*arguments):
        if first.exists():
            shutil.copytree(first, first.with_name("step_00000002"))
            discard(first)
        return real(*arguments)

    monkeypatch.setattr(checkpoint, reader, read)


@pytest.mark.parametrize("reader", READERS)
def test_of_a_run_the_next_checkpoint_is_read_where_one_was_removed(reader, run_dir, monkeypatch, caplog):
    prune_before(reader, run_dir, monkeypatch)
    generator = load_generator(run_dir)
    assert generator.checkpoint.name == "step_00000002"
    assert caplog.messages == [
        f"{run_dir}/checkpoints/step_00000001 was removed while it was read, as training.keep_last says: "
        "the newest checkpoint is read instead"
    ]


@pytest.mark.parametrize("reader", READERS)
def test_a_checkpoint_that_was_named_and_is_removed_is_named(reader, run_dir, monkeypatch):
    prune_before(reader, run_dir, monkeypatch)
    with pytest.raises(ValueError, match=r"^RUN: .*step_00000001 was removed while it was read, as train"):
        load_generator(run_dir / "checkpoints" / "step_00000001", called="RUN")


def test_what_a_generator_says_of_itself_needs_its_checkpoint_no_more(run_dir):
    generator = load_generator(run_dir)
    weights = (generator.checkpoint / "ema" / "diffusion_pytorch_model.safetensors").read_bytes()
    discard(generator.checkpoint)
    assert generator.recipe()["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert generator.images_path is None
