"""One reader of weight files: every format and wrapper gives the same tensors, and no pickle is executed."""

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashdit import FlashDiT
from flashdit.models.weights import start_from
from flashdit.shared.weights import read_content, read_tensors, unwrap

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
RAW = {name: value + 1 for name, value in TENSORS.items()}


def assert_tensors(found, expected=TENSORS):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not found[name].equal(expected[name])] == []


@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        {"model": TENSORS},
        {"state_dict": TENSORS, "epoch": 3},
        {"state_dict": {"model": TENSORS}},
        {"model": RAW, "ema": TENSORS, "opt": {"state": {}}},
        {"state_dict": RAW, "model": TENSORS},
        {f"module._orig_mod.{name}": value for name, value in TENSORS.items()},
        {"ema": {f"_orig_mod.module.{name}": value for name, value in TENSORS.items()}},
        {**TENSORS, "step": 7},
    ],
)
def test_torch_files_give_their_tensors_out_of_any_wrapper(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    assert_tensors(read_tensors(tmp_path / "weights.pt"))
    assert_tensors(unwrap(content))


def test_a_safetensors_file_and_a_folder_of_several_give_all_tensors(tmp_path):
    save_file(TENSORS, tmp_path / "whole.safetensors")
    assert_tensors(read_tensors(str(tmp_path / "whole.safetensors")))
    (tmp_path / "folder").mkdir()
    for number, (name, value) in enumerate(TENSORS.items()):
        save_file({name: value}, tmp_path / "folder" / f"model-0000{number}-of-2.safetensors")
    (tmp_path / "folder" / "config.json").write_text("{}")
    assert_tensors(read_tensors(tmp_path / "folder"))


class Payload:
    """A pickle that touches a file where it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
@pytest.mark.parametrize("forced", ["0", "1"])
def test_no_pickle_is_executed_whatever_the_environment_says(tmp_path, monkeypatch, forced):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    torch.save({"model": TENSORS, "args": Payload(tmp_path / "executed")}, tmp_path / "weights.pt")
    model = FlashDiT(sample_size=8, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    for load in (read_tensors, FlashDiT.from_lightningdit, lambda path: start_from(model, path)):
        with pytest.raises(
            ValueError, match=r"readable torch \(weights_only=True\) file, .*weights\.pt is not"
        ):
            load(tmp_path / "weights.pt")
    assert not (tmp_path / "executed").exists()


class Config:
    """An object such as trainers pickle beside their weights."""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("content", "held"),
    [
        ({"model": TENSORS, "args": argparse.Namespace(lr=1e-4)}, "argparse.Namespace"),
        ({"ema": TENSORS, "hyper": {"paths": [Path("x")]}}, "pathlib.PosixPath"),
        ({"model": TENSORS, "config": Config()}, f"{__name__}.Config"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_a_checkpoint_holds_beside_tensors_is_named_in_one_sentence(tmp_path, content, held):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights_only=True") as raised:
        read_tensors(tmp_path / "weights.pt")
    assert str(raised.value).endswith(
        f"weights.pt is not: it holds {held}, which is code to run; "
        "where you trust it, store its tensors alone in a new file"
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no weights", "it was not written by torch.save"),
        (pickle.dumps({"a": argparse.Namespace()}, protocol=4), "it was not written by torch.save"),
        (b"", r"it is empty \(EOFError\)"),
        (b"PK\x03\x04" + bytes(200), "PytorchStreamReader failed reading zip archive"),
    ],
)
def test_a_file_of_another_kind_has_a_reason_of_one_clause(tmp_path, content, reason):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"weights\.pt is not: {reason}") as raised:
        read_tensors(tmp_path / "weights.pt")
    assert len(str(raised.value)) < 180 + len(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.pt", [1, 2], "weights must be tensors by name, got a list of others in .*list.pt"),
        ("steps.pt", {"step": 3}, "weights must be tensors by name, got a dict of others in .*steps.pt"),
        ("empty.pt", {"model": {}}, "weights must be tensors by name, got a dict of others in .*empty.pt"),
    ],
)
def test_files_without_tensors_are_named(tmp_path, name, content, message):
    torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / name)


def test_missing_and_damaged_files_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"weights must be a file, got .*absent\.pt"):
        read_content(tmp_path / "absent.pt")
    for name, kind in (("a.safetensors", "safetensors"), ("a.pt", "torch")):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(ValueError, match=rf"weights must be a readable {kind} .*{name} is not: "):
            read_content(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"a checkpoint must hold weights, got no .safetensors file in .*empty"
    ):
        read_tensors(tmp_path / "empty")
