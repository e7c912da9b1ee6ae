"""Batches that are nests of tensors of unequal sizes, and those of before."""

import json

import pytest
import torch
from safetensors.torch import load_file
from unequal_task import Pictures, Unequal, make_unequal

from flashdit.shared.runs import list_checkpoints
from flashdit.training.batches import StepBatches
from flashdit.training.guard import StopSignals
from flashdit.training.task import Task


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (2, 2)])
def test_images_of_unequal_sizes_train_and_each_position_is_taken_once(tmp_path, workers, accumulation):
    run = make_unequal(tmp_path, workers=workers, accumulation=accumulation)
    run.fit()
    assert len(run.task.seen) == 6 * accumulation
    positions = [item["place"][0] for batch in run.task.seen for item in batch["more"][0]]
    assert positions == list(range(24))
    for batch in run.task.seen:
        assert [type(part) for part in batch.values()] == [list, list, tuple]
    images = [image for batch in run.task.seen for image in batch["images"]]
    assert len({image.shape for image in images}) == 6
    assert all(image.equal(Pictures()[n]["image"]) for n, image in enumerate(images))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["images_seen"] for record in records] == [4, 8, 12, 16, 20, 24]
    for record in records:
        assert record["loss"] == pytest.approx(record["loss_bbox"] + record["loss_size"], rel=1e-5)


def test_every_tensor_of_the_nest_is_on_the_device(tmp_path):
    class Seen(Exception):
        pass

    class Looks(Unequal):
        def loss(self, network, batch):
            tensors = [*batch["images"], *(target["boxes"] for target in batch["targets"])]
            tensors += [item["image"] for item in batch["more"][0]]
            assert {tensor.device.type for tensor in tensors} == {"meta"}
            assert batch["more"][0][1]["place"] == (1, 4)
            raise Seen

    run = make_unequal(tmp_path)
    run.task.__class__ = Looks
    run.batches = StepBatches(run._batches(), 1)
    run.meter.start_clock(0)
    run._read()
    run.device = torch.device("meta")
    with StopSignals() as stop, pytest.raises(Seen):
        run._make_step(stop)


def test_a_paused_run_on_nested_batches_ends_as_an_uninterrupted_one(tmp_path):
    make_unequal(tmp_path / "whole").fit()
    make_unequal(tmp_path / "paused", steps=2).fit()
    make_unequal(tmp_path / "paused").fit()
    for part in ("model", "ema"):
        whole, again = (
            load_file(list_checkpoints(tmp_path / name)[-1] / part / "finder.safetensors")
            for name in ("whole", "paused")
        )
        assert whole.keys() == again.keys()
        assert [name for name in whole if not whole[name].equal(again[name])] == []


def test_a_batch_is_torchs_own_unless_a_data_set_makes_it_at_once():
    made = {"x": torch.zeros(2)}
    assert Task.collate(made) is made
    collated = Task.collate([{"x": torch.tensor(1.0)}, {"x": torch.tensor(2.0)}])
    assert collated["x"].tolist() == [1, 2]
    with pytest.raises(RuntimeError, match="equal size"):
        Task.collate([Pictures()[0]["image"], Pictures()[1]["image"]])
